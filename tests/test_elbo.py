"""Test the parts of the bound and the loss identity by identity, against fifty digits, diffusers and drawn samples."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import linear, never, refuses
from ddpm_nb.elbo import (
    OBJECTIVES,
    VARIANCES,
    decoder_log_likelihood,
    diffuse_mixture,
    log_snr_schedule,
    normal_log_prob,
    objective_target,
    output_to_eps,
    predict_noise,
    prior_divergence,
    reverse_log_variance,
    reverse_mean_variance,
    simple_loss,
    vlb_weights,
)
from ddpm_nb.forward import NoiseSchedule, q_posterior, q_sample
from ddpm_nb.gaussian import GaussianMixture, normal_kl, seeded

F64 = {"dtype": torch.float64}
quick = settings(deadline=None, max_examples=30)


# The parts


def test_prior_is_negligible_for_ddpm_and_exact():
    schedule = linear(1000, torch.float32)
    corners = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])
    nats = prior_divergence(schedule, corners).double() / 64
    assert (nats / math.log(2) < 1e-4).all()
    bar = float(torch.cumprod(1 - schedule.exact_betas, 0)[-1])
    expected = [0.5 * (bar * x**2 - bar - math.log1p(-bar)) for x in (1, -1, 0)]
    torch.testing.assert_close(nats, torch.tensor(expected, **F64), rtol=1e-3, atol=1e-11)


def test_trap_wrong_log_variance_of_q_adds_half_a_bit():
    """Store sqrt(1 - alpha_bar) as the log-variance, as tqch/ddpm-torch#9 did: only L_T shows it."""
    schedule = linear(1000)
    x_0 = torch.full((1, 4), 0.5, **F64)
    wrong = schedule.sqrt_one_minus_alpha_bars[-1].expand_as(x_0)
    mean, zero = schedule.sqrt_alpha_bars[-1] * x_0, torch.zeros_like(x_0)
    assert normal_kl(mean, wrong, zero, zero).mean() / math.log(2) > 0.5
    assert prior_divergence(schedule, x_0).mean() / 4 / math.log(2) < 1e-4


def test_trap_variance_in_place_of_standard_deviation():
    """Pass the log-variance as the log of the scale: the masses no longer agree with the integral of the density."""
    mean, log_variance, n_levels = torch.tensor(0.13, **F64), torch.tensor(-4.0, **F64), 17
    levels = torch.linspace(-1, 1, n_levels, **F64)
    mass = decoder_log_likelihood(levels, mean, log_variance, n_levels).exp()
    fine = torch.linspace(-0.0625, 0.0625, 2001, **F64)  # one bin
    middle = levels[1:-1]
    density = decoder_log_likelihood(middle[:, None] + fine, mean, log_variance, None).exp()
    torch.testing.assert_close(mass[1:-1], torch.trapezoid(density, fine, dim=1), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0, **F64))
    wrong = decoder_log_likelihood(levels, mean, 2 * log_variance, n_levels).exp()
    assert (wrong - mass).abs().max() > 0.1


@pytest.mark.parametrize("n_steps", [10, 1000])
def test_weights_against_arithmetic_with_fifty_digits(n_steps):
    with mpmath.workdps(50):
        betas = [mpmath.mpf(b.item()) for b in linear(n_steps).exact_betas]
        bar, rows = mpmath.mpf(1), []
        for beta in betas:
            prev, bar = bar, bar * (1 - beta)
            rows.append((beta, prev, bar))
        tilde = [b * (1 - p) / (1 - bar) for b, p, bar in rows]
        tilde[0] = tilde[1]
        for variance, sigma2 in (("posterior", tilde), ("beta", betas)):
            exact = [float(b**2 / (2 * s * (1 - b) * (1 - bar))) for (b, _, bar), s in zip(rows, sigma2, strict=True)]
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
                found = vlb_weights(linear(n_steps, dtype), variance).double()
                torch.testing.assert_close(found, torch.tensor(exact, **F64), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variance", VARIANCES)
def test_weights_of_a_schedule_in_16_bits_are_its_own(dtype, variance):
    found = vlb_weights(linear(1000, dtype), variance)
    torch.testing.assert_close(found, vlb_weights(linear(1000, torch.float32), variance))


def silent(x_t, t):
    """Predict no noise."""
    return torch.zeros_like(x_t)


def test_clipping_and_variance_reach_the_reverse_step():
    schedule, x_t, t = linear(50), torch.full((2, 3), 2.0, **F64), torch.tensor([10, 40])
    free, clipped = (reverse_mean_variance(silent, schedule, x_t, t, clip_x_0=c) for c in (False, True))
    torch.testing.assert_close(free[2], x_t / schedule.sqrt_alpha_bars[t, None])
    assert clipped[2].abs().max() == 1
    torch.testing.assert_close(clipped[0], q_posterior(schedule, clipped[2], x_t, t)[0])
    for variance in VARIANCES:
        log_variance = reverse_mean_variance(silent, schedule, x_t, t, variance=variance)[1]
        torch.testing.assert_close(log_variance[:, 0], reverse_log_variance(schedule, variance)[t])
    torch.testing.assert_close(reverse_log_variance(schedule, "beta").exp(), schedule.betas)
    torch.testing.assert_close(reverse_log_variance(schedule)[0].exp(), schedule.posterior_variance[1])


def test_diffused_mixture_has_the_moments_of_noisy_samples():
    covariances = torch.tensor([[[0.02, 0.0], [0.0, 0.3]], [[0.15, 0.1], [0.1, 0.12]]], **F64)
    mixture = GaussianMixture(torch.tensor([0.6, 0.4], **F64), torch.tensor([[-1.0, 0.0], [0.8, 0.8]], **F64), covariances)
    schedule, n, t = linear(10), 200_000, 3
    x_t = q_sample(schedule, mixture.sample(n, generator=seeded(0)), t, generator=seeded(1))
    noisy = diffuse_mixture(mixture, schedule, t)
    error = (noisy.covariance().diagonal() / n).sqrt()
    assert ((x_t.mean(0) - noisy.mean()).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(x_t.T), noisy.covariance(), rtol=0, atol=0.02)


def test_levels_of_the_even_schedule_are_even():
    for n_steps, first, last in ((1, 8.0, -10.0), (7, 8.0, -10.0), (1000, 20.0, -20.0), (3, 2, -20)):
        schedule = log_snr_schedule(n_steps, first, last)
        assert (schedule.n_steps, schedule.betas.dtype) == (n_steps, torch.float64)
        torch.testing.assert_close(schedule.log_snr, torch.linspace(first, last, n_steps, **F64), rtol=1e-10, atol=1e-9)
    single = log_snr_schedule(7, dtype=torch.float32)
    assert single.betas.dtype == torch.float32 and torch.equal(single.exact_betas, log_snr_schedule(7).betas)
    with mpmath.workdps(50):  # the first fall is small, and keeps its digits
        exact = 1 - 1 / (1 + mpmath.exp(-20))
    assert abs(float(log_snr_schedule(5, 20, -1).betas[0]) / float(exact) - 1) < 1e-14
    refuses(lambda: log_snr_schedule(0), "n_steps must be")
    refuses(lambda: log_snr_schedule(5, -10, 8), "last must be finite and in (-inf, -10.0); got 8")
    refuses(lambda: log_snr_schedule(5, last=8.0), "last must be")
    refuses(lambda: log_snr_schedule(5, first=math.inf), "first must be")
    refuses(lambda: log_snr_schedule(2, last=-100), "betas must be in (0, 1)")


def test_density_is_that_of_pytorch():
    x, mean, variance = torch.randn(5, 1, **F64), torch.randn(4, **F64), torch.rand(5, 4, **F64) + 0.01
    theirs = torch.distributions.Normal(mean, variance.sqrt()).log_prob(x)
    torch.testing.assert_close(normal_log_prob(x, mean, variance), theirs)


# The five predictions


@quick
@given(
    n_steps=st.integers(1, 60),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 10**6),
)
def test_every_objective_determines_the_noise(n_steps, shape, objective, seed):
    generator = seeded(seed)
    schedule = NoiseSchedule(torch.rand(n_steps, generator=generator, **F64) * 0.3 + 1e-4, dtype=torch.float64)
    x_0, eps = torch.randn(2, *shape, generator=generator, **F64)
    t = torch.randint(n_steps, shape[:1], generator=generator)
    x_t = q_sample(schedule, x_0, t, eps)
    target = objective_target(schedule, objective, x_0, x_t, t, eps)
    condition = float((schedule.snr.max().sqrt() + 1 / schedule.betas.min()) + 1 / schedule.alpha_bars.min().sqrt())
    tolerance = {"rtol": 1e-10, "atol": 1e-13 * condition}
    torch.testing.assert_close(output_to_eps(schedule, objective, x_t, t, target), eps, **tolerance)
    seen = []
    model = predict_noise(lambda x, i: (seen.append((x, i)), target)[1], schedule, objective)
    torch.testing.assert_close(model(x_t, t), eps, **tolerance)
    assert seen[0][0] is x_t
    assert seen[0][1] is t


def test_velocity_of_the_chord_by_hand():
    """At alpha_bar = 0.64 an image 1 and a noise 3 make 0.8 + 1.8; the velocity 2 gives the noise back."""
    schedule = NoiseSchedule([0.36, 1e-3], **F64)
    x_0, eps = torch.full((1, 1), 1.0, **F64), torch.full((1, 1), 3.0, **F64)
    x_t = q_sample(schedule, x_0, 0, eps)
    assert abs(float(x_t) - 2.6) < 1e-12
    assert objective_target(schedule, "velocity", x_0, x_t, 0, eps).item() == 2
    assert abs(float(output_to_eps(schedule, "velocity", x_t, 0, torch.full((1, 1), 2.0, **F64))) - (2.6 + 0.8 * 2) / 1.4) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_error_of_the_output_weighs_as_the_table_says(objective):
    """Derivative of eps_hat by the output, step by step, against the last column of the table in chapter 3."""
    schedule, t = linear(50), torch.arange(50)
    signal, noise = schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars
    weights = {"eps": torch.ones(50, **F64), "x_0": -signal / noise, "v": signal, "velocity": signal / (signal + noise)}
    weights["mu"] = -(schedule.alphas.sqrt()) * noise / schedule.betas
    x_t, output = torch.randn(2, 50, 1, generator=seeded(0), **F64)
    at = lambda output: output_to_eps(schedule, objective, x_t, t, output)
    torch.testing.assert_close((at(output + 1) - at(output))[:, 0], weights[objective], rtol=1e-8, atol=1e-10)


def test_velocity_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="linear")
    schedule = NoiseSchedule(torch.linspace(1e-4, 0.02, 100, **F64))
    x_0, eps = torch.randn(2, 6, 1, 4, 4, generator=seeded(0))
    t = torch.tensor([0, 1, 20, 50, 98, 99])
    ours = objective_target(schedule, "v", x_0, q_sample(schedule, x_0, t, eps), t, eps)
    torch.testing.assert_close(ours, scheduler.get_velocity(x_0, eps, t), rtol=1e-5, atol=1e-6)


# The loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_weighting_does_not_depend_on_what_the_network_predicts(objective):
    """Give the same knowledge in each of the five forms: the weighted loss is the same, the simple loss is not."""
    schedule, generator = linear(20), seeded(0)
    x_0, eps, eps_hat = torch.randn(3, 50, 3, generator=generator, **F64)
    t = torch.randint(20, (50,), generator=generator)

    def model(x_t, t):  # what the objective would be, were eps_hat the noise
        x_0_hat = (x_t - schedule.sqrt_one_minus_alpha_bars[t, None] * eps_hat) / schedule.sqrt_alpha_bars[t, None]
        return objective_target(schedule, objective, x_0_hat, x_t, t, eps_hat)

    for variance in VARIANCES:
        expected = 20 * (vlb_weights(schedule, variance)[t, None] * (eps - eps_hat).square())
        options = {"t": t, "eps": eps, "objective": objective, "weighting": "vlb", "variance": variance}
        torch.testing.assert_close(simple_loss(model, schedule, x_0, **options), expected.mean())
        each = simple_loss(model, schedule, x_0, **options, reduction="none")
        torch.testing.assert_close(each, expected.mean(1))
    simple = simple_loss(model, schedule, x_0, t=t, eps=eps, objective=objective)
    x_t = q_sample(schedule, x_0, t, eps)
    error = objective_target(schedule, objective, x_0, x_t, t, eps) - model(x_t, t)
    torch.testing.assert_close(simple, error.square().mean())
    assert (simple - (eps - eps_hat).square().mean()).abs() < 1e-9 or objective != "eps"


def test_simple_loss_repeats_with_its_seed_and_reaches_the_parameters():
    layer, schedule, x_0 = torch.nn.Linear(3, 3), linear(10, torch.float32), torch.randn(8, 3, generator=seeded(0))
    first, second, other = (simple_loss(lambda x_t, t: layer(x_t), schedule, x_0, generator=seeded(s)) for s in (1, 1, 2))
    assert first == second != other
    first.backward()
    assert layer.weight.grad.abs().sum() > 0


def test_timesteps_are_uniform_and_belong_to_the_images():
    """Record the steps of many images: all of them occur, equally often, and each image is noised by its own."""
    schedule, n, seen = linear(8), 80_000, []
    simple_loss(lambda x_t, t: (seen.append((x_t, t)), x_t)[1], schedule, torch.ones(n, 1, **F64), generator=seeded(0))
    x_t, t = seen[0]
    counts = torch.bincount(t, minlength=8)
    assert ((counts - n / 8).abs() < 5 * math.sqrt(n / 8)).all()
    for i in range(8):
        mean, noise = schedule.sqrt_alpha_bars[i], schedule.sqrt_one_minus_alpha_bars[i]
        assert (x_t[t == i].mean() - mean).abs() < 5 * noise / math.sqrt(n / 8)


# Bad input


IMAGES = torch.zeros(2, 1, 3, 3)


def test_loss_refuses_bad_arguments_before_any_work():
    schedule = linear(5, torch.float32)
    for words, change in {
        "objective must be one of 'eps', 'x_0', 'v', 'mu', 'velocity'": {"objective": "noise"},
        "weighting must be one of 'simple', 'vlb'": {"weighting": "snr"},
        "reduction must be one of 'mean', 'none'": {"reduction": "sum"},
        "variance must be one of": {"weighting": "vlb", "variance": "learned"},
        "t must have shape (2,)": {"t": torch.zeros(3).long()},
        "t must have an integer dtype": {"t": torch.zeros(2)},
        "t must be in 0..4; got values from 0 to 5": {"t": torch.tensor([0, 5])},
        "t must be in 0..4; got values from -1 to 0": {"t": torch.tensor([-1, 0])},
        "eps must have the shape": {"eps": torch.zeros(2, 1, 3, 4)},
        "eps must be finite": {"eps": IMAGES * math.inf},
        "generator must be a torch.Generator": {"generator": 3},
        "x_0 must have shape": {"x_0": IMAGES[:0]},
        "x_0 must have a floating-point dtype": {"x_0": IMAGES.int()},
    }.items():
        arguments = {"x_0": IMAGES, **change}
        refuses(lambda a=arguments: simple_loss(never, schedule, **a), words, error=(ValueError, TypeError))


def test_output_of_another_shape_is_refused_and_not_broadcast():
    for shape in [(2, 1, 1, 1), (2, 2, 3, 3), (2,)]:
        model = lambda x_t, t, shape=shape: torch.zeros(shape)
        refuses(lambda m=model: simple_loss(m, linear(5, torch.float32), IMAGES), "the model's output must have the shape of x_0")


def test_other_bad_arguments():
    schedule, x = linear(5), torch.zeros(2, 2, **F64)
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    refuses(lambda: objective_target(schedule, "score", x, x, 0, x), "objective must be one of")
    refuses(lambda: output_to_eps(schedule, "score", x, 0, x), "objective must be one of")
    refuses(lambda: predict_noise(never, schedule, "score"), "objective must be one of")
    refuses(lambda: output_to_eps(schedule, "v", x, 0, x[:, :1]), "output must have the shape of x_t")
    for objective in ("v", "mu", "velocity"):
        for t, words in ((-1, "t must be in 0..4; got -1"), (torch.tensor([0]), "t must have shape (2,)")):
            refuses(lambda o=objective, t=t: output_to_eps(schedule, o, x, t, x), words)
            if objective != "velocity":  # whose target has no coefficient
                refuses(lambda o=objective, t=t: objective_target(schedule, o, x, x, t, x), words)
    refuses(lambda: vlb_weights(schedule, "learned"), "variance must be one of")
    refuses(lambda: reverse_log_variance(schedule, "fixed"), "variance must be one of")
    refuses(lambda: diffuse_mixture(mixture, schedule, 5), "t must be in 0..4")
