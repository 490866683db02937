"""What a first user tries that cannot work: each gets a sentence that says what is wanted."""

import inspect
import warnings
from pathlib import Path

import pytest
import rules
import torch
from torch.utils.data import DataLoader

from conftest import refuses
from ddpm_nb import bound
from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_images
from ddpm_nb.elbo import simple_loss
from ddpm_nb.gaussian import GaussianMixture
from ddpm_nb.results import Yardstick
from ddpm_nb.runs import train
from ddpm_nb.sampling import sample_ddim, sample_ddpm, sample_dpm_solver
from ddpm_nb.schedules import make_schedule
from ddpm_nb.scores import sample_sde
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import make_unet

SCHEDULE = make_schedule("cosine", 100)
MODEL = make_unet("digits", base_channels=8)
X = load_images("digits")[:16]
QUICK = TrainConfig(n_iterations=1, batch_size=4, warmup=0, precision="float32")
MASK = torch.ones(8, 8, dtype=torch.bool)


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
HEARS_WORDS = {"conditioning"}  # whose models take a third argument


def public_functions():
    """Yield every public function of the package outside the checks, with its name and the names of its parameters."""
    for path in sorted(Path(bound.__file__).parent.glob("[a-z]*.py")):
        for name, function in rules.public_objects(path.stem):
            if inspect.isfunction(function) and path.stem not in {"checks", *HEARS_WORDS}:
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
    needed = [p for p, found in inspect.signature(function).parameters.items() if found.default is found.empty]
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
