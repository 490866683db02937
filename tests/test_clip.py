"""Test the ruler, the captions, the tokens, both encoders, the contrastive loss and its training."""

import json
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpm_nb import clip as module
from ddpm_nb.clip import (
    ATTRIBUTE_NAMES,
    BEGIN,
    MAX_LOG_SCALE,
    PADDING,
    TEMPLATES,
    UNKNOWN,
    WORDS,
    CaptionRule,
    ImageEncoder,
    TextBlock,
    TextEncoder,
    Tokenizer,
    attributes,
    caption_fits,
    check_prompts,
    contrastive_loss,
    fit_caption_rule,
    fit_tokenizer,
    make_clip,
    measure_strokes,
    read_captions,
    recall_at,
    similarities,
    split_words,
    train_clip,
    write_captions,
    zero_shot,
)
from ddpm_nb.data import load_dataset
from ddpm_nb.gaussian import randn, seeded

DIGITS = load_dataset("digits")
IMAGES, LABELS = DIGITS.images(), DIGITS.labels
RULE = fit_caption_rule(IMAGES, LABELS)
KNOWN = attributes(RULE, IMAGES, LABELS)
ALL = torch.tensor(list(product(range(10), range(3), range(3))))
ALL_WITH_SIZE = torch.tensor(list(product(range(10), range(3), range(3), range(2))))
WORDS_OF_ALL = fit_tokenizer([text for k in range(len(TEMPLATES)) for text in write_captions(ALL, template=k)])


def unit(n, dim, seed):
    """Draw n unit vectors of a dimension."""
    return F.normalize(randn((n, dim), generator=seeded(seed)), dim=1)


def block(rows, columns, size=20, top=4, left=4):
    """Draw a filled rectangle (1, 1, size, size)."""
    x = torch.full((1, 1, size, size), -1.0)
    x[..., top : top + rows, left : left + columns] = 1
    return x


# --- the ruler


@pytest.mark.parametrize(("rows", "columns"), [(10, 3), (12, 2), (3, 10), (6, 6)])
def test_a_filled_rectangle_is_measured(rows, columns):
    found = measure_strokes(block(rows, columns))
    outline = 2 * (rows + columns) - (2 - math.sqrt(2))  # one of the four corners is cut by the discrete gradient
    assert abs(float(found.width) - 2 * rows * columns / outline) < 1e-4
    assert abs(float(found.extent) - math.sqrt(rows * columns)) < 1e-5
    assert abs(float(found.slant)) < 1e-6


def test_slant_is_right_for_one_pixel_up():
    x = torch.full((1, 1, 9, 9), -1.0)
    for row in range(9):
        x[0, 0, row, 8 - row] = 1  # from the lower left to the upper right
    assert abs(float(measure_strokes(x).slant) - 1) < 1e-6
    assert abs(float(measure_strokes(x.flip(-1)).slant) + 1) < 1e-6
    assert abs(float(measure_strokes(x.flip(-2)).slant) + 1) < 1e-6


def test_measurements_do_not_see_place_or_colour():
    padded = [F.pad(IMAGES[:50], pad, value=-1.0) for pad in ((2, 2, 2, 2), (4, 0, 1, 3))]
    first, second, colour = (measure_strokes(x) for x in (*padded, padded[0].expand(-1, 3, -1, -1)))
    for name in ("width", "slant", "extent"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(getattr(first, name), getattr(colour, name), rtol=1e-4, atol=1e-4)


def test_faint_noise_on_empty_paper_is_no_ink():
    x = F.pad(block(10, 3), (10, 10, 10, 10), value=-1.0)
    noisy = (x + 0.1 * randn(x.shape, generator=seeded(0)) * (x < 0)).clamp(-1, 1)
    assert abs(float(measure_strokes(noisy).slant)) < 0.01
    assert abs(float(measure_strokes(noisy).width - measure_strokes(x).width)) < 0.1


def test_an_empty_image_has_finite_measurements():
    found = measure_strokes(torch.full((2, 1, 8, 8), -1.0))
    assert found.width.tolist() == found.slant.tolist() == found.extent.tolist() == [0.0, 0.0]
    assert len(measure_strokes(torch.zeros(0, 1, 8, 8)).width) == 0
    with pytest.raises(ValueError, match=r"images must be scaled to \[-1, 1\]"):
        measure_strokes(torch.full((1, 1, 8, 8), 2.0))


# --- the rule


def test_limits_are_quantiles_of_each_digit():
    for digit in range(10):
        counts = KNOWN[digit == LABELS][:, 1:]
        for column in range(2):
            shares = counts[:, column].bincount(minlength=3) / len(counts)
            assert (shares - torch.tensor([0.3, 0.4, 0.3])).abs().max() < 0.03
    narrow = attributes(fit_caption_rule(IMAGES, LABELS, tail=0.1), IMAGES, LABELS)
    assert abs(float((narrow[:, 1] == 2).float().mean()) - 0.1) < 0.02
    assert torch.equal(KNOWN[:, 0], LABELS) and KNOWN.dtype == torch.int64


def test_words_rise_with_the_measurement():
    strokes = measure_strokes(IMAGES)
    for column, value in ((1, strokes.width), (2, strokes.slant)):
        for digit in range(10):
            order = KNOWN[digit == LABELS][value[digit == LABELS].argsort(), column]
            assert bool((order.diff() >= 0).all())


def test_size_is_a_fourth_column():
    rule = fit_caption_rule(IMAGES, LABELS, with_size=True)
    found = attributes(rule, IMAGES, LABELS)
    assert attributes(rule, IMAGES, LABELS.to(torch.uint8)).equal(found)  # whole numbers of any type
    assert found.shape == (len(IMAGES), 4) and torch.equal(found[:, :3], KNOWN)
    assert abs(float(found[:, 3].float().mean()) - 0.5) < 0.03
    assert CaptionRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert CaptionRule.from_dict(json.loads(json.dumps(RULE.to_dict()))) == RULE


def test_rule_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="images must have 8 pixels a side, as the rule; got 10"):
        attributes(RULE, F.pad(IMAGES[:2], (1, 1, 1, 1)), LABELS[:2])
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9; got values from 0 to 10"):
        attributes(RULE, IMAGES[:2], torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="labels must hold 2 whole numbers"):
        attributes(RULE, IMAGES[:2], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="images must be square"):
        fit_caption_rule(IMAGES[..., :7], LABELS)
    with pytest.raises(ValueError, match="labels must hold each digit at least 3 times; 4 occurs 0 times"):
        fit_caption_rule(IMAGES[LABELS != 4], LABELS[LABELS != 4])
    with pytest.raises(ValueError, match="tail must be"):
        fit_caption_rule(IMAGES, LABELS, tail=0.5)


# --- sentences


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
@pytest.mark.parametrize("rows", [ALL, ALL_WITH_SIZE], ids=["three", "four"])
def test_sentences_say_what_their_template_names(template, rows):
    said = read_captions(texts := write_captions(rows, template=template))
    for i, name in enumerate(ATTRIBUTE_NAMES):
        if "{" + name + "}" in TEMPLATES[template] and i < rows.shape[1]:
            assert torch.equal(said[:, i], rows[:, i])
        else:
            assert bool((said[:, i] == -1).all())
    for text in texts:
        assert "{" not in text and "  " not in text and ", ," not in text and text == text.strip()
        assert " an " not in f" {text} " or "an eight" in text or "an upright" in text
        assert "a eight" not in text and "a upright" not in text
    assert len(set(texts)) == len(said.unique(dim=0))


def test_sentences_follow_their_generator():
    state = torch.get_rng_state()
    first, second = (write_captions(KNOWN, generator=seeded(5)) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert first != write_captions(KNOWN, generator=seeded(6))
    assert len({len(split_words(text)) for text in first}) > 3  # many templates
    assert write_captions(KNOWN[:0]) == []


def test_fits_are_sentences_without_a_wrong_word():
    captions = [*write_captions(ALL_WITH_SIZE[::7], generator=seeded(0)), "strokes", "a large eight", "an upright"]
    fits = caption_fits(captions, ALL_WITH_SIZE)
    for i, caption in enumerate(captions):
        for j, row in enumerate(ALL_WITH_SIZE.tolist()):
            own = {WORDS[name][value].split()[-1] for name, value in zip(ATTRIBUTE_NAMES, row, strict=True)}
            known = {phrase.split()[-1] for phrases in WORDS.values() for phrase in phrases}
            assert bool(fits[i, j]) == (set(split_words(caption)) & known <= own)
    assert bool(caption_fits(["a large eight"], torch.tensor([[8, 0, 0]])).all())  # where size is not known, it is not wrong


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3), r"attributes must be whole numbers of shape \(N, 3\) or \(N, 4\); got torch.float32 \(2, 3\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"got torch.int64 \(2, 2\)"),
        ([[1, 2, 3]], "got list"),
        (torch.tensor([[0, 3, 0]]), r"attributes must have weight in 0\.\.2; got values from 3 to 3"),
        (torch.tensor([[0, 0, 0, 2]]), r"attributes must have size in 0\.\.1"),
        (torch.tensor([[-1, 0, 0]]), r"attributes must have digit in 0\.\.9"),
    ],
)
def test_bad_attributes_are_refused(bad, message):
    for use in (write_captions, lambda rows: caption_fits(["a seven"], rows)):
        with pytest.raises(ValueError, match=message):
            use(bad)
    with pytest.raises(ValueError, match=r"template must be in 0\.\.9; got 10"):
        write_captions(KNOWN[:1], template=10)


# --- tokens


def test_tokens_and_words_are_inverse():
    texts = write_captions(ALL, generator=seeded(2))
    tokens = WORDS_OF_ALL.encode(texts)
    assert tokens.dtype == torch.int64 and tokens.shape == (90, WORDS_OF_ALL.length)
    assert WORDS_OF_ALL.decode(tokens) == [" ".join(split_words(text)) for text in texts]
    assert bool((tokens[:, 0] == BEGIN).all()) and UNKNOWN not in tokens and int(tokens.max()) < len(WORDS_OF_ALL)
    counts = torch.tensor([len(split_words(text)) for text in texts])
    assert torch.equal((tokens != PADDING).sum(1), counts + 1)
    assert WORDS_OF_ALL.encode([]).shape == (0, WORDS_OF_ALL.length)


def test_tokenizer_is_plain_and_does_not_depend_on_order():
    again = Tokenizer.from_dict(json.loads(json.dumps(WORDS_OF_ALL.to_dict())))
    assert again == WORDS_OF_ALL and again.encode(["a Seven!"]).tolist() == WORDS_OF_ALL.encode(["a seven"]).tolist()
    assert fit_tokenizer(["b a", "c"]) == fit_tokenizer(["c", "a b a"])
    assert len({PADDING, UNKNOWN, BEGIN}) == 3 and len(fit_tokenizer(["b a"])) == 5
    assert fit_tokenizer(["a b"]).encode(["b x a"]).tolist() == [[BEGIN, 4, UNKNOWN, 3, 0, 0, 0, 0, 0, 0]]
    assert WORDS_OF_ALL.unknown_words("a crooked seven, crooked") == ["crooked", "crooked"]
    assert WORDS_OF_ALL.decode(torch.tensor([[BEGIN, UNKNOWN, PADDING]])) == ["<unknown>"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompts must be texts with at least one word; got \[''\]"),
        ([], r"prompts must be texts with at least one word; got \[\]"),
        (["a seven", " .,"], "at least one word"),
        ([None], "at least one word"),
        ("a sevn", "prompts hold unknown words: 'sevn' \\(nearest: seven.*; known are a, "),
        (["a blod uprigt one", "a xyz"], "'blod' \\(nearest: bold\\); 'uprigt' \\(nearest: upright.*'xyz' \\(nearest: none\\)"),
        ("a large seven", "'large'"),
        ("a " * 10, "captions must have at most 9 words; got 10 in"),
    ],
)
def test_prompts_are_refused_by_name(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, WORDS_OF_ALL)


def test_good_prompts_pass():
    assert check_prompts("A bold SEVEN", WORDS_OF_ALL) == ["A bold SEVEN"]
    assert check_prompts(("a one", "a two"), WORDS_OF_ALL) == ["a one", "a two"]
    with pytest.raises(TypeError, match="captions must be a list of texts; got one text"):
        WORDS_OF_ALL.encode("a seven")


# --- encoders


def test_block_agrees_with_torch():
    torch.manual_seed(0)
    own, theirs = TextBlock(16, 4), nn.TransformerEncoderLayer(16, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
    pairs = {"self_attn.in_proj_": own.qkv, "self_attn.out_proj.": own.out, "linear1.": own.mlp[0], "linear2.": own.mlp[2]}
    pairs |= {"norm1.": own.norm_1, "norm2.": own.norm_2}
    theirs.load_state_dict({name + kind: getattr(layer, kind) for name, layer in pairs.items() for kind in ("weight", "bias")})
    x, hidden = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    hidden[0, 3:] = hidden[1, 1:] = True
    torch.testing.assert_close(own(x, ~hidden[:, None, None]), theirs(x, src_key_padding_mask=hidden), rtol=1e-4, atol=1e-5)


def test_padding_is_not_heard_and_order_is():
    torch.manual_seed(0)
    encoder = TextEncoder(len(WORDS_OF_ALL), 10).eval()
    tokens = WORDS_OF_ALL.encode(["a bold seven", "", "a seven bold"])
    before = encoder(tokens).detach()
    with torch.no_grad():
        encoder.words.weight[PADDING] += 100
    after = encoder(tokens).detach()
    torch.testing.assert_close(before[:, 0], after[:, 0])
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert (before[0, 0] - before[2, 0]).abs().max() > 1e-4
    assert before.isfinite().all()


def test_sentence_sees_its_last_word():
    encoder = TextEncoder(len(WORDS_OF_ALL), 10).eval()
    left, right = encoder(WORDS_OF_ALL.encode(["a seven leaning left", "a seven leaning right"]))[:, 0]
    assert (left - right).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[2, 3]]), r"tokens must be whole numbers of shape \(B, 3\); got torch.int64 \(1, 2\)"),
        (torch.tensor([[2.0, 3, 0]]), "got torch.float32"),
        (torch.tensor([[2, 6, 0]]), r"tokens must be in 0\.\.5; got values from 0 to 6"),
        (torch.tensor([[3, 2, 0]]), "tokens must begin with 2 in every row"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(6, 3, dim=8)(tokens)


@pytest.mark.parametrize(("size", "channels_in"), [(8, 1), (28, 1), (9, 3), (4, 1)])
def test_clip_is_rebuilt_from_its_config(size, channels_in):
    torch.manual_seed(0)
    text = {"n_words": 9, "length": 5, "dim": 24, "n_layers": 1, "n_heads": 3}
    clip = make_clip({"image_size": size, "in_channels": channels_in, "channels": 8, "dim": 12}, text, 16).eval()
    again = make_clip(**json.loads(json.dumps(clip.config))).eval()
    again.load_state_dict(clip.state_dict())
    x, tokens = torch.randn(3, channels_in, size, size).clamp(-1, 1), torch.tensor([[2, 3, 4, 0, 0], [2, 8, 0, 0, 0], [2, 0, 0, 0, 0]])
    for use, given in (("encode_images", x), ("encode_texts", tokens)):
        vectors = getattr(clip, use)(given)
        assert torch.equal(vectors, getattr(again, use)(given)) and vectors.shape == (3, 16)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert clip.text_encoder(tokens).shape == (3, 5, 24) and abs(clip.log_scale.exp().item() - 1 / 0.07) < 1e-4


def test_encoders_refuse_bad_settings():
    with pytest.raises(ValueError, match="n_heads must divide dim, 10; got 4"):
        TextEncoder(5, 3, dim=10)
    with pytest.raises(ValueError, match="image_size must be at least 4; got 3"):
        ImageEncoder(3)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 8, 8\); got \(2, 1, 7, 8\)"):
        ImageEncoder(8)(torch.zeros(2, 1, 7, 8))


# --- the loss


def test_loss_is_two_searches():
    u, v, s = unit(6, 4, 0), unit(6, 4, 1), torch.tensor(1.5)
    total = 0.0
    for i in range(6):
        for a, b in ((u, v), (v, u)):
            weights = [math.exp(math.exp(1.5) * float(a[i] @ b[j])) for j in range(6)]
            total -= math.log(weights[i] / sum(weights)) / 12
    assert abs(float(contrastive_loss(u, v, s)) - total) < 1e-5
    assert abs(float(contrastive_loss(v, u, s)) - total) < 1e-5
    order = torch.randperm(6, generator=seeded(0))
    torch.testing.assert_close(contrastive_loss(u[order], v[order], s), contrastive_loss(u, v, s))
    assert contrastive_loss(u, v.roll(1, 0), s) != contrastive_loss(u, v, s)


def test_fits_take_the_sentence_along_rows():
    u, v, s = unit(4, 8, 2), unit(4, 8, 3), torch.tensor(2.0)
    fits = torch.eye(4, dtype=torch.bool)
    fits[0, 2] = True  # sentence 0 is also true of image 2, but sentence 2 is not true of image 0
    z = s.exp() * v @ u.T
    texts = [z[0, [0, 1, 3]].logsumexp(0) - z[0, 0], *(z[i].logsumexp(0) - z[i, i] for i in (1, 2, 3))]
    images = [*(z[:, i].logsumexp(0) - z[i, i] for i in (0, 1, 3)), z[[1, 2, 3], 2].logsumexp(0) - z[2, 2]]
    torch.testing.assert_close(contrastive_loss(u, v, s, fits=fits), torch.stack(texts + images).sum() / 8)


def test_equal_pairs_have_a_floor_only_without_fits():
    v = unit(5, 8, 4).repeat_interleave(3, 0)  # each pair occurs three times
    fits = torch.eye(5, dtype=torch.bool).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert abs(float(contrastive_loss(v, v, torch.tensor(MAX_LOG_SCALE))) - math.log(3)) < 1e-3
    assert contrastive_loss(v, v, torch.tensor(MAX_LOG_SCALE), fits=fits) < 1e-3


def test_a_row_without_negatives_has_no_gradient():
    u = unit(3, 4, 5).requires_grad_()
    loss = contrastive_loss(u, unit(3, 4, 6), torch.tensor(1.0), fits=torch.ones(3, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and u.grad.abs().max() == 0


def test_loss_refuses_what_is_no_pair():
    u = unit(4, 8, 0)
    with pytest.raises(ValueError, match=r"must have one shape \(B, D\) with B at least 2; got \(4, 8\), \(3, 8\)"):
        contrastive_loss(u, u[:3], torch.tensor(0.0))
    with pytest.raises(ValueError, match="B at least 2"):
        contrastive_loss(u[:1], u[:1], torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"fits must be bool of shape \(4, 4\)"):
        contrastive_loss(u, u, torch.tensor(0.0), fits=torch.ones(4, 4))


# --- training and use


@pytest.fixture(scope="module")
def trained():
    """Train for a few steps on digits."""
    losses = []
    options = {"n_iterations": 60, "batch_size": 96, "channels": 16, "n_layers": 1}
    clip = train_clip(IMAGES, KNOWN, WORDS_OF_ALL, callback=lambda c, i, loss: losses.append(loss), **options)
    return clip, losses


def test_training_learns_digits(trained):
    clip, losses = trained
    assert len(losses) == 60 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    test = load_dataset("digits", split="test")
    prompts = write_captions(torch.tensor([[d, 1, 1] for d in range(10)]), template=TEMPLATES.index("a {digit}"))
    assert (zero_shot(clip, WORDS_OF_ALL, test.images(), prompts) == test.labels).float().mean() > 0.8
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())


def test_training_follows_its_seed_and_leaves_the_global_stream():
    options = {"n_iterations": 2, "batch_size": 8, "channels": 8, "n_layers": 1, "dim": 16}
    state = torch.get_rng_state()
    first, second, other = (train_clip(IMAGES[:40], KNOWN[:40], WORDS_OF_ALL, seed=s, **options) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.image_head.weight, other.image_head.weight)


def test_factor_stays_in_its_range_and_does_not_decay():
    clip = make_clip({"image_size": 8, "channels": 8}, {"n_words": 5, "length": 3})
    for start, end in ((9.0, MAX_LOG_SCALE), (-3.0, 0.0)):
        clip.log_scale.data.fill_(start)
        module._descend(clip, torch.optim.SGD(clip.parameters(), 0.0), clip.log_scale * 1.0)
        assert abs(clip.log_scale.item() - end) < 1e-6
    matrices, others = module._decay_groups(clip)
    assert others["weight_decay"] == 0 < matrices["weight_decay"]
    assert any(p is clip.log_scale for p in others["params"]) and not any(p is clip.log_scale for p in matrices["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(clip.parameters()))


def test_mask_is_what_train_clip_says(monkeypatch):
    given = []
    monkeypatch.setattr(module, "contrastive_loss", lambda u, v, s, fits: given.append(fits) or contrastive_loss(u, v, s, fits=fits))
    options = {"n_iterations": 1, "batch_size": 16, "channels": 8, "n_layers": 1, "dim": 16}
    for mask in (True, False):
        train_clip(IMAGES, KNOWN, WORDS_OF_ALL, mask=mask, **options)
    assert given[1] is None and given[0].shape == (16, 16) and bool(given[0].diag().all())


def test_training_refuses_bad_arguments():
    for bad, message in (
        ({"images": IMAGES[:3]}, r"images must be square and as many as attributes, 1500; got \(3, 1, 8, 8\)"),
        ({"n_iterations": 0}, "n_iterations must be at least 1; got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2; got 1"),
        ({"lr": 0.0}, "lr must be"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            train_clip(**{"images": IMAGES, "attributes": KNOWN, "tokenizer": WORDS_OF_ALL} | bad)


def test_similarities_do_not_depend_on_the_batch(trained):
    prompts = ["a seven", "a bold one", "an upright two"]
    whole = similarities(trained[0], WORDS_OF_ALL, IMAGES[:50], prompts)
    parts = similarities(trained[0], WORDS_OF_ALL, IMAGES[:50], prompts, batch_size=7)
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (50, 3) and whole.abs().max() <= 1 + 1e-5 and not whole.requires_grad
    stretched = IMAGES[:50] + 0.5 * IMAGES[:50].sign() * (IMAGES[:50].abs() == 1)  # sticks out where the image is black or white
    torch.testing.assert_close(whole, similarities(trained[0], WORDS_OF_ALL, stretched, prompts))
    assert torch.equal(zero_shot(trained[0], WORDS_OF_ALL, IMAGES[:50], prompts), whole.argmax(1))
    with pytest.raises(ValueError, match="unknown words"):
        similarities(trained[0], WORDS_OF_ALL, IMAGES[:2], ["a cat"])


def test_recall_counts_queries_with_an_answer():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [3, 2, 1]])
    fits = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert [round(recall_at(scores, fits, k), 4) for k in (1, 2, 3)] == [0.3333, 0.6667, 1.0]
    with pytest.raises(ValueError, match="fits must have a right candidate"):
        recall_at(scores, fits & False, 1)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3; got 4"):
        recall_at(scores, fits, 4)
    with pytest.raises(ValueError, match=r"fits must be bool of the shape of scores, \(4, 3\)"):
        recall_at(scores, fits.T, 1)
