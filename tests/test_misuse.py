"""What a first user tries that cannot work: each gets a sentence that says what is wanted."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import refuses
from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_images
from ddpm_nb.evaluation import bits_per_dim
from ddpm_nb.runs import train
from ddpm_nb.sampling import ddim_invert, inpaint, sample_ddim, sample_ddpm, sample_dpm_solver
from ddpm_nb.schedules import make_schedule
from ddpm_nb.scores import flow_log_likelihood, sample_sde
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


TAKES_MODEL_AND_SCHEDULE = {
    "train": lambda a, b: train(a, b, X, QUICK),
    "fit": lambda a, b: fit(a, b, X, QUICK),
    "ddpm": lambda a, b: sample_ddpm(a, b, (1, 1, 8, 8)),
    "ddim": lambda a, b: sample_ddim(a, b, (1, 1, 8, 8)),
    "dpm": lambda a, b: sample_dpm_solver(a, b, (1, 1, 8, 8)),
    "sde": lambda a, b: sample_sde(a, b, (1, 1, 8, 8)),
    "invert": lambda a, b: ddim_invert(a, b, X[:1]),
    "inpaint": lambda a, b: inpaint(a, b, X[:1], MASK),
    "likelihood": lambda a, b: flow_log_likelihood(a, b, X[:1], n_steps=2),
    "bits": lambda a, b: bits_per_dim(a, b, X[:2], n_levels=17),
}


@pytest.mark.parametrize("name", TAKES_MODEL_AND_SCHEDULE)
def test_a_model_and_a_schedule_that_are_swapped_or_none(name):
    call = TAKES_MODEL_AND_SCHEDULE[name]
    refuses(lambda: call(SCHEDULE, MODEL), "model and schedule are swapped", error=TypeError)
    refuses(lambda: call(SCHEDULE, SCHEDULE), "model must be callable as model(x_t, t); got NoiseSchedule", error=TypeError)
    refuses(lambda: call("digits", SCHEDULE), "model must be callable as model(x_t, t); got str", error=TypeError)
    refuses(lambda: call(MODEL, SCHEDULE.betas), "schedule must be a NoiseSchedule", "got Tensor", error=TypeError)


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
