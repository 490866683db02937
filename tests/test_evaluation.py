"""Evaluation: distances against independent implementations, the bound's averages, copies found, bad input refused."""

import math
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from on_disk import read, seal
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

import ddpm_nb.evaluation as evaluation
from conftest import refuses
from ddpm_nb.bound import rate_distortion, vlb_terms
from ddpm_nb.conditioning import ClassUNet
from ddpm_nb.data import load_dataset, scale_levels
from ddpm_nb.evaluation import (
    DigitClassifier,
    bits_per_dim,
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    gap_with_error,
    inception_fid,
    kernel_distance,
    load_classifier,
    mean_with_error,
    nearest_neighbors,
    save_classifier,
    train_classifier,
    verdict,
)
from ddpm_nb.files import save_parts
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.runs import held_out_loss
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, Trainer
from ddpm_nb.unet import PRESETS


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
    assert whole.terms.mse.shape == (10, 20)
    rate, rmse = rate_distortion(whole.terms, n_levels=17)
    assert bool((rate.diff() < 0).all()) and rmse.shape == (20,)


def test_bits_per_dim_with_a_generator_for_each_image_does_not_depend_on_the_batch_size():
    images, schedule = load_dataset("digits", split="test").images()[:5], make_schedule("linear", 6)
    measure = partial(bits_per_dim, lambda x, t: 0.9 * x, schedule, images, n_levels=17)
    own = lambda: [seeded(i) for i in range(5)]
    whole, parts = (measure(batch_size=size, generator=own()).terms for size in (5, 2))
    assert torch.equal(whole.total, parts.total)
    assert not torch.equal(whole.total, measure(generator=own()[::-1]).terms.total)
    refuses(lambda: measure(batch_size=2, generator=own()[:2]), "a list of 5, one an image; got 2 of type Generator", error=TypeError)



def test_nearest_neighbors_find_copies():
    images = load_dataset("digits").images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:20]
    shifted = images[order] + 0.1
    index, distance = nearest_neighbors(shifted, images)
    assert index.equal(order)
    torch.testing.assert_close(distance, torch.full((20,), 0.1, dtype=torch.float64), rtol=1e-5, atol=0)


def test_frechet_distance_of_known_normals():
    """Whitened sets have exactly known moments, so the closed form is met to rounding: diagonal, then rotated."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(40, 3, generator=g).double()
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    s, r, shift = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    expected = float(shift.square().sum() + (s - r).square().sum())
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0]
    for q in (torch.eye(3).double(), turn):
        assert frechet_distance(white * s @ q, (white * r + shift) @ q) == pytest.approx(expected, rel=1e-9)


def test_the_error_of_a_distance_is_its_spread_over_repeated_draws():
    """A jackknife of ten groups scatters by about a quarter, the spread of 40 draws by a ninth: their ratio is near one."""
    g = torch.Generator().manual_seed(7)
    for distance in (frechet_distance, kernel_distance):
        pairs = [(torch.randn(100, 3, generator=g), 1.3 * torch.randn(80, 3, generator=g) + 0.7) for _ in range(40)]
        found = torch.tensor([distance_with_error(distance, a, b) for a, b in pairs], dtype=torch.float64)
        assert found[0, 0] == distance(*pairs[0])
        assert 0.65 < float(found[:, 1].square().mean().sqrt() / found[:, 0].std()) < 1.5


def test_the_error_of_a_gap_is_its_spread_over_repeated_draws_and_pairing_shrinks_it():
    """Two sets from the same noise: the gap varies less than its parts, and the jackknife knows."""
    found = []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        noise, reference = torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g)
        near, far = noise, 1.2 * noise + 0.1
        gap, error = gap_with_error(frechet_distance, reference, far, near, n_groups=20)
        assert gap == pytest.approx(frechet_distance(reference, far) - frechet_distance(reference, near), rel=1e-9)
        apart = [distance_with_error(frechet_distance, reference, x, n_groups=20)[1] for x in (far, near)]
        found.append((gap, error, math.hypot(*apart)))
    gaps, errors, unpaired = torch.tensor(found, dtype=torch.float64).T
    assert 0.6 < float(errors.mean() / gaps.std()) < 1.7
    assert errors.mean() < 0.8 * unpaired.mean()
    same = gap_with_error(frechet_distance, reference, near, near)
    assert same == (0, 0)
    refuses(lambda: gap_with_error(frechet_distance, reference, near, near[:100]), "better must have the shape of worse, (200, 4)")
    refuses(lambda: gap_with_error(frechet_distance, reference, near, near, n_groups=201), "n_groups must be in 2..200")


def test_the_error_of_a_distance_uses_both_sets_and_its_generator():
    a, b = cloud(8, 30, 2).double(), cloud(9, 30, 2).double()
    mean = lambda u, v: float(u.mean() - v.mean())
    constant = torch.zeros(30, 2).double()
    for pair in ((a, constant), (constant, b)):
        usual = float(sum(pair).mean(1).std()) / math.sqrt(30)
        assert distance_with_error(mean, *pair, n_groups=30)[1] == pytest.approx(usual, rel=1e-9)
    seeded = [distance_with_error(mean, a, b, generator=torch.Generator().manual_seed(s))[1] for s in (0, 0, 1)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert distance_with_error(mean, a, b)[1] == seeded[0]


class Corner(torch.nn.Module):
    """Take three bytes as features."""

    num_features = 3

    def forward(self, levels):
        assert levels.dtype == torch.uint8 and levels.shape[1] == 3
        return levels.float()[:, 0, :2, :2].flatten(1)[:, :3]


def test_inception_fid_is_torchmetrics_on_exact_bytes():
    levels = torch.arange(256).reshape(4, 1, 8, 8)
    assert evaluation._to_bytes("images_1", scale_levels(levels, 256)).equal(levels.to(torch.uint8).expand(-1, 3, -1, -1))
    assert evaluation._to_bytes("images_1", torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1))[:, 0, 0, 0].tolist() == [0, 255]
    g = torch.Generator().manual_seed(0)
    a, b = (scale_levels(torch.randint(256, (n, 3, 8, 8), generator=g), 256) for n in (20, 30))
    own = frechet_distance(*(Corner()(evaluation._to_bytes("x", x)) for x in (a, b)))
    assert inception_fid(a, b, network=Corner(), batch_size=7) == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("name", ["torchmetrics.image.fid", "torch_fidelity"])
def test_inception_fid_says_what_is_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "torch_fidelity":
        monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ImportError, match=r"needs two packages: pip install torchmetrics torch-fidelity \("):
        inception_fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_inception_fid_says_that_the_weights_are_missing(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", no_network)
    with pytest.raises(OSError, match=r"weights of Inception could not be loaded.*needs a network \(Name or service"):
        inception_fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_a_trained_classifier_depends_on_its_seed_alone():
    data, state = load_dataset("digits"), torch.get_rng_state()
    x, y = data.images()[:200], data.labels[:200]
    first, second, other = (train_classifier(x, y, n_iterations=100, channels=4, seed=s) for s in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert first(x).equal(second(x)) and not first(x).equal(other(x))
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    before = train_classifier(x, y, n_iterations=1, lr=1e-9, channels=4)
    loss = torch.nn.functional.cross_entropy
    assert loss(first(x), y) < 0.8 * loss(before(x), y)


def test_the_shipped_classifier_is_what_its_card_says():
    config = read(evaluation.CLASSIFIERS / "digits")
    classifier, data = load_classifier("digits"), load_dataset("digits", split="test")
    features = classifier_features(classifier, data.images(), batch_size=100)
    right = classifier.head(features).argmax(1) == data.labels
    assert float(right.float().mean()) == pytest.approx(config["card"]["test accuracy"], abs=0.004) and right.float().mean() > 0.96
    assert classifier.config == config["parts"]["classifier"]["config"] and not any(p.requires_grad for p in classifier.parameters())
    beyond = 1.5 * data.images()
    assert classifier_features(classifier, beyond).equal(classifier_features(classifier, beyond.clamp(-1, 1)))


@pytest.fixture
def saved(tmp_path):
    return Path(shutil.copytree(evaluation.CLASSIFIERS / "digits", tmp_path / "saved"))


def test_classifiers_come_back_to_the_last_bit(tmp_path):
    card = {"data": "none", "iterations": 0, "test accuracy": 0.1}
    classifier = DigitClassifier(image_size=12, n_classes=3, in_channels=3, channels=4, n_features=5)
    save_classifier(tmp_path / "a" / "b", classifier, card=card)
    again = load_classifier(tmp_path / "a" / "b")
    x = torch.rand(2, 3, 12, 12) * 2 - 1
    assert again(x).equal(classifier(x)) and again.config == classifier.config
    assert "| test accuracy | 0.1 |" in (tmp_path / "a" / "b" / "README.md").read_text()
    with pytest.raises(ValueError, match="card must say data, iterations and test accuracy"):
        save_classifier(tmp_path / "c", classifier, card={"data": "none"})
    assert not (tmp_path / "c").exists()


def test_damaged_classifiers_are_refused(saved):
    config, weights = read(saved), (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refuses(lambda: load_classifier(saved), "the checksum does not fit")
    part = config["parts"]["classifier"]
    changed = {"classifier": part | {"config": part["config"] | {"n_features": 31}}}
    seal(saved, config | {"parts": changed}, weights)
    refuses(lambda: load_classifier(saved), "does not hold a complete model")
    for text, words in (("{", "is not valid JSON"), ('{"format": "x"}', "does not describe a model"), ("[]", "does not describe")):
        (saved / "config.json").write_text(text)
        refuses(lambda: load_classifier(saved), words)
    (saved / "config.json").unlink()
    for missing in (saved, "nobody"):
        refuses(lambda path=missing: load_classifier(path), "no model at", "or a shipped name: digits", error=FileNotFoundError)
    save_parts(saved, {"other": DigitClassifier()}, overwrite=True)
    refuses(lambda: load_classifier(saved), "must hold a classifier and nothing else")


class Fixed(torch.nn.Module):
    """Answer with the first three pixels as logits."""

    config = {"image_size": 4, "n_classes": 3, "in_channels": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 10 * x.flatten(1)[:, :3]


def test_the_report_counts_and_averages():
    x = torch.zeros(6, 1, 4, 4)
    for i, label in enumerate((0, 0, 0, 1)):
        x[i, 0, 0, label] = 1  # sure; the last two images are undecided and fall to class 0
    report, sure = classifier_report(Fixed(), x), math.exp(10) / (math.exp(10) + 2)
    assert report.counts == (5, 1, 0) and report.n_images == 6 and report.confident == pytest.approx(4 / 6)
    assert report.mean_confidence == pytest.approx((4 * sure + 2 / 3) / 6, rel=1e-6)
    assert report.imbalance == pytest.approx((3 + 1 + 2) / 6 / 2)
    assert classifier_report(Fixed(), x, threshold=0.3).confident == 1
    counts = torch.multinomial(torch.ones(20000, 3), 6, replacement=True, generator=torch.Generator().manual_seed(0))
    draws = sum((torch.stack([(counts == k).sum(1) for k in range(3)], 1) / 6 - 1 / 3).abs().T) / 2
    assert abs(report.imbalance_floor - float(draws.mean())) < 5 * float(draws.std()) / math.sqrt(20000)
    exact = 1.5 * sum(math.comb(5, c) * 2 ** (5 - c) / 3**5 * abs(c / 5 - 1 / 3) for c in range(6))  # five images: np is no whole number
    assert classifier_report(Fixed(), x[:5]).imbalance_floor == pytest.approx(exact, rel=1e-9)


def test_published_figures_are_ordered_as_the_papers_say():
    rows = list(evaluation.PUBLISHED["rate distortion"].values())
    assert rows == sorted(rows, reverse=True) and [r[1] for r in rows] == sorted(r[1] for r in rows)
    for row in evaluation.PUBLISHED["ddim"].values():
        assert list(row.values()) == sorted(row.values(), reverse=True)


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


def test_images_off_the_grid_are_found_before_any_is_measured():
    def never(x_t, t):
        raise AssertionError("the network was called before all images were looked at")

    images = torch.ones(6, 1, 4, 4)
    images[5, 0, 0] = torch.tensor([-1, 0.03, 0.5, 1])
    refuses(lambda: bits_per_dim(never, make_schedule("linear", 5), images, n_levels=17, batch_size=2), "images must lie on the grid of n_levels=17")


def test_large_sets_are_compared_in_parts():
    """More rows than one part holds: the sums and the minima are those of the whole."""
    a, b = torch.randn(1201, 3, dtype=torch.float64), torch.randn(1100, 3, dtype=torch.float64)
    own = [(x @ x.T / 3 + 1) ** 3 for x in (a, b)]
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in own)
    whole = within - 2 * ((a @ b.T / 3 + 1) ** 3).mean()
    assert kernel_distance(a, b) == pytest.approx(float(whole), rel=1e-9)
    x, y = (torch.rand(n, 1, 2, 2) * 2 - 1 for n in (1201, 50))
    index, distance = nearest_neighbors(x, y)
    nearest = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).min(1)
    assert torch.equal(index, nearest.indices)
    torch.testing.assert_close(distance, nearest.values / 2)


def test_no_matrix_of_all_pairs_is_held(monkeypatch):
    sizes, cdist, power = [], torch.cdist, torch.Tensor.__pow__
    monkeypatch.setattr(torch, "cdist", lambda a, b: (sizes.append(len(a)), cdist(a, b))[1])
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda x, k: (sizes.append(len(x)) if x.ndim > 1 else None, power(x, k))[1])
    nearest_neighbors(torch.zeros(1201, 1, 2, 2), torch.ones(3, 1, 2, 2))
    kernel_distance(torch.randn(2001, 3), torch.randn(30, 3))
    assert max(sizes) <= 1000


def test_bad_images():
    with pytest.raises(ValueError, match="images must hold at least 2 images"):
        bits_per_dim(None, make_schedule("linear", 5), torch.zeros(1, 1, 8, 8), n_levels=17)
    with pytest.raises(ValueError, match="images must have the shape of samples"):
        nearest_neighbors(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))


ones = lambda *shape: torch.ones(*shape)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: distance_with_error(kernel_distance, ones(5, 2), ones(4, 2), n_groups=5), ValueError, "n_groups must be in 2..4; got 5"),
        (lambda: distance_with_error(kernel_distance, ones(5, 2), ones(4, 2), n_groups=1), ValueError, "n_groups must be in 2..4"),
        (lambda: inception_fid(ones(2, 2, 8, 8), ones(2, 2, 8, 8)), ValueError, r"images_1 must have shape \(N, C, H, W\) with C 1 or 3"),
        (lambda: inception_fid(ones(2, 3, 8, 8), ones(1, 3, 8, 8)), ValueError, "images_2 must have shape"),
        (lambda: DigitClassifier(image_size=10), ValueError, "image_size must be divisible by 4; got 10"),
        (lambda: DigitClassifier(n_classes=1), ValueError, "n_classes must be at least 2"),
        (lambda: classifier_features(DigitClassifier(), ones(2, 1, 9, 9)), ValueError, r"images must have shape \(N, 1, 8, 8\)"),
        (lambda: classifier_report(DigitClassifier(), ones(0, 1, 8, 8)), ValueError, "with N at least 1"),
        (lambda: classifier_report(DigitClassifier(), ones(2, 1, 8, 8), threshold=1), ValueError, "threshold must be"),
        (lambda: train_classifier(2 * ones(2, 1, 8, 8), torch.tensor([0, 1])), ValueError, r"images must be scaled to \[-1, 1\]"),
        (lambda: train_classifier(ones(2, 1, 8, 12), torch.tensor([0, 1])), ValueError, "images must be square"),
        (lambda: train_classifier(ones(2, 1, 8, 8), ones(2)), TypeError, r"labels must be a tensor of dtype torch\.int64"),
        (lambda: train_classifier(ones(2, 1, 8, 8), torch.tensor([0, -1])), ValueError, "labels must be numbers from 0, of at least two classes; got -1 to 0"),
        (lambda: train_classifier(ones(2, 1, 8, 8), torch.tensor([0])), ValueError, "labels must have shape"),
        (lambda: train_classifier(ones(2, 1, 8, 8), torch.tensor([0, 1]), lr=0), ValueError, "lr must be"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("gap", "error", "said"),
    [(2.01, 1, "agrees"), (2.0, 1, "undecided"), (-2.0, 1, "undecided"), (-2.01, 1, "DISAGREES"), (1e-9, 0, "agrees"), (0, 0, "undecided")],
)
def test_a_verdict_needs_two_errors(gap, error, said):
    assert verdict(gap, error) == said


def test_a_mean_over_trainings_has_the_standard_error_of_the_textbook():
    figures = [3.0, 8.5, 1.25, 1e6]
    for values in (figures, torch.tensor(figures), tuple(figures)):
        mean, error = mean_with_error(values)
        assert isinstance(mean, float) and isinstance(error, float)
        assert math.isclose(mean, statistics.mean(figures)) and math.isclose(error, statistics.stdev(figures) / 2)
    for wrong in ([1.0], [], [[1.0, 2.0]]):
        refuses(lambda w=wrong: mean_with_error(w), "values must have shape (N,), N at least 2")


def test_a_verdict_needs_an_error():
    with pytest.raises(ValueError, match=r"error must be .*; got -1"):
        verdict(1.0, -1)
    with pytest.raises(ValueError, match="gap must be finite"):
        verdict(math.nan, 0.1)


def test_held_out_loss_keeps_image_step_noise_and_class_together():
    """Above 256 images, which are looked at in parts: by hand, image by image, no two alike in any of the four."""
    n, n_steps, n_classes = 300, 50, 7
    with seeded_init(0):
        net = ClassUNet(n_classes, **PRESETS["digits"] | {"base_channels": 8, "norm_groups": 2})
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    schedule, config = make_schedule("cosine", n_steps), TrainConfig(n_iterations=1, conditional="class")
    trainer, model = Trainer(net, schedule, config), net.eval()
    x, labels = torch.rand(n, 1, 8, 8, generator=seeded(1)) * 2 - 1, torch.arange(n).remainder(n_classes)
    eps, t = torch.randn(x.shape, generator=seeded(0)), torch.arange(n) * n_steps // n
    with torch.inference_mode():
        signal, noise = (a.view(-1, 1, 1, 1) for a in (schedule.alpha_bars[t].sqrt(), (1 - schedule.alpha_bars[t]).sqrt()))
        error = lambda classes: (model(signal * x + noise * eps, t, classes) - eps).square().mean().item()
        wanted, other = error(labels), error(torch.cat([labels[:256], labels[:44]]))
    assert held_out_loss(trainer, x, labels) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(other, rel=1e-4)


def test_an_error_of_few_trainings_decides_less():
    """The limits are Student's t: with three trainings 4.3 errors, with eleven and more two."""
    assert [verdict(3.0, 1.0, n) for n in (None, 2, 3, 4, 5, 40)] == ["agrees", "undecided", "undecided", "undecided", "agrees", "agrees"]
    assert verdict(-4.4, 1.0, 3) == "DISAGREES" and verdict(4.2, 1.0, 3) == "undecided" and verdict(2.2, 1.0, 11) == "agrees"
    with pytest.raises(ValueError, match="n must be"):
        verdict(1.0, 1.0, 1)
