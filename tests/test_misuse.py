"""What a first user tries that cannot work: each gets a sentence that says what is wanted."""

import inspect
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rules
import torch
from torch.utils.data import DataLoader

from conftest import refuses
from ddpm_nb import bound
from ddpm_nb.bound import optimal_denoiser, rate_distortion, vlb_terms
from ddpm_nb.data import ImageDataset, batch_order, load_images, train_batches
from ddpm_nb.elbo import (
    normal_log_prob,
    objective_target,
    output_to_eps,
    predict_noise,
    reverse_mean_variance,
    simple_loss,
    split_output,
)
from ddpm_nb.files import find_model
from ddpm_nb.flows import (
    edm_denoiser,
    eps_from_velocity,
    flow_matching_loss,
    sample_flow,
    sample_heun,
    straightness,
    velocity_from_eps,
)
from ddpm_nb.forward import predict_x_0, q_posterior, q_sample, q_step
from ddpm_nb.gaussian import GaussianMixture, seeded
from ddpm_nb.hub import save_pretrained
from ddpm_nb.improved import (
    LossHistory,
    hybrid_loss,
    optimal_variances,
    respaced_model,
    step_bits,
    weighted_loss,
)
from ddpm_nb.latent import (
    Autoencoder,
    autoencoder_loss,
    fit_latent_scale,
    from_latents,
    psnr,
    to_latents,
    train_autoencoder,
)
from ddpm_nb.pictures import find_parts, load_torchvision, read_picture
from ddpm_nb.pipeline import TextToImage
from ddpm_nb.processes import Processes
from ddpm_nb.results import Yardstick
from ddpm_nb.runs import train
from ddpm_nb.sampling import (
    ddim_step,
    ddpm_step,
    p_sample,
    respace,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    slerp,
    walk,
)
from ddpm_nb.schedules import make_schedule
from ddpm_nb.scores import flow_log_likelihood, langevin, sample_sde, score
from ddpm_nb.training import TrainConfig, Watcher, descend, fit
from ddpm_nb.unet import make_unet

SCHEDULE = make_schedule("cosine", 100)
MODEL = make_unet("digits", base_channels=8)
X = load_images("digits")[:16]
QUICK = TrainConfig(n_iterations=1, batch_size=4, warmup=0, precision="float32")
MASK = torch.ones(8, 8, dtype=torch.bool)
AUTOENCODER = Autoencoder(8, 1, 2, 8, 1)
ATTRIBUTES = torch.zeros(16, 3, dtype=torch.long)


@pytest.mark.parametrize("held_out", [None, X[:2]])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (X.numpy(), ("data must be a tensor (N, C, H, W) or a data set of pairs", "ndarray")),
        ([X[0]] * 8, ("data must be a tensor (N, C, H, W) or a data set of pairs", "Tensor")),
        (DataLoader(X), ("data must be a tensor (N, C, H, W) or a data set of pairs", "DataLoader")),
        ([], ("data must be a tensor (N, C, H, W) or a data set of pairs", "got none")),
        ("pictures", ("data must be a tensor (N, C, H, W) or a data set of pairs", "got str")),
        ((X * 127.5 + 127.5).byte(), ("floating-point dtype, in [-1, 1]", "uint8")),
        (X * 127.5 + 127.5, ("must be scaled to [-1, 1]",)),
        (X[:, 0], ("must have shape (",)),
        (X.to_sparse(), ("data must be a dense tensor, as x.to_dense() is; got torch.sparse_coo",)),
    ],
)
def test_data_of_another_kind(data, words, held_out, tmp_path):
    refuses(lambda: train(MODEL, SCHEDULE, data, QUICK, held_out=held_out, out=tmp_path / "run"), *words, error=(TypeError, ValueError))
    assert not (tmp_path / "run").exists()


def test_images_from_zero_to_one_get_one_warning():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(MODEL, SCHEDULE, (X + 1) / 2, QUICK, held_out=X[:2], progress=False)
    assert len(told) == 1 and "are they in [0, 1]? Then 2 * x - 1 is right" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(MODEL, SCHEDULE, X, QUICK, progress=False)


# What stands for an argument that has no default, wherever a function calls it so.
GIVEN = dict.fromkeys(("x_0", "x_t", "x_prev", "x", "x_T", "eps", "eps_hat", "x_0_hat", "output", "known", "images", "data"), X)
GIVEN |= {"t": 3, "t_prev": 1, "kept": [0, 3], "shape": (1, 1, 8, 8), "mask": MASK, "weights": torch.ones(100), "objective": "v"}
GIVEN |= {"variance": "posterior", "name": "vlb", "n_levels": 17, "n_steps": 2, "n_images": 2, "n_samples": 10, "config": QUICK}
GIVEN |= {"mixture": GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]), "yardstick": Yardstick(X, 17, None, None)}
GIVEN |= {"step": lambda x, i, eps_hat: (x, x), "unet": MODEL, "path": "never-written"}
GIVEN |= {"context": None, "null_context": None, "tokens": None, "text_encoder": None, "scale": 2.0}  # looked at after the model


def public_functions():
    """Yield every public function of the package outside the checks, with its name and the names of its parameters."""
    for path in sorted(Path(bound.__file__).parent.glob("[a-z]*.py")):
        for name, function in rules.public_objects(path.stem):
            if inspect.isfunction(function) and path.stem != "checks":
                yield f"{path.stem}.{name}", function, list(inspect.signature(function).parameters)


FUNCTIONS = {name: function for name, function, _ in public_functions()}
TAKES_SCHEDULE = [name for name, _, taken in public_functions() if "schedule" in taken]
TAKES_MODEL_AND_SCHEDULE = [name for name, _, taken in public_functions() if taken[:2] == ["model", "schedule"]]
ASKED = {"model", "denoiser"}
TAKES_MODEL_ALONE = [
    name
    for name, function, taken in public_functions()
    if "schedule" not in taken and any(p in ASKED and text.startswith("callable") for p, text in rules.parameter_comments(function).items())
]


def call_with(name, **changed):
    """Call a public function with what its arguments should be, but for those that are changed."""
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters.items()
    needed = [p for p, found in parameters if found.default is found.empty and found.kind is not found.VAR_POSITIONAL]
    return function(**{p: changed[p] if p in changed else GIVEN[p] for p in needed})


def test_the_functions_are_found():
    """Those that the book speaks of first; a new one is found by the names of its parameters."""
    assert {"forward.q_sample", "forward.q_posterior", "bound.optimal_denoiser", "sampling.ddpm_step"} <= {*TAKES_SCHEDULE}
    assert {"elbo.simple_loss", "bound.vlb_terms", "sampling.p_sample", "scores.score", "runs.train"} <= {*TAKES_MODEL_AND_SCHEDULE}
    assert {"flows.sample_flow", "flows.sample_heun", "sampling.walk", "improved.respaced_model"} <= {*TAKES_MODEL_ALONE}


@pytest.mark.parametrize("name", TAKES_SCHEDULE)
def test_a_schedule_that_is_none(name):
    for wrong, got in ((MODEL, "got UNet"), (SCHEDULE.betas, "got Tensor"), ("cosine", "got str"), (None, "got NoneType")):
        refuses(lambda wrong=wrong: call_with(name, model=MODEL, schedule=wrong), "schedule must be a NoiseSchedule", got, error=TypeError)


@pytest.mark.parametrize("name", TAKES_MODEL_AND_SCHEDULE)
def test_a_model_and_a_schedule_that_are_swapped_or_none(name):
    wanted = "model must be callable as model(x_t, t)"
    refuses(lambda: call_with(name, model=SCHEDULE, schedule=MODEL), "model and schedule are swapped", error=TypeError)
    refuses(lambda: call_with(name, model=SCHEDULE, schedule=SCHEDULE), wanted, "got NoiseSchedule", error=TypeError)
    refuses(lambda: call_with(name, model="digits", schedule=SCHEDULE), wanted, "got str", error=TypeError)


@pytest.mark.parametrize("name", TAKES_MODEL_ALONE)
def test_a_model_that_is_none(name):
    argument = (ASKED & {*inspect.signature(FUNCTIONS[name]).parameters}).pop()
    for wrong, got in ((SCHEDULE, "got NoiseSchedule"), ("digits", "got str"), (X, "got Tensor")):
        refuses(lambda wrong=wrong: call_with(name, **{argument: wrong}), f"{argument} must be callable as", got, error=TypeError)


UNASKED = {  # flags that are not asked for by name, and why
    "checks": "they are the checks: called at every step, by the package",
    "plots": "figures of the book; Matplotlib says what it was given",
}
NETWORKS = {"image_size": 8, "in_channels": 1, "base_channels": 8, "channel_mults": (1,), "norm_groups": 8}
PEER = {"image_size": 8, "in_channels": 1, "out_channels": 1, "widths": (32,), "time_dim": 8, "down_attention": (False,), "up_attention": (False,)}
OWN_CALLS = {  # what stands for the arguments without a default of a class or method, and of functions that name them otherwise
    "data.ImageDataset": {"levels": (X * 0).byte(), "n_levels": 17},
    "unet.UNet": NETWORKS,
    "unet.make_unet": {"name": "digits"},
    "unet.Level": {"channels": [(8, 8)], "time_dim": 8, "norm_groups": 8},
    "conditioning.ClassUNet": {"n_classes": 2} | NETWORKS,
    "hub.PeerUNet": PEER,
    "hub.save_pretrained": {"path": "never-written", "model": MODEL, "schedule": SCHEDULE},
    "files.save_parts": {"path": "never-written", "parts": {"model": MODEL}},
    "runs.Checkpoints": {"out": "never-written", "data": X},
    "runs.refuse_other_run": {"out": "never-written"},
    "files.refuse_foreign_folder": {"out": "never-written", "names": [], "holds": False, "resume": False},
    "runs.prepare_run": {"out": "never-written"},
    "texts.StageCheckpoints": {"out": "never-written", "data": X},
    "texts.train_text": {"data": None, "out": "never-written"},
    "texts.CaptionedFolder": {"root": ".", "image_size": 8},
    "pictures.FolderDataset": {"root": ".", "image_size": 8},
    "pictures.load_folder": {"root": ".", "image_size": 8},
    "pictures.read_picture": {"path": "never-written", "image_size": 8},
    "schedules.linear_betas": {"n_steps": 2},
    "schedules.make_schedule": {"name": "linear", "n_steps": 2},
    "captions.fit_caption_rule": {"images": X, "labels": torch.arange(16) % 2},
    "clip.train_clip": {"clip": None, "images": X, "attributes": ATTRIBUTES, "tokenizer": None},
    "gan.train_gan": {"model": None, "discriminator": None, "images": X},
    "fast.optimize_for_sampling": {"model": MODEL},
    "files.Pretrained.save_pretrained": {"path": "never-written"},
    "pipeline.TextToImage.generate": {"prompt": "a seven"},
    "pipeline.TextToImage.interpolate": {"first": "a seven", "second": "a three"},
}


def public_calls():
    """Yield each public function, class and method of the package with its full name."""
    for path in sorted(Path(bound.__file__).parent.glob("[a-z]*.py")):
        for name, found in rules.public_objects(path.stem):
            yield f"{path.stem}.{name}", found
            methods = vars(found).items() if inspect.isclass(found) else ()
            yield from ((f"{path.stem}.{name}.{key}", value) for key, value in methods if inspect.isfunction(value) and key[0] != "_")


CALLS = {**dict(public_calls())}
FLAG_CALLS = [
    (name, flag)
    for name, found in CALLS.items()
    for flag, parameter in inspect.signature(found).parameters.items()
    if parameter.annotation in (bool, bool | None) or isinstance(parameter.default, bool)
]
ASKED_FLAGS = [(name, flag) for name, flag in FLAG_CALLS if name.split(".")[0] not in UNASKED]
FLAG_GIVEN = {"n": 16, "epoch": 0, "seed": 0, "batch_size": 4, "items": [], "text": "counting", "classifier": None, "card": {}}


@pytest.fixture(scope="module")
def pipeline():
    """Load a pipeline whose methods are called."""
    return TextToImage.from_pretrained("digits")


@pytest.mark.parametrize(("name", "flag"), ASKED_FLAGS)
def test_a_flag_that_is_a_text_or_a_number(name, flag, request, tmp_path, monkeypatch):
    """In an `if` every text is true, "False" too; nobody is asked, and nothing written, before that is told."""
    monkeypatch.chdir(tmp_path)
    never = MODEL if name in ("training.fit", "runs.train") else lambda x, t: pytest.fail("the model was asked")
    given = GIVEN | FLAG_GIVEN | {"name": "digits", "model": never, "schedule": SCHEDULE} | OWN_CALLS.get(name, {})
    parameters = inspect.signature(CALLS[name]).parameters
    needed = {p: given[p] for p, found in parameters.items() if (found.default is found.empty and p != "self") or p in OWN_CALLS.get(name, {})}
    call = CALLS[name]
    if "self" in parameters:
        call = getattr(request.getfixturevalue("pipeline"), name.split(".")[-1])
    for wrong in ("yes", 1, *([None] if parameters[flag].annotation is bool else [])):
        words = f"{flag} must be True or False; got {wrong!r} of type {type(wrong).__name__}"
        refuses(lambda wrong=wrong: call(**needed | {flag: wrong}), words, error=TypeError)
    assert not list(tmp_path.iterdir())


# the functions that call back; of `walk` the samplers' tests tell
CALLED_BACK = [name for name, found in CALLS.items() if "callback" in inspect.signature(found).parameters]
CALLED_BACK = [name for name in CALLED_BACK if name not in ("sampling.walk", "checks.check_callback")]


@pytest.mark.parametrize("name", CALLED_BACK)
def test_a_callback_that_cannot_be_called(name, request, tmp_path, monkeypatch):
    """It is told before the first step, and before anything is written."""
    monkeypatch.chdir(tmp_path)
    never = MODEL if name in ("training.fit", "runs.train") else lambda *args: pytest.fail("the model was asked")
    given = GIVEN | FLAG_GIVEN | {"model": never, "schedule": SCHEDULE, "autoencoder": Autoencoder(8)}
    given |= {"known": X, "mask": X > 0} | OWN_CALLS.get(name, {})
    parameters = inspect.signature(CALLS[name]).parameters
    needed = {p: given.get(p) for p, found in parameters.items() if (found.default is found.empty and p != "self") or p in OWN_CALLS.get(name, {})}
    call = CALLS[name]
    if "self" in parameters:
        call = getattr(request.getfixturevalue("pipeline"), name.split(".")[-1])
    refuses(lambda: call(**needed | {"callback": 5}), "callback must be callable as callback(", "got int", error=TypeError)
    assert not list(tmp_path.iterdir())


def test_flags_are_found_and_those_of_numpy_will_do(tmp_path):
    assert {("sampling.sample_ddim", "clip_x_0"), ("unet.UNet", "cumulative"), ("files.Pretrained.save_pretrained", "half")} <= {*ASKED_FLAGS}
    assert {name.split(".")[0] for name, _ in FLAG_CALLS} >= {*UNASKED}  # no exception stays that is none
    assert make_unet("digits", base_channels=8, cumulative=np.bool_(False)).config["cumulative"] is False  # as JSON holds it
    refuses(lambda: ImageDataset((X * 0).byte(), n_levels=17, flip="no"), "flip must be True or False; got 'no'", error=TypeError)
    assert ImageDataset((X * 0).byte(), n_levels=17, flip=np.bool_(True)).flip is True
    refuses(lambda: train(MODEL, SCHEDULE, X, QUICK, out=tmp_path / "run", progress="no"), "progress must be True or False", error=TypeError)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_training_without_gradients(mode, tmp_path):
    """A sentence before any work instead of PyTorch's own at the first step."""
    words = "training needs gradients, which are off here: call it outside of torch.no_grad() and torch.inference_mode()"
    with mode():
        refuses(lambda: fit(MODEL, SCHEDULE, X, QUICK), words, error=RuntimeError)
        refuses(lambda: train(MODEL, SCHEDULE, X, QUICK, out=tmp_path / "run"), words, error=RuntimeError)
        refuses(lambda: next(descend(MODEL, QUICK, lambda i: pytest.fail("a loss was computed"))), words, error=RuntimeError)
    assert not (tmp_path / "run").exists()


def test_weights_that_were_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = make_unet("digits", base_channels=8)
    words = "model must have weights that were made or loaded outside of torch.inference_mode()"
    refuses(lambda: train(model, SCHEDULE, X, QUICK, out=tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_a_network_that_keeps_coefficients_of_its_own_is_no_schedule():
    """As in many implementations: the network registers betas and alpha_bars itself."""
    model = torch.nn.Conv2d(1, 1, 1)
    model.alpha_bars = SCHEDULE.alpha_bars
    assert simple_loss(lambda x, t: model(x), SCHEDULE, X).isfinite()
    model.forward = lambda x, t: x
    assert simple_loss(model, SCHEDULE, X).isfinite()
    refuses(lambda: simple_loss(SCHEDULE, model, X), "model and schedule are swapped", error=TypeError)


@pytest.mark.parametrize("sample", [sample_ddpm, sample_ddim, sample_dpm_solver, sample_sde])
@pytest.mark.parametrize("shape", [4, X[0, 0, 0, 0], "8", None])
def test_a_shape_that_is_a_number(sample, shape):
    refuses(lambda: sample(MODEL, SCHEDULE, shape), "shape must be that of a batch, such as (64, 1, 8, 8)", error=TypeError)


@pytest.mark.parametrize("sample", [sample_ddpm, sample_ddim, sample_dpm_solver, sample_sde])
def test_a_shape_of_odd_numbers(sample):
    refuses(lambda: sample(MODEL, SCHEDULE, ()), "shape must be that of a batch", error=TypeError)
    refuses(lambda: sample(MODEL, SCHEDULE, (1, 1, 8, 8.0)), "shape must be a whole number", error=TypeError)


def test_settings_that_are_no_config(tmp_path):
    for config in ({"lr": 1e-3}, 100, "fast"):
        for call in (fit, train):
            refuses(lambda call=call, config=config: call(MODEL, SCHEDULE, X, config), "config must be a TrainConfig", error=TypeError)
    train(MODEL, SCHEDULE, X, QUICK, out=tmp_path / "run", progress=False)
    again = lambda: train(MODEL, SCHEDULE, X, {"lr": 1e-3}, out=tmp_path / "run", resume=True)
    refuses(again, "config must be a TrainConfig", error=TypeError)


def test_a_network_without_a_batch_of_steps():
    refuses(lambda: MODEL(X, 5), "t must be a tensor of shape (16,), one step for each image; got int")
    refuses(lambda: vlb_terms(MODEL, SCHEDULE, X * 0.99, n_levels=17), "x_0 must lie on the grid of n_levels=17")


# Other kinds of numbers, arrays, lists and times, in what takes images.


def half(x, t):
    """Predict half of the input, wherever it is asked."""
    return 0.5 * x


T = SCHEDULE.n_steps
NOISE = torch.randn(X.shape, generator=seeded(1))
BOTH = torch.cat([NOISE, 0 * NOISE], 1)
STEPS = torch.arange(16)
TAKES_IMAGES = {
    "q_step": lambda x: q_step(SCHEDULE, x, 3),
    "q_sample": lambda x: q_sample(SCHEDULE, x, 3),
    "q_posterior": lambda x: q_posterior(SCHEDULE, x, NOISE, 3),
    "predict_x_0": lambda x: predict_x_0(SCHEDULE, x, 3, NOISE),
    "split_output": lambda x: split_output(SCHEDULE, x, 3, BOTH, "learned"),
    "reverse_mean_variance": lambda x: reverse_mean_variance(half, SCHEDULE, x, STEPS),
    "objective_target": lambda x: objective_target(SCHEDULE, "v", x, NOISE, 3, NOISE),
    "objective_target, noise": lambda x: objective_target(SCHEDULE, "eps", X, NOISE, 3, x),
    "output_to_eps": lambda x: output_to_eps(SCHEDULE, "v", x, 3, NOISE),
    "predict_noise": lambda x: predict_noise(half, SCHEDULE, "v")(x, STEPS),
    "simple_loss": lambda x: simple_loss(half, SCHEDULE, x),
    "simple_loss, noise": lambda x: simple_loss(half, SCHEDULE, X, eps=x),
    "vlb_terms": lambda x: vlb_terms(half, SCHEDULE, x, n_levels=17),
    "optimal_variances": lambda x: optimal_variances(GIVEN["mixture"], SCHEDULE)(x, 3),
    "ddpm_step": lambda x: ddpm_step(SCHEDULE, x, 3, NOISE),
    "ddpm_step, noise": lambda x: ddpm_step(SCHEDULE, NOISE, 3, x),
    "p_sample": lambda x: p_sample(half, SCHEDULE, x, 3),
    "ddim_step": lambda x: ddim_step(SCHEDULE, x, 3, 1, NOISE),
    "walk": lambda x: walk(half, x, [3, 0], lambda x, i, eps_hat: (x, x)),
    "hybrid_loss": lambda x: hybrid_loss(lambda x, t: torch.cat([x, x], 1), SCHEDULE, x, n_levels=17),
    "step_bits": lambda x: step_bits(SCHEDULE, X, x, STEPS, BOTH, n_levels=17),
    "weighted_loss": lambda x: weighted_loss(half, SCHEDULE, x, t=STEPS, eps=NOISE, weights=torch.ones(T)),
    "weighted_loss, noise": lambda x: weighted_loss(half, SCHEDULE, X, t=STEPS, eps=x, weights=torch.ones(T)),
    "respaced_model": lambda x: respaced_model(half, range(T))(x, STEPS),
    "score": lambda x: score(half, SCHEDULE, x, 3),
    "langevin": lambda x: langevin(half, SCHEDULE, x, 3, n_steps=1),
    "flow_log_likelihood": lambda x: flow_log_likelihood(half, SCHEDULE, x, n_steps=2, n_probes=1),
    "flow_matching_loss": lambda x: flow_matching_loss(half, x),
    "velocity_from_eps": lambda x: velocity_from_eps(half, SCHEDULE)(x, 0.5),
    "eps_from_velocity": lambda x: eps_from_velocity(half, SCHEDULE)(x, 3),
    "edm_denoiser": lambda x: edm_denoiser(half, SCHEDULE)(x, 0.5),
    "straightness": lambda x: straightness(half, x),
    "autoencoder_loss": lambda x: autoencoder_loss(AUTOENCODER, x, kl_weight=0.1),
    "to_latents": lambda x: to_latents(AUTOENCODER, x),
    "fit_latent_scale": lambda x: fit_latent_scale(AUTOENCODER, x),
    "psnr": lambda x: psnr(x, X),
    "psnr, of": lambda x: psnr(X, x),
}


@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_images_that_are_no_floating_point_tensor(name):
    """Numbers from 0 to 255 would be taken for images, and an array would fail far inside."""
    call = TAKES_IMAGES[name]
    for wrong, got in ((X.numpy(), "got ndarray"), (X.tolist(), "got list"), ([*X], "got list"), (None, "got NoneType"), (0.5, "got float")):
        if wrong is not None or "noise" not in name or "simple" not in name:  # where None means: draw it
            refuses(lambda wrong=wrong: call(wrong), "must be a torch.Tensor", got, error=TypeError)
    for wrong in ((X * 127.5 + 127.5).byte(), X.long(), X > 0, X.to(torch.complex64)):
        refuses(lambda wrong=wrong: call(wrong), "must have a floating-point dtype", str(wrong.dtype), error=TypeError)


TAKES_STEPS = {
    "q_sample": lambda t: q_sample(SCHEDULE, X, t),
    "q_posterior": lambda t: q_posterior(SCHEDULE, X, NOISE, t),
    "split_output": lambda t: split_output(SCHEDULE, NOISE, t, BOTH, "learned"),
    "split_output, beta": lambda t: split_output(SCHEDULE, NOISE, t, NOISE, "beta"),
    "reverse_mean_variance": lambda t: reverse_mean_variance(half, SCHEDULE, NOISE, t),
    "simple_loss": lambda t: simple_loss(half, SCHEDULE, X, t=t),
    "step_bits": lambda t: step_bits(SCHEDULE, X, NOISE, t, BOTH, n_levels=17),
    "respaced_model": lambda t: respaced_model(half, range(T))(NOISE, t),
    "score": lambda t: score(half, SCHEDULE, NOISE, t),
    "optimal_denoiser": lambda t: optimal_denoiser(GIVEN["mixture"], SCHEDULE)(torch.zeros(16, 2), t),
    "optimal_variances": lambda t: optimal_variances(GIVEN["mixture"], SCHEDULE)(torch.zeros(16, 2), t),
    "eps_from_velocity": lambda t: eps_from_velocity(half, SCHEDULE)(NOISE, t),
    "LossHistory": lambda t: LossHistory(T).update(t, torch.ones(16)),
}


@pytest.mark.parametrize("name", TAKES_STEPS)
def test_steps_that_are_none(name):
    """A step below 0 would be counted from the end, one that is no whole number cut off."""
    call, numbers = TAKES_STEPS[name], torch.linspace(0, 9, 16)
    refuses(lambda: call(STEPS - 1), "t must be in 0..99; got values from -1 to 14")
    refuses(lambda: call(STEPS + 90), "t must be in 0..99; got values from 90 to 105")
    refuses(lambda: call(STEPS[:3]), "t must have")
    refuses(lambda: call(STEPS[:, None]), "t must have")
    refuses(lambda: call(numbers), "t must have an integer dtype; got torch.float32", error=TypeError)
    refuses(lambda: call(STEPS > 3), "t must have an integer dtype; got torch.bool", error=TypeError)
    for wrong in (2.5, "3", True, [0] * 16, STEPS.numpy()):
        refuses(lambda wrong=wrong: call(wrong), "t must be a", error=TypeError)
    if name != "LossHistory":
        for wrong in (-1, T):
            refuses(lambda wrong=wrong: call(wrong), f"t must be in 0..99; got {wrong}")


@pytest.mark.parametrize("name", [name for name in TAKES_STEPS if name not in {"q_sample", "simple_loss", "LossHistory"}])
def test_one_step_for_all_is_a_step_for_each(name):
    one, each = (TAKES_STEPS[name](t) for t in (3, torch.full((16,), 3, dtype=torch.uint8)))
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (one, each)), strict=True):
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-3, atol=1e-4)


def test_lists_of_steps_that_are_none():
    calls = [
        lambda kept: respace(SCHEDULE, kept),
        lambda kept: respaced_model(half, kept),
        lambda kept: walk(half, NOISE, kept, lambda x, i, eps_hat: (x, x)),
    ]
    for call in calls:
        refuses(lambda call=call: call(5), "kept must be a list of code indices; got 5 of type int", error=TypeError)
        refuses(lambda call=call: call(None), "kept must be a list of code indices; got None", error=TypeError)
        refuses(lambda call=call: call([0, 2.5]), "kept must be a whole number; got 2.5", error=TypeError)
        refuses(lambda call=call: call("03"), "kept must be a whole number", error=TypeError)
        refuses(lambda call=call: call([-1, 3]), "kept must be", "got -1")
        refuses(lambda call=call: call([]), "kept must hold at least one code index; got none")
        for fits in (range(2), torch.tensor([0, 1]), (i for i in (0, 1)), [0, 1]):
            call(fits)


@pytest.mark.parametrize("output", [None, (X, X), {"sample": X}, X.numpy()], ids=["none", "tuple", "dict", "array"])
def test_a_model_that_returns_no_tensor(output):
    """As the models of another library, which return a record whose field `sample` is the tensor."""
    model = lambda x, t: output
    calls = [
        lambda: simple_loss(model, SCHEDULE, X),
        lambda: vlb_terms(model, SCHEDULE, X, n_levels=17),
        lambda: hybrid_loss(model, SCHEDULE, X, n_levels=17),
        lambda: weighted_loss(model, SCHEDULE, X, t=STEPS, eps=NOISE, weights=torch.ones(T)),
        lambda: predict_noise(model, SCHEDULE, "eps")(X, STEPS),
        lambda: p_sample(model, SCHEDULE, X, 3),
        lambda: walk(model, X, [3, 0], lambda x, i, eps_hat: (x, x)),
        lambda: sample_ddim(model, SCHEDULE, X.shape, n_steps=2),
        lambda: score(model, SCHEDULE, X, 3),
        lambda: flow_matching_loss(model, X),
        lambda: sample_flow(model, X.shape, n_steps=2),
        lambda: sample_heun(model, X.shape, n_steps=2),
    ]
    for call in calls:
        refuses(call, f"the model's output must be a Tensor; got {type(output).__name__}", error=TypeError)


def test_a_model_that_returns_no_numbers_is_found_by_every_sampler():
    broken = lambda x, t: x * math.nan
    for sample in (sample_ddpm, sample_ddim, sample_dpm_solver, sample_sde):
        refuses(lambda sample=sample: sample(broken, make_schedule("cosine", 20), X.shape, **({} if sample is sample_sde else {"n_steps": 2})), "must be finite")
    for sample in (sample_flow, sample_heun):
        refuses(lambda sample=sample: sample(broken, X.shape, n_steps=2), "the model's output must be finite")


def test_times_and_shares_that_are_none():
    calls = {
        "share": lambda value: slerp(X, NOISE, value),
        "t": lambda value: velocity_from_eps(half, SCHEDULE)(NOISE, value),
        "sigma": lambda value: edm_denoiser(half, SCHEDULE)(NOISE, value),
    }
    for name, call in calls.items():
        for wrong in (None, "0.5", 1j):
            refuses(lambda call=call, wrong=wrong: call(wrong), f"{name} must be a number or a tensor; got {wrong!r}", error=TypeError)
        for wrong in (-0.5, math.nan, math.inf, torch.ones(3)):
            refuses(lambda call=call, wrong=wrong: call(wrong), f"{name} must be one number or (16,)")


def test_weights_and_variances_that_are_none():
    loss = lambda weights: weighted_loss(half, SCHEDULE, X, t=STEPS, eps=NOISE, weights=weights)
    refuses(lambda: loss([1.0] * T), "weights must be a torch.Tensor; got list", error=TypeError)
    refuses(lambda: loss(torch.ones(T).long()), "weights must have a floating-point dtype", error=TypeError)
    refuses(lambda: loss(torch.full((T,), math.inf)), "weights must be finite")
    refuses(lambda: normal_log_prob(X, X, 1.0), "variance must be a torch.Tensor; got float", error=TypeError)
    refuses(lambda: LossHistory(T).update(STEPS, [1.0] * 16), "losses must be a torch.Tensor; got list", error=TypeError)
    refuses(lambda: LossHistory(T).update(STEPS, torch.full((16,), math.nan)), "losses must be finite")
    refuses(lambda: rate_distortion(X), "terms must be a VLBTerms; got Tensor", error=TypeError)
    for call in (optimal_denoiser, optimal_variances):
        refuses(lambda call=call: call(SCHEDULE, GIVEN["mixture"]), "mixture must be a GaussianMixture; got NoiseSchedule", error=TypeError)


def test_noise_of_another_shape_is_not_stretched():
    refuses(lambda: objective_target(SCHEDULE, "v", X, NOISE, 3, NOISE[:1]), "eps must have the shape of x_0")
    refuses(lambda: weighted_loss(half, SCHEDULE, X, t=STEPS, eps=NOISE[:1], weights=torch.ones(T)), "eps must have the shape of")


def test_an_autoencoder_that_is_none_and_images_of_another_type():
    latents = torch.zeros(2, *AUTOENCODER.latent_shape)
    wanted = "autoencoder must be an Autoencoder; got Tensor"
    refuses(lambda: from_latents(latents, AUTOENCODER), wanted, error=TypeError)
    refuses(lambda: to_latents(X, AUTOENCODER), wanted, error=TypeError)
    refuses(lambda: fit_latent_scale(X, AUTOENCODER), wanted, error=TypeError)
    refuses(lambda: autoencoder_loss(X, AUTOENCODER, kl_weight=0.1), wanted, error=TypeError)
    refuses(lambda: train_autoencoder(X, AUTOENCODER), wanted, error=TypeError)
    words = "the model's input must be as its weights, torch.float32 on cpu; got torch.float64 on cpu"
    refuses(lambda: to_latents(AUTOENCODER, X.double()), words, error=TypeError)
    refuses(lambda: from_latents(AUTOENCODER, latents.double()), words, error=TypeError)
    refuses(lambda: from_latents(AUTOENCODER, latents.byte()), "z must have a floating-point dtype", error=TypeError)
    size = np.int64(1)
    assert from_latents(AUTOENCODER, to_latents(AUTOENCODER, X[:2], batch_size=size), batch_size=size).shape == X[:2].shape
    refuses(lambda: psnr(X * 127.5 + 127.5, X), "x must be scaled to [-1, 1]")


def test_an_empty_batch():
    """A mean over no image is refused; a step takes what is there."""
    none = X[:0]
    needs_one = "and at least one image"
    for call in (
        lambda: simple_loss(half, SCHEDULE, none),
        lambda: weighted_loss(half, SCHEDULE, none, t=STEPS[:0], eps=none, weights=torch.ones(T)),
        lambda: flow_matching_loss(half, none),
    ):
        refuses(call, "x_0 must have shape (B, ...)", needs_one)
    refuses(lambda: straightness(half, none), "x_T must have shape (B, ...)", needs_one)
    refuses(lambda: autoencoder_loss(AUTOENCODER, none, kl_weight=0.1), "x must have shape (B, ...)", needs_one)
    assert p_sample(half, SCHEDULE, none, 3)[0].shape == langevin(half, SCHEDULE, none, 3, n_steps=1).shape == none.shape


def test_tensors_of_other_modes_and_layouts():
    """What requires gradients, comes from inference mode or lies in steps gives the same numbers, without a warning."""
    with torch.inference_mode():
        inferred = X + 0
    apart = X.repeat(1, 1, 1, 2)[..., ::2]
    eps = NOISE.expand(T, *X.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (inferred, X.clone().requires_grad_(), apart.copy_(X)):
            assert vlb_terms(half, SCHEDULE, x, n_levels=17, eps=eps).kl.equal(vlb_terms(half, SCHEDULE, X, n_levels=17, eps=eps).kl)
            assert simple_loss(half, SCHEDULE, x, t=STEPS, eps=NOISE).equal(simple_loss(half, SCHEDULE, X, t=STEPS, eps=NOISE))
            assert sample_ddim(half, SCHEDULE, X.shape, n_steps=3, x_T=x).equal(sample_ddim(half, SCHEDULE, X.shape, n_steps=3, x_T=X))
            simple_loss(MODEL, SCHEDULE, x).backward()


def test_a_network_as_a_shape_is_not_printed_in_full():
    with pytest.raises(TypeError, match="shape must be that of a batch") as caught:
        sample_ddim(MODEL, SCHEDULE, MODEL)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("wrong", [None, 5, ["run"], ""])
def test_a_place_that_is_no_path(wrong):
    """Told under the argument's name, before anything is read or written."""
    refuses(lambda: find_model(wrong, "."), "name_or_path must be a path that is not empty", f"got {wrong!r}")
    refuses(lambda: save_pretrained(wrong, MODEL, SCHEDULE), "path must be a path that is not empty", f"got {wrong!r}")
    if wrong is not None:
        refuses(lambda: train(MODEL, SCHEDULE, X, QUICK, out=wrong, progress=False), "out must be a path that is not empty", f"got {wrong!r}")


def test_a_card_a_choice_and_classes_of_another_kind(tmp_path):
    refuses(lambda: save_pretrained(tmp_path / "it", MODEL, SCHEDULE, card=["a model"]), "card must be a dict; got list", error=TypeError)
    refuses(lambda: save_pretrained(tmp_path / "it", MODEL, SCHEDULE, objective=np.array(["v", "eps"])), "objective must be one of 'eps'")
    assert not (tmp_path / "it").exists()
    digits = ImageDataset((X * 0).byte(), STEPS % 2, n_levels=17, classes=(3, 8))
    assert digits.classes == ("3", "8") and "2 classes: 3, 8" in repr(digits)


LEVELS = (X * 0).byte()
OTHER_KINDS = {
    "a loss": (lambda: fit(MODEL, SCHEDULE, X, QUICK, loss=5), "loss must be callable as loss(model, schedule, x_0, ...)", "got int"),
    "watchers": (lambda: fit(MODEL, SCHEDULE, X, QUICK, watchers=5), "watchers must be a list of objects with the methods of `Watcher`", "got 5 of type int"),
    "a watcher": (lambda: fit(MODEL, SCHEDULE, X, QUICK, watchers=Watcher()), "watchers must be a list of objects", "of type Watcher"),
    "a watcher in a list": (lambda: fit(MODEL, SCHEDULE, X, QUICK, watchers=[5]), "watchers[0] is of type int, which lacks start, step, line"),
    "a watcher's class": (lambda: fit(MODEL, SCHEDULE, X, QUICK, watchers=[Watcher(), Watcher]), "watchers[1] is a class: Watcher() is one"),
    "processes": (lambda: fit(MODEL, SCHEDULE, X, QUICK, processes=2), "processes must be Processes(device)", "got 2 of type int"),
    "processes of a run": (lambda: train(MODEL, SCHEDULE, X, QUICK, processes=2), "processes must be Processes(device)", "got 2 of type int"),
    "sparse images": (lambda: simple_loss(MODEL, SCHEDULE, X.to_sparse()), "x_0 must be a dense tensor", "got torch.sparse_coo"),
    "sparse images, held out": (lambda: train(MODEL, SCHEDULE, X, QUICK, held_out=X.to_sparse()), "held_out must be a dense tensor", "got torch.sparse_coo"),
    "sparse levels": (lambda: ImageDataset(LEVELS.to_sparse(), n_levels=17), "levels must be a dense tensor", "got torch.sparse_coo"),
    "levels": (lambda: ImageDataset(5, n_levels=17), "levels must be whole numbers, a tensor of shape (N, C, H, W); got int"),
    "levels of NumPy": (lambda: ImageDataset(LEVELS.numpy(), n_levels=17), "levels must be whole numbers, a tensor of shape (N, C, H, W); got ndarray"),
    "labels": (lambda: ImageDataset(LEVELS, "abc", n_levels=17), "labels must be whole numbers of shape (N,); got 'abc' of type str"),
    "classes": (lambda: ImageDataset(LEVELS, n_levels=17, classes=3), "classes must be a list with the name of each class; got 3 of type int"),
    "files": (lambda: find_parts("text"), "files must be a list of relative paths", "got 'text' of type str"),
    "a file": (lambda: find_parts(["train/a.png", 5]), "files must be a list of relative paths", "files[1] is 5 of type int"),
    "a picture": (lambda: read_picture(None, 8), "path must be a path that is not empty", "got None"),
    "a device of batches": (lambda: train_batches(X, 4, device="gpu"), "device must be a device of this machine", "got 'gpu'"),
    "a device of an order": (lambda: batch_order(16, 4, device="gpu"), "device must be a device of this machine", "got 'gpu'"),
    "a device of a flow": (lambda: sample_flow(half, X.shape, n_steps=1, device="gpu"), "device must be a device of this machine", "got 'gpu'"),
    "a device of processes": (lambda: Processes("gpu"), "device must be 'cpu' or 'cuda'; got 'gpu'"),
}


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_arguments_of_another_kind(what):
    """Told before any work: no network is changed, no bar is shown."""
    call, *words = OTHER_KINDS[what]
    before = [weights.clone() for weights in MODEL.parameters()]
    refuses(call, *words, error=(TypeError, ValueError))
    assert all(map(torch.equal, before, MODEL.parameters()))


def test_a_torchvision_of_another_torch(monkeypatch, tmp_path):
    """As when torch alone was upgraded: its operators are missing, and importing it fails."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    words = ("the set needs a torchvision that can be imported with torch", "pip install --upgrade torch torchvision")
    refuses(lambda: load_torchvision("mnist", root=tmp_path), *words, error=RuntimeError)
