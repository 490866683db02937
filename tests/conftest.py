"""What several test files use."""

import os
import re

os.environ.pop("TQDM_DISABLE", None)  # before tqdm reads it: tests of bars see bars, whatever the caller's shell says

import pytest
import torch

from ddpm_nb.data import load_dataset
from ddpm_nb.forward import NoiseSchedule


def refuses(call, *words, error=ValueError):
    """Assert that a call raises an error whose message holds all the given words."""
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if not re.search(re.escape(word), str(caught.value))]
    assert not missing, f"{caught.value!s} lacks {missing}"


def linear(n_steps, dtype=torch.float64):
    """Build DDPM's schedule, rescaled so that a short chain ends in noise as well."""
    scale = 1000 / n_steps
    return NoiseSchedule(torch.linspace(1e-4 * scale, min(0.02 * scale, 0.9), n_steps, dtype=torch.float64), dtype=dtype)


def never(x_t, t):
    """Stand for a network that must not be reached."""
    raise AssertionError("the network was called before the arguments were checked")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def digits():
    """Load the training digits once, (1500, 1, 8, 8) in [-1, 1]."""
    return load_dataset("digits").images()


@pytest.fixture(autouse=True)
def own_seed():
    """Start every test from the same global seed, whatever ran before it."""
    torch.manual_seed(0)
