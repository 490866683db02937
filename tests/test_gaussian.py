"""Test `ddpm_nb.gaussian`: identities over random inputs, digits kept in the tails, and what is refused."""

import dataclasses
import math
from contextlib import nullcontext

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import (
    Categorical,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.testing import assert_close

from ddpm_nb.gaussian import (
    GaussianMixture,
    discretized_gaussian_log_likelihood,
    gaussian_log_prob,
    log_normal_mass,
    normal_kl,
    randn,
    reparameterize,
    seeded,
    seeded_init,
)

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
common = settings(deadline=None, max_examples=50, derandomize=True)
shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)
seeds = st.integers(0, 2**31)



def precise_log_mass(lower, upper):
    """Compute log(Phi(upper) - Phi(lower)) with 60 digits."""
    with mpmath.workdps(60):
        lower, upper = mpmath.mpf(lower), mpmath.mpf(upper)
        if lower + upper > 0:
            lower, upper = -upper, -lower
        return float(mpmath.log((mpmath.erfc(-upper / mpmath.sqrt(2)) - mpmath.erfc(-lower / mpmath.sqrt(2))) / 2))


def random_mixture(k, d, seed, dtype=F64):
    """Make a mixture with random parameters."""
    g = seeded(seed)
    roots = randn((k, d, d), generator=g, dtype=dtype)
    covariances = roots @ roots.mT + 0.2 * torch.eye(d, dtype=dtype)
    return GaussianMixture(randn((k,), generator=g, dtype=dtype).softmax(0), 2 * randn((k, d), generator=g, dtype=dtype), covariances)


# randn and reparameterize


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_randn_is_one_draw_of_torch_randn(dtype):
    """Any code that draws with torch.randn from the same seed gets the same noise."""
    assert torch.equal(randn((3, 5), generator=seeded(4), dtype=dtype), torch.randn((3, 5), generator=seeded(4), dtype=dtype))
    assert not torch.equal(randn((3, 5), generator=seeded(4)), randn((3, 5), generator=seeded(5)))


@common
@given(shapes, seeds)
def test_reparameterize_is_undone_by_standardising(shape, seed):
    """The noise comes back from the draw, in double and in single precision."""
    g = seeded(seed)
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-4)):
        mean, eps = randn(shape, generator=g, dtype=dtype), randn(shape, generator=g, dtype=dtype)
        std = 0.1 + torch.rand(shape, generator=g, dtype=dtype)
        z = reparameterize(mean, std, eps)
        assert z.dtype == dtype
        assert_close((z - mean) / std, eps, rtol=tolerance, atol=tolerance)


@common
@given(shapes, seeds)
def test_gradient_of_a_sample_is_one_and_eps(shape, seed):
    """dz/dmean = 1 and dz/dstd = eps, for every element of a broadcast scalar as well."""
    eps = randn(shape, generator=seeded(seed), dtype=F64)
    mean, std = torch.zeros(shape, dtype=F64, requires_grad=True), torch.ones((), dtype=F64, requires_grad=True)
    grad_mean, grad_std = torch.autograd.grad(reparameterize(mean, std, eps).sum(), (mean, std))
    assert_close(grad_mean, torch.ones(shape, dtype=F64))
    assert_close(grad_std, eps.sum(), **EXACT)


def test_reparameterize_repeats_with_the_seed_and_broadcasts():
    """The noise has the broadcast shape: nothing shares one draw by accident."""
    mean, std = torch.zeros(4, 1), torch.ones(3)
    z = reparameterize(mean, std, generator=seeded(0))
    assert z.shape == (4, 3)
    assert len(z.unique()) == 12
    assert torch.equal(z, reparameterize(mean, std, generator=seeded(0)))
    assert torch.equal(reparameterize(mean, torch.zeros(3)), torch.zeros(4, 3))


# sums and linear maps


@common
@given(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(-10, 10), st.floats(-10, 10))
def test_product_of_two_densities_completes_the_square(a, b, u, w):
    """The split of the product, from which the sum of Gaussians follows, holds at every point."""
    a, b, u, w = (torch.tensor(v, dtype=F64) for v in (a, b, u, w))
    s = torch.hypot(a, b)
    left = Normal(0 * a, a).log_prob(u) + Normal(0 * b, b).log_prob(w - u)
    right = Normal(a**2 / s**2 * w, a * b / s).log_prob(u) + Normal(0 * s, s).log_prob(w)
    assert_close(left, right, **EXACT)


@common
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), seeds)
def test_log_prob_agrees_with_torch_distributions(d, k, n, seed):
    """The density equals PyTorch's, and single precision agrees with double to 1e-3."""
    mixture, x = random_mixture(k, d, seed), 3 * randn((n, d), generator=seeded(seed + 1), dtype=F64)
    theirs = MultivariateNormal(mixture.means, mixture.covariances).log_prob(x[:, None])
    ours = gaussian_log_prob(x, mixture.means, mixture.covariances)
    assert_close(ours, theirs, **EXACT)
    single = gaussian_log_prob(x.float(), mixture.means.float(), mixture.covariances.float())
    assert_close(single.double(), ours, rtol=1e-3, atol=1e-3)


@common
@given(st.integers(1, 4), seeds)
def test_log_prob_follows_linear_maps(d, seed):
    """log N(x; m, C) = log N(Ax + b; Am + b, ACA') + log |det A|."""
    mixture, g = random_mixture(1, d, seed), seeded(seed + 1)
    x, b = randn((3, d), generator=g, dtype=F64), randn((d,), generator=g, dtype=F64)
    a = randn((d, d), generator=g, dtype=F64) + 3 * torch.eye(d, dtype=F64)
    after = gaussian_log_prob(x @ a.T + b, mixture.means @ a.T + b, a @ mixture.covariances @ a.T)
    before = gaussian_log_prob(x, mixture.means, mixture.covariances)
    assert_close(after + torch.linalg.slogdet(a).logabsdet, before, rtol=1e-7, atol=1e-7)


# normal_kl


numbers = st.floats(-5, 5)


@common
@given(numbers, numbers, numbers, numbers)
def test_kl_agrees_with_torch_distributions(mean_1, log_var_1, mean_2, log_var_2):
    """The divergence equals PyTorch's, is not negative, and single precision agrees to 1e-5."""
    values = [torch.tensor(v, dtype=F64) for v in (mean_1, log_var_1, mean_2, log_var_2)]
    ours = normal_kl(*values)
    p, q = Normal(values[0], (0.5 * values[1]).exp()), Normal(values[2], (0.5 * values[3]).exp())
    assert_close(ours, kl_divergence(p, q), **EXACT)
    assert ours >= 0
    assert_close(normal_kl(*(v.float() for v in values)).double(), ours, rtol=1e-4, atol=1e-5)


@common
@given(numbers, numbers, numbers, numbers, st.floats(0.1, 3), numbers)
def test_kl_does_not_depend_on_units(mean_1, log_var_1, mean_2, log_var_2, a, b):
    """One linear map of both variables changes nothing."""
    mean_1, log_var_1, mean_2, log_var_2 = (torch.tensor(v, dtype=F64) for v in (mean_1, log_var_1, mean_2, log_var_2))
    shift = 2 * math.log(a)
    mapped = normal_kl(a * mean_1 + b, log_var_1 + shift, a * mean_2 + b, log_var_2 + shift)
    assert_close(mapped, normal_kl(mean_1, log_var_1, mean_2, log_var_2), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ratio", [1e-3, 1e-6, -1e-5])
def test_kl_keeps_digits_for_nearly_equal_variances(ratio):
    """The form with expm1 keeps at least six digits where the plain exponential loses them."""
    with mpmath.workdps(60):
        r = mpmath.mpf(ratio)
        precise = float((mpmath.exp(r) - 1 - r) / 2)
    zero, r = torch.zeros((), dtype=F64), torch.tensor(ratio, dtype=F64)
    ours, plain = normal_kl(zero, r, zero, zero), 0.5 * (torch.exp(r) - 1 - r)
    assert abs(ours - precise) < 1e-6 * precise
    assert abs(plain - precise) > 10 * abs(ours - precise)


def test_kl_is_zero_only_for_equal_distributions_and_is_not_symmetric():
    """Equal arguments give exactly 0; swapping them changes the value."""
    mean, log_var = randn((50,), generator=seeded(0)), randn((50,), generator=seeded(1))
    assert torch.equal(normal_kl(mean, log_var, mean, log_var), torch.zeros(50))
    zero, one = torch.zeros(()), torch.ones(())
    assert abs(normal_kl(zero, one, zero, zero) - normal_kl(zero, zero, zero, one)) > 0.1


# log_normal_mass


@pytest.mark.parametrize("width", [1e-6, 1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5)])
def test_mass_agrees_with_many_digits(width, dtype, tolerance):
    """From the centre to ten thousand standard deviations, against 60 digits; relative where the logarithm is large."""
    if dtype == torch.float32 and width < 0.1:
        pytest.skip("a narrow bin is below the resolution of single precision; the likelihood works in double")
    for centre in (0.0, 0.1, 1.0, 3.0, 6.0, 10.0, 40.0, 1e3, 1e4):
        for sign in (1, -1):
            lower, upper = (torch.tensor(sign * centre + side * width / 2, dtype=dtype) for side in (-1, 1))
            precise = precise_log_mass(lower.item(), upper.item())
            error = abs(log_normal_mass(lower, upper).item() - precise)
            assert error < tolerance * max(1, abs(precise)), (centre, sign)


def test_mass_of_half_lines():
    """Infinite limits are allowed: half lines have the mass of one tail, the whole line has mass 1."""
    inf, a = torch.tensor(math.inf, dtype=F64), torch.tensor([-50.0, -1.0, 0.0, 2.0, 50.0], dtype=F64)
    assert_close(log_normal_mass(-inf.expand(5), a), torch.special.log_ndtr(a))
    assert_close(log_normal_mass(a, inf.expand(5)), torch.special.log_ndtr(-a))
    assert log_normal_mass(-inf, inf) == 0


@pytest.mark.parametrize("centre", [0.0, 2.0, -2.0, 8.0, -30.0])
def test_gradient_of_mass(centre):
    """The derivative with respect to a limit is the density there divided by the mass."""
    lower, upper = (torch.tensor(centre + side, dtype=F64, requires_grad=True) for side in (-0.3, 0.3))
    log_mass = log_normal_mass(lower, upper)
    grads = torch.autograd.grad(log_mass, (lower, upper))
    log_density = [-0.5 * limit**2 - 0.5 * math.log(2 * math.pi) for limit in (lower, upper)]
    assert_close(grads, (-(log_density[0] - log_mass).exp(), (log_density[1] - log_mass).exp()), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("distance", [10.0, 1e3, 1e5, 1e9])
def test_gradient_of_mass_far_away(distance, dtype, tolerance):
    """The slope of log Phi(x) at x = -z is z + 1/z - 2/z^3 + ...; density over Phi by logarithms, as in log_ndtr, loses it."""
    with mpmath.workdps(60):
        z = mpmath.mpf(distance)
        series = z + 1 / z - 2 / z**3
        precise = float(series if distance > 100 else mpmath.npdf(z) / (mpmath.erfc(z / mpmath.sqrt(2)) / 2))
    x = torch.tensor(-distance, dtype=dtype, requires_grad=True)
    (ours,) = torch.autograd.grad(log_normal_mass(torch.tensor(-math.inf, dtype=dtype), x), x)
    assert abs(ours.item() / precise - 1) < tolerance
    if distance**2 * torch.finfo(dtype).eps > 0.1:
        through_logarithms = torch.exp(-0.5 * x**2 - torch.special.log_ndtr(x)) / math.sqrt(2 * math.pi)
        assert abs(through_logarithms.item() / precise - 1) > 1e-2


@pytest.mark.parametrize("lower", [10.0, -11.0])
def test_plain_difference_fails_in_the_tail(lower):
    """Above the mean the difference of distribution functions is 0 even in double precision; ours is right on both sides."""
    a = torch.tensor(lower, dtype=F64)
    assert_close(log_normal_mass(a, a + 1).item(), precise_log_mass(lower, lower + 1), rtol=1e-12, atol=0)
    if lower > 0:
        assert torch.special.ndtr(a + 1) - torch.special.ndtr(a) == 0


# discretized_gaussian_log_likelihood


def grid(n_levels, dtype=F64):
    """List the levels."""
    return torch.linspace(-1, 1, n_levels, dtype=dtype)


@common
@given(st.integers(2, 300), st.floats(-3, 3), st.floats(-7, 3))
def test_levels_sum_to_one(n_levels, mean, log_scale):
    """Whatever the number of levels, the mean and the scale, the probabilities sum to 1."""
    mean, log_scale = torch.tensor(mean, dtype=F64), torch.tensor(log_scale, dtype=F64)
    log_p = discretized_gaussian_log_likelihood(grid(n_levels), mean, log_scale, n_levels=n_levels)
    assert_close(log_p.logsumexp(0), torch.zeros((), dtype=F64), **EXACT)
    single = discretized_gaussian_log_likelihood(grid(n_levels, torch.float32), mean.float(), log_scale.float(), n_levels=n_levels)
    assert single.dtype == torch.float32
    assert abs(single.logsumexp(0)) < 1e-5


@pytest.mark.parametrize("n_levels", [2, 17, 256])
@pytest.mark.parametrize(("mean", "scale"), [(0.3, 0.5), (-0.9, 0.01), (1.7, 0.02), (0.0, 20.0)])
def test_likelihood_agrees_with_many_digits(n_levels, mean, scale):
    """Every level, from probabilities near 1 to 1e-10000, against 60 digits."""
    levels, half = grid(n_levels), 1 / (n_levels - 1)
    ours = discretized_gaussian_log_likelihood(
        levels, torch.tensor(mean, dtype=F64), torch.tensor(scale, dtype=F64).log(), n_levels=n_levels
    )
    for k in range(0, n_levels, max(1, n_levels // 16)):
        lower = -math.inf if k == 0 else (levels[k].item() - half - mean) / scale
        upper = math.inf if k == n_levels - 1 else (levels[k].item() + half - mean) / scale
        precise = precise_log_mass(lower, upper)
        assert abs(ours[k].item() - precise) < 1e-9 * max(1, abs(precise))


@common
@given(st.integers(2, 64), st.floats(-2, 2), st.floats(-5, 2))
def test_likelihood_is_symmetric(n_levels, mean, log_scale):
    """Exchanging black and white changes nothing."""
    mean, log_scale = torch.tensor(mean, dtype=F64), torch.tensor(log_scale, dtype=F64)
    log_p = discretized_gaussian_log_likelihood(grid(n_levels), mean, log_scale, n_levels=n_levels)
    mirrored = discretized_gaussian_log_likelihood(-grid(n_levels), -mean, log_scale, n_levels=n_levels)
    assert_close(log_p, mirrored, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("log_scale", [-20.0, -7.0, 0.0, 5.0])
@pytest.mark.parametrize("mean", [-5.0, -1.0, 0.03, 1.0])
def test_values_and_gradients_are_finite(dtype, log_scale, mean):
    """However wrong the prediction, it gets a finite value and a finite gradient, at the edge bins too."""
    mean = torch.full((256,), mean, dtype=dtype, requires_grad=True)
    log_scale = torch.full((256,), log_scale, dtype=dtype, requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(grid(256, dtype), mean, log_scale)
    assert log_p.isfinite().all()
    assert (log_p <= 0).all()
    for grad in torch.autograd.grad(log_p.sum(), (mean, log_scale)):
        assert grad.isfinite().all()


def test_gradient_pulls_the_mean_towards_the_value():
    """The sign of the gradient is right at every distance; the form with a floor of 1e-12 has no gradient when far."""
    mean = torch.zeros(17, requires_grad=True)
    ours = discretized_gaussian_log_likelihood(grid(17, torch.float32), mean, torch.tensor(-4.0), n_levels=17)
    (pull,) = torch.autograd.grad(ours.sum(), mean)
    assert torch.equal(pull.sign()[:8], -torch.ones(8))
    assert torch.equal(pull.sign()[9:], torch.ones(8))
    plus, minus = (torch.special.ndtr((grid(17, torch.float32) - mean + side / 16) * math.exp(4)) for side in (1, -1))
    floored = (plus - minus).clamp(min=1e-12).log()
    (pull,) = torch.autograd.grad(floored.sum(), mean)
    assert (pull[:4] == 0).all()
    assert (floored[:4] > ours[:4] + 100).all()


def test_edge_bins_reach_to_infinity():
    """A mean beyond white makes white certain; a bin that ends at 1 + h would give it almost nothing."""
    mean, log_scale, h = torch.tensor(2.0, dtype=F64), torch.tensor(0.1, dtype=F64).log(), 1 / 255
    white = discretized_gaussian_log_likelihood(torch.ones((), dtype=F64), mean, log_scale)
    assert abs(white) < 1e-10
    assert log_normal_mass((1 - h - mean) / 0.1, (1 + h - mean) / 0.1) < -40


def test_number_of_levels_matters():
    """Bins of 256 levels on data of 17 leave most of the probability between the levels; such data are refused."""
    mean, log_scale, levels = torch.zeros((), dtype=F64), torch.tensor(-1.0, dtype=F64), grid(17)
    lower, upper = ((levels + side / 255) * math.e for side in (-1, 1))
    assert log_normal_mass(lower, upper).exp().sum() < 0.1
    with pytest.raises(ValueError, match="n_levels=256"):
        discretized_gaussian_log_likelihood(levels, mean, log_scale, n_levels=256)


def test_likelihood_of_values_rounded_in_single_precision():
    """Levels that were computed in single precision count as the exact level."""
    exact = discretized_gaussian_log_likelihood(grid(256), torch.zeros((), dtype=F64), torch.tensor(-4.0, dtype=F64))
    rounded = discretized_gaussian_log_likelihood(grid(256).float(), torch.zeros((), dtype=F64), torch.tensor(-4.0, dtype=F64))
    assert_close(rounded, exact, **EXACT)


# GaussianMixture


@common
@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_mixture_agrees_with_torch_distributions(k, d, seed):
    """Density and moments equal PyTorch's (whose covariance is only the diagonal); single precision agrees to 1e-3."""
    mixture = random_mixture(k, d, seed)
    theirs = MixtureSameFamily(Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covariances))
    x = 3 * randn((5, d), generator=seeded(seed + 1), dtype=F64)
    assert_close(mixture.log_prob(x), theirs.log_prob(x), **EXACT)
    assert_close(mixture.mean(), theirs.mean, **EXACT)
    assert_close(mixture.covariance().diagonal(), theirs.variance, **EXACT)
    single = GaussianMixture(mixture.weights.float(), mixture.means.float(), mixture.covariances.float())
    assert_close(single.log_prob(x.float()).double(), mixture.log_prob(x), rtol=1e-3, atol=1e-3)


@common
@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_score_of_a_mixture_is_the_responsible_components(k, d, seed):
    """The gradient of the log-density is the sum over k of r_k C_k^-1 (m_k - x)."""
    mixture = random_mixture(k, d, seed)
    x = (2 * randn((4, d), generator=seeded(seed + 1), dtype=F64)).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    pulls = torch.linalg.solve(mixture.covariances, (mixture.means - x[:, None])[..., None])[..., 0]  # (B, K, d)
    assert_close(score, torch.einsum("bk,bkd->bd", mixture.responsibilities(x), pulls), rtol=1e-8, atol=1e-8)


@common
@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_covariance_of_a_mixture_is_the_second_moment(k, d, seed):
    """Cov(x) + mean mean' = the weighted second moments of the components, off the diagonal too."""
    mixture = random_mixture(k, d, seed)
    second = sum(w * (c + torch.outer(m, m)) for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True))
    assert_close(mixture.covariance() + torch.outer(mixture.mean(), mixture.mean()), second, **EXACT)


def test_responsibilities_are_probabilities_far_away():
    """Where every density underflows the responsibilities still sum to 1."""
    x = torch.tensor([[1e3, -1e3], [0.0, 0.0], [-1e5, 2e5]], dtype=F64)
    mixture = random_mixture(3, 2, 0)
    assert_close(mixture.responsibilities(x).sum(1), torch.ones(3, dtype=F64), **EXACT)
    assert mixture.log_prob(x).isfinite().all()


@pytest.mark.parametrize("d", [1, 2])
def test_one_gaussian_is_a_mixture(d):
    """With one component the mixture is that Gaussian."""
    mixture = random_mixture(1, d, 3)
    assert_close(mixture.mean(), mixture.means[0])
    assert_close(mixture.covariance(), mixture.covariances[0])
    assert torch.equal(mixture.responsibilities(torch.zeros(4, d, dtype=F64)), torch.ones(4, 1, dtype=F64))


def test_samples_have_the_moments_and_the_weights():
    """Means, variances and shares of the components within five standard errors computed from the exact moments."""
    n, w, m, v = 100_000, torch.tensor([0.2, 0.8], dtype=F64), torch.tensor([-6.0, 4.0], dtype=F64), torch.tensor([0.25, 2.0], dtype=F64)
    mixture = GaussianMixture(w, m[:, None], v[:, None, None])
    x = mixture.sample(n, generator=seeded(0))
    assert x.shape == (n, 1)
    assert x.dtype == F64
    variance, d = mixture.covariance().item(), m - mixture.mean()
    fourth = (w * (d**4 + 6 * d**2 * v + 3 * v**2)).sum().item()
    assert abs(x.mean() - mixture.mean()) < 5 * (variance / n) ** 0.5
    assert abs(x.var() - variance) < 5 * ((fourth - variance**2) / n) ** 0.5
    assert abs((x < 0).double().mean() - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5 + 0.003  # 0.8 Phi(-4 / sqrt 2) of the right one is below 0


def test_samples_of_a_component_have_its_covariance():
    """The linear map of the sampler is the Cholesky factor, not its transpose."""
    n, mixture = 100_000, random_mixture(1, 2, 1)
    x = mixture.sample(n, generator=seeded(1))
    c = mixture.covariances[0]
    error = ((c.diagonal().outer(c.diagonal()) + c**2) / n).sqrt()  # of a sample covariance of Gaussians
    assert ((x.T.cov() - c).abs() < 5 * error).all()
    root = torch.linalg.cholesky(c)
    assert ((root.T @ root - c).abs() > 10 * error).any()  # what the transpose would give


def test_samples_repeat_with_the_seed_and_are_differentiable():
    """Equal seeds give equal samples; a sample moves with the mean of its component."""
    mixture = random_mixture(3, 2, 5)
    assert torch.equal(mixture.sample(20, generator=seeded(7)), mixture.sample(20, generator=seeded(7)))
    means = mixture.means.clone().requires_grad_()
    moving = GaussianMixture(mixture.weights, means, mixture.covariances)
    (grad,) = torch.autograd.grad(moving.sample(20, generator=seeded(7)).sum(), means)
    assert grad[:, 0].sum() == 20


def test_mixture_is_frozen():
    """Parameters cannot be replaced by unchecked ones."""
    mixture = random_mixture(2, 2, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixture.weights = torch.ones(2)


# what is refused


ONE, TWO = torch.ones(2), torch.ones(3)
NAN, WHOLE = torch.tensor([float("nan"), 0.0]), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reparameterize(1.0, ONE), TypeError, "mean must be a torch.Tensor"),
        (lambda: reparameterize(WHOLE, ONE), TypeError, "mean must have a floating-point dtype"),
        (lambda: reparameterize(NAN, ONE), ValueError, "mean must be finite"),
        (lambda: reparameterize(ONE, -ONE), ValueError, "std must be at least 0; got -1"),
        (lambda: reparameterize(ONE, TWO), ValueError, r"mean, std must have shapes that broadcast; got \(2,\), \(3,\)"),
        (lambda: reparameterize(ONE, ONE, torch.ones(2, 2)), ValueError, r"eps must have the shape .*\(2,\); got \(2, 2\)"),
        (lambda: reparameterize(ONE, ONE, WHOLE), TypeError, "eps must have a floating-point dtype"),
        (lambda: normal_kl(ONE, ONE, ONE, NAN), ValueError, "log_var_2 must be finite"),
        (lambda: normal_kl(ONE, ONE, ONE, 0.0), TypeError, "log_var_2 must be a torch.Tensor"),
        (lambda: normal_kl(ONE, ONE, ONE, TWO), ValueError, "must have shapes that broadcast"),
        (lambda: discretized_gaussian_log_likelihood(ONE, ONE, TWO), ValueError, "x, mean, log_scale must have shapes that broadcast"),
        (lambda: discretized_gaussian_log_likelihood(NAN, ONE, ONE), ValueError, "x must be finite"),
        (lambda: discretized_gaussian_log_likelihood(ONE, ONE, ONE, n_levels=1), ValueError, "n_levels must be at least 2; got 1"),
        (lambda: discretized_gaussian_log_likelihood(ONE, ONE, ONE, n_levels=2.0), TypeError, "n_levels must be a whole number"),
        (lambda: discretized_gaussian_log_likelihood(ONE / 2, ONE, ONE, n_levels=2), ValueError, "x must lie on the grid of n_levels=2"),
        (lambda: discretized_gaussian_log_likelihood(3 * ONE, ONE, ONE), ValueError, "x must lie on the grid"),
        (lambda: gaussian_log_prob(ONE, torch.ones(1, 2), torch.eye(2)[None]), ValueError, r"x must have shape \(B, 2\); got \(2,\)"),
        (lambda: gaussian_log_prob(torch.ones(1, 3), torch.ones(1, 2), torch.eye(2)[None]), ValueError, r"x must have shape \(B, 2\)"),
        (lambda: gaussian_log_prob(torch.ones(1, 2), torch.ones(1, 2), torch.eye(2)), ValueError, "means, covariances must have shapes"),
        (lambda: random_mixture(2, 2, 0).sample(0), ValueError, "n must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    """The error names the argument, what is allowed and what was given."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.4])}, ValueError, "weights must be positive and sum to 1"),
        ({"weights": torch.tensor([1.5, -0.5])}, ValueError, "weights must be positive and sum to 1"),
        ({"weights": torch.tensor([1.0])}, ValueError, r"must have shapes \(K,\), \(K, d\), \(K, d, d\); got \(1,\), \(2, 3\)"),
        ({"weights": torch.tensor([1, 0])}, TypeError, "weights must have a floating-point dtype"),
        ({"weights": torch.tensor([0.5, 0.5], dtype=F64)}, TypeError, "one dtype and one device"),
        ({"means": torch.zeros(2)}, ValueError, "must have shapes"),
        ({"means": torch.full((2, 3), math.inf)}, ValueError, "means must be finite"),
        ({"covariances": torch.eye(3)}, ValueError, "must have shapes"),
        ({"covariances": -torch.eye(3).expand(2, 3, 3)}, ValueError, "symmetric and positive definite"),
        ({"covariances": torch.eye(3).expand(2, 3, 3) + torch.ones(3, 3).triu(1)}, ValueError, "symmetric and positive definite"),
    ],
)
def test_bad_mixtures_are_refused(change, error, message):
    """A mixture is checked when it is made."""
    good = {"weights": torch.tensor([0.5, 0.5]), "means": torch.zeros(2, 3), "covariances": torch.eye(3).expand(2, 3, 3)}
    GaussianMixture(**good)
    with pytest.raises(error, match=message):
        GaussianMixture(**good | change)


# on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    """Noise of a CPU generator, likelihood, divergence and mixture agree on both devices."""
    assert torch.equal(randn((4,), generator=seeded(0), device="cuda").cpu(), randn((4,), generator=seeded(0)))
    mean, log_scale = randn((256,), generator=seeded(1)), randn((256,), generator=seeded(2)) - 2
    here = discretized_gaussian_log_likelihood(grid(256, torch.float32), mean, log_scale)
    there = discretized_gaussian_log_likelihood(grid(256, torch.float32).cuda(), mean.cuda(), log_scale.cuda())
    assert_close(there.cpu(), here)
    assert_close(normal_kl(mean.cuda(), log_scale.cuda(), log_scale.cuda(), mean.cuda()).cpu(), normal_kl(mean, log_scale, log_scale, mean))
    mixture = random_mixture(3, 2, 0)
    moved = GaussianMixture(mixture.weights.cuda(), mixture.means.cuda(), mixture.covariances.cuda())
    x = mixture.sample(100, generator=seeded(3))
    assert_close(moved.sample(100, generator=seeded(3)).cpu(), x)
    assert_close(moved.log_prob(x.cuda()).cpu(), mixture.log_prob(x))
    assert moved.sample(100, generator=torch.Generator("cuda").manual_seed(0)).device.type == "cuda"


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_init_starts_the_shared_stream_and_sets_it_back(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with pytest.raises(KeyError) if fails else nullcontext(), seeded_init(seed):
            drawn.append(torch.nn.Linear(3, 2).weight)
            if fails:
                raise KeyError
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.5, TypeError), ("0", TypeError)])
def test_seeded_init_refuses_what_is_no_seed(seed, error):
    with pytest.raises(error, match=r"seed must be .* got"), seeded_init(seed):
        pytest.fail("the block ran")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_64_bits(seed):
    with pytest.raises(ValueError, match=rf"seed must be in 0\.\.{2**64 - 1}; got {seed}"):
        seeded(seed)
    assert seeded(2**64 - 1).initial_seed() in (2**64 - 1, -1)
