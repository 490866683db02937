"""Test the bound against closed forms: exactly where the data is Gaussian, and against mixtures elsewhere."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import linear, never, refuses
from ddpm_nb.bound import VLBTerms, optimal_denoiser, rate_distortion, vlb_terms
from ddpm_nb.elbo import (
    VARIANCES,
    diffuse_mixture,
    reverse_log_variance,
    reverse_mean_variance,
    simple_loss,
    vlb_weights,
)
from ddpm_nb.forward import NoiseSchedule, q_posterior, q_sample
from ddpm_nb.gaussian import GaussianMixture, normal_kl, seeded

F64 = {"dtype": torch.float64}
CONTINUOUS = {"n_levels": None, "clip_x_0": False}
quick = settings(deadline=None, max_examples=30)


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


@pytest.mark.parametrize(
    ("n_levels", "shape", "betas"),
    [
        (256, (4, 3, 5, 5), torch.tensor([0.3, 0.6])),
        (17, (2, 1, 8, 8), torch.linspace(1e-4, 0.02, 1000)),
        (2, (1, 1, 1, 1), torch.tensor([0.3])),
        (None, (3, 7), torch.tensor([0.3, 0.6])),
    ],
    ids=str,
)
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

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB on Linux

x_0 = torch.randint(256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
conv = torch.nn.Conv2d(1, 1, 3, padding=1)
conv(x_0)  # loads what torch loads at the first convolution
before = peak()  # half of one to three, as torch's libraries are mapped
terms = vlb_terms(lambda x, t: conv(x), NoiseSchedule(torch.linspace(1e-4, 0.02, 1000)), x_0)
assert terms.total.isfinite().all()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_thousand_steps_of_64_mnist_images_take_less_than_one_gigabyte():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1  # GiB beside torch itself; all steps at once take 3.7


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


def test_rate_falls_and_its_scale_is_grey_levels():
    mse = torch.tensor([[0.01, 0.04, 0.16]] * 2)
    terms = VLBTerms(torch.tensor([0.1, 0.3]), torch.tensor([[3.0, 1.0], [5.0, 3.0]]), torch.tensor([9.0, 9.0]), mse)
    rate, distortion = rate_distortion(terms)
    torch.testing.assert_close(rate, torch.tensor([6.2, 2.2, 0.2]))
    torch.testing.assert_close(distortion, 127.5 * torch.tensor([0.1, 0.2, 0.4]))
    torch.testing.assert_close(rate_distortion(terms, n_levels=17)[1], 8 * torch.tensor([0.1, 0.2, 0.4]))
    refuses(lambda: rate_distortion(VLBTerms(terms.prior, terms.kl, terms.decoder)), "terms.mse")
    refuses(lambda: rate_distortion(terms, n_levels=1), "n_levels must be at least 2")


IMAGES = torch.zeros(2, 1, 3, 3)


def test_bound_refuses_bad_arguments_before_any_work():
    schedule = linear(5, torch.float32)
    for words, change in {
        "variance must be one of 'posterior', 'beta', 'learned'": {"variance": "wide"},
        "n_levels must be at least 2": {"n_levels": 1},
        "n_levels must be a whole number; got 17.0": {"n_levels": 17.0},
        "n_levels must be a whole number; got True": {"n_levels": True},
        "x_0 must lie on the grid of n_levels=17": {"x_0": IMAGES + 0.03, "n_levels": 17},
        "x_0 must lie on the grid of n_levels=256": {"x_0": IMAGES + 0.5 / 255},
        "x_0 must be scaled to [-1, 1]": {"x_0": IMAGES + 3},
        "x_0 must have shape (B, C, H, W)": {"x_0": IMAGES[0]},
        "x_0 must have shape (B, ...) and at least one image; got (0,": {"x_0": IMAGES[:0]},
        "x_0 must have shape (B, ...) and at least one image; got (3,)": {"x_0": torch.zeros(3), "n_levels": None},
        "x_0 must have a floating-point dtype": {"x_0": IMAGES.long()},
        "x_0 must be a torch.Tensor": {"x_0": IMAGES.numpy()},
        "x_0 must be finite": {"x_0": IMAGES + math.nan},
        "eps must have shape (5, 2, 1, 3, 3)": {"eps": torch.zeros(2, 1, 3, 3)},
        "eps must be finite": {"eps": torch.full((5, 2, 1, 3, 3), math.nan)},
        "chunk_size must be at least 1": {"chunk_size": 0},
        "generator must be a torch.Generator": {"generator": 3},
    }.items():
        arguments = {"x_0": IMAGES + 1, **change}
        refuses(lambda a=arguments: vlb_terms(never, schedule, **a), words, error=(ValueError, TypeError))


def test_output_of_another_shape_is_refused_and_not_broadcast():
    for shape in [(2, 1, 1, 1), (2, 2, 3, 3), (2,)]:
        model = lambda x_t, t, shape=shape: torch.zeros(shape)
        refuses(lambda m=model: vlb_terms(m, linear(5, torch.float32), IMAGES + 1, chunk_size=1), "eps_hat must have the shape of x_t")


def test_the_bound_records_no_graph():
    terms = vlb_terms(lambda x_t, t: x_t, linear(5, torch.float32), (IMAGES + 1).requires_grad_())
    assert not any(part.requires_grad for part in (terms.total, terms.prior, terms.mse))


def test_the_bound_with_given_noise_under_a_default_device():
    schedule, eps = linear(5, torch.float32), torch.randn(5, *IMAGES.shape)
    wanted = vlb_terms(lambda x_t, t: x_t, schedule, IMAGES + 1, eps=eps).total
    with torch.device("meta"):
        assert torch.equal(vlb_terms(lambda x_t, t: x_t, schedule, IMAGES + 1, eps=eps).total, wanted)


def test_best_denoiser_takes_a_mixture_of_another_type():
    single, x = to(MIXTURE, torch.float32), torch.randn(3, 2, generator=seeded(0))
    wanted = optimal_denoiser(to(single, torch.float64), linear(5))(x.double(), 3)
    for points in (x, x.double()):
        found = optimal_denoiser(single, linear(5))(points, 3)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_best_denoiser_refuses_other_dimensions_and_steps():
    model = optimal_denoiser(MIXTURE, linear(5))
    refuses(lambda: model(torch.zeros(4, 3, **F64), 0), "x_t must have 2 values for each image")
    refuses(lambda: model(torch.zeros(2, 2, **F64), torch.tensor([0, 7])), "t must be in 0..4")


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


def test_the_error_of_the_guess_is_the_mean_over_an_image():
    """A model whose guess is always 0, in the middle of [-1, 1], errs by the mean square of the image."""
    schedule, x_0 = linear(20), torch.rand(3, 2, 4, 4, generator=seeded(0), dtype=torch.float64) * 2 - 1
    grey = lambda x_t, t: x_t / schedule.sqrt_one_minus_alpha_bars[t].view(-1, 1, 1, 1)
    terms = vlb_terms(grey, schedule, x_0, n_levels=None, generator=seeded(1))
    wanted = x_0.square().flatten(1).mean(1)
    torch.testing.assert_close(terms.mse, wanted[:, None].expand(3, 20))
