"""Evaluation: distances against independent implementations, the bound's averages, copies found, bad input refused."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from ddpm_nb.data import load_dataset
from ddpm_nb.elbo import vlb_terms
from ddpm_nb.evaluation import bits_per_dim, frechet_distance, kernel_distance, nearest_neighbors
from ddpm_nb.schedules import make_schedule


def cloud(seed, n, d, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + torch.randn(d, generator=g)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 1), (200, 100, 5), (300, 300, 32), (20, 20, 30)])
def test_frechet_distance_equals_scipy_and_torchmetrics(n, m, d):
    """The last case has fewer samples than dimensions: singular covariances, where square roots go complex."""
    a, b = cloud(0, n, d).double(), cloud(1, m, d).double()
    moments = [(x.mean(0), torch.cov(x.T).reshape(d, d)) for x in (a, b)]
    (m_1, c_1), (m_2, c_2) = moments
    scipy = (m_1 - m_2).square().sum() + torch.as_tensor((c_1 + c_2 - 2 * torch.as_tensor(sqrtm((c_1 @ c_2).numpy()).real)).trace())
    theirs = _compute_fid(m_1, c_1, m_2, c_2)
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(float(scipy), rel=1e-3 if n < d else 1e-6)


def test_kernel_distance_equals_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = cloud(2, 40, 6, 0.5), cloud(3, 40, 6, 0.5)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a.double(), b.double())), rel=1e-9)


def test_kernel_distance_is_unbiased_and_the_frechet_distance_is_not():
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(15, 4, generator=g), torch.randn(15, 4, generator=g)) for _ in range(300)]
    kernel = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    frechet = torch.tensor([frechet_distance(a, b) for a, b in pairs])
    assert kernel.mean().abs() < 4 * kernel.std() / math.sqrt(300)
    assert frechet.mean() > 10 * frechet.std() / math.sqrt(300)


def test_distances_are_symmetric_and_zero_for_equal_sets():
    a, b = cloud(4, 30, 4), cloud(5, 25, 4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a)) and abs(frechet_distance(a, a)) < 1e-9
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a))


def test_bits_per_dim_does_not_depend_on_the_batch_size_but_for_the_noise():
    """A network that always answers zero has a deterministic prior; the parts keep the order of the images."""
    images, schedule = load_dataset("digits", split="test").images()[:10], make_schedule("linear", 20)
    zero = lambda x, t: torch.zeros_like(x)
    whole, split = (
        bits_per_dim(zero, schedule, images, n_levels=17, batch_size=size, generator=torch.Generator().manual_seed(0)) for size in (10, 3)
    )
    assert whole.terms.prior.equal(split.terms.prior) and whole.n_images == split.n_images == 10
    assert whole.mean == pytest.approx(split.mean, rel=0.1)
    again = vlb_terms(zero, schedule, images, n_levels=17, generator=torch.Generator().manual_seed(0)).total
    assert whole.mean == pytest.approx(again.mean().item()) and whole.stderr == pytest.approx(again.std().item() / math.sqrt(10))


def test_nearest_neighbors_find_copies():
    images = load_dataset("digits").images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:20]
    shifted = images[order] + 0.1
    index, distance = nearest_neighbors(shifted, images)
    assert index.equal(order)
    torch.testing.assert_close(distance, torch.full((20,), 0.1, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"features_1 must have shape \(N, D\) with N at least 2; got \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5), r"features_2 must have shape \(N, D\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "features_2 must have 3 columns as features_1 has; got 4"),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3), "features_1 must be finite"),
    ],
)
def test_bad_features(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)


def test_bad_images():
    with pytest.raises(ValueError, match="images must hold at least 2 images"):
        bits_per_dim(None, make_schedule("linear", 5), torch.zeros(1, 1, 8, 8), n_levels=17)
    with pytest.raises(ValueError, match="images must have the shape of samples"):
        nearest_neighbors(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))
