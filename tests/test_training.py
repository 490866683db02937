"""Training: reproducible, averaging parameters only, refusing what cannot work, writing whole runs."""

import json

import pytest
import torch
from torch import nn

from ddpm_nb.data import load_images
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.hub import load_pretrained
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import EMA, TrainConfig, lr_factor, train
from ddpm_nb.unet import make_unet

TINY = {"base_channels": 8, "channel_mults": (1, 1), "attn_resolutions": ()}
QUICK = TrainConfig(n_iterations=3, batch_size=8, precision="float32")


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return make_unet("digits", **TINY)


def run(config=QUICK, **options):
    return train(tiny_unet(), make_schedule("cosine", 20), load_images("digits")[:32], config, progress=False, **options)


def test_equal_seeds_give_equal_weights_whatever_the_global_state():
    first = run()
    torch.manual_seed(99)
    torch.randn(7)
    second = run()
    assert first.losses.equal(second.losses)
    assert all(a.equal(b) for a, b in zip(first.ema.parameters(), second.ema.parameters(), strict=True))
    other = run(TrainConfig(n_iterations=3, batch_size=8, precision="float32", seed=1))
    assert not other.losses.equal(first.losses)


def test_training_leaves_global_random_state_alone():
    model = tiny_unet()
    before = torch.get_rng_state()
    train(model, make_schedule("cosine", 20), load_images("digits")[:32], QUICK, progress=False)
    assert torch.get_rng_state().equal(before)


def test_training_learns_a_single_point():
    """One image only: the noise is (x_t - sqrt(a) x_0) / sqrt(1 - a), and a linear model per step can learn it."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.shift = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 1))

        def forward(self, x, t):
            return self.slope[t] * x + self.shift[t]

    schedule, model = NoiseSchedule(torch.full((5,), 0.3)), Affine()
    config = TrainConfig(n_iterations=800, batch_size=64, lr=0.05, ema_decay=0.9, precision="float32")
    result = train(model, schedule, torch.full((64, 1), 0.7), config, range_check=False, progress=False)
    assert result.losses[0] > 0.5 and result.losses[-50:].mean() < 1e-3
    torch.testing.assert_close(result.ema.slope[:, 0], schedule.sqrt_one_minus_alpha_bars.reciprocal(), rtol=0.05, atol=0)


def test_ema_averages_parameters_and_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 5
    for n in range(1, 4):
        ema.update(model)
        decay = min(0.9, n / (10 + n))
        start = decay * start + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(ema.model[0].weight, start)
    assert ema.model[1].running_mean.equal(model[1].running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training


def test_learning_rate_counts_optimiser_steps():
    config = TrainConfig(n_iterations=100, warmup=9)
    factors = torch.tensor([lr_factor(config, i) for i in range(100)])
    assert factors[0] == pytest.approx(0.1, rel=1e-3) and factors.argmax() == 9
    assert (factors[9:].diff() < 0).all() and factors[-1] > 0


def test_a_run_on_disk_holds_the_averaged_model(tmp_path):
    result = run(out=tmp_path / "run", card={"data": "digits"})
    model, schedule = load_pretrained(tmp_path / "run")
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), result.ema.state_dict().values(), strict=True))
    assert schedule.n_steps == 20 and not model.training
    settings = json.loads((tmp_path / "run" / "train.json").read_text())
    assert settings["batch_size"] == 8 and settings["seed"] == 0
    expected = ["README.md", "config.json", "losses.json", "model.safetensors", "train.json"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == expected


def test_a_run_is_never_overwritten(tmp_path):
    run(out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny_unet()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OSError, match="cannot be written"):
        train(model, make_schedule("cosine", 20), load_images("digits")[:32], QUICK, out=tmp_path / "file" / "run")
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_unet()
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is not finite at or shortly before iteration 2"):
        train(model, make_schedule("cosine", 20), load_images("digits")[:32], QUICK, out=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(32, 8, 8), r"images must have shape \(B, C, H, W\); got \(32, 8, 8\)"),
        (torch.full((32, 1, 8, 8), 255.0), r"images must be scaled to \[-1, 1\]; got values from 255 to 255"),
        (torch.full((32, 1, 8, 8), float("nan")), "images must be finite"),
        (torch.zeros(4, 1, 8, 8), "batch_size must be at most the number of images, 4; got 8"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_unet(), make_schedule("cosine", 20), images, QUICK)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 0}, ValueError, "lr must be finite and in"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got 'fast'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"n_iterations": 1.5}, TypeError, "n_iterations must be a whole number; got 1.5"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be finite and in"),
        ({"precision": "float16"}, ValueError, "precision must be one of 'auto', 'float32', 'bfloat16'; got 'float16'"),
        ({"objective": "noise"}, ValueError, "objective must be one of"),
        ({"lr_decay": "step"}, ValueError, "lr_decay must be one of 'cosine', 'constant'; got 'step'"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**settings)
