"""Test the bound against closed forms: exactly where the data is Gaussian, and identity by identity elsewhere."""

import itertools
import math
import subprocess
import sys

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_nb.elbo import (
    OBJECTIVES,
    VARIANCES,
    VLBTerms,
    decoder_log_likelihood,
    diffuse_mixture,
    objective_target,
    optimal_denoiser,
    output_to_eps,
    prior_divergence,
    rate_distortion,
    reverse_log_variance,
    reverse_mean_variance,
    simple_loss,
    vlb_terms,
    vlb_weights,
)
from ddpm_nb.forward import NoiseSchedule, q_posterior, q_sample
from ddpm_nb.gaussian import GaussianMixture, normal_kl

F64 = {"dtype": torch.float64}
CONTINUOUS = {"n_levels": None, "clip_x_0": False}
quick = settings(deadline=None, max_examples=30)


def seeded(seed):
    """Make a generator."""
    return torch.Generator().manual_seed(seed)


def linear(n_steps, dtype=torch.float64):
    """Build DDPM's schedule, rescaled so that a short chain ends in noise as well."""
    scale = 1000 / n_steps
    return NoiseSchedule(torch.linspace(1e-4 * scale, min(0.02 * scale, 0.9), n_steps, **F64), dtype=dtype)


def gaussian(dim, seed=0):
    """Draw the mean and the covariance of Gaussian data, as a mixture of one."""
    root = torch.randn(dim, dim, generator=seeded(seed), **F64) * 0.5
    mean = torch.randn(1, dim, generator=seeded(seed + 1), **F64) * 0.5
    return GaussianMixture(torch.ones(1, **F64), mean, (root @ root.T + 0.1 * torch.eye(dim, **F64))[None])


def to(mixture, dtype):
    """Cast a mixture."""
    return GaussianMixture(mixture.weights.to(dtype), mixture.means.to(dtype), mixture.covariances.to(dtype))


MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], **F64),
    torch.tensor([[-1.0, 0.0], [0.8, 0.8], [0.6, -0.9]], **F64),
    torch.tensor([[[0.02, 0.0], [0.0, 0.3]], [[0.15, 0.1], [0.1, 0.12]], [[0.05, 0.0], [0.0, 0.05]]], **F64),
)


class ClosedForm:
    """Derive every term of the bound for Gaussian data and the best denoiser, from the variances alone, with matrices."""

    def __init__(self, betas, data, variance):
        self.betas, self.bars = betas, torch.cumprod(1 - betas, 0)
        self.prev = torch.cat([torch.ones(1, **F64), self.bars[:-1]])
        self.mean, self.cov, self.dim = data.means[0], data.covariances[0], data.means.shape[1]
        tilde = betas * (1 - self.prev) / (1 - self.bars)
        stand_in = torch.cat([tilde[1:2], tilde[1:]])
        self.tilde, self.sigma2 = tilde, stand_in if variance == "posterior" else betas

    def error(self, t, x_0):
        """Return b (B, d) and A (d, d) with x_0 - x_0_hat = b - A eps."""
        bar, eye = self.bars[t], torch.eye(self.dim, **F64)
        gain = self.cov @ torch.linalg.inv(bar * self.cov + (1 - bar) * eye)
        return (x_0 - self.mean) @ (eye - bar * gain).T, (bar * (1 - bar)).sqrt() * gain

    def weight(self, t):
        """Return the factor of ||x_0 - x_0_hat||^2 in the term of step t."""
        share = self.betas[t] * self.prev[t].sqrt() / (1 - self.bars[t])  # of x_0 in the posterior's mean
        return share**2 / (2 * self.sigma2[t])

    def terms(self, x_0):
        """Return the prior (B,), the terms of the steps (B, T) with L_0 first, and their variances (B, T), in nats."""
        rest = 1 - self.bars[-1]
        prior = 0.5 * ((1 - rest) * x_0.square() + rest - 1 - rest.log()).sum(1)
        means, variances = [], []
        for t in range(len(self.betas)):
            b, a = self.error(t, x_0)
            ratio = self.tilde[t] / self.sigma2[t]
            constant = 0.5 * self.dim * (ratio - 1 - ratio.log() if t else math.log(2 * math.pi) + self.sigma2[0].log())
            means.append(self.weight(t) * (b.square().sum(1) + a.square().sum()) + constant)
            spread = 4 * (b @ a).square().sum(1) + 2 * (a.T @ a).square().sum()  # variance of ||b - A eps||^2
            variances.append(self.weight(t) ** 2 * spread)
        return prior, torch.stack(means, 1), torch.stack(variances, 1)


def sign_patterns(n_steps, n_images, dim):
    """List all noises with entries +1 and -1: their mean of a quadratic is its mean over N(0, I); (T, B * 2^d, d)."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), **F64)
    return signs.repeat(n_images, 1).expand(n_steps, -1, -1)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    ("dim", "n_steps", "dtype"), [(1, 4, torch.float64), (2, 50, torch.float64), (3, 20, torch.float64), (2, 1000, torch.float32)]
)
def test_bound_of_gaussian_data_is_exact_where_the_mean_over_the_noise_is(dim, n_steps, dtype, variance):
    schedule, data = linear(n_steps, dtype), gaussian(dim)
    x_0 = data.sample(3, generator=seeded(3))
    prior, steps, _ = ClosedForm(schedule.exact_betas, data, variance).terms(x_0)
    n, eps = 2**dim, sign_patterns(n_steps, 3, dim).to(dtype)
    repeated, model = x_0.repeat_interleave(n, 0).to(dtype), optimal_denoiser(to(data, dtype), schedule)
    found = vlb_terms(model, schedule, repeated, variance=variance, eps=eps, **CONTINUOUS)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for value, nats in (
        (found.prior.view(3, n), prior),
        (found.kl.view(3, n, -1), steps[:, 1:]),
        (found.decoder.view(3, n), steps[:, 0]),
        (found.total.view(3, n), prior + steps.sum(1)),
    ):
        torch.testing.assert_close(value.mean(1).double(), nats / (dim * math.log(2)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_gaussian_data_within_the_monte_carlo_error_computed_beforehand(variance):
    schedule, data, n = linear(40), gaussian(2), 4000
    x_0 = data.sample(1, generator=seeded(4))
    prior, steps, variances = ClosedForm(schedule.exact_betas, data, variance).terms(x_0)
    expected, error = (prior + steps.sum(1)).item(), math.sqrt(variances.sum().item() / n)
    found = vlb_terms(optimal_denoiser(data, schedule), schedule, x_0.expand(n, -1), variance=variance, generator=seeded(5), **CONTINUOUS)
    nats = found.total * 2 * math.log(2)
    assert abs(nats.mean().item() - expected) < 5 * error
    assert nats.std().item() == pytest.approx(math.sqrt(n) * error, rel=0.1)


@pytest.mark.parametrize("variance", VARIANCES)
def test_gap_of_the_bound_is_the_divergence_between_the_chains(variance):
    """Build the joint Gaussians of both chains on a line, and compare the gap with the divergence of matrices."""
    schedule, data, n_steps, x_0 = linear(3), gaussian(1), 3, torch.tensor([[0.7]], **F64)
    form = ClosedForm(schedule.exact_betas, data, variance)
    # forward: x_t = sqrt(alpha) x_{t-1} + sqrt(beta) eps_t, as the vector (x_1, ..., x_T) = mean + root eps
    mean, root, m, row = [], [], x_0[0, 0], torch.zeros(n_steps, **F64)
    for t, beta in enumerate(form.betas):
        m, row = (1 - beta).sqrt() * m, (1 - beta).sqrt() * row
        row[t] = beta.sqrt()
        mean.append(m)
        root.append(row.clone())
    q_mean, q_cov = torch.stack(mean), torch.stack(root) @ torch.stack(root).T
    # reverse: x_T = eps_T, x_{t-1} = shift + slope x_t + sigma eps, as the vector (x_0, ..., x_T)
    shifts, rows, shift, row = [torch.zeros((), **F64)], [], torch.zeros((), **F64), torch.zeros(n_steps + 1, **F64)
    row[n_steps] = 1
    rows.append(row.clone())
    for t in reversed(range(n_steps)):
        gain = form.bars[t].sqrt() * form.cov[0, 0] / (form.bars[t] * form.cov[0, 0] + 1 - form.bars[t])
        of_x_0, of_x_t = schedule.posterior_coef_x_0[t], schedule.posterior_coef_x_t[t]
        slope = of_x_0 * gain + of_x_t
        shift = of_x_0 * (1 - gain * form.bars[t].sqrt()) * form.mean[0] + slope * shift
        row = slope * row
        row[t] = form.sigma2[t].sqrt()
        shifts.insert(0, shift)
        rows.insert(0, row.clone())
    p_mean, p_cov = torch.stack(shifts), torch.stack(rows) @ torch.stack(rows).T
    log_p = -0.5 * (math.log(2 * math.pi) + p_cov[0, 0].log() + (x_0[0, 0] - p_mean[0]) ** 2 / p_cov[0, 0])
    p_mean_given = p_mean[1:] + p_cov[1:, 0] / p_cov[0, 0] * (x_0[0, 0] - p_mean[0])
    p_cov_given = p_cov[1:, 1:] - torch.outer(p_cov[1:, 0], p_cov[1:, 0]) / p_cov[0, 0]
    d = p_mean_given - q_mean
    divergence = 0.5 * (torch.trace(torch.linalg.solve(p_cov_given, q_cov)) + d @ torch.linalg.solve(p_cov_given, d) - n_steps)
    divergence = divergence + 0.5 * (torch.logdet(p_cov_given) - torch.logdet(q_cov))
    eps = sign_patterns(n_steps, 1, 1)
    terms = vlb_terms(optimal_denoiser(data, schedule), schedule, x_0.expand(2, 1), variance=variance, eps=eps, **CONTINUOUS)
    torch.testing.assert_close(log_p + terms.total.mean() * math.log(2), divergence, rtol=1e-8, atol=1e-10)
    assert divergence > 0


@pytest.mark.parametrize(("n_levels", "shape"), [(256, (4, 3, 5, 5)), (17, (2, 1, 8, 8)), (2, (1, 1, 1, 1)), (None, (3, 7))])
@pytest.mark.parametrize("betas", [torch.tensor([0.3]), torch.tensor([0.3, 0.6]), torch.linspace(1e-4, 0.02, 1000)], ids=len)
def test_total_is_the_sum_of_the_parts_on_any_model(n_levels, shape, betas):
    x_0 = torch.randint(n_levels or 100, shape, generator=seeded(0)) / ((n_levels or 100) - 1) * 2 - 1

    def model(x_t, t):
        return torch.cos(3 * x_t) + t.view(-1, *[1] * (x_t.ndim - 1)) / 10

    terms = vlb_terms(model, NoiseSchedule(betas), x_0, n_levels=n_levels, generator=seeded(1))
    b, n_steps = shape[0], len(betas)
    assert (terms.prior.shape, terms.kl.shape, terms.decoder.shape, terms.mse.shape) == ((b,), (b, n_steps - 1), (b,), (b, n_steps))
    torch.testing.assert_close(terms.total, terms.prior + terms.kl.sum(1) + terms.decoder)
    assert (terms.prior >= 0).all()
    assert (terms.kl >= 0).all()
    assert n_levels is None or (terms.decoder >= 0).all()
    assert not any(x.is_inference() for x in (terms.prior, terms.kl, terms.decoder, terms.mse))


def test_terms_are_in_bits_per_dimension_and_do_not_depend_on_the_image_size():
    x_0 = torch.full((1, 1, 4, 4), 0.5, **F64)
    eps = torch.full((20, 1, 1, 4, 4), 0.7, **F64)
    small, large = (
        vlb_terms(lambda x, t: 0.5 * x, linear(20), x_0.repeat(1, c, 1, 1), eps=eps.repeat(1, 1, c, 1, 1), n_levels=5) for c in (1, 3)
    )
    torch.testing.assert_close(small.total, large.total)
    one = torch.tensor([[0.5]], **F64)
    t = 5
    x_t = q_sample(linear(20), one, t, torch.full((1, 1), 0.7, **F64))
    mean, log_variance, _ = reverse_mean_variance(lambda x, t: 0.5 * x, linear(20), x_t, torch.tensor([t]))
    true_mean, _, true_log_variance = q_posterior(linear(20), one, x_t, t)
    torch.testing.assert_close(small.kl[0, t - 1], normal_kl(true_mean, true_log_variance, mean, log_variance)[0, 0] / math.log(2))


def test_chunks_change_nothing_but_the_number_of_calls():
    schedule, x_0, calls = linear(30, torch.float32), torch.randint(17, (4, 1, 3, 3), generator=seeded(0)) / 8 - 1, []

    def model(x_t, t):
        calls.append(len(x_t))
        return 0.9 * x_t

    reference = None
    for chunk_size, n_calls in ((1, 30), (4, 30), (13, 10), (120, 1), (10**6, 1)):
        calls.clear()
        terms = vlb_terms(model, schedule, x_0, n_levels=17, chunk_size=chunk_size, generator=seeded(2))
        assert len(calls) == n_calls
        assert sum(calls) == 120
        reference = reference or terms
        torch.testing.assert_close(terms.kl, reference.kl, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(terms.total, reference.total, rtol=1e-5, atol=1e-6)


def test_given_noise_is_the_noise_that_is_used():
    schedule, x_0, generator = linear(8), torch.zeros(2, 3, **F64), seeded(7)
    eps = torch.stack([torch.randn(2, 3, generator=generator, **F64) for _ in range(8)])
    drawn = vlb_terms(lambda x, t: torch.sin(x), schedule, x_0, generator=seeded(7), **CONTINUOUS)
    given_eps = vlb_terms(lambda x, t: torch.sin(x), schedule, x_0, eps=eps, **CONTINUOUS)
    torch.testing.assert_close(drawn.total, given_eps.total)


MEMORY = """
import resource, torch
from ddpm_nb.bound import vlb_terms
from ddpm_nb.forward import NoiseSchedule
torch.set_num_threads(1)
x_0 = torch.randint(256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
conv = torch.nn.Conv2d(1, 1, 3, padding=1)
terms = vlb_terms(lambda x, t: conv(x), NoiseSchedule(torch.linspace(1e-4, 0.02, 1000)), x_0)
assert terms.total.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_thousand_steps_of_64_mnist_images_fit_in_two_gigabytes():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 2  # GiB, of which torch itself takes half of one


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


def test_trap_the_sum_without_step_one_is_not_the_bound():
    """Leave L_0 out of the weighted squared errors, as a loop over t = 2..T does: the bound is missed by its size."""
    schedule = linear(12)
    x_0, eps = torch.randn(3, 2, generator=seeded(0), **F64), torch.randn(12, 3, 2, generator=seeded(1), **F64)
    terms = vlb_terms(lambda x_t, t: torch.tanh(x_t), schedule, x_0, eps=eps, **CONTINUOUS)
    constants = math.log(2 * math.pi) + reverse_log_variance(schedule)[0]  # of L_0, with D = 2
    nats = (terms.total - terms.prior) * 2 * math.log(2) - constants
    x_t = q_sample(schedule, x_0.repeat(12, 1), torch.arange(12).repeat_interleave(3), eps.flatten(0, 1))
    errors = (torch.tanh(x_t) - eps.flatten(0, 1)).square().sum(1).view(12, 3)
    weighted = vlb_weights(schedule)[:, None] * errors
    torch.testing.assert_close(weighted.sum(0), nats)
    assert ((weighted[1:].sum(0) - nats).abs() > 0.2).all()


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


@pytest.mark.parametrize("n_steps", [10, 100, 1000])
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
    torch.testing.assert_close(output_to_eps(schedule, objective, x_t, t, target), eps, rtol=1e-10, atol=1e-13 * condition)


def test_velocity_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="linear")
    schedule = NoiseSchedule(torch.linspace(1e-4, 0.02, 100, **F64))
    x_0, eps = torch.randn(2, 6, 1, 4, 4, generator=seeded(0))
    t = torch.tensor([0, 1, 20, 50, 98, 99])
    ours = objective_target(schedule, "v", x_0, q_sample(schedule, x_0, t, eps), t, eps)
    torch.testing.assert_close(ours, scheduler.get_velocity(x_0, eps, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_weighting_does_not_depend_on_what_the_network_predicts(objective):
    """Give the same knowledge in each of the four forms: the weighted loss is the same, the simple loss is not."""
    schedule, generator = linear(20), seeded(0)
    x_0, eps, eps_hat = torch.randn(3, 50, 3, generator=generator, **F64)
    t = torch.randint(20, (50,), generator=generator)

    def model(x_t, t):  # what the objective would be, were eps_hat the noise
        x_0_hat = (x_t - schedule.sqrt_one_minus_alpha_bars[t, None] * eps_hat) / schedule.sqrt_alpha_bars[t, None]
        return objective_target(schedule, objective, x_0_hat, x_t, t, eps_hat)

    for variance in VARIANCES:
        expected = 20 * (vlb_weights(schedule, variance)[t, None] * (eps - eps_hat).square()).mean()
        found = simple_loss(model, schedule, x_0, t=t, eps=eps, objective=objective, weighting="vlb", variance=variance)
        torch.testing.assert_close(found, expected)
    simple = simple_loss(model, schedule, x_0, t=t, eps=eps, objective=objective)
    assert (simple - (eps - eps_hat).square().mean()).abs() < 1e-9 or objective != "eps"


def test_weighted_loss_estimates_the_bound_with_its_own_draws():
    """Average the loss with drawn steps over many images: it is the bound less its constants, within the error computed beforehand."""
    schedule, data, n = linear(25), gaussian(2), 200_000
    x_0 = data.sample(1, generator=seeded(0))
    form = ClosedForm(schedule.exact_betas, data, "posterior")
    means = []
    for t in range(25):
        b, a = form.error(t, x_0)
        means.append(form.weight(t) * (b.square().sum() + a.square().sum()) / 2)  # nats per dimension
    expected = torch.stack(means).sum()
    _, _, variances = form.terms(x_0)
    second = (variances[0] / 4 + torch.stack(means) ** 2).mean() * 25**2  # mean square of one draw, t uniform
    error = ((second - expected**2) / n).sqrt()
    found = simple_loss(optimal_denoiser(data, schedule), schedule, x_0.expand(n, -1), weighting="vlb", generator=seeded(1))
    assert (found - expected).abs() < 5 * error
    assert error < 0.02 * expected


def test_simple_loss_repeats_with_its_seed_and_reaches_the_parameters():
    layer, schedule, x_0 = torch.nn.Linear(3, 3), linear(10, torch.float32), torch.randn(8, 3, generator=seeded(0))
    first, second, other = (simple_loss(lambda x_t, t: layer(x_t), schedule, x_0, generator=seeded(s)) for s in (1, 1, 2))
    assert first == second != other
    first.backward()
    assert layer.weight.grad.abs().sum() > 0


def random_mixture(k, d, generator):
    """Draw a mixture."""
    roots = torch.randn(k, d, d, generator=generator, **F64)
    covariances = roots @ roots.mT * 0.2 + 0.05 * torch.eye(d, **F64)
    weights, means = torch.rand(k, generator=generator, **F64).softmax(0), torch.randn(k, d, generator=generator, **F64)
    return GaussianMixture(weights, means, covariances)


@quick
@given(k=st.integers(1, 4), d=st.integers(1, 4), n_steps=st.integers(1, 50), seed=st.integers(0, 10**6))
def test_optimal_denoiser_is_the_score(k, d, n_steps, seed):
    generator = seeded(seed)
    mixture = random_mixture(k, d, generator)
    schedule = NoiseSchedule(torch.rand(n_steps, generator=generator, **F64) * 0.5 + 1e-3, dtype=torch.float64)
    t = torch.randint(n_steps, (5,), generator=generator)
    x_t = (2 * torch.randn(5, d, generator=generator, **F64)).requires_grad_()
    log_prob = torch.stack([diffuse_mixture(mixture, schedule, int(i)).log_prob(x[None])[0] for i, x in zip(t, x_t, strict=True)])
    (score,) = torch.autograd.grad(log_prob.sum(), x_t)
    expected = -schedule.sqrt_one_minus_alpha_bars[t, None] * score
    found = optimal_denoiser(mixture, schedule)(x_t.detach(), t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_optimal_denoiser_on_images_integers_and_far_points():
    schedule, model = linear(1000, torch.float32), optimal_denoiser(MIXTURE, linear(1000, torch.float32))
    x_t = torch.randn(4, 1, 1, 2, generator=seeded(0))
    flat = model(x_t.flatten(1), torch.full((4,), 7))
    assert model(x_t, 7).shape == x_t.shape
    assert flat.dtype == torch.float32
    torch.testing.assert_close(model(x_t, 7).flatten(1), flat)
    for t in (0, 999):
        assert model(torch.tensor([[1e3, -1e3], [0.0, 0.0]]), t).isfinite().all()
    assert schedule.n_steps == 1000


def test_diffused_mixture_has_the_moments_of_noisy_samples():
    schedule, n, t = linear(10), 200_000, 3
    x_t = q_sample(schedule, MIXTURE.sample(n, generator=seeded(0)), t, generator=seeded(1))
    noisy = diffuse_mixture(MIXTURE, schedule, t)
    error = (noisy.covariance().diagonal() / n).sqrt()
    assert ((x_t.mean(0) - noisy.mean()).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(x_t.T), noisy.covariance(), rtol=0, atol=0.02)


@pytest.mark.parametrize("variance", VARIANCES)
def test_mean_bound_never_exceeds_the_entropy_of_a_mixture(variance):
    x_0 = MIXTURE.sample(3000, generator=seeded(0))
    for schedule, errors in ((linear(20), 10), (linear(200), -5), (NoiseSchedule(torch.full((30,), 0.2, **F64), dtype=torch.float64), 10)):
        terms = vlb_terms(optimal_denoiser(MIXTURE, schedule), schedule, x_0, variance=variance, generator=seeded(1), **CONTINUOUS)
        gap = MIXTURE.log_prob(x_0) + terms.total * 2 * math.log(2)
        assert gap.mean() > errors * gap.std() / math.sqrt(len(gap))  # far above zero for the short chains


def test_no_prediction_beats_the_optimal_one():
    schedule, n = linear(20), 50_000
    x_0, t = MIXTURE.sample(n, generator=seeded(0)), torch.randint(20, (n,), generator=seeded(1))
    eps = torch.randn(n, 2, generator=seeded(2), **F64)
    best = optimal_denoiser(MIXTURE, schedule)
    floor = simple_loss(best, schedule, x_0, t=t, eps=eps)
    for change, sign in itertools.product((torch.tanh, torch.cos, torch.ones_like), (-0.1, 0.1)):
        other = simple_loss(lambda x, t, c=change, s=sign: best(x, t) + s * c(x), schedule, x_0, t=t, eps=eps)
        assert other > floor


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


def test_rate_falls_and_its_scale_is_grey_levels():
    mse = torch.tensor([[0.01, 0.04, 0.16]] * 2)
    terms = VLBTerms(torch.tensor([0.1, 0.3]), torch.tensor([[3.0, 1.0], [5.0, 3.0]]), torch.tensor([9.0, 9.0]), mse)
    rate, distortion = rate_distortion(terms)
    torch.testing.assert_close(rate, torch.tensor([6.2, 2.2, 0.2]))
    torch.testing.assert_close(distortion, 127.5 * torch.tensor([0.1, 0.2, 0.4]))
    torch.testing.assert_close(rate_distortion(terms, n_levels=17)[1], 8 * torch.tensor([0.1, 0.2, 0.4]))
    with pytest.raises(ValueError, match=r"terms\.mse"):
        rate_distortion(VLBTerms(terms.prior, terms.kl, terms.decoder))


def never(x_t, t):
    """Stand for a network that must not be reached."""
    raise AssertionError("the network was called before the arguments were checked")


IMAGES = torch.zeros(2, 1, 3, 3)
BAD_BOUNDS = [
    ({"variance": "learned"}, ValueError, "variance must be one of 'posterior', 'beta'"),
    ({"n_levels": 1}, ValueError, "n_levels must be at least 2"),
    ({"n_levels": 17.0}, TypeError, "n_levels must be a whole number"),
    ({"n_levels": True}, TypeError, "n_levels must be a whole number"),
    ({"x_0": IMAGES + 0.03, "n_levels": 17}, ValueError, "x_0 must lie on the grid of n_levels=17"),
    ({"x_0": IMAGES + 0.5 / 255}, ValueError, "x_0 must lie on the grid of n_levels=256"),
    ({"x_0": IMAGES + 3}, ValueError, r"x_0 must be scaled to \[-1, 1\]"),
    ({"x_0": IMAGES[0]}, ValueError, r"x_0 must have shape \(B, C, H, W\)"),
    ({"x_0": IMAGES[:0]}, ValueError, "x_0 must have shape"),
    ({"x_0": torch.zeros(3), "n_levels": None}, ValueError, "x_0 must have shape"),
    ({"x_0": IMAGES.long()}, TypeError, "x_0 must have a floating-point dtype"),
    ({"x_0": IMAGES.numpy()}, TypeError, r"x_0 must be a torch\.Tensor"),
    ({"x_0": IMAGES + math.nan}, ValueError, "x_0 must be finite"),
    ({"eps": torch.zeros(2, 1, 3, 3)}, ValueError, r"eps must have shape \(5, 2, 1, 3, 3\)"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BOUNDS)
def test_bound_refuses_bad_arguments_before_any_work(change, error, message):
    arguments = {"x_0": IMAGES + 1, **change}
    with pytest.raises(error, match=message):
        vlb_terms(never, linear(5, torch.float32), arguments.pop("x_0"), **arguments)


BAD_LOSSES = [
    ({"objective": "noise"}, ValueError, "objective must be one of 'eps', 'x_0', 'v', 'mu'"),
    ({"weighting": "snr"}, ValueError, "weighting must be one of 'simple', 'vlb'"),
    ({"weighting": "vlb", "variance": "learned"}, ValueError, "variance must be one of"),
    ({"t": torch.zeros(3).long()}, ValueError, r"t must have shape \(2,\)"),
    ({"t": torch.zeros(2)}, TypeError, "t must have an integer dtype"),
    ({"t": torch.tensor([0, 5])}, ValueError, r"t must be in 0\.\.4"),
    ({"t": torch.tensor([-1, 0])}, ValueError, r"t must be in 0\.\.4"),
    ({"eps": torch.zeros(2, 1, 3, 4)}, ValueError, "eps must have the shape"),
    ({"eps": IMAGES * math.inf}, ValueError, "eps must be finite"),
    ({"x_0": IMAGES[:0]}, ValueError, "x_0 must have shape"),
    ({"x_0": IMAGES.int()}, TypeError, "x_0 must have a floating-point dtype"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LOSSES)
def test_loss_refuses_bad_arguments_before_any_work(change, error, message):
    arguments = {"x_0": IMAGES, **change}
    with pytest.raises(error, match=message):
        simple_loss(never, linear(5, torch.float32), arguments.pop("x_0"), **arguments)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 2, 3, 3), (2,)])
def test_output_of_another_shape_is_refused_and_not_broadcast(shape):
    with pytest.raises(ValueError, match="the model's output must have the shape of x_0"):
        simple_loss(lambda x_t, t: torch.zeros(shape), linear(5, torch.float32), IMAGES)
    with pytest.raises(ValueError, match="eps_hat must have the shape of x_t"):
        vlb_terms(lambda x_t, t: torch.zeros(shape), linear(5, torch.float32), IMAGES + 1, chunk_size=1)


def test_other_bad_arguments():
    schedule, x = linear(5), torch.zeros(2, 2, **F64)
    with pytest.raises(ValueError, match="objective must be one of"):
        objective_target(schedule, "score", x, x, 0, x)
    with pytest.raises(ValueError, match="objective must be one of"):
        output_to_eps(schedule, "score", x, 0, x)
    with pytest.raises(ValueError, match="output must have the shape of x_t"):
        output_to_eps(schedule, "v", x, 0, x[:, :1])
    with pytest.raises(ValueError, match="variance must be one of"):
        vlb_weights(schedule, "learned")
    with pytest.raises(ValueError, match=r"t must be in 0\.\.4"):
        diffuse_mixture(MIXTURE, schedule, 5)
    with pytest.raises(ValueError, match="x_t must have 2 values for each image"):
        optimal_denoiser(MIXTURE, schedule)(torch.zeros(4, 3, **F64), 0)
    with pytest.raises(ValueError, match=r"t must be in 0\.\.4"):
        optimal_denoiser(MIXTURE, schedule)(x, torch.tensor([0, 7]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bound_on_a_gpu_is_the_bound_on_the_cpu():
    schedule, data = linear(40), gaussian(2)
    x_0 = data.sample(6, generator=seeded(0))
    on_cpu = vlb_terms(optimal_denoiser(data, schedule), schedule, x_0, generator=seeded(1), **CONTINUOUS)
    there = GaussianMixture(data.weights.cuda(), data.means.cuda(), data.covariances.cuda())
    schedule = linear(40).cuda()
    on_gpu = vlb_terms(optimal_denoiser(there, schedule), schedule, x_0.cuda(), generator=seeded(1), **CONTINUOUS)
    assert on_gpu.kl.device.type == "cuda"
    torch.testing.assert_close(on_gpu.kl.cpu(), on_cpu.kl, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(on_gpu.total.cpu(), on_cpu.total, rtol=1e-9, atol=1e-9)
    generator = torch.Generator("cuda").manual_seed(0)
    loss = simple_loss(optimal_denoiser(there, schedule), schedule, x_0.cuda(), weighting="vlb", generator=generator)
    assert loss.isfinite()
