"""Measure the shipped DDPM of the digits with 2,000 samples, and GANs in and out of balance with four seeds each.

Run `python studies/relatives.py` (about ten minutes on one core); chapters 16 and 17 read ddpm_nb/measured/relatives.json.
"""

import platform

import torch

from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    load_classifier,
)
from ddpm_nb.files import PACKAGE, write_json
from ddpm_nb.gan import Discriminator, Generator, sample_gan, train_gan
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.sampling import sample_ddim

SEEDS, N = (0, 1, 2, 3), 2000
GAMES = {
    "1 : 1": {},
    "10 : 1": {"generator_steps": 10},
    "minimax": {"kind": "minimax"},
    "no penalty": {"gamma": 0.0},
}
digits, held_out = load_images("digits"), load_images("digits", split="test")
judge = load_classifier("digits")
reference = classifier_features(judge, digits)


def measure(images):
    """Measure a set of images: distance from the training digits, its jackknife error, and the counts of the classes."""
    value, error = distance_with_error(frechet_distance, reference, classifier_features(judge, images))
    report = classifier_report(judge, images)
    return {"n": len(images), "frechet": value, "frechet error": error, "imbalance": report.imbalance, "confident": report.confident}


def draw(model, schedule, shape, n_steps, seed, **options):
    """Draw N samples in parts of 500."""
    g = seeded(seed)
    parts = [sample_ddim(model, schedule, (500, *shape), n_steps=n_steps, generator=g, **options) for _ in range(N // 500)]
    return torch.cat(parts)


def game(options, seed):
    """Play 400 rounds of a GAN; return its row."""
    with seeded_init(seed):
        players = Generator(8), Discriminator(8)
    result = train_gan(*players, digits, n_iterations=400, seed=seed, **options)
    losses = result.losses[-50:].mean(0).tolist()
    images = sample_gan(result.generator, N, generator=seeded(seed))
    spread = {"spread": float(images.std(0).mean())}
    return measure(images) | spread | {"loss of D": losses[0], "loss of G": losses[1]}


def main():
    """Measure everything and write it."""
    torch.set_num_threads(1)
    path = PACKAGE / "measured" / "relatives.json"
    results = {"seeds": list(SEEDS), "samples": N, "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    results["floor"] = measure(held_out)
    model, schedule = load_pretrained("digits")
    results["shipped"] = [
        measure(draw(model, schedule, (1, 8, 8), n_steps, 0)) | {"steps": n_steps} for n_steps in (10, 20, 50)
    ]
    results["balance"] = {name: [game(options, seed) for seed in SEEDS] for name, options in GAMES.items()}
    write_json(path, results)


if __name__ == "__main__":
    main()
