"""Captions: measured strokes, the rule, sentences, what is true of what, tokens and prompts."""

import json
import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from conftest import refuses
from ddpm_nb.captions import (
    ATTRIBUTE_NAMES,
    BEGIN,
    MARKS,
    PADDING,
    TEMPLATES,
    UNKNOWN,
    WORDS,
    CaptionRule,
    Tokenizer,
    attributes,
    caption_fits,
    check_prompts,
    fit_caption_rule,
    fit_tokenizer,
    measure_strokes,
    read_captions,
    split_words,
    write_captions,
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


def block(rows, columns, size=20, top=4, left=4):
    """Draw a filled rectangle (1, 1, size, size)."""
    x = torch.full((1, 1, size, size), -1.0)
    x[..., top : top + rows, left : left + columns] = 1
    return x


# --- the measurements


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


def test_a_limit_belongs_to_the_word_below_it():
    """The rule keeps the widest thin stroke, so that width itself is thin."""
    strokes = measure_strokes(IMAGES[:1])
    width, slant = strokes.width.item(), strokes.slant.item()
    rule = CaptionRule(8, ((width, width + 1),) * 10, ((slant - 1, slant),) * 10)
    assert attributes(rule, IMAGES[:1], LABELS[:1])[0, 1:].tolist() == [0, 1]


def test_size_is_a_fourth_column():
    rule = fit_caption_rule(IMAGES, LABELS, with_size=True)
    found = attributes(rule, IMAGES, LABELS)
    assert attributes(rule, IMAGES, LABELS.to(torch.uint8)).equal(found)  # whole numbers of any type
    assert found.shape == (len(IMAGES), 4) and torch.equal(found[:, :3], KNOWN)
    assert abs(float(found[:, 3].float().mean()) - 0.5) < 0.03
    assert CaptionRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert CaptionRule.from_dict(json.loads(json.dumps(RULE.to_dict()))) == RULE


def test_rule_refuses_what_does_not_fit():
    few = LABELS != 4
    for call, words in (
        (lambda: measure_strokes(torch.full((1, 1, 8, 8), 2.0)), "images must be scaled to [-1, 1]"),
        (lambda: attributes(RULE, F.pad(IMAGES[:2], (1, 1, 1, 1)), LABELS[:2]), "images must have 8 pixels a side, as the rule; got 10"),
        (lambda: attributes(RULE, IMAGES[:2], torch.tensor([0, 10])), "labels must be (2,) whole numbers in 0..9; got [0, 10] of torch.int64"),
        (lambda: attributes(RULE, IMAGES[:2], torch.tensor([0.0, 1.0])), "labels must be (2,) whole numbers in 0..9; got [0.0, 1.0] of torch.float32"),
        (lambda: attributes(RULE, IMAGES[:2], [0, 1]), "labels must be (2,) whole numbers in 0..9; got list"),
        (lambda: fit_caption_rule(IMAGES[..., :7], LABELS), "images must be square"),
        (lambda: fit_caption_rule(IMAGES[few], LABELS[few]), "labels must hold each digit at least 3 times; 4 occurs 0 times"),
        (lambda: fit_caption_rule(IMAGES, LABELS, tail=0.5), "tail must be"),
    ):
        refuses(call, words)


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
    for tokens, told in ((torch.tensor([[-1]]), "-1 to -1"), (torch.tensor([[999]]), "999 to 999"), (torch.ones(1, 2), "torch.float32"), ([[3]], "got list")):
        with pytest.raises((TypeError, ValueError), match=rf"tokens must be whole numbers in 0..{len(WORDS_OF_ALL) - 1}.*{told}"):
            WORDS_OF_ALL.decode(tokens)
    assert len(MARKS) == 3 and MARKS[BEGIN] == "<begin>"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", "prompts must be texts with at least one word; got ['']"),
        ([], "prompts must be texts with at least one word; got []"),
        (["a seven", " .,"], "at least one word"),
        ([None], "at least one word"),
        (["a seven", 7], "at least one word; got ['a seven', 7]"),
        ("a sevn", "prompts hold unknown words: 'sevn' (nearest: seven"),
        (["a blod uprigt one", "a xyz"], "'blod' (nearest: bold); 'uprigt' (nearest: upright"),
        (["a blod uprigt one", "a xyz"], "'xyz' (nearest: none); known are a, "),
        ("a large seven", "'large'"),
        ("a " * 10, "captions must have at most 9 words; got 10 in"),
        ("a thin bold seven", "must not contradict itself; got 'a thin bold seven': it says thin and bold"),
        (["a one", "a one and two"], "got 'a one and two': it says one and two"),
        ("a seven leaning left, upright", "it says left and upright"),
        ("a seven leaning right leaning left", "it says right and left"),
    ],
)
def test_prompts_are_refused_by_name(prompts, words):
    refuses(lambda: check_prompts(prompts, WORDS_OF_ALL), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी", ["हिन्दी"]),  # vowel signs stay with their letters
        ("เด็กที่นี่", ["เด็กที่นี่"]),
        ("Re\u0301sume\u0301, naïve", ["résumé", "naïve"]),  # decomposed or not, one word
        ("snake_case 3 don't", ["snake_case", "3", "don", "t"]),
        ("I ❤\ufe0f dogs \u0301", ["i", "dogs"]),  # a mark without a letter is no word
    ],
)
def test_words_of_many_scripts(text, words):
    assert split_words(text) == words


def test_own_captions_are_not_judged_by_the_rule_of_the_digits():
    own = fit_tokenizer(["one cat and two dogs"])
    assert check_prompts("one cat and two dogs", own) == ["one cat and two dogs"]


def test_a_text_alone_is_not_read_letter_by_letter():
    for use in (fit_tokenizer, read_captions, lambda text: caption_fits(text, ALL)):
        refuses(lambda use=use: use("a seven"), "captions must be a list of texts; got one text", error=TypeError)


@pytest.mark.parametrize("prompts", [5, None, b"a seven", {"a": "seven"}, torch.zeros(3), {"a seven"}])
def test_what_is_no_text_gets_a_sentence(prompts):
    words = ("prompts must be a text or a list of texts; got", f"of type {type(prompts).__name__}")
    refuses(lambda: check_prompts(prompts, WORDS_OF_ALL), *words, error=TypeError)


def test_good_prompts_pass():
    assert check_prompts("A bold SEVEN", WORDS_OF_ALL) == ["A bold SEVEN"]
    assert check_prompts(("a one", "a two"), WORDS_OF_ALL) == ["a one", "a two"]
    assert check_prompts("bold bold seven", WORDS_OF_ALL) == ["bold bold seven"]  # twice is no contradiction
    refuses(lambda: WORDS_OF_ALL.encode("a seven"), "captions must be a list of texts; got one text", error=TypeError)


def test_a_contradiction_is_true_of_nothing_and_read_by_nobody():
    for use in (lambda: read_captions(["a thin bold seven"]), lambda: caption_fits(["a zero nine"], ALL)):
        refuses(use, "a sentence must not contradict itself")
    for k in range(len(TEMPLATES)):
        check_prompts(write_captions(ALL, template=k), WORDS_OF_ALL)  # no sentence of ours does
