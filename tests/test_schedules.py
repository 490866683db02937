"""Schedules against numbers computed independently, against diffusers, and the forms that users got wrong."""

import inspect
import math
from fractions import Fraction

import mpmath
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import refuses
from ddpm_nb.forward import NoiseSchedule, predict_x_0, q_posterior, q_sample
from ddpm_nb.schedules import (
    SCHEDULES,
    betas_from_alpha_bars,
    cosine_betas,
    linear_betas,
    make_schedule,
    sigmoid_betas,
)

mpmath.mp.dps = 60
exactly = settings(deadline=None, max_examples=40)
steps = st.integers(1, 300)


def relative_error(values, exact):
    """Compare float64 values with numbers of arbitrary precision."""
    return max(abs(float((mpmath.mpf(v) - e) / e)) for v, e in zip(values.double().tolist(), exact, strict=True))


def alpha_bars_of(betas):
    """Multiply 1 - beta with 60 digits."""
    product, products = mpmath.mpf(1), []
    for beta in betas.tolist():
        product *= 1 - mpmath.mpf(beta)
        products.append(product)
    return products


# Values


@pytest.mark.parametrize(("n_steps", "rescale"), [(2, False), (10, False), (137, False), (137, True), (1000, True)])
def test_linear_values(n_steps, rescale):
    low, high = Fraction(1, 10_000), Fraction(2, 100)
    scale = Fraction(1000, n_steps) if rescale else 1
    exact = [scale * (low + (high - low) * Fraction(i, n_steps - 1)) for i in range(n_steps)]
    exact = [mpmath.mpf(e.numerator) / e.denominator for e in exact]
    assert relative_error(linear_betas(n_steps, rescale=rescale), exact) < 1e-14


def cosine_exactly(n_steps, s):
    f = [mpmath.cos((mpmath.mpf(t) / n_steps + s) / (1 + s) * mpmath.pi / 2) ** 2 for t in range(n_steps + 1)]
    return [1 - f[t] / f[t - 1] for t in range(1, n_steps + 1)]


def sigmoid_exactly(n_steps, start, end, tau):
    v = [mpmath.mpf(start) / tau + mpmath.mpf(t) / n_steps * (mpmath.mpf(end) - start) / tau for t in range(n_steps + 1)]
    sigma = [1 / (1 + mpmath.exp(-x)) for x in v]
    curve = [(sigma[-1] - x) / (sigma[-1] - sigma[0]) for x in sigma]
    return [1 - curve[t] / curve[t - 1] for t in range(1, n_steps + 1)]


@pytest.mark.parametrize(("n_steps", "s"), [(1, 0.008), (10, 0.5), (100, 0.0), (1000, 0.008), (1000, 0.0)])
def test_cosine_values(n_steps, s):
    exact = [min(b, mpmath.mpf(0.999)) for b in cosine_exactly(n_steps, mpmath.mpf(s))]
    assert relative_error(cosine_betas(n_steps, s), exact) < 1e-9


@pytest.mark.parametrize(
    ("n_steps", "start", "end", "tau"),
    [(1, -3, 3, 1.0), (10, 0, 3, 0.3), (100, -6, 2, 0.9), (1000, -3, 3, 0.3), (1000, -3, 40, 0.5)],
)
def test_sigmoid_values(n_steps, start, end, tau):
    exact = [min(b, mpmath.mpf(0.999)) for b in sigmoid_exactly(n_steps, start, end, mpmath.mpf(tau))]
    assert relative_error(sigmoid_betas(n_steps, start, end, tau), exact) < 1e-8


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 25, 1000])
def test_stored_coefficients_are_rounded_once(name, n_steps):
    """The float32 buffers hold the exact products and differences, rounded; a subtraction from 1 in float32 would not."""
    schedule = make_schedule(name, n_steps)
    products = alpha_bars_of(schedule.exact_betas)
    exact = {
        "alpha_bars": products,
        "one_minus_alpha_bars": [1 - p for p in products],
        "snr": [p / (1 - p) for p in products],
    }
    for key, values in exact.items():
        assert relative_error(getattr(schedule, key), values) < 2**-23, key
    naive = 1 - (1 - schedule.betas).cumprod(0)
    assert n_steps < 1000 or relative_error(naive, exact["one_minus_alpha_bars"]) > 1e-5


@pytest.mark.parametrize(("n_steps", "percent"), [(200, 36), (300, 22), (1000, 1)])
def test_amplitude_left_by_the_range_of_1000_steps(n_steps, percent):
    amplitude = float(alpha_bars_of(linear_betas(n_steps))[-1]) ** 0.5
    assert round(100 * amplitude) == percent
    if n_steps == 1000:
        assert round(amplitude, 3) == 0.006


# Parity


@pytest.mark.parametrize("n_steps", [10, 100, 1000])
@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_parity_with_diffusers(name, theirs, n_steps):
    peer, ours = DDPMScheduler(num_train_timesteps=n_steps, beta_schedule=theirs), make_schedule(name, n_steps)
    for key, other in (("betas", "betas"), ("alphas", "alphas"), ("alpha_bars", "alphas_cumprod")):
        assert_close(getattr(ours, key), getattr(peer, other).float(), atol=1e-6, rtol=0)


def test_sigmoid_is_not_the_variance_schedule_of_this_name():
    """diffusers puts the variances on a logistic curve, the paper that is followed here puts alpha-bar on one."""
    peer = DDPMScheduler(num_train_timesteps=100, beta_schedule="sigmoid").betas
    formula = 1e-4 + (0.02 - 1e-4) * torch.sigmoid(torch.linspace(-6, 6, 100))
    assert_close(peer, formula, atol=1e-7, rtol=0)
    curve = (1 - sigmoid_betas(100)).cumprod(0)
    logistic = torch.sigmoid(torch.linspace(-3, 3, 101, dtype=torch.float64))
    wanted = (logistic[-1] - logistic[1:]) / (logistic[-1] - logistic[0])
    assert_close(curve[:-1], wanted[:-1], atol=1e-12, rtol=0)
    assert (curve - (1 - peer.double()).cumprod(0)).abs().max() > 0.1


# Properties


@st.composite
def schedules(draw):
    """Draw variances of any schedule with any sound options."""
    name, n_steps = draw(st.sampled_from(sorted(SCHEDULES))), draw(steps)
    unit = st.floats(1e-6, 0.9)
    options = {
        "linear": lambda: {"beta_start": draw(unit), "beta_end": draw(unit)},
        "cosine": lambda: {"s": draw(st.floats(0, 1)), "max_beta": draw(st.floats(0.5, 0.9999))},
        "sigmoid": lambda: {
            "start": draw(st.floats(-5, 0)),
            "end": draw(st.floats(0.5, 5)),
            "tau": draw(st.floats(0.3, 3)),
            "max_beta": draw(st.floats(0.5, 0.9999)),
        },
    }[name]()
    return SCHEDULES[name](n_steps, **options)


@given(betas=schedules())
@exactly
def test_betas_and_alpha_bars(betas):
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    schedule = NoiseSchedule(betas, dtype=torch.float64)
    assert (schedule.log_snr.diff() < 0).all()
    assert (schedule.snr.diff() <= 0).all()
    curve = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bars])
    assert (curve.diff() < 0).all()
    recovered = betas_from_alpha_bars(curve, max_beta=1 - 1e-12)
    assert_close(recovered, betas, atol=1e-13, rtol=1e-9)


@given(betas=schedules(), scale=st.floats(1e-3, 1e3))
@exactly
def test_only_ratios_of_alpha_bars_matter(betas, scale):
    curve = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    assert_close(betas_from_alpha_bars(scale * curve), betas_from_alpha_bars(curve), atol=1e-12, rtol=1e-9)


@given(n_steps=st.integers(21, 3000))
@exactly
def test_rescaling_keeps_the_sum(n_steps):
    betas = linear_betas(n_steps, rescale=True)
    assert float(betas.sum()) == pytest.approx(500 * 0.0201, rel=1e-11)
    log_alpha_bar, squares = float(torch.log1p(-betas).sum()), float(betas.square().sum())
    assert -10.05 - squares / (2 * (1 - float(betas[-1]))) < log_alpha_bar < -10.05 - squares / 2
    plain = float(torch.log1p(-linear_betas(n_steps)).sum())
    assert n_steps > 900 or plain > log_alpha_bar + 0.5, "without rescaling, a short chain ends early"


@given(n_steps=steps, max_beta=st.floats(0.01, 0.9999))
@exactly
def test_max_beta_limits(n_steps, max_beta):
    for make in (cosine_betas, sigmoid_betas):
        free, clipped = make(n_steps, max_beta=0.99999), make(n_steps, max_beta=max_beta)
        assert_close(clipped, free.clamp(max=max_beta), atol=0, rtol=0)
        assert clipped[-1] == max_beta


def test_small_temperatures_keep_their_digits():
    """Towards the end sigma(v_T) - sigma(v_t) is the difference of two numbers near 1, which loses every digit."""
    v = torch.linspace(-3 / 0.11, 3 / 0.11, 101, dtype=torch.float64)
    naive = torch.sigmoid(v[-1]) - torch.sigmoid(v)
    exact = sigmoid_exactly(100, -3, 3, mpmath.mpf("0.11"))[:-1]
    assert relative_error(sigmoid_betas(100, tau=0.11)[50:-1], exact[50:]) < 1e-10
    assert relative_error((1 - naive[1:] / naive[:-1])[50:-1], exact[50:]) > 1e-6


# Traps


def test_all_points_of_the_grid_as_steps_divide_zero_by_zero():
    u = torch.linspace(0, 100, 101) / 100
    kept = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    kept = kept / kept[0]
    assert ((1 - kept[0]) / (1 - kept[0])).isnan()  # the posterior's coefficient at the first "step"
    schedule = make_schedule("cosine", 100)
    assert all(buffer.isfinite().all() for buffer in schedule.buffers())
    refuses(lambda: NoiseSchedule(1 - kept / torch.cat([torch.ones(1), kept[:-1]])), "betas must be in")


def test_mixed_grid_ends_early():
    right = make_schedule("cosine", 100, dtype=torch.float64).alpha_bars[-1]
    u = torch.linspace(0, 101, 101, dtype=torch.float64) / 101  # another way to write the right grid
    same = betas_from_alpha_bars(torch.cos((u + 0.008) / 1.008 * math.pi / 2).square())
    assert_close(same, cosine_betas(100), atol=1e-12, rtol=0)
    u = torch.linspace(0, 100, 101, dtype=torch.float64) / 101
    mixed = betas_from_alpha_bars(torch.cos((u + 0.008) / 1.008 * math.pi / 2).square())
    assert (1 - mixed).prod() > 100 * right


def test_unclipped_last_step_cannot_be_inverted():
    curve = torch.cos((torch.linspace(0, 1, 101, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2).square()
    unclipped = 1 - curve[1:] / curve[:-1]
    assert unclipped[-1] == 1
    refuses(lambda: NoiseSchedule(unclipped), "betas must be in")
    schedule = make_schedule("cosine", 100, dtype=torch.float64)
    x_0, eps = torch.ones(1, 4, dtype=torch.float64), torch.full((1, 4), -0.5, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, 99, eps)
    assert_close(predict_x_0(schedule, x_t, 99, eps), x_0, atol=1e-9, rtol=0)


def test_untrained_network_blows_up_unless_the_image_is_clipped():
    schedule = make_schedule("cosine", 100)
    growth = 1 / float(schedule.sqrt_alpha_bars[-1])
    assert growth > 2000
    for clip in (False, True):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(50, 8, generator=g)
        for t in reversed(range(100)):
            x_0_hat = predict_x_0(schedule, x, t, torch.zeros_like(x))
            mean, variance, _ = q_posterior(schedule, x_0_hat.clamp(-1, 1) if clip else x_0_hat, x, t)
            x = mean + variance.sqrt() * torch.randn(50, 8, generator=g)
        assert (x.abs().max() <= 1) == clip
        assert clip or x.std() > 0.5 * growth


def test_rescaling_a_short_chain_is_refused():
    scale = 1000 / 10
    assert (1 - torch.linspace(1e-4 * scale, 0.02 * scale, 10)).cumprod(0).sqrt().isnan().any()
    refuses(lambda: linear_betas(10, rescale=True), "n_steps must be above 20", "got 10")
    refuses(lambda: linear_betas(20, rescale=True), "n_steps must be above 20")
    assert linear_betas(21, rescale=True).max() < 1


# Bad input


def test_bad_input_is_named():
    refuses(lambda: linear_betas(0), "n_steps must be at least 1; got 0")
    refuses(lambda: cosine_betas(-3), "n_steps must be at least 1")
    refuses(lambda: sigmoid_betas(2.5), "n_steps must be a whole number", error=TypeError)
    refuses(lambda: linear_betas(True), "n_steps must be a whole number", error=TypeError)
    refuses(lambda: linear_betas(10, beta_start=0), "beta_start must be finite and in (0, 1); got 0")
    refuses(lambda: linear_betas(10, beta_end=1.0), "beta_end must be finite and in (0, 1)")
    refuses(lambda: linear_betas(10, beta_end=math.nan), "beta_end")
    refuses(lambda: linear_betas(10, beta_end="0.02"), "beta_end must be a number", error=TypeError)
    refuses(lambda: cosine_betas(10, s=-0.1), "s must be finite and in [0, inf)")
    refuses(lambda: cosine_betas(10, max_beta=1.0), "max_beta must be finite and in (0, 1)")
    refuses(lambda: cosine_betas(10, max_beta=0), "max_beta")
    refuses(lambda: sigmoid_betas(10, tau=0), "tau must be finite and in (0")
    refuses(lambda: sigmoid_betas(10, tau=0.01), "tau must be finite and in [0.1")
    refuses(lambda: sigmoid_betas(10, start=3, end=3), "end must be finite and in (3.0")
    refuses(lambda: sigmoid_betas(10, start=math.inf), "start must be finite")
    refuses(lambda: sigmoid_betas(10, max_beta=2), "max_beta")
    refuses(lambda: betas_from_alpha_bars([1.0, 0.5]), "alpha_bars must be a torch.Tensor", error=TypeError)
    refuses(lambda: betas_from_alpha_bars(torch.tensor([1, 0])), "alpha_bars must have a floating-point dtype", error=TypeError)
    refuses(lambda: betas_from_alpha_bars(torch.tensor([1.0])), "alpha_bars must have shape (T+1,)")
    refuses(lambda: betas_from_alpha_bars(torch.ones(2, 2)), "alpha_bars must have shape (T+1,)")
    refuses(lambda: betas_from_alpha_bars(torch.tensor([1.0, 0.5, 0.5])), "alpha_bars must fall at every step")
    refuses(lambda: betas_from_alpha_bars(torch.tensor([0.5, 0.6])), "alpha_bars must fall at every step")
    refuses(lambda: betas_from_alpha_bars(torch.tensor([1.0, 0.5, -0.1])), "the smallest fall is 0.5 and the last value -0.1")
    refuses(lambda: betas_from_alpha_bars(torch.tensor([1.0, math.nan])), "alpha_bars must be finite")
    refuses(lambda: make_schedule("quadratic", 10), "name must be one of 'linear', 'cosine', 'sigmoid'; got 'quadratic'")
    refuses(lambda: make_schedule("cosine", 10, beta_end=0.1), "the cosine schedule takes s, max_beta; got beta_end", error=TypeError)
    refuses(lambda: make_schedule("linear", 10, rescale=True), "n_steps must be above 20")


def test_options_reach_the_schedule():
    """Give every option of every schedule by name, each away from its default; those of another schedule are refused."""
    options = {
        "linear": {"beta_start": 0.01, "beta_end": 0.3, "rescale": True},
        "cosine": {"s": 0.1, "max_beta": 0.9},
        "sigmoid": {"start": -2.0, "end": 4.0, "tau": 0.5, "max_beta": 0.8},
    }
    for name, chosen in options.items():
        make = SCHEDULES[name]
        assert list(chosen) == list(inspect.signature(make).parameters)[1:]
        expected = make(400, **chosen)
        assert_close(make_schedule(name, 400, **chosen, dtype=torch.float64).betas, expected)
        for key, value in chosen.items():
            assert not torch.equal(make(400, **{k: v for k, v in chosen.items() if k != key}), expected)
            for other in set(options) - {name}:
                if key not in options[other]:
                    refuses(lambda o=other, k=key, v=value: make_schedule(o, 400, **{k: v}), f"got {key}", error=TypeError)
        assert_close(make_schedule(name, 50, dtype=torch.float64).betas, make(50))
    taken = set(inspect.signature(make_schedule).parameters) - {"name", "n_steps", "dtype"}
    assert taken == set().union(*options.values())
    assert make_schedule("linear", 50, rescale=False).betas[-1] == torch.tensor(0.02)
    assert make_schedule("cosine", 50, s=0).betas[0] < make_schedule("cosine", 50).betas[0]
    assert make_schedule("cosine", 5).betas.dtype == torch.float32


def test_sigmoid_schedules_end_exactly_at_zero():
    for seed in range(3000):  # a vector and a single value may go through different code, rounded differently
        g = torch.Generator().manual_seed(seed)
        n_steps = int(torch.randint(1, 60, (1,), generator=g))
        start, end = sorted((40 * torch.rand(2, generator=g, dtype=torch.float64) - 10).tolist())
        betas = sigmoid_betas(n_steps, start, end, max_beta=0.9999)
        assert betas[-1] == 0.9999
        assert bool(((betas > 0) & (betas < 1)).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_built_whole_under_the_meta_device(name):
    """Modules are often built there, without numbers, and filled from a file; a schedule needs its numbers to be checked."""
    with torch.device("meta"):
        schedule = make_schedule(name, 20)
    for buffer, wanted in make_schedule(name, 20).named_buffers():
        assert torch.equal(schedule.get_buffer(buffer), wanted)
