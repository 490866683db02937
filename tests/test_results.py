"""The tables in small: what is compared is treated alike, and what is stored is whole."""

import math

import pytest
import torch
from torch import nn

from ddpm_nb.data import load_dataset
from ddpm_nb.elbo import OBJECTIVES, objective_target
from ddpm_nb.evaluation import PUBLISHED, classifier_features, load_classifier
from ddpm_nb.forward import q_sample
from ddpm_nb.gaussian import seeded
from ddpm_nb.results import (
    VARIANTS,
    Yardstick,
    measure_bound,
    measure_images,
    measure_samples,
    paired_difference,
    predict_noise,
    read_results,
    train_variant,
)
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig

SETTINGS = TrainConfig(n_iterations=4, batch_size=8, warmup=0)


class Affine(nn.Module):
    """Predict anything, quickly."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.1]))

    def forward(self, x, t):
        return self.weight[0] * x + self.weight[1]


@pytest.fixture(scope="module")
def yardstick():
    """Return the yardstick of the digits, with a part of the training images."""
    classifier = load_classifier("digits")
    reference = classifier_features(classifier, load_dataset("digits").images()[:400])
    return Yardstick(load_dataset("digits", split="test").images()[:60], 17, classifier, reference)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_perfect_network_predicts_the_noise(objective, schedule):
    schedule = make_schedule(schedule, 100, dtype=torch.float64)
    x_0, eps = (torch.randn(5, 1, 4, 4, generator=seeded(i), dtype=torch.float64) for i in (0, 1))
    t = torch.tensor([0, 1, 20, 60, 98])
    x_t = q_sample(schedule, x_0, t, eps)
    perfect = lambda x, t: objective_target(schedule, objective, x_0, x, t, eps)
    torch.testing.assert_close(predict_noise(perfect, schedule, objective)(x_t, t), eps, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_trained_as_it_says(name, monkeypatch):
    seen = {}

    def spy(model, schedule, images, config, **options):
        seen.update(objective=config.objective, weighting=config.weighting, betas=schedule.betas, n=config.n_iterations)
        raise InterruptedError

    monkeypatch.setattr("ddpm_nb.results.fit", spy)
    with pytest.raises(InterruptedError):
        train_variant(name, Affine(), torch.zeros(8, 1, 4, 4), SETTINGS, n_steps=50)
    facts = VARIANTS[name]
    assert (seen["objective"], seen["weighting"], seen["n"]) == (facts["objective"], facts["weighting"], 4)
    assert seen["betas"].equal(make_schedule(facts["schedule"], 50).betas)


def test_snapshots_are_copies_of_the_average():
    images = torch.rand(32, 1, 4, 4, generator=seeded(0)) * 2 - 1
    predictor, schedule, kept, seconds = train_variant("eps, L_simple", Affine(), images, SETTINGS, n_steps=50, snapshots=(1, 4))
    x, t = torch.randn(3, 1, 4, 4, generator=seeded(1)), torch.tensor([0, 20, 49])
    assert list(kept) == [1, 4] and seconds > 0 and schedule.n_steps == 50
    assert kept[4](x, t).equal(predictor(x, t))
    assert not kept[1](x, t).equal(kept[4](x, t))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("x", {}, "name must be one of 'eps, L_simple'"), ("eps, L", {"snapshots": (5,)}, r"snapshots must be in 1\.\.4; got 5")],
)
def test_training_refuses_bad_input_first(name, options, message):
    model = Affine()
    with pytest.raises(ValueError, match=message):
        train_variant(name, model, torch.zeros(8, 1, 4, 4), SETTINGS, **options)
    assert model.weight.tolist() == pytest.approx([0.5, 0.1])


def test_networks_see_the_same_noise(yardstick):
    schedule = make_schedule("linear", 20)
    zero = lambda x, t: torch.zeros_like(x)
    rows = [measure_bound(zero, schedule, yardstick, 6, seed=seed, batch_size=6)[0] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0]["n"] == 6
    assert math.isclose(rows[0]["prior"] + rows[0]["kl"] + rows[0]["decoder"], rows[0]["bits/dim"], rel_tol=1e-5)
    with pytest.raises(ValueError, match=r"n_images must be in 2\.\.60; got 61"):
        measure_bound(None, schedule, yardstick, 61)


def test_samples_are_split_into_batches(yardstick):
    schedule, sizes = make_schedule("linear", 20), []

    def model(x, t):
        sizes.append(len(x))
        return torch.zeros_like(x)

    row, samples = measure_samples(model, schedule, yardstick, 25, 2, batch_size=10)
    assert sizes == [10, 10, 10, 10, 5, 5]
    assert samples.shape == (25, 1, 8, 8)
    assert (row["n"], row["steps"], row["eta"]) == (25, 2, 1.0)
    again = measure_samples(model, schedule, yardstick, 25, 2, batch_size=10)[0]
    calm = measure_samples(model, schedule, yardstick, 25, 2, batch_size=10, eta=0.0)[1]
    other = measure_samples(model, schedule, yardstick, 25, 2, batch_size=5)[1]
    assert again == row
    assert not calm.equal(samples) and not other.equal(samples)  # as the comment on batch_size says
    assert other[:5].equal(measure_samples(model, schedule, yardstick, 10, 2, batch_size=5)[1][:5])
    with pytest.raises(ValueError, match="n_samples must be at least 10; got 9"):
        measure_samples(model, schedule, yardstick, 9, 2)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {size}"):
            measure_samples(model, schedule, yardstick, 10, 2, batch_size=size)


def test_distances_are_from_the_training_images(yardstick):
    images = load_dataset("digits").images()[:400]
    same, noise = measure_images(images, yardstick), measure_images(torch.rand(100, 1, 8, 8, generator=seeded(0)) * 2 - 1, yardstick)
    assert same["frechet"] < 1e-3 * noise["frechet"]
    assert same["confident"] > 0.9 > noise["confident"]


def test_paired_difference():
    gap, error = paired_difference([3.0, 5.0, 4.0], torch.tensor([1.0, 2.0, 3.0]))
    assert (gap, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0)
    for bad in ([1.0], [[1.0, 2.0]], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="bits_1 and bits_2 must be of one length"):
            paired_difference([1.0, 2.0], bad)
    with pytest.raises(ValueError, match="bits_1 and bits_2"):
        paired_difference([1.0], [1.0])


def test_the_stored_study_is_whole():
    study = read_results("mnist")
    assert [row["variant"] for row in study["objectives"]] == list(VARIANTS)
    for row in study["objectives"]:
        bits = torch.tensor(row["bits of each image"])
        assert len(bits) == row["bound"]["n"] == study["study"]["held-out images"]
        assert bits.mean().item() == pytest.approx(row["bound"]["bits/dim"], rel=1e-5)
        assert row["bound"]["stderr"] == pytest.approx(bits.std().item() / math.sqrt(len(bits)), rel=1e-4)
    assert {(row["eta"], row["steps"]) for row in study["ddim"]} <= {(eta, s) for eta, row in PUBLISHED["ddim"].items() for s in row}
    assert {p["reverse steps"] for p in study["curve"]["points"]} >= set(PUBLISHED["rate distortion"])
    assert TrainConfig(**study["study"]["training"]).seed == 0
    assert {"torch", "python", "ddpm_nb"} <= set(study["versions"])
    assert study["hardware"]
    with pytest.raises(ValueError, match=r"name must be one of .*'mnist'"):
        read_results("../mnist")
