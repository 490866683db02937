"""From a sentence to a picture: the parts fit, the order is kept, the walk is chapter 10's, and bad orders are refused."""

import inspect
import json
import math
import shutil

import pytest
import torch

from conftest import refuses
from ddpm_nb.captions import TEMPLATES, WORDS, CaptionRule, fit_tokenizer, write_captions
from ddpm_nb.clip import TextEncoder
from ddpm_nb.conditioning import TextUNet, encode_words, guided, score_attributes
from ddpm_nb.evaluation import load_classifier
from ddpm_nb.files import CONFIG_FILE, PACKAGE, WEIGHTS_FILE, checksum
from ddpm_nb.forward import q_sample
from ddpm_nb.gaussian import seeded
from ddpm_nb.latent import Autoencoder, from_latents, to_latents
from ddpm_nb.pipeline import MAX_GUIDANCE, PIPELINES, TextToImage
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule

A, B = "a bold seven leaning right", "a thin zero leaning left"
ROWS = torch.cartesian_prod(torch.arange(10), torch.arange(3), torch.arange(3))
TOKENIZER = fit_tokenizer([text for k in range(len(TEMPLATES)) for text in write_captions(ROWS, template=k)])


def lively(module, seed):
    """Give all weights, also those that begin at zero, a random value."""
    g = seeded(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            scale = 0.1 if tensor.ndim < 2 else 2 * tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=g) * scale + ("norm" in name and tensor.ndim < 2))
    return module.eval().requires_grad_(False)


def make_parts(pixels=False):
    """Build small parts that fit together."""
    text_encoder = lively(TextEncoder(len(TOKENIZER), TOKENIZER.length, dim=8, n_layers=1, n_heads=2), 0)
    shape = (8, 1) if pixels else (4, 2)
    unet = lively(TextUNet(*shape, 8, base_channels=8, channel_mults=(1,), attn_resolutions=(4, 8), n_heads=2, norm_groups=2), 1)
    autoencoder = None if pixels else lively(Autoencoder(8, latent_channels=2, base_channels=4, n_downs=1), 2)
    if autoencoder is not None:
        autoencoder.latent_mean.fill_(0.3), autoencoder.latent_std.fill_(1.7)
    return {"text_encoder": text_encoder, "unet": unet, "autoencoder": autoencoder}


@pytest.fixture(scope="module", params=["latents", "pixels"])
def pipeline(request):
    """Return an untrained pipeline of each kind."""
    schedule = make_schedule("linear", 100)  # whose first prediction of an untrained network is not all clipped
    return TextToImage(TOKENIZER, schedule=schedule, **make_parts(request.param == "pixels"))


def order(**options):
    """Return the options of a short walk with its own generator."""
    return {"n_steps": 5, "generator": seeded(3)} | options


def by_hand(pipeline, texts, guidance, **options):
    """Draw with the sampler of chapter 10 and decode."""
    context, null = encode_words(pipeline.text_encoder, pipeline.tokenizer.encode(texts))
    side, pixels = pipeline.unet.config["image_size"], pipeline.autoencoder is None
    shape = (len(texts), pipeline.unet.config["in_channels"], side, side)
    z = sample_ddim(guided(pipeline.unet, context, null, guidance), pipeline.schedule, shape, clip_x_0=pixels, **options)
    return z if pixels else from_latents(pipeline.autoencoder, z)


# the walk


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (3.0, 0.0), (4.0, 1.0)])
def test_text_alone_is_the_sampler_of_chapter_10(pipeline, guidance, eta):
    pictures = pipeline.generate([A, B], n=2, guidance=guidance, **order(eta=eta))
    assert pictures.shape == (4, 1, 8, 8) and pictures.abs().max() <= 1
    torch.testing.assert_close(pictures, by_hand(pipeline, [A, A, B, B], guidance, **order(eta=eta)))


def test_sentences_guidance_and_seeds_matter(pipeline):
    first = pipeline.generate(A, n=3, **order())
    assert torch.equal(first, pipeline.generate([A], n=3, guidance=2.0, **order()))
    for other in ({"prompt": B}, {"guidance": 1.0}, {"generator": seeded(4)}):
        changed = pipeline.generate(**({"prompt": A, "n": 3} | order() | other))
        assert (changed - first).abs().amax((1, 2, 3)).min() > 1e-4


def test_no_prompt_is_the_empty_sentence_whatever_the_guidance(pipeline):
    pictures = pipeline.generate(n=3, **order())
    torch.testing.assert_close(pictures, by_hand(pipeline, [A] * 3, 0.0, **order(eta=1.0)))
    torch.testing.assert_close(pictures, pipeline.generate(None, 3, 9.0, **order()))
    torch.testing.assert_close(pictures, pipeline.generate(A, 3, 0.0, **order()))


def test_generating_leaves_torch_alone(pipeline):
    state = torch.get_rng_state()
    pictures = pipeline.generate(A, **order())
    assert torch.equal(state, torch.get_rng_state()) and not pictures.requires_grad
    (pictures.requires_grad_() ** 2).sum().backward()  # not an inference tensor


# a picture to begin with


@pytest.mark.parametrize(("strength", "n_calls"), [(1.0, 10), (0.5, 5), (0.31, 3), (0.01, 1)])
def test_strength_is_the_share_of_the_chain(pipeline, strength, n_calls):
    seen = []
    image = torch.rand(1, 1, 8, 8, generator=seeded(0)) * 2 - 1
    pipeline.generate(A, image=image, strength=strength, n_steps=10, generator=seeded(0), callback=lambda t, *_: seen.append(t))
    whole = torch.linspace(99, 0, 10, dtype=torch.float64).round().int().tolist()
    assert seen == whole[10 - n_calls :]


def test_a_picture_is_noised_to_the_first_kept_step(pipeline):
    image, seen = torch.rand(2, 1, 8, 8, generator=seeded(0)) * 2 - 1, []
    original, pipeline.unet.forward = pipeline.unet.forward, lambda x, t, c: seen.append((x, t)) or original(x, t, c)
    try:
        pipeline.generate(A, n=2, guidance=1.0, image=image, strength=0.4, **order())
    finally:
        del pipeline.unet.forward
    clean = image if pipeline.autoencoder is None else to_latents(pipeline.autoencoder, image)
    x, t = seen[0]
    eps = torch.randn(clean.shape, generator=seeded(3))
    torch.testing.assert_close(x, q_sample(pipeline.schedule, clean, t, eps))
    assert t.tolist() == [25, 25]  # kept are 99, 74, 50, 25, 0, and two of five are walked


def test_one_picture_serves_all_sentences(pipeline):
    image = torch.rand(1, 1, 8, 8, generator=seeded(0)) * 2 - 1
    one = pipeline.generate([A, B], image=image, **order())
    assert torch.equal(one, pipeline.generate([A, B], image=image.expand(2, 1, 8, 8), **order()))


# what to keep away from, holes, mixtures


def test_a_negative_prompt_takes_the_place_of_the_empty_sentence(pipeline):
    words, _ = pipeline.encode_text([A, B])
    for negative, asked in ((B, [B, B]), ([B, A], [B, A])):
        null, _ = pipeline.encode_text(asked)
        side, pixels = pipeline.unet.config["image_size"], pipeline.autoencoder is None
        shape = (2, pipeline.unet.config["in_channels"], side, side)
        z = sample_ddim(guided(pipeline.unet, words, null, 3.0), pipeline.schedule, shape, clip_x_0=pixels, **order(eta=1.0))
        drawn = pipeline.generate([A, B], guidance=3.0, negative=negative, **order())
        torch.testing.assert_close(drawn, pipeline.decode(z))
    same = pipeline.generate(A, negative=A, guidance=9.0, **order())
    torch.testing.assert_close(same, pipeline.generate(A, guidance=1.0, **order()), atol=1e-4, rtol=0)
    pushed = pipeline.generate(negative=A, guidance=3.0, **order(eta=0.0))  # with noise an untrained network's pixels are all clipped
    assert (pushed - pipeline.generate(**order(eta=0.0))).abs().max() > 1e-4


def test_a_hole_is_drawn_and_the_rest_stays(pipeline):
    image = torch.rand(1, 1, 8, 8, generator=seeded(0)) * 2 - 1
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:, 2:] = False
    drawn = pipeline.generate([A, B], image=image, mask=mask, **order())
    where = mask.expand_as(drawn)
    assert torch.equal(drawn[where], image.expand_as(drawn)[where])
    assert (drawn - image).abs()[~where].max() > 1e-3
    under = torch.where(mask, image, -image)  # what lies under the hole does not matter
    torch.testing.assert_close(pipeline.generate([A, B], image=under, mask=mask, **order()), drawn)
    other = torch.where(mask, -image, image)  # what is known does; with noise an untrained network's pixels are all clipped
    plain = [pipeline.generate([A, B], image=x, mask=mask, **order(eta=0.0)) for x in (image, other)]
    assert (plain[1] - plain[0]).abs()[~where].max() > 1e-3
    if pipeline.autoencoder is not None:
        few = torch.zeros_like(mask)
        few[..., 0, 0] = True  # no latent is known whole
        little = pipeline.generate(A, image=image, mask=few, **order())
        alone = pipeline.generate(A, image=image[..., :1, :1].expand_as(image), strength=1.0, **order())
        torch.testing.assert_close(little[~few], alone[~few])  # an image of the mean of what is known


def test_a_mask_that_keeps_all_or_nothing_is_refused(pipeline):
    image = torch.zeros(2, 1, 8, 8)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, 4:] = False  # the other keeps all
    for one in (mask, mask[1:]):
        refuses(lambda one=one: pipeline.generate([A, B], image=image, mask=one), "mask must be False in some place, where it is drawn anew")
        refuses(lambda one=one: pipeline.generate([A, B], image=image, mask=~one), "mask must be True in some place, where the image stays")


def test_known_latents_carry_the_noise_of_their_step(pipeline):
    image, seen = torch.rand(1, 1, 8, 8, generator=seeded(0)) * 2 - 1, []
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :3, :] = False  # a row of latents is half known, and so is drawn
    pipeline.generate(A, image=image, mask=mask, callback=lambda t, z, _: seen.append((t, z)), **order())
    known = slice(3, None) if pipeline.autoencoder is None else slice(2, None)
    filled = torch.where(mask, image, image[mask].mean())
    z_0, eps = pipeline.encode(filled), torch.randn(seen[0][1].shape, generator=seeded(3))
    for i, (_, z) in enumerate(seen):
        t_prev = seen[i + 1][0] if i + 1 < len(seen) else None
        held = z_0 if t_prev is None else q_sample(pipeline.schedule, z_0, t_prev, eps)
        torch.testing.assert_close(z[..., known, :], held[..., known, :])


def test_interpolation_ends_in_its_sentences(pipeline):
    between = pipeline.interpolate(A, B, n=3, guidance=2.0, **order())
    for at, text in ((0, A), (2, B)):
        end = pipeline.generate(text, guidance=2.0, **order(eta=0.0))  # between them no step adds noise
        torch.testing.assert_close(between[at : at + 1], end)
    assert all((between[i] - between[i + 1]).abs().max() > 1e-4 for i in (0, 1))
    refuses(lambda: pipeline.interpolate(A, B, n=1), "n must be at least 2")


def test_each_picture_may_have_its_own_seed(pipeline):
    both = pipeline.generate(A, n=2, **order(generator=[seeded(1), seeded(2)]))
    one = pipeline.generate(A, **order(generator=seeded(2)))
    torch.testing.assert_close(both[1:], one)


# what is refused



@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "at least one word"),
        ({"prompt": "  ,. "}, "at least one word"),
        ({"prompt": []}, "at least one word"),
        ({"prompt": [A, ""]}, "at least one word"),
        ({"prompt": "a bald sevn"}, r"'bald' \(nearest: .*bold.*'sevn' \(nearest: .*seven"),
        ({"prompt": "a bold xyzzy"}, r"'xyzzy' \(nearest: none\)"),
        ({"prompt": " ".join(["seven"] * 40)}, "at most 9 words"),
        ({"n": 0}, "n must be at least 1"),
        ({"guidance": -0.1}, r"guidance must be finite and in \[0, 20"),
        ({"guidance": MAX_GUIDANCE + 1}, "guidance must be"),
        ({"guidance": math.nan}, "guidance must be"),
        ({"strength": 0.0}, r"strength must be finite and in \(0, 1\]"),
        ({"strength": 1.1}, "strength must be"),
        ({"eta": 2}, "eta must be"),
        ({"n_steps": 101}, "n_steps must be in 1..100"),
        ({"image": torch.zeros(1, 1, 4, 4)}, r"image must have shape \(1 or 2, 1, 8, 8\); got \(1, 1, 4, 4\)"),
        ({"image": torch.zeros(3, 1, 8, 8)}, "image must have shape"),
        ({"image": torch.full((1, 1, 8, 8), 255.0)}, "image must be scaled"),
        ({"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "mask must come with an image"),
        ({"image": torch.zeros(1, 1, 8, 8), "mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "mask must have shape"),
        ({"negative": "a bald seven"}, "^negative holds unknown words: 'bald'"),
        ({"negative": "."}, "^negative must be texts with at least one word"),
        ({"negative": " ".join(["seven"] * 40)}, "^negative must have at most 9 words"),
        ({"negative": [A, B]}, "negative must be one sentence, or one for each of 1 prompts; got 2"),
    ],
)
def test_bad_orders_are_refused_before_any_work(pipeline, monkeypatch, wrong, message):
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        pipeline.generate(**({"prompt": A, "n": 2} | wrong))


def test_a_callback_that_is_none_is_refused_before_any_work(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_: pytest.fail("work was done"))
    with pytest.raises(TypeError, match="callback must be callable as callback"):
        pipeline.generate(A, callback=5)


@pytest.mark.parametrize(("path", "device", "message"), [("", "cpu", "name_or_path must be a path that is not empty"), (5, "cpu", "got 5"), ("digits", "tpu", "device must be a device of this machine, such as 'cpu'; got 'tpu'")])
def test_no_path_and_no_device_are_named(path, device, message):
    with pytest.raises(ValueError, match=message):
        TextToImage.from_pretrained(path, device=device)


def test_an_empty_path_is_not_written_to(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path must be a path that is not empty"):
        pipeline.save_pretrained("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("text_encoder", TextEncoder(5, 10, 8, 1, 2), "vocabulary and the text encoder do not"),
        ("text_encoder", TextEncoder(len(TOKENIZER), 9, 8, 1, 2), "rows and the text encoder do not: 10 and 9"),
        ("text_encoder", TextEncoder(len(TOKENIZER), 10, 16, 1, 2), "words and the U-Net do not: 16 and 8"),
        ("autoencoder", Autoencoder(8, latent_channels=3, base_channels=4, n_downs=1), r"\(3, 4, 4\) and \(2, 4, 4\)"),
        ("autoencoder", Autoencoder(16, latent_channels=2, base_channels=4, n_downs=1), r"\(2, 8, 8\) and \(2, 4, 4\)"),
        ("rule", CaptionRule(28, ((1, 2),) * 10, ((0, 1),) * 10), "caption rule do not: 8 and 28"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, wrong, message):
    with pytest.raises(ValueError, match=message):
        TextToImage(TOKENIZER, schedule=make_schedule("cosine", 100), **(make_parts() | {part: wrong}))


# on disk


@pytest.fixture
def saved(pipeline, tmp_path):
    """Save a pipeline with a rule and a card."""
    pipeline.rule = CaptionRule(8, ((1.0, 2.0),) * 10, ((0.0, 1.0),) * 10)
    pipeline.card = {"name": "small"}
    pipeline.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_pipeline_comes_back_whole(pipeline, saved):
    again = TextToImage.from_pretrained(saved)
    assert torch.equal(again.generate(A, **order()), pipeline.generate(A, **order()))
    assert (again.rule, again.card, again.tokenizer) == (pipeline.rule, pipeline.card, pipeline.tokenizer)
    assert not again.unet.training and not again.text_encoder.training
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pipeline.save_pretrained(saved)
    pipeline.save_pretrained(saved, overwrite=True)


def test_a_pipeline_is_loaded_to_a_device_as_a_whole(saved):
    """The meta device stands for a GPU: networks and schedule must meet there."""
    assert {part.type for part in _places(TextToImage.from_pretrained(saved, device="meta"))} == {"meta"}


def _places(pipeline):
    """Return where the parts of a pipeline lie."""
    networks = pipeline.to_parts()[0].values()
    return {pipeline.device, *(next(network.parameters()).device for network in networks)}


def test_exchanged_and_damaged_parts_are_refused(pipeline, saved):
    config = json.loads((saved / CONFIG_FILE).read_text())
    weights = (saved / WEIGHTS_FILE).read_bytes()

    def refuse(message, **changes):
        changed = config | changes
        changed["sha256"] = checksum(changed, weights)
        (saved / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            TextToImage.from_pretrained(saved)

    facts, parts = config["facts"], config["parts"]
    fewer = {**facts["tokenizer"], "words": facts["tokenizer"]["words"][:-1]}
    refuse("vocabulary and the text encoder do not", facts=facts | {"tokenizer": fewer})
    refuse("does not hold a complete model", facts={"rule": None})
    refuse("does not hold a complete model", facts=facts | {"rule": {"image_size": 8}})
    refuse("does not hold a complete model", parts={k: v for k, v in parts.items() if k != "unet"})
    refuse("part 'unet' must name a class among", parts=parts | {"unet": {"class": "Popen", "config": {}}})
    giant = {**parts["unet"]["config"], "n_res_blocks": 10**9}
    refuse("does not hold a complete model", parts=parts | {"unet": {"class": "TextUNet", "config": giant}})
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    (saved / WEIGHTS_FILE).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum does not fit"):
        TextToImage.from_pretrained(saved)


def test_other_models_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not describe a model of this kind"):
        TextToImage.from_pretrained(shutil.copytree(PACKAGE / "weights" / "digits", tmp_path / "copy"))
    with pytest.raises(FileNotFoundError, match=r"or a shipped name: .*digits.*mnist"):
        TextToImage.from_pretrained("nobody")
    with pytest.raises(FileNotFoundError):
        TextToImage.from_pretrained("../weights/digits")


# what is shipped


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_shipped_pipelines_are_small_and_draw_what_they_are_asked_for(name):
    assert sum(file.stat().st_size for file in (PIPELINES / name).iterdir()) <= 15e6
    pipeline, g = TextToImage.from_pretrained(name), seeded(0)
    rows = torch.stack([torch.randint(n, (100,), generator=g) for n in (10, 3, 3, *([2] * (pipeline.rule.size is not None)))], 1)
    prompts = write_captions(rows, template=0)
    usual = {name: pipeline.card[name] for name in ("guidance", "eta")}  # with which the shares of the card were measured
    pictures = pipeline.generate(prompts, n_steps=20, generator=g, **usual)
    right = score_attributes(pictures, rows, load_classifier(name), pipeline.rule).double().mean(0)
    for share, attribute in zip(right, WORDS, strict=False):  # 100 sentences: 0.1 is about three standard errors
        assert share > pipeline.card["guidance {guidance:g}, eta {eta:g}: ".format(**usual) + f"{attribute} right, share of 1000 prompts"] - 0.1


def test_shipped_figures_are_those_that_were_aimed_for():
    mnist, digits = (TextToImage.from_pretrained(name).card for name in ("mnist", "digits"))
    shares = [mnist[f"guidance 2, eta 1: {attribute} right, share of 1000 prompts"] for attribute in ("digit", "weight", "slant")]
    assert all(share >= aim for share, aim in zip(shares, (0.97, 0.85, 0.80), strict=True))
    assert mnist["PSNR of the autoencoder, dB, test"] >= 25 and mnist["CLIP zero-shot digit accuracy, test"] >= 0.97
    assert all(share >= 0.97 for key, share in digits.items() if key.startswith("guidance 2") and "digit right" in key)


def test_noise_in_the_steps_is_the_default_and_what_the_cards_say(pipeline):
    default = inspect.signature(TextToImage.generate).parameters["eta"].default
    assert default == TextToImage.from_pretrained("mnist").card["eta"] == 1.0
    noisy = by_hand(pipeline, [A, B], 2.0, **order(eta=1.0))
    torch.testing.assert_close(pipeline.generate([A, B], **order()), noisy)
    plain = pipeline.generate([A, B], **order(eta=0.0))
    assert (plain - noisy).abs().amax((1, 2, 3)).min() > 1e-4


def test_every_share_on_a_card_says_its_guidance_and_its_noise():
    for name in ("digits", "mnist"):
        card = TextToImage.from_pretrained(name).card
        shares = [key for key in card if "share of 1000" in key or key.startswith("spread")]
        assert shares and all("eta 0" in key or "eta 1" in key for key in shares)
