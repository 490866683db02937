"""What does not fit is refused in one sentence: types, devices, ranges, generators, wrapped networks, prompts."""

import copy
import json
import math
import warnings
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from conftest import refuses
from ddpm_nb import checks
from ddpm_nb.bound import vlb_terms
from ddpm_nb.captions import fit_tokenizer, write_captions
from ddpm_nb.clip import TextEncoder
from ddpm_nb.conditioning import TextUNet, drop_context
from ddpm_nb.data import check_data, load_images, train_batches
from ddpm_nb.elbo import predict_noise, simple_loss
from ddpm_nb.evaluation import (
    DigitClassifier,
    bits_per_dim,
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    gap_with_error,
    inception_fid,
    nearest_neighbors,
    train_classifier,
)
from ddpm_nb.forward import NoiseSchedule, q_sample
from ddpm_nb.gaussian import GaussianMixture
from ddpm_nb.hub import load_pretrained, save_pretrained
from ddpm_nb.improved import hybrid_loss
from ddpm_nb.pipeline import TextToImage
from ddpm_nb.plots import show_images
from ddpm_nb.runs import train
from ddpm_nb.sampling import (
    ddim_invert,
    ddim_step,
    ddpm_step,
    inpaint,
    p_sample,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
)
from ddpm_nb.schedules import make_schedule
from ddpm_nb.scores import flow_log_likelihood, langevin, sample_sde, score
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import UNet

SHAPE = (2, 1, 8, 8)
QUICK = {"n_steps": 2}
WORDS = ("the model's input must be as its weights",)


@pytest.fixture(scope="module")
def network():
    return UNet(8, 1, 16, (1,), 1, norm_groups=8)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("cosine", 10)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", split="test")[:8]


def calls(model, schedule, x, mask):
    """Return every way to hand a network images, or to have it draw some."""
    config, quiet = TrainConfig(1, 4, precision="float32"), {"progress": False}
    return {
        "sample_ddim": lambda: sample_ddim(model, schedule, SHAPE, x_T=x[:2], **QUICK),
        "sample_ddpm": lambda: sample_ddpm(model, schedule, SHAPE, x_T=x[:2], **QUICK),
        "sample_dpm_solver": lambda: sample_dpm_solver(model, schedule, SHAPE, x_T=x[:2], **QUICK),
        "p_sample": lambda: p_sample(model, schedule, x, 3),
        "ddim_invert": lambda: ddim_invert(model, schedule, x, **QUICK),
        "inpaint": lambda: inpaint(model, schedule, x, mask, x_T=x, **QUICK),
        "vlb_terms": lambda: vlb_terms(model, schedule, x, n_levels=17),
        "bits_per_dim": lambda: bits_per_dim(model, schedule, x, n_levels=17),
        "simple_loss": lambda: simple_loss(model, schedule, x),
        "hybrid_loss": lambda: hybrid_loss(model, schedule, x, n_levels=None),
        "predict_noise": lambda: predict_noise(model, schedule, "v")(x, torch.zeros(len(x)).long()),
        "score": lambda: score(model, schedule, x, 3),
        "langevin": lambda: langevin(model, schedule, x, 3, n_steps=1),
        "sample_sde": lambda: sample_sde(model, schedule, SHAPE, x_T=x[:2]),
        "flow_log_likelihood": lambda: flow_log_likelihood(model, schedule, x, n_steps=2),
        "fit": lambda: fit(copy.deepcopy(model), schedule, x, config, **quiet),
    }


@pytest.mark.parametrize("name", calls(None, None, torch.zeros(2, 1), None))
def test_types_and_devices_that_do_not_fit_are_named(network, schedule, images, name):
    mask = torch.arange(8) < 4
    doubled = calls(network, schedule, images.double(), mask)[name]
    refuses(doubled, *WORDS, "torch.float32 on cpu; got torch.float64 on cpu", error=TypeError)
    half = calls(copy.deepcopy(network).half(), schedule, images, mask)[name]
    refuses(half, *WORDS, "torch.float16 on cpu; got torch.float32 on cpu", error=TypeError)
    nowhere = copy.deepcopy(network).to("meta")  # stands in for another device
    wanted = "on the device meta" if name == "fit" else "torch.float32 on meta"
    refuses(calls(nowhere, schedule, images, mask)[name], wanted, error=(TypeError, ValueError))


def test_a_schedule_of_another_type_or_place_is_named(network, schedule):
    for changed, words in (("double", "float64 on cpu"), ("meta", "torch.float32 on meta")):
        other = NoiseSchedule(schedule.exact_betas).to(getattr(torch, changed, changed))
        draw = partial(sample_ddim, network, other, SHAPE, **QUICK)
        refuses(draw, *WORDS, words, error=TypeError)


def test_what_a_network_does_not_take_is_refused_before_a_folder_is_made(network, schedule, images, tmp_path):
    """The network's own words would come after the first checkpoint, and name an argument of its own."""
    exact, config = NoiseSchedule(schedule.exact_betas, dtype=torch.float64), TrainConfig(1, 4, precision="float32")
    turned = [(image.repeat(3, 1, 1), 0) for image in images]
    large = torch.zeros(8, 1, 9, 9) - 0.5
    cases = [
        (schedule, turned, "data must hold images of the network's (1, 8, 8); got (3, 8, 8)"),
        (schedule, large, "data must hold images of the network's (1, 8, 8); got (1, 9, 9)"),
        (schedule, images[:0], "data must hold at least one image; got none"),
        (schedule, images.double(), "as its weights, torch.float32 on cpu; got torch.float64 on cpu"),
        (exact, images, "as its weights, torch.float32 on cpu; got torch.float64 on cpu"),
    ]
    for chain, data, words in cases:
        for start in (fit, partial(train, out=tmp_path / "run")):
            refuses(lambda s=start, c=chain, d=data: s(copy.deepcopy(network), c, d, config, progress=False), words, error=(ValueError, TypeError))
    assert not (tmp_path / "run").exists()
    assert len(fit(copy.deepcopy(network).double(), exact, images, config, progress=False).losses) == 1


def test_a_card_that_is_no_runs_is_not_replaced(network, schedule, images, tmp_path, monkeypatch):
    """A project's own folder has a README.md, which a run would have written over."""
    (tmp_path / "README.md").write_text("my project")
    monkeypatch.chdir(tmp_path)
    start = lambda out: train(copy.deepcopy(network), schedule, images, TrainConfig(1, 4), out=out, progress=False)
    refuses(lambda: start("."), "out='.' holds a README.md that is no run's", "choose another folder", error=FileExistsError)
    refuses(lambda: start(""), "out must be a path that is not empty", "got ''")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and (tmp_path / "README.md").read_text() == "my project"
    for name in ("model.safetensors", "log.jsonl"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
        refuses(lambda n=name: start("mine"), f"holds a {name} that is no run's", error=FileExistsError)
        assert (tmp_path / "mine" / name).read_text() == "mine"
        (tmp_path / "mine" / name).unlink()


def test_inpainting_of_no_image_names_the_images(network, schedule, images):
    refuses(lambda: inpaint(network, schedule, images[:0], torch.eye(8).bool()), "known must hold at least one image; got shape (0, 1, 8, 8)")


def test_half_precision_throughout_still_works(network, schedule):
    half = copy.deepcopy(network).bfloat16()
    other = NoiseSchedule(schedule.exact_betas).bfloat16()
    assert sample_ddim(half, other, SHAPE, **QUICK).dtype == torch.bfloat16


def test_another_failure_of_a_network_keeps_its_words(schedule, images):
    def model(x, t):
        raise RuntimeError("my own words")

    refuses(lambda: simple_loss(model, schedule, images), "my own words", error=RuntimeError)
    flat = nn.Linear(3, 3)
    broken = lambda x, t: flat(x)
    refuses(lambda: simple_loss(broken, schedule, images), "shapes", error=RuntimeError)


@pytest.mark.parametrize("wrong", [0, "0", [torch.Generator()] * 3, [0, 1]], ids=["int", "text", "long", "ints"])
def test_generators_are_refused_everywhere(network, schedule, images, wrong):
    x, features = images[:2], torch.randn(20, 2)
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    given = {"generator": wrong}
    context = torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)
    draws = [
        lambda: sample_ddim(network, schedule, SHAPE, **QUICK, **given),
        lambda: sample_ddpm(network, schedule, SHAPE, **QUICK, **given),
        lambda: sample_dpm_solver(network, schedule, SHAPE, **QUICK, **given),
        lambda: inpaint(network, schedule, x, torch.arange(8) < 4, **QUICK, **given),
        lambda: p_sample(network, schedule, x, 3, **given),
        lambda: ddpm_step(schedule, x, 3, x, **given),
        lambda: ddim_step(schedule, x, 3, 1, x, eta=1.0, **given),
        lambda: q_sample(schedule, x, 3, **given),
        lambda: vlb_terms(network, schedule, x, n_levels=17, **given),
        lambda: bits_per_dim(network, schedule, x, n_levels=17, **given),
        lambda: simple_loss(network, schedule, x, **given),
        lambda: hybrid_loss(network, schedule, x, n_levels=17, **given),
        lambda: langevin(network, schedule, x, 3, n_steps=1, **given),
        lambda: sample_sde(network, schedule, SHAPE, **given),
        lambda: flow_log_likelihood(network, schedule, x, n_steps=2, n_probes=1, **given),
        lambda: mixture.sample(5, **given),
        lambda: distance_with_error(frechet_distance, features, features, **given),
        lambda: gap_with_error(frechet_distance, features, features, features, **given),
        lambda: write_captions(torch.zeros(2, 4, dtype=torch.long), **given),
        lambda: drop_context(*context, 0.5, **given),
    ]
    for draw in draws:
        refuses(draw, "generator must be", error=TypeError)


def entrances(model, schedule, x, classifier):
    """Return every entrance that takes clean images, or samples."""
    labels = torch.arange(len(x)) % 2
    return {
        "fit": lambda: fit(copy.deepcopy(model), schedule, x, TrainConfig(1, 4), progress=False),
        "check_data": lambda: check_data(x),
        "train_batches": lambda: next(train_batches(x, 4)),
        "bits_per_dim": lambda: bits_per_dim(model, schedule, x, n_levels=17),
        "vlb_terms": lambda: vlb_terms(model, schedule, x, n_levels=17),
        "continuous": lambda: vlb_terms(model, schedule, x, n_levels=None),
        "inpaint": lambda: inpaint(model, schedule, x, torch.arange(8) < 4, **QUICK),
        "ddim_invert": lambda: ddim_invert(model, schedule, x, **QUICK),
        "train_classifier": lambda: train_classifier(x, labels, n_iterations=1),
        "classifier_features": lambda: classifier_features(classifier, x),
        "classifier_report": lambda: classifier_report(classifier, x),
        "inception_fid": lambda: inception_fid(x, x, network=Quarters()),
        "nearest_neighbors": lambda: nearest_neighbors(x, x),
    }


class Quarters(nn.Module):
    """Take four means as features."""

    num_features = 4

    def forward(self, levels):
        return nn.functional.adaptive_avg_pool2d(levels.float().mean(1), 2).flatten(1)


@pytest.mark.parametrize("name", entrances(None, None, torch.zeros(2), None))
def test_one_function_looks_at_the_images_of_every_entrance(network, schedule, images, name):
    if name == "inception_fid":
        pytest.importorskip("torchmetrics")
    rest = network, schedule
    classifier = DigitClassifier()

    def entrance(x):
        return entrances(*rest, x, classifier)[name]

    levels = (images + 1) * 127.5
    refuses(entrance(levels), "must be scaled to [-1, 1]; got values from 0 to 255")
    refuses(entrance(levels.byte()), "floating-point dtype", error=TypeError)
    refuses(entrance(images * torch.nan), "must be finite")
    for other in (images.numpy(), "digits", list(images)):
        refuses(entrance(other), "must be a t", error=TypeError)
    off_the_grid = nullcontext()
    if name in ("bits_per_dim", "vlb_terms"):
        off_the_grid = pytest.raises(ValueError, match="must lie on the grid")
    with pytest.warns(UserWarning, match="no value is below 0: are they in"), off_the_grid:
        entrance((images + 1) / 2)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entrance(images)()


def test_samples_may_stick_out_and_data_may_not(network, schedule, images):
    classifier, spilt = DigitClassifier(), 1.5 * images
    for name, call in entrances(network, schedule, spilt, classifier).items():
        if name == "inception_fid" and find_spec("torchmetrics") is None:
            continue
        if name in ("classifier_features", "classifier_report", "inception_fid", "nearest_neighbors", "check_data", "train_batches"):
            call()  # a tensor may hold latents: only `fit` knows that it holds images
        else:
            refuses(call, "must be scaled to [-1, 1]; got values from -1.5 to 1.5")
    toy = 3 * torch.randn(4, 2)  # what is not clipped may have any range
    model = lambda x, t: x
    ddim_invert(model, schedule, toy, clip_x_0=False, **QUICK)
    inpaint(model, schedule, toy, torch.tensor([True, False]), clip_x_0=False, **QUICK)
    vlb_terms(model, schedule, toy, n_levels=None, clip_x_0=False)


def test_bright_images_of_a_data_set_are_told_after_a_look_at_others(images):
    bright = images.abs()
    with pytest.warns(UserWarning, match="are they in"):
        check_data([(image, 0) for image in bright])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_data([(image, 0) for image in torch.cat([bright[:1], images])])
        check_data(torch.zeros(4, 1, 8, 8))  # of one value: nothing to suspect
        check_data(images.abs(), range_check=False)


def test_masks_are_refused_in_words(network, schedule, images):
    for mask, words in (
        (torch.ones(8, 8), "dtype torch.bool; got torch.float32"),
        ((torch.ones(8, 8) > 0).numpy(), "dtype torch.bool; got ndarray"),
        ("left", "dtype torch.bool; got str"),
        (torch.ones(7, 7) > 0, "must broadcast to the shape of known"),
    ):
        refuses(lambda mask=mask: inpaint(network, schedule, images, mask, **QUICK), words, error=(TypeError, ValueError))


def test_fit_names_what_is_no_network_schedule_or_config(network, schedule, images):
    def run(model=network, schedule=schedule, config=None):
        return lambda: fit(model, schedule, images, config or TrainConfig(1, 4), progress=False)

    refuses(run(model=lambda x, t: x), "model must be a Module; got function", error=TypeError)
    refuses(run(schedule=schedule.betas), "schedule must be a NoiseSchedule, such as make_schedule('cosine', 1000); got Tensor", error=TypeError)
    refuses(run(config={"lr": 1}), "config must be a TrainConfig; got dict", error=TypeError)
    empty = NoiseSchedule(schedule.exact_betas).to("meta")
    refuses(run(schedule=empty), "schedule must hold values", error=ValueError)


def test_compiled_networks_are_trained_and_kept_as_what_they_are(tmp_path, schedule, images):
    def compiled():
        torch.manual_seed(0)
        return torch.compile(UNet(8, 1, 16, (1,), 1, norm_groups=8), backend="eager")

    config, rest = TrainConfig(2, 4, precision="float32"), {"progress": False}
    plain = fit(compiled()._orig_mod, schedule, images, config, **rest)
    result = train(compiled(), schedule, images, config, out=tmp_path / "run", **rest)
    assert type(result.ema) is UNet
    torch.testing.assert_close(result.losses, plain.losses)
    network = load_pretrained(tmp_path / "run")[0]
    t = torch.zeros(8, dtype=torch.long)
    torch.testing.assert_close(network(images, t), result.ema(images, t))
    longer = train(compiled(), schedule, images, out=tmp_path / "run", resume=True, **rest)
    assert len(longer.losses) == 2

    save_pretrained(tmp_path / "saved", compiled(), schedule, card={})
    torch.testing.assert_close(load_pretrained(tmp_path / "saved")[0](images, t), compiled()._orig_mod.eval()(images, t))


def test_a_compiled_part_of_a_pipeline_is_saved_under_its_own_names(tmp_path, schedule):
    tokenizer = fit_tokenizer(["a seven"], length=4)
    text = TextEncoder(len(tokenizer), length=4, dim=16, n_layers=1, n_heads=1)
    unet = TextUNet(8, 1, 16, 16, (1,), n_heads=1)
    wrapped = TextToImage(tokenizer, text, torch.compile(unet, backend="eager"), schedule)
    wrapped.save_pretrained(tmp_path / "it")
    names = TextToImage.from_pretrained(tmp_path / "it").unet.state_dict()
    assert set(names) == set(unet.state_dict())


def test_a_compiled_network_is_converted(schedule):
    pytest.importorskip("diffusers")
    from ddpm_nb.convert import unet_to_diffusers

    unet = UNet(8, 1, 16, (1,), 1, norm_groups=8)
    model, _ = unet_to_diffusers(torch.compile(unet, backend="eager"), schedule)
    assert type(model).__name__ == "UNet2DModel"


def test_a_network_that_cannot_be_kept_leaves_no_folder(tmp_path, schedule, images):
    class Other(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    model, config = Other(1, 1, 3, padding=1), TrainConfig(1, 4)
    refuses(
        lambda: train(model, schedule, images, config, out=tmp_path / "run", progress=False),
        "model must be one of UNet, ResNetBaseline, ClassUNet to be kept; got Other",
        error=TypeError,
    )
    assert not (tmp_path / "run").exists()


def test_a_linear_layer_of_whole_numbers_does_not_stop_the_network(network, images):
    t = torch.zeros(8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear})
        assert (quantized(images, t) - network(images, t)).abs().max() < 0.5


def test_too_few_samples_for_a_distance_are_told():
    with pytest.warns(UserWarning, match="16 and 500 samples of 32 features"):
        frechet_distance(torch.randn(16, 32), torch.randn(500, 32))


def test_prompts_that_are_no_text_or_contradict_themselves():
    pipeline = TextToImage.from_pretrained("digits")
    for prompt, words in (
        (5, "got 5 of type int"),
        (b"a seven", "of type bytes"),
        ({"a": 1}, "of type dict"),
        (["a seven", 5], "texts with at least one word"),
        ([], "texts with at least one word"),
        ("a thin bold seven", "it says thin and bold"),
        ("a three five", "it says three and five"),
        ("a seven upright leaning left", "it says upright and left"),
    ):
        refuses(lambda p=prompt: pipeline.generate(p, n_steps=1), words, error=(TypeError, ValueError))
    for captions in ("a seven", 5, None, ["a seven", 5], [["a"]], {"a": 1}):
        refuses(lambda c=captions: pipeline.tokenizer.encode(c), "captions must be a list of texts", error=TypeError)


def test_each_picture_of_a_pipeline_may_have_its_own_generator():
    pipeline = TextToImage.from_pretrained("digits")

    def draw(prompt, seeds):
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline.generate(prompt, n_steps=3, eta=1.0, generator=sources)

    both = draw(["a seven", "a three"], (1, 2))
    torch.testing.assert_close(both[:1], draw("a seven", (1,)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], draw("a three", (2,)), rtol=1e-4, atol=1e-4)
    refuses(lambda: draw("a seven", (1, 2)), "a list of 1", error=TypeError)


def test_the_sealed_folder_of_a_run_says_the_class_of_a_compiled_network(tmp_path, schedule, images):
    unet = torch.compile(UNet(8, 1, 16, (1,), 1, norm_groups=8), backend="eager")
    train(unet, schedule, images, TrainConfig(1, 4), out=tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["parts"]["model"]["class"] == "UNet"


def test_nan_is_refused_where_nobody_looked_before(monkeypatch):
    """On a GPU `check_floating` looks at no values, and no comparison with NaN is true."""
    monkeypatch.setattr(checks, "has_values", lambda x: False)
    for bad in (math.nan, math.inf, -math.inf):
        refuses(lambda bad=bad: checks.check_range("x", torch.tensor([0.5, bad])), "x must be finite")


def test_no_image_is_not_drawn():
    refuses(lambda: show_images(torch.zeros(0, 1, 8, 8)), "x must hold at least one image; got shape (0, 1, 8, 8)")
    refuses(lambda: show_images(torch.zeros(2, 1, 8, 8), n_cols=0), "n_cols must be at least 1; got 0")
