"""Training: the step is Algorithm 1, the settings reach it, the average follows, and nothing else is touched."""

import copy
import math
import os
import random
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from training_helpers import (
    CPU,
    N_STEPS,
    QUICK,
    Affine,
    Stop,
    Streamed,
    all_equal,
    at,
    die,
    make_data,
    make_trainer,
    run,
    tiny_unet,
)

from conftest import refuses
from ddpm_nb import training
from ddpm_nb.data import train_batches
from ddpm_nb.elbo import simple_loss
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import (
    EMA,
    TrainConfig,
    Watcher,
    descend,
    fit,
    lr_factor,
    make_optimizer,
    pick_precision,
)


@pytest.fixture(scope="module")
def undisturbed():
    """Return the result of a run without a folder."""
    return run()


# --- results are kept ---


SUMS = {  # made by the first version, through Accelerate: sum of the losses, sum of the averaged weights
    "plain": ({}, 7.9425119161605835, 182.12245920853547),
    "parts": ({"n_accumulate": 2}, 7.942150950431824, 181.94994083707138),
    "v": ({"objective": "v", "weighting": "vlb", "weight_decay": 0.1}, 43.64196038246155, 183.14286183437548),
    "bfloat16": ({"precision": "bfloat16"}, 7.9425511956214905, 182.1075759347136),
}


@pytest.mark.parametrize("name", SUMS)
def test_results_are_those_of_the_first_version(name):
    changes, losses, weights = SUMS[name]
    if torch.__version__ < torch.torch_version.TorchVersion("2.15"):
        pytest.skip("older kernels round otherwise, and Adam's first steps make much of it: weights differ by 2 in 1,000 on 2.6")
    result = run(replace(QUICK, **changes), model=tiny_unet(norm_groups=2))  # groups of more than one channel: no rounding grows
    # processors differ in how they multiply 16 bits: ten times what another one changed
    rounding = {"losses": 1e-4, "weights": 1e-3} if name == "bfloat16" else {"losses": 1e-5, "weights": 1e-5}
    assert result.losses.double().sum().item() == pytest.approx(losses, rel=rounding["losses"])
    assert sum(p.double().sum().item() for p in result.ema.parameters()) == pytest.approx(weights, rel=rounding["weights"])


# --- one descent for all ---


def test_descend_is_the_loop_written_out():
    """Gradient, rate, clip, step: with groups of their own, and without a limit on the gradient, equal to the last bit."""
    x, config = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), TrainConfig(n_iterations=20, lr=0.1, warmup=4)

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3))

    for clip, group in ((0.01, {}), (math.inf, {}), (math.inf, {"betas": (0.5, 0.9), "weight_decay": 0.1, "fused": False})):
        one, other = net(), net()
        optimizer = torch.optim.AdamW([{"params": other.parameters(), **group}], weight_decay=0.0, fused=group.get("fused", True))
        losses = []
        for i in range(20):
            optimizer.param_groups[0]["lr"] = 0.1 * min(1, (i + 1) / 5) * 0.5 * (1 + math.cos(math.pi * i / 20))
            loss = (other(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if clip < math.inf:
                nn.utils.clip_grad_norm_(other.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
        parameters = [{"params": one.parameters(), **group}] if group else None
        one[0].weight.grad = torch.ones_like(one[0].weight)  # what a caller left is not added
        seen = list(descend(one, replace(config, grad_clip=clip), lambda i: (one(x) - x).square().mean(), parameters=parameters))  # noqa: B023
        assert [i for i, _ in seen] == list(range(20)) and [loss.item() for _, loss in seen] == losses
        assert not any(loss.requires_grad for _, loss in seen) and all_equal(one.parameters(), other.parameters())


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_a_trainer_descends_by_the_lines_of_descend(clip, monkeypatch):
    """Rate and clip are written once, and both come to the same weights, to the last bit."""
    calls, lines = [], training._rate_and_clip
    monkeypatch.setattr(training, "_rate_and_clip", lambda *rest: calls.append(rest[-1]) or lines(*rest))
    config, x = replace(QUICK, grad_clip=clip), make_data("tensor")[:8]
    trainer = make_trainer(config, tiny_unet(dropout=0.0))
    other, noise = tiny_unet(dropout=0.0), torch.Generator().manual_seed(config.seed)

    def loss_of(i):
        t = torch.randint(N_STEPS, (8,), generator=noise)
        eps = torch.randn(x.shape, generator=noise)
        return simple_loss(other, trainer.schedule, x, t=t, eps=eps, reduction="none").mean()

    for i, loss in descend(other, config, loss_of):
        _, losses = trainer.step(x)
        assert losses.mean() == loss and all_equal(trainer.network.parameters(), other.parameters())
        assert calls == [number for number in range(i + 1) for _ in range(2)]


# --- the step ---


def test_the_loop_takes_the_batches_in_their_order(undisturbed):
    """The run is Algorithm 1 on the batches of the chapter on data, from the first on, mirrored where they are."""
    trainer, order = make_trainer(), {"seed": QUICK.seed, "flip": True}
    batches = train_batches(make_data(), QUICK.batch_size, **order)
    losses = torch.stack([trainer.step(next(batches))[1].mean() for _ in range(6)])  # into the second epoch
    assert losses.equal(undisturbed.losses[:6])


def record_gradients(monkeypatch):
    """Note the gradients before and after clipping."""
    seen, clip = [], nn.utils.clip_grad_norm_

    def watched(parameters, norm):
        parameters = list(parameters)
        before = [p.grad.clone() for p in parameters]
        result = clip(parameters, norm)
        seen.append((before, [p.grad.clone() for p in parameters], norm))
        return result

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    return seen


@pytest.mark.parametrize("n_accumulate", [1, 2, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_batch(n_accumulate, monkeypatch):
    config, x = replace(QUICK, n_accumulate=n_accumulate, grad_clip=1e-3), make_data("tensor")[:8]
    model = tiny_unet(dropout=0.0)
    reference = copy.deepcopy(model)
    model.conv_in.weight.grad = torch.ones_like(model.conv_in.weight)  # what a caller left is not added
    trainer = make_trainer(config, model)
    seen = record_gradients(monkeypatch)
    generator = torch.Generator().manual_seed(config.seed)
    for n in range(2):
        t, losses = trainer.step(x)
        t_own = torch.randint(N_STEPS, (8,), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        assert t.equal(t_own) and len(seen) == n + 1
        if n == 0:  # later the weights have moved
            own = simple_loss(reference, trainer.schedule, x, t=t_own, eps=eps, reduction="none")
            own.mean().backward()
            torch.testing.assert_close(losses, own.detach())
            for a, b in zip(seen[0][0], reference.parameters(), strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-6)
    before, after, norm = seen[0]
    assert norm == 1e-3
    size = torch.cat([g.flatten() for g in before]).norm()
    assert size > 2e-3
    torch.testing.assert_close(torch.cat([g.flatten() for g in after]).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert all(p.grad is None or not p.grad.any() for p in trainer.network.parameters())


def test_an_infinite_limit_leaves_the_gradient_alone(monkeypatch):
    seen = record_gradients(monkeypatch)
    make_trainer(replace(QUICK, grad_clip=math.inf)).step(make_data("tensor")[:8])
    assert seen == []


@pytest.mark.parametrize(("objective", "weighting"), [("x_0", "simple"), ("v", "simple"), ("eps", "vlb"), ("velocity", "simple"), ("velocity", "vlb")])
def test_objective_and_weighting_reach_the_loss(objective, weighting):
    config, x = replace(QUICK, objective=objective, weighting=weighting), make_data("tensor")[:8]
    model = tiny_unet(dropout=0.0)
    reference, trainer, g = copy.deepcopy(model), make_trainer(config, model), torch.Generator().manual_seed(QUICK.seed)
    t, eps = torch.randint(N_STEPS, (8,), generator=g), torch.randn(x.shape, generator=g)
    options = {"objective": objective, "weighting": weighting, "reduction": "none"}
    own = simple_loss(reference, trainer.schedule, x, t=t, eps=eps, **options)
    torch.testing.assert_close(trainer.step(x)[1], own.detach())


def test_weight_decay_reaches_the_optimiser():
    optimizer = make_optimizer(nn.Linear(2, 2), replace(QUICK, weight_decay=0.25))
    assert isinstance(optimizer, torch.optim.AdamW) and {g["weight_decay"] for g in optimizer.param_groups} == {0.25}
    assert optimizer.defaults["fused"] and not make_optimizer(nn.Linear(2, 2), replace(QUICK, precision="float16")).defaults["fused"]


def test_learning_rate_rises_and_falls():
    config = TrainConfig(n_iterations=100, warmup=9)
    factors = torch.tensor([lr_factor(config, i) for i in range(100)])
    assert factors[0] == pytest.approx(0.1, rel=1e-3) and factors.argmax() == 9
    assert (factors[9:].diff() < 0).all() and 0 < factors[-1] < 0.01
    assert factors[60].item() == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.6)))
    constant = [lr_factor(replace(config, lr_decay="constant"), i) for i in range(100)]
    assert constant[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and set(constant[9:]) == {1.0}
    assert lr_factor(TrainConfig(warmup=0, lr_decay="constant"), 0) == 1


@pytest.mark.parametrize("n_accumulate", [1, 4])
def test_learning_rate_counts_optimiser_steps(n_accumulate):
    """Neither the parts of a batch nor processes count: a step is a step of the optimiser."""
    config, rates = replace(QUICK, n_accumulate=n_accumulate), []

    def look(trainer):
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups)
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {trainer.n_steps}

    run(config, callback=look)
    assert rates == pytest.approx([config.lr * lr_factor(config, i) for i in range(9)], rel=1e-12)


def test_skipped_steps_are_counted_and_leave_the_average_alone(monkeypatch):
    """A float16 gradient that overflowed halves the scale and moves nothing; the run says how often that was."""
    count, updates = [], []

    def get_scale(self):  # asked before and after each step; smaller after the second and the fifth
        count.append(1)
        return 0.5 if len(count) in (4, 10) else 1.0

    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", get_scale)
    result = run(callback=lambda trainer: updates.append((trainer.n_skipped, trainer.ema.n_updates)))
    assert updates == [(0, 1), (1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (2, 5), (2, 6), (2, 7)]
    assert result.n_skipped == 2


# --- precision ---


def test_precision_is_chosen_by_device():
    assert pick_precision("float32", CPU) == torch.float32 and pick_precision("float16", torch.device("cuda")) == torch.float16
    assert pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    refuses(lambda: pick_precision("double", CPU), "precision must be one of 'auto', 'float32'")
    refuses(lambda: run(replace(QUICK, precision="float16")), "precision='float16' needs a CUDA device; got cpu")


def test_bfloat16_computes_in_bfloat16_and_returns_float32(undisturbed):
    model, kinds = tiny_unet(), []
    hook = model.conv_out.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    half = run(replace(QUICK, precision="bfloat16"), model=model)
    assert set(kinds) == {torch.bfloat16} and half.losses.isfinite().all()
    assert all(p.dtype == torch.float32 for p in (*model.parameters(), *half.ema.parameters()))
    assert not half.losses.equal(undisturbed.losses)
    torch.testing.assert_close(half.losses, undisturbed.losses, rtol=0.1, atol=0.05)
    kinds.clear()
    assert model(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)).dtype == torch.float32
    assert kinds == [torch.float32] and "forward" not in vars(model)  # the network is as it was
    hook.remove()
    run(replace(QUICK, precision="bfloat16", n_iterations=1), model=model)  # a second run is as good
    assert run().losses.equal(undisturbed.losses)


def test_a_compiled_network_trains_the_original(undisturbed):
    network = tiny_unet()
    result = run(model=torch.compile(network, backend="eager"))
    assert result.losses.equal(undisturbed.losses) and type(result.ema) is type(network)


# --- what is left alone ---


def test_equal_seeds_give_equal_weights_whatever_the_global_state(undisturbed):
    torch.manual_seed(99)
    torch.randn(7)
    second = run()
    assert second.losses.equal(undisturbed.losses) and all_equal(second.ema.parameters(), undisturbed.ema.parameters())
    other = run(replace(QUICK, seed=4, n_iterations=2))
    assert not other.losses.equal(second.losses[:2])


def test_training_leaves_the_program_as_it_found_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    before, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    environment, mode = dict(os.environ), torch.is_grad_enabled()
    run(replace(QUICK, n_iterations=2), kind="streamed")
    assert torch.get_rng_state().equal(before)
    with pytest.raises(Stop):
        run(callback=die)
    assert torch.get_rng_state().equal(before) and torch.is_grad_enabled() == mode
    assert random.getstate() == python and all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert dict(os.environ) == environment


def test_the_callers_accelerate_is_left_alone():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run(replace(QUICK, n_iterations=1))
        assert not PartialState._shared_state and not AcceleratorState._shared_state
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
        run(replace(QUICK, n_iterations=1))
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 4)
        Accelerator(cpu=True, mixed_precision="bf16")  # another one is not refused
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_callback_that_draws_does_not_change_the_run(undisturbed):
    drawn = []

    def draw(trainer):
        torch.manual_seed(7)
        drawn.append(torch.randn(3))
        trainer.ema.model(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))

    result = run(callback=draw)
    assert len(drawn) == 9 and result.losses.equal(undisturbed.losses)


def test_dropout_is_on_in_training_and_off_in_the_average(undisturbed):
    model = tiny_unet().eval()
    result = run(model=model)  # train mode is set, whatever it was
    assert result.losses.equal(undisturbed.losses) and not result.ema.training
    assert not run(model=tiny_unet(dropout=0.0)).losses.equal(undisturbed.losses)


def test_off_a_terminal_nothing_is_printed(capfd):
    run(replace(QUICK, n_iterations=2), progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# --- watchers ---


class Notes(Watcher):
    """Write down what happens."""

    def __init__(self, stop_at=None):
        self.notes, self.stop_at = [], stop_at

    def start(self, trainer):
        self.notes.append("start")

    def step(self, trainer, t, losses):
        assert t.shape == losses.shape == (8,) and not losses.requires_grad
        self.notes.append(trainer.n_steps)
        if trainer.n_steps == self.stop_at:
            trainer.stop = "enough"

    def line(self, trainer, losses):
        self.notes.append(("line", len(losses)))

    def checkpoint(self, trainer):
        self.notes.append("checkpoint")

    def close(self):
        self.notes.append("close")


def fit_watched(watcher, callback=None):
    config = replace(QUICK, n_iterations=7, log_every=2, checkpoint_every=3)
    schedule = make_schedule("cosine", N_STEPS)
    return fit(tiny_unet(), schedule, make_data(), config, watchers=[watcher, Watcher()], callback=callback, progress=False)


def test_watchers_are_told_of_the_moments_of_a_run():
    watcher = Notes()
    result = fit_watched(watcher)
    save = [("line", 1), "checkpoint"]
    assert watcher.notes == ["start", 1, 2, ("line", 2), 3, *save, 4, ("line", 1), 5, 6, ("line", 2), "checkpoint", 7, *save, "close"]
    assert len(result.losses) == 7 and result.seconds > 0


def test_a_watcher_can_end_a_run():
    watcher = Notes(stop_at=4)
    assert len(fit_watched(watcher).losses) == 4
    assert watcher.notes[-4:] == [4, ("line", 1), "checkpoint", "close"]


def test_watchers_are_closed_when_a_run_dies():
    watcher = Notes()
    with pytest.raises(Stop):
        fit_watched(watcher, callback=at(2, act=die))
    assert watcher.notes[-1] == "close" and watcher.notes.count("close") == 1


# --- the moving average ---


def test_ema_averages_parameters_and_copies_buffers():
    """Averaged buffers give black images: the running statistics and counters of a network are not weights."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 5
        model[1].num_batches_tracked += 7
    for n in range(1, 4):
        ema.update(model)
        decay = min(0.9, n / (10 + n))
        start = decay * start + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(ema.model[0].weight, start)
        assert ema.model[1].running_mean.equal(model[1].running_mean) and ema.model[1].num_batches_tracked == 7
    assert ema.model[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training and model.training


def test_ema_in_closed_form():
    """With decays d_1 .. d_n the average is sum_i (1 - d_i) prod_{j > i} d_j w_i, and the rest of the initial weight."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.3)
    values = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = model.weight.item()
    decays = [min(0.3, n / (10 + n)) for n in range(1, 41)]
    assert decays[3] < 0.3 == decays[4]  # the warm-up ends within the test
    products = [math.prod(decays[i + 1 :]) for i in range(40)]
    expected = expected * math.prod(decays) + sum((1 - d) * p * v.item() for d, p, v in zip(decays, products, values, strict=True))
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5) and ema.n_updates == 40


def test_ema_warms_up():
    """Without a warm-up, 0.9999 ** 100 = 99 % of the average would be the initial weights after a hundred steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.zeros_(model.weight)
    for _ in range(100):
        ema.update(model)
    assert ema.model.weight.item() < 1e-6


def test_ema_follows_the_weights_of_every_step():
    trainer, x = make_trainer(), make_data("tensor")[:8]
    own = EMA(trainer.network, QUICK.ema_decay)
    for _ in range(4):
        trainer.step(x)
        own.update(trainer.network)
    assert trainer.ema.n_updates == 4 and all_equal(own.model.parameters(), trainer.ema.model.parameters())


def test_ema_refuses_a_bad_decay():
    for decay in (-0.1, 1.0, math.nan):
        refuses(lambda decay=decay: EMA(nn.Linear(1, 1), decay), "decay must be finite and in")


# --- learning, and what is refused ---


def test_training_learns_a_single_point():
    """One image only: the noise is (x_t - sqrt(a) x_0) / sqrt(1 - a), and a linear model per step can learn it."""

    class ByStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.shift = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 1))

        def forward(self, x, t):
            return self.slope[t] * x + self.shift[t]

    schedule, model = NoiseSchedule(torch.full((5,), 0.3)), ByStep()
    config = TrainConfig(n_iterations=300, batch_size=64, lr=0.1, ema_decay=0.9, precision="float32")
    result = fit(model, schedule, torch.full((64, 1), 0.7), config, range_check=False, progress=False)
    assert result.losses[0] > 0.5 and result.losses[-50:].mean() < 1e-3
    torch.testing.assert_close(result.ema.slope[:, 0], schedule.sqrt_one_minus_alpha_bars.reciprocal(), rtol=0.05, atol=0)


def test_a_loss_that_is_not_finite_names_step_and_rate():
    def break_it(trainer):
        with torch.no_grad():
            trainer.network.conv_out.bias.fill_(math.nan)

    config = replace(QUICK, n_iterations=20, log_every=16, checkpoint_every=8)
    words = f"not finite at iteration 11 (lr {config.lr * lr_factor(config, 11):.3g}); try a smaller lr"
    refuses(lambda: run(config, callback=at(11, act=break_it)), words, error=FloatingPointError)


def test_bad_data_is_refused_before_the_work():
    schedule = make_schedule("cosine", 20)
    for images, words, error in (
        (torch.zeros(32, 8, 8), "must have shape (B, C, H, W); got (32, 8, 8)", ValueError),
        (torch.full((32, 1, 8, 8), 255.0), "must be scaled to [-1, 1]; got values from 255 to 255", ValueError),
        (torch.full((32, 1, 8, 8), math.nan), "must be finite", ValueError),
        (torch.zeros(32, 1, 8, 8, dtype=torch.uint8), "must have a floating-point dtype", TypeError),
        (torch.zeros(4, 1, 8, 8), "batch_size must be at most the number of images, 4; got 8", ValueError),
        (Streamed(torch.zeros(4, 1, 8, 8)), "batch_size must be at most the number of images, 4; got 8", ValueError),
    ):
        refuses(lambda images=images: fit(tiny_unet(), schedule, images, QUICK, callback=die), words, error=error)
    words = "batch_size must be a multiple of 1 processes x 3 parts; got 8 with n_accumulate=3"
    refuses(lambda: run(replace(QUICK, n_accumulate=3), callback=die), words)
    refuses(lambda: run(kind="streamed", n_workers=-1, callback=die), "n_workers must be at least 0; got -1")


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    call = lambda **options: fit(Affine(), make_schedule("cosine", 20), make_data(), replace(QUICK, n_iterations=1), **options)
    refuses(call, "one of 2 processes (WORLD_SIZE); pass processes=Processes(device)")
    call(processes=training.OneProcess())  # whoever says so trains alone


def test_bad_settings_are_refused():
    for settings, words, error in (
        ({"lr": 0}, "lr must be finite and in", ValueError),
        ({"lr": math.nan}, "lr must be finite and in", ValueError),
        ({"lr": math.inf}, "lr must be finite and in", ValueError),
        ({"lr": "fast"}, "lr must be a number; got 'fast'", TypeError),
        ({"grad_clip": 0}, "grad_clip must be above 0, or math.inf; got", ValueError),
        ({"grad_clip": -math.inf}, "grad_clip must be above 0, or math.inf; got", ValueError),
        ({"weight_decay": -1}, "weight_decay must be finite and in", ValueError),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0", ValueError),
        ({"n_accumulate": 0}, "n_accumulate must be at least 1; got 0", ValueError),
        ({"n_iterations": 1.5}, "n_iterations must be a whole number; got 1.5", TypeError),
        ({"n_iterations": True}, "n_iterations must be a whole number", TypeError),
        ({"warmup": -1}, "warmup must be at least 0; got -1", ValueError),
        ({"log_every": 0}, "log_every must be at least 1; got 0", ValueError),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1; got 0", ValueError),
        ({"keep": 0}, "keep must be at least 1; got 0", ValueError),
        ({"ema_decay": 1.0}, "ema_decay must be finite and in", ValueError),
        ({"precision": "half"}, "precision must be one of 'auto', 'float32', 'bfloat16', 'float16'; got 'half'", ValueError),
        ({"objective": "noise"}, "objective must be one of", ValueError),
        ({"weighting": "snr"}, "weighting must be one of", ValueError),
        ({"lr_decay": "step"}, "lr_decay must be one of 'cosine', 'constant'; got 'step'", ValueError),
        ({"seed": -1}, "seed must be at least 0; got -1", ValueError),
    ):
        refuses(lambda settings=settings: TrainConfig(**settings), words, error=error)
    assert TrainConfig(grad_clip=math.inf).grad_clip == math.inf
    with pytest.raises(FrozenInstanceError):
        QUICK.lr = 1.0
