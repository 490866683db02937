"""Test the forward process: identities on random schedules, exact numbers, a reference implementation, bad input."""

import copy
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ddpm_nb.forward import (
    NoiseSchedule,
    extract,
    predict_eps,
    predict_x_0,
    q_mean_variance,
    q_posterior,
    q_sample,
    q_step,
    schedule_coefficients,
)

assert_close = torch.testing.assert_close


def linear(n_steps):
    """Give the DDPM paper's variances."""
    return torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64)


def cosine(n_steps):
    """Give the squared-cosine variances that diffusers computes."""
    return DDPMScheduler(n_steps, beta_schedule="squaredcos_cap_v2").betas.double()


BETAS = [pytest.param(make(n), id=f"{make.__name__}-{n}") for make in (linear, cosine) for n in (10, 100, 1000)]


@st.composite
def cases(draw, dtype=torch.float64):
    """Draw a schedule, clean images of any shape, noise, and one step for each image or one for all."""
    # At most 40 shares of at most 0.2 leave at least 1.3e-4 of the signal, so that the inverse maps keep 10 digits in float64.
    betas = draw(st.lists(st.floats(1e-5, 0.2), min_size=1, max_size=40))
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 4), max_size=3)))
    steps = st.integers(0, len(betas) - 1)
    t = draw(st.one_of(steps, st.lists(steps, min_size=shape[0], max_size=shape[0]).map(torch.tensor)))
    x_0, eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))), dtype=torch.float64)
    return NoiseSchedule(betas, dtype=dtype), x_0.to(dtype), eps.to(dtype), t


def per_image(t, batch):
    """List the step of each image."""
    return [t] * batch if isinstance(t, int) else t.tolist()


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(0, 2**31))
def test_walk_is_jump(case, seed):
    """t steps with their own noises are one jump with the combined noise, for every image of the batch."""
    schedule, x_0, _, t = case
    noises = torch.randn(schedule.n_steps, *x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, walked = x_0, []
    for s in range(schedule.n_steps):
        x = q_step(schedule, x, s, noises[s])
        walked.append(x)
    for i, t_i in enumerate(per_image(t, len(x_0))):
        weights = (schedule.alpha_bars[t_i] / schedule.alpha_bars * schedule.betas).sqrt()[: t_i + 1]
        assert_close(weights.square().sum(), schedule.one_minus_alpha_bars[t_i], rtol=1e-10, atol=1e-10)
        total = torch.einsum("s,s...->...", weights, noises[: t_i + 1, i]) / schedule.sqrt_one_minus_alpha_bars[t_i]
        jump = q_sample(schedule, x_0[i : i + 1], t_i, total[None])
        assert_close(jump[0], walked[t_i][i], rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_squares_sum_to_one(case):
    """Signal and noise shares sum to 1, in one step and in many, and one step links neighbours."""
    schedule = case[0]
    one = torch.ones(schedule.n_steps, dtype=torch.float64)
    assert_close(schedule.alphas + schedule.betas, one, rtol=0, atol=1e-10)
    assert_close(schedule.sqrt_alpha_bars**2 + schedule.sqrt_one_minus_alpha_bars**2, one, rtol=0, atol=1e-10)
    assert_close(schedule.alphas * (1 - schedule.alpha_bars_prev) + schedule.betas, schedule.one_minus_alpha_bars, rtol=0, atol=1e-10)
    assert_close(schedule.alphas * schedule.alpha_bars_prev, schedule.alpha_bars, rtol=1e-10, atol=0)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_inverse_maps(case):
    """Image and noise determine each other."""
    schedule, x_0, eps, t = case
    x_t = q_sample(schedule, x_0, t, eps)
    assert_close(predict_x_0(schedule, x_t, t, eps), x_0, rtol=1e-10, atol=1e-10)
    assert_close(predict_eps(schedule, x_t, t, x_0), eps, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(cases(torch.float32))
def test_inverse_maps_in_float32(case):
    """In float32 the error is that of rounding x_t, a few 6e-8 of its size, times what the inverse multiplies it by."""
    schedule, x_0, eps, t = case
    assert x_0.dtype == q_sample(schedule, x_0, t, eps).dtype == torch.float32
    x_t = q_sample(schedule, x_0, t, eps)
    rounding = 4 * 6e-8 * (x_0.abs() + eps.abs())
    signal, noise = (extract(v, t, x_0.ndim) for v in (schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars))
    assert ((predict_x_0(schedule, x_t, t, eps) - x_0).abs() <= rounding / signal).all()
    assert ((predict_eps(schedule, x_t, t, x_0) - eps).abs() <= rounding / noise).all()


@settings(deadline=None, max_examples=60)
@given(cases())
def test_posterior_mean_in_its_three_forms(case):
    """The mean from x_0, from the noise, and from x_0 recovered from the noise are one."""
    schedule, x_0, eps, t = case
    x_t = q_sample(schedule, x_0, t, eps)
    alpha, beta, noise = (extract(v, t, x_0.ndim) for v in (schedule.alphas, schedule.betas, schedule.sqrt_one_minus_alpha_bars))
    mean = q_posterior(schedule, x_0, x_t, t)[0]
    assert_close((x_t - beta / noise * eps) / alpha.sqrt(), mean, rtol=1e-10, atol=1e-10)
    assert_close(q_posterior(schedule, predict_x_0(schedule, x_t, t, eps), x_t, t)[0], mean, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_one_step_index_is_a_batch_of_equal_indices(case):
    """An int, a tensor without dimensions and a batch of indices give the same numbers of the same type."""
    schedule, x_0, eps, t = case
    first = per_image(t, len(x_0))[0]
    for function in (q_step, q_sample, predict_x_0, predict_eps):
        expected = function(schedule, x_0, torch.full((len(x_0),), first), eps)
        for same in (first, torch.tensor(first), np.int64(first)):
            assert_close(function(schedule, x_0, same, eps), expected, rtol=0, atol=0)
    for expected, got in zip(
        q_posterior(schedule, x_0, eps, torch.full((len(x_0),), first)), q_posterior(schedule, x_0, eps, first), strict=True
    ):
        assert_close(got.expand_as(x_0), expected.expand_as(x_0), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_images_do_not_mix(case):
    """Each image of a batch is treated as if it were alone, with its own step."""
    schedule, x_0, eps, t = case
    together = q_sample(schedule, x_0, t, eps)
    for i, t_i in enumerate(per_image(t, len(x_0))):
        assert_close(q_sample(schedule, x_0[i : i + 1], t_i, eps[i : i + 1])[0], together[i], rtol=0, atol=0)


# The posterior, and what widely copied notes make of its mean.


def bayes_gap(schedule, t, mean, variance, x_0, x_prev, x_t):
    """Return the largest difference between the two sides of Bayes' rule."""
    left = Normal(mean, variance.sqrt()).log_prob(x_prev)
    step = Normal(schedule.alphas[t].sqrt() * x_prev, schedule.betas[t].sqrt()).log_prob(x_t)
    before, after = (Normal(m, v.sqrt()) for m, v, _ in (q_mean_variance(schedule, x_0, s) for s in (t - 1, t)))
    return (left - step - before.log_prob(x_prev) + after.log_prob(x_t)).abs().max()


def posterior_points(schedule):
    """Draw three values for every step but the first."""
    t = torch.arange(1, schedule.n_steps)
    return t, torch.randn(3, len(t), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("betas", BETAS)
def test_posterior_obeys_bayes(betas):
    """q(x_{t-1} | x_t, x_0) is the ratio of three known densities, for every t."""
    schedule = NoiseSchedule(betas, dtype=torch.float64)
    t, (x_0, x_prev, x_t) = posterior_points(schedule)
    mean, variance, log_variance = q_posterior(schedule, x_0, x_t, t)
    # Log-densities are as large as 1 / beta, so that 1e-16 of rounding becomes 1e-11 at beta = 4e-5 (cosine, T = 1000).
    assert bayes_gap(schedule, t, mean, variance, x_0, x_prev, x_t) < 1e-9
    assert_close(log_variance.exp(), variance, rtol=1e-10, atol=0)


WRONG_MEANS = {
    "a bar too many in front": lambda s, t, x_0, x_t, eps: (
        (x_t - s.betas[t] / s.sqrt_one_minus_alpha_bars[t] * eps) / s.alpha_bars[t].sqrt()
    ),
    "a bar too few on x_0": lambda s, t, x_0, x_t, eps: (
        s.alphas[t - 1].sqrt() * s.betas[t] / s.one_minus_alpha_bars[t] * x_0 + s.posterior_coef_x_t[t] * x_t
    ),
    "all of the total noise": lambda s, t, x_0, x_t, eps: (x_t - s.betas[t].sqrt() * eps) / s.alphas[t].sqrt(),
    "alpha-bar of the wrong step": lambda s, t, x_0, x_t, eps: (
        s.alpha_bars[t].sqrt() * s.betas[t] / s.one_minus_alpha_bars[t] * x_0 + s.posterior_coef_x_t[t] * x_t
    ),
}


@pytest.mark.parametrize("wrong", WRONG_MEANS.values(), ids=WRONG_MEANS)
def test_wrong_posterior_means_break_bayes(wrong):
    """Each slip is caught by the identity that the right mean obeys."""
    schedule = NoiseSchedule(linear(100), dtype=torch.float64)
    t, (x_0, x_prev, x_t) = posterior_points(schedule)
    _, variance, _ = q_posterior(schedule, x_0, x_t, t)
    mean = wrong(schedule, t, x_0, x_t, predict_eps(schedule, x_t, t, x_0))
    assert bayes_gap(schedule, t, mean, variance, x_0, x_prev, x_t) > 0.1


@pytest.mark.parametrize("betas", BETAS)
def test_log_variance_is_the_logarithm_of_the_variance(betas):
    """The log-variance of q(x_t | x_0) is log(1 - alpha_bar), in float32 too; a standard deviation in its place is not."""
    t, exact = torch.arange(len(betas)), exact_coefficients(betas)["log_one_minus_alpha_bars"]
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 6.1e-8)):
        _, variance, log_variance = q_mean_variance(NoiseSchedule(betas, dtype=dtype), torch.zeros(len(betas), dtype=dtype), t)
        assert_close(log_variance.double(), exact, rtol=rtol, atol=0)
        assert not torch.isclose(variance.sqrt().double(), exact, rtol=0.1).any()  # tqch/ddpm-torch, issue 9


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_first_step_back(n_steps):
    """At t = 0 the posterior is x_0 for certain; its log-variance is finite, that of the next step."""
    schedule = NoiseSchedule([0.1 * (i + 1) for i in range(n_steps)], dtype=torch.float64)
    x_0, x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance, log_variance = q_posterior(schedule, x_0, x_t, 0)
    assert_close(mean, x_0, rtol=0, atol=1e-15)
    assert float(variance) == 0
    stand_in = schedule.posterior_variance[1] if n_steps > 1 else schedule.betas[0]
    assert_close(float(log_variance), math.log(stand_in))


# Exact numbers.


def exact_coefficients(betas):
    """Compute every coefficient with 60 digits."""
    with mpmath.workdps(60):
        betas = [mpmath.mpf(float(b)) for b in betas]
        bars, prev = [], [mpmath.mpf(1)]
        for beta in betas:
            bars.append(prev[-1] * (1 - beta))
            prev.append(bars[-1])
        rows = []
        for b, a, p in zip(betas, bars, prev, strict=False):
            rows.append(
                {
                    "betas": b,
                    "alphas": 1 - b,
                    "alpha_bars": a,
                    "alpha_bars_prev": p,
                    "sqrt_alpha_bars": mpmath.sqrt(a),
                    "one_minus_alpha_bars": 1 - a,
                    "sqrt_one_minus_alpha_bars": mpmath.sqrt(1 - a),
                    "log_one_minus_alpha_bars": mpmath.log(1 - a),
                    "snr": a / (1 - a),
                    "log_snr": mpmath.log(a / (1 - a)),
                    "posterior_variance": b * (1 - p) / (1 - a),
                    "posterior_log_variance": mpmath.log(b * (1 - p) / (1 - a)) if p < 1 else None,
                    "posterior_coef_x_0": b * mpmath.sqrt(p) / (1 - a),
                    "posterior_coef_x_t": (1 - p) * mpmath.sqrt(1 - b) / (1 - a),
                }
            )
        rows[0]["posterior_log_variance"] = rows[1]["posterior_log_variance"]
        return {key: torch.tensor([float(row[key]) for row in rows], dtype=torch.float64) for key in rows[0]}


@pytest.mark.parametrize("betas", BETAS)
def test_every_coefficient_has_its_digits(betas):
    """Float64 to 13 digits of the exact value, float32 to half a unit in its last place."""
    exact = exact_coefficients(betas)
    assert exact.keys() == schedule_coefficients(betas).keys()
    double, single = NoiseSchedule(betas, dtype=torch.float64), NoiseSchedule(betas)
    for name, value in exact.items():
        # log_snr passes through 0, where only its absolute error can be small
        assert_close(getattr(double, name), value, rtol=1e-13, atol=1e-14 if name == "log_snr" else 0, msg=lambda m, n=name: f"{n}: {m}")
        assert_close(getattr(single, name).double(), value, rtol=6.1e-8, atol=1e-14 if name == "log_snr" else 0)
        assert torch.equal(getattr(single, name), getattr(double, name).float())


def test_alpha_bars_as_fractions():
    """The products are those of exact rational arithmetic."""
    betas, product = linear(100), Fraction(1)
    got = schedule_coefficients(betas)
    for t, beta in enumerate(betas.tolist()):
        product *= 1 - Fraction(beta)
        assert abs(Fraction(float(got["alpha_bars"][t])) / product - 1) < Fraction(1, 10**14)
        assert abs(Fraction(float(got["one_minus_alpha_bars"][t])) / (1 - product) - 1) < Fraction(1, 10**14)


def test_subtracting_in_float32_loses_digits():
    """1 - alpha_bar from a float32 product is off by more than 1e-4 of itself at the first step; the buffer is not."""
    exact = float(exact_coefficients(linear(1000))["one_minus_alpha_bars"][0])
    naive = float((1 - (1 - linear(1000).float()).cumprod(0))[0])
    assert abs(naive / exact - 1) > 1e-4
    assert abs(float(NoiseSchedule(linear(1000)).one_minus_alpha_bars[0]) / exact - 1) < 6.1e-8


@pytest.mark.parametrize("betas", [[0.999] * 1000, [1e-12] * 1000, [1e-12, 0.999], [1e-300], [1 - 1e-16]])
def test_extreme_variances_stay_finite(betas):
    """No coefficient becomes NaN or infinite, in float64; SNR may be too large for a float."""
    got = schedule_coefficients(betas)
    for name, value in got.items():
        assert not value.isnan().any(), name
        assert name == "snr" or value.isfinite().all(), name


# A reference implementation.


def reference(betas, exact):
    """Build diffusers' scheduler; with `exact`, let its own formulas run in float64."""
    scheduler = DDPMScheduler(len(betas), trained_betas=betas.tolist(), clip_sample=False, prediction_type="sample")
    if exact:
        scheduler.betas, scheduler.one = betas, scheduler.one.double()
        scheduler.alphas = 1 - betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def reference_step(scheduler, t, x_0_hat, x_t):
    """Take diffusers' step with a fixed noise."""
    return scheduler.step(x_0_hat, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample


@pytest.mark.parametrize("betas", BETAS)
def test_marginal_parity_with_diffusers(betas):
    """alpha_bar and noisy images, as diffusers ships (float32) and in float64, to 1e-6."""
    x_0, eps = torch.randn(2, len(betas), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.arange(len(betas))
    for exact, dtype in ((True, torch.float64), (False, torch.float32)):
        scheduler, schedule = reference(betas, exact), NoiseSchedule(betas, dtype=dtype)
        assert_close(schedule.alpha_bars, scheduler.alphas_cumprod, rtol=0, atol=1e-6)
        # float32: diffusers' 1 - alpha_bar cancels; its root is off by up to 6e-8 / (2 sqrt(1 - alpha_bar)) = 5e-6, times |eps|
        noisy = scheduler.add_noise(x_0.to(dtype), eps.to(dtype), t)
        assert_close(q_sample(schedule, x_0.to(dtype), t, eps.to(dtype)), noisy, rtol=0, atol=1e-6 if exact else 5e-5)


@pytest.mark.parametrize("betas", BETAS)
def test_posterior_parity_with_diffusers(betas):
    """Both coefficients of the posterior mean and its variance, to 1e-6, from diffusers' own step in float64."""
    scheduler, schedule = reference(betas, True), NoiseSchedule(betas, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t in range(len(betas)):
        noise = reference_step(scheduler, t, zero, zero)  # the step is linear: probe it with unit inputs
        coef_x_0 = reference_step(scheduler, t, one, zero) - noise
        coef_x_t = reference_step(scheduler, t, zero, one) - noise
        assert abs(coef_x_0.item() - schedule.posterior_coef_x_0[t]) < 1e-6
        assert abs(coef_x_t.item() - schedule.posterior_coef_x_t[t]) < 1e-6
        assert abs(scheduler._get_variance(t) - schedule.posterior_variance[t]) < 1e-6
        if t > 0:
            eps = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            assert_close(noise, schedule.posterior_variance[t].sqrt() * eps, rtol=0, atol=1e-6)


# The object and its inputs.


def test_betas_may_be_a_list_an_array_or_a_tensor():
    """Numbers that are not tensors keep their 16 digits."""
    for betas in ([0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)):
        schedule = NoiseSchedule(betas, dtype=torch.float64)
        assert schedule.betas.tolist() == schedule.exact_betas.tolist() == [0.1, 0.2]
        assert not schedule.betas.requires_grad


def test_schedule_does_not_share_memory():
    """Changing the argument, or a buffer, leaves the rest as it was."""
    betas = linear(10)
    schedule, coefficients = NoiseSchedule(betas, dtype=torch.float64), schedule_coefficients(betas)
    schedule.betas.zero_()
    betas.mul_(0.5)
    assert torch.equal(schedule.exact_betas, linear(10)) and torch.equal(coefficients["betas"], linear(10))
    assert torch.equal(schedule.alpha_bars[:-1], schedule.alpha_bars_prev[1:])
    assert repr(schedule) == "NoiseSchedule(n_steps=10, betas=0.0001..0.02)"


def test_state_holds_the_variances_and_refuses_others():
    """A checkpoint of another schedule is an error; of the same one, in any precision, it is not."""
    schedule = NoiseSchedule(linear(10))
    assert list(schedule.state_dict()) == ["betas"]
    for dtype in (torch.float16, torch.float32, torch.float64):
        copy.deepcopy(schedule).load_state_dict(NoiseSchedule(linear(10), dtype=dtype).state_dict())
    for other in (linear(10) * 1.01, linear(11)):
        with pytest.raises(ValueError, match="betas must be those of NoiseSchedule"):
            schedule.load_state_dict(NoiseSchedule(other).state_dict())
    outer = torch.nn.ModuleDict({"schedule": schedule})
    with pytest.raises(ValueError, match=r"schedule\.betas must be those"):
        outer.load_state_dict({"schedule.betas": torch.rand(10)})


@pytest.mark.parametrize("way", [(torch.float64,), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_a_converted_schedule_is_the_one_of_that_type(way):
    """No rounding of an earlier type stays behind, in a module that holds the schedule, too; and it takes its own state."""
    outer = torch.nn.ModuleDict({"schedule": NoiseSchedule(linear(10))})
    for dtype in way:
        outer.to(dtype)
    for name, value in NoiseSchedule(linear(10), dtype=way[-1]).named_buffers():
        assert torch.equal(getattr(outer["schedule"], name), value), name
    outer["schedule"].betas.zero_()
    assert torch.equal(outer["schedule"].exact_betas, linear(10))
    rounded = NoiseSchedule(linear(10)).betas.double()  # as older versions wrote it
    for state in (NoiseSchedule(linear(10)).double().state_dict(), {"betas": rounded}):
        assert not any(outer["schedule"].load_state_dict(state))


def test_steps_of_any_integer_type_are_indices():
    """Four steps for four images: bytes are no mask."""
    schedule, x, t = NoiseSchedule(linear(4)), torch.ones(4, 2), torch.tensor([3, 1, 2, 1])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(q_sample(schedule, x, t.to(dtype), x), q_sample(schedule, x, t, x))


def test_a_default_device_is_no_obstacle():
    with torch.device("meta"):
        assert NoiseSchedule([0.1, 0.2]).exact_betas.device.type == "cpu"


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("way", ["plain", "meta", "to_empty", "meta, to_empty"])
@pytest.mark.parametrize("saved", [torch.float32, torch.float64])
def test_all_coefficients_follow_from_the_loaded_variances(way, assign, saved):
    """Of a state only the betas are kept, so that whatever was in the other buffers must not survive a load."""
    outer = torch.nn.ModuleDict({"schedule": NoiseSchedule(linear(10))})
    if "meta" in way:
        outer = outer.to("meta")
    if "to_empty" in way:
        outer = outer.to_empty(device="cpu")
    for name, buffer in outer["schedule"].named_buffers():
        if not buffer.is_meta and (way != "plain" or name != "betas"):
            buffer.fill_(math.nan)
    state = {"schedule.betas": NoiseSchedule(linear(10), dtype=saved).betas}
    if way == "meta" and not assign:  # PyTorch keeps what has no memory as it is, and warns
        with pytest.warns(UserWarning, match="no-op"):
            outer.load_state_dict(state)
        assert all(buffer.is_meta for buffer in outer.buffers())
        return
    assert not any(outer.load_state_dict(state, assign=assign))
    dtype = saved if assign else torch.float32
    expected = dict(NoiseSchedule(linear(10), dtype=dtype).named_buffers())
    found = dict(outer["schedule"].named_buffers())
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_state_without_variances_is_reported_as_such(place):
    schedule = NoiseSchedule(linear(10)).to(place)
    with pytest.raises(RuntimeError, match=r'Missing key.*"betas"'):
        schedule.load_state_dict({})
    assert schedule.load_state_dict({}, strict=False).missing_keys == ["betas"]


def test_noise_comes_from_the_generator():
    """Drawn noise is one draw of the images' shape, and equal seeds give equal results."""
    schedule, x = NoiseSchedule(linear(10)), torch.ones(2, 3)
    for function in (q_step, q_sample):
        drawn = function(schedule, x, 5, generator=torch.Generator().manual_seed(1))
        eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(drawn, function(schedule, x, 5, eps))
        assert not torch.equal(drawn, function(schedule, x, 5, generator=torch.Generator().manual_seed(2)))


def test_gradients_reach_image_and_noise():
    """The jump is differentiable: its derivatives are its two coefficients."""
    schedule = NoiseSchedule(linear(10))
    x_0, eps = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    q_sample(schedule, x_0, 7, eps).sum().backward()
    assert_close(x_0.grad, schedule.sqrt_alpha_bars[7].expand(1, 2))
    assert_close(eps.grad, schedule.sqrt_one_minus_alpha_bars[7].expand(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_wider_type(dtype):
    """Images and coefficients of different types meet in the wider one, whichever form t has."""
    x = torch.ones(2, 3, dtype=dtype)
    for t in (3, torch.tensor([3, 4])):
        wider = torch.promote_types(dtype, torch.float32)
        assert q_sample(NoiseSchedule(linear(10)), x, t, x).dtype == wider
        assert all(v.dtype == wider for v in q_posterior(NoiseSchedule(linear(10)), x, x, t)[:1])
        assert predict_x_0(NoiseSchedule(linear(10), dtype=torch.float64), x, t, x).dtype == torch.float64


def test_empty_batch():
    """No images in, no images out."""
    schedule, nothing = NoiseSchedule(linear(10)), torch.empty(0, 1, 8, 8)
    assert q_sample(schedule, nothing, torch.empty(0, dtype=torch.long)).shape == nothing.shape
    assert q_posterior(schedule, nothing, nothing, 3)[0].shape == nothing.shape


BAD_BETAS = {
    "zero": ([0.0, 0.1], ValueError, r"betas must be in \(0, 1\); got values from 0 to 0\.1"),
    "one": ([0.1, 1.0], ValueError, r"betas must be in \(0, 1\)"),
    "negative": ([-0.1], ValueError, r"betas must be in \(0, 1\)"),
    "rescaled for too few steps": (torch.linspace(1e-2, 2, 10), ValueError, r"betas must be in \(0, 1\); got values from 0\.01 to 2"),
    "nan": ([0.1, math.nan], ValueError, "betas must be finite"),
    "infinite": ([0.1, math.inf], ValueError, "betas must be finite"),
    "empty": ([], ValueError, r"betas must have shape \(T,\) with T at least 1; got \(0,\)"),
    "a number": (0.1, ValueError, r"betas must have shape \(T,\) with T at least 1; got \(\)"),
    "a matrix": (torch.full((2, 2), 0.1), ValueError, r"betas must have shape \(T,\) with T at least 1; got \(2, 2\)"),
    "whole numbers": (torch.tensor([0, 1]), TypeError, "betas must have a floating-point dtype"),
    "a name": ("linear", TypeError, "betas must be a tensor or a sequence of numbers; got 'linear'"),
    "nothing": (None, TypeError, "betas must be a tensor or a sequence of numbers; got None"),
}


@pytest.mark.parametrize(("betas", "error", "message"), BAD_BETAS.values(), ids=BAD_BETAS)
def test_bad_betas(betas, error, message):
    """Variances that make no schedule are refused, by the object and by the function."""
    for build in (NoiseSchedule, schedule_coefficients):
        with pytest.raises(error, match=message):
            build(betas)


def test_bad_dtype():
    """Buffers are floating-point."""
    with pytest.raises(TypeError, match=r"dtype must be a floating-point type; got torch\.int64"):
        NoiseSchedule([0.1], dtype=torch.int64)
    with pytest.raises(TypeError, match="dtype must be a floating-point type; got 'float32'"):
        NoiseSchedule([0.1], dtype="float32")


FUNCTIONS = {  # name -> (function of schedule, first images, t, second images; names of the two)
    "q_step": (q_step, "x_prev", "eps"),
    "q_sample": (q_sample, "x_0", "eps"),
    "q_mean_variance": (lambda s, x, t, _: q_mean_variance(s, x, t), "x_0", None),
    "q_posterior": (lambda s, x, t, y: q_posterior(s, x, y, t), "x_0", "x_t"),
    "predict_x_0": (predict_x_0, "x_t", "eps_hat"),
    "predict_eps": (predict_eps, "x_t", "x_0_hat"),
}
BAD_T = {
    "negative": (-1, ValueError, r"t must be in 0\.\.9; got -1"),
    "too large": (10, ValueError, r"t must be in 0\.\.9; got 10"),
    "float": (3.0, TypeError, "t must be a whole number; got 3.0 of type float"),
    "bool": (True, TypeError, "t must be a whole number; got True of type bool"),
    "none": (None, TypeError, "t must be a whole number; got None"),
    "float tensor": (torch.tensor([0.0, 1.0]), TypeError, "t must have an integer dtype; got torch.float32"),
    "bool tensor": (torch.tensor([True, False]), TypeError, "t must have an integer dtype; got torch.bool"),
    "negative in a batch": (torch.tensor([0, -1]), ValueError, r"t must be in 0\.\.9; got values from -1 to 0"),
    "too large in a batch": (torch.tensor([0, 10]), ValueError, r"t must be in 0\.\.9; got values from 0 to 10"),
    "too many": (torch.tensor([0, 1, 2]), ValueError, r"t must have shape \(2,\), one index for each image; got \(3,\)"),
    "a column": (torch.tensor([[0], [1]]), ValueError, r"t must have shape \(2,\), one index for each image; got \(2, 1\)"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("t", "error", "message"), BAD_T.values(), ids=BAD_T)
def test_bad_t(name, t, error, message):
    """A step that does not exist, or is no step, is refused by every function."""
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(error, match=message):
        FUNCTIONS[name][0](NoiseSchedule(linear(10)), x, t, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_images(name):
    """NaN, whole numbers, lists, missing dimensions and shapes that differ are refused by name."""
    function, first, second = FUNCTIONS[name]
    schedule, x = NoiseSchedule(linear(10)), torch.zeros(2, 1, 4, 4)
    bad = ((x / 0, ValueError, "finite"), (x.long(), TypeError, "floating-point"), (x.tolist(), TypeError, "torch.Tensor"))
    for value, error, word in bad:
        with pytest.raises(error, match=f"{first} must .*{word}"):
            function(schedule, value, 3, x)
        if second:
            with pytest.raises(error, match=f"{second} must .*{word}"):
                function(schedule, x, 3, value)
    if second:  # shapes that would broadcast are refused too
        with pytest.raises(ValueError, match=rf"{second} must have the shape of .*, \(2, 1, 4, 4\); got \(1, 1, 4, 4\)"):
            function(schedule, x, 3, x[:1])
    with pytest.raises(ValueError, match=r"images must have shape \(B, \.\.\.\)"):
        function(schedule, torch.tensor(0.0), 3, torch.tensor(0.0))


def test_images_on_another_device():
    """A schedule that was left behind is named."""
    x = torch.zeros(2, 1, 4, 4, device="meta")
    with pytest.raises(ValueError, match="schedule must be on the images' device, meta; it is on cpu"):
        q_sample(NoiseSchedule(linear(10)), x, 3, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_the_gpu():
    """Moved to a GPU, every function gives what it gives on the CPU, with t on either device."""
    cpu, gpu = NoiseSchedule(linear(100)), NoiseSchedule(linear(100)).cuda()
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 50, 99])
    for function in (q_step, q_sample, predict_x_0, predict_eps):
        for t_gpu in (t, t.cuda()):
            got = function(gpu, x.cuda(), t_gpu, eps.cuda())
            assert got.is_cuda
            assert_close(got.cpu(), function(cpu, x, t, eps), rtol=1e-5, atol=1e-6)
    for got, expected in zip(q_posterior(gpu, x.cuda(), eps.cuda(), t.cuda()), q_posterior(cpu, x, eps, t), strict=True):
        assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)
