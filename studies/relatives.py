"""Measure the shipped DDPM of the digits with 2,000 samples, GANs in and out of balance and the bounds of VAE and DDPM, four seeds each.

Run `python studies/relatives.py` (about fifteen minutes on one core); chapters 16 and 17 read ddpm_nb/measured/relatives.json.
With the name of a part (shipped, balance, bounds) only that part is measured anew; the others stay if they were measured with the same settings.
"""

import argparse
import math

import torch
from common import MEASURED, checksums, kept, setting, write

from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    load_classifier,
)
from ddpm_nb.forward import predict_x_0, q_sample
from ddpm_nb.gan import Discriminator, Generator, sample_gan, train_gan
from ddpm_nb.gaussian import discretized_gaussian_log_likelihood, seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.results import train_variant
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import make_unet
from ddpm_nb.vae import VAE, train_vae, vae_bound

SEEDS, N, PART, CALLS = (0, 1, 2, 3), 2000, 500, (10, 20, 50)
ROUNDS, ITERATIONS = 400, {"VAE": 1800, "DDPM": 280}
PARTS, PATH = ("shipped", "balance", "bounds"), MEASURED / "relatives.json"
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
    """Draw N samples in parts."""
    g = seeded(seed)
    parts = [sample_ddim(model, schedule, (PART, *shape), n_steps=n_steps, generator=g, **options) for _ in range(N // PART)]
    return torch.cat(parts)


def game(options, seed):
    """Play some rounds of a GAN; return its row."""
    with seeded_init(seed):
        players = Generator(8), Discriminator(8)
    result = train_gan(*players, digits, n_iterations=ROUNDS, seed=seed, **options)
    losses = result.losses[-50:].mean(0).tolist()
    images = sample_gan(result.generator, N, generator=seeded(seed))
    spread = {"spread": float(images.std(0).mean())}
    return measure(images) | spread | {"loss of D": losses[0], "loss of G": losses[1]}


def pixel_bits(ddpm, schedule, images, k, log_scale, seed):
    """Compute the bits per dimension of a decoder around the image that the network guesses at index k; (B,)."""
    x_k, t = q_sample(schedule, images, k, generator=seeded(seed)), torch.full((len(images),), k)
    with torch.inference_mode():
        guess = predict_x_0(schedule, x_k, t, ddpm(x_k, t)).clamp(-1, 1)
    mass = [discretized_gaussian_log_likelihood(images, guess, c, n_levels=17).flatten(1).sum(1) for c in log_scale]
    return -torch.stack(mass) / (64 * math.log(2))


def bounds(seed):
    """Train chapter 16's VAE and DDPM from one seed; return their bounds on the held-out digits, and that of the stopped chain."""
    with seeded_init(seed):
        vae, network = VAE(8, latent_dim=8), make_unet("digits", base_channels=16, norm_groups=4)
    vae = train_vae(vae, digits, n_levels=17, seed=seed, n_iterations=ITERATIONS["VAE"], batch_size=128)
    options = {"batch_size": 64, "warmup": 25, "ema_decay": 0.98, "seed": seed, "precision": "float32"}
    config = TrainConfig(n_iterations=ITERATIONS["DDPM"], **options)
    ddpm, schedule, _, _ = train_variant("eps, L_simple, cosine", network, digits, config, n_steps=200)
    with torch.no_grad():
        vae_bits = vae_bound(vae, held_out, n_levels=17, generator=seeded(0)).total
    terms, k = vlb_terms(ddpm, schedule, held_out, n_levels=17, generator=seeded(0)), 4  # k: fixed beforehand
    scales = torch.linspace(-4, 0, 25)
    best = scales[pixel_bits(ddpm, schedule, digits[:300], k, scales, 7).mean(1).argmin()]
    decoder = pixel_bits(ddpm, schedule, held_out, k, best[None], 9)[0]
    stopped = terms.prior + terms.kl[:, k:].sum(1) + decoder
    return {"VAE": float(vae_bits.mean()), "DDPM": float(terms.total.mean()), "DDPM, stopped": float(stopped.mean())}


def settings():
    """Return what all parts have in common."""
    facts = {"seeds": SEEDS, "samples": N, "rounds of a GAN": ROUNDS, "iterations": ITERATIONS}
    return facts | {"sha256": checksums("weights/digits", "classifiers/digits")}


def main():
    """Measure everything, or the parts that are named, and write each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure anew, of {', '.join(PARTS)}; without, everything")
    parts = parser.parse_args().parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    results = kept(PATH, settings()) | settings() | setting("one thread of an x86-64 CPU")
    if "shipped" in parts:
        model, schedule = load_pretrained("digits")
        drawn = {n_steps: draw(model, schedule, (1, 8, 8), n_steps, 0) for n_steps in CALLS}
        results["floor"] = measure(held_out)
        results["shipped"] = [measure(images) | {"steps": n_steps} for n_steps, images in drawn.items()]
        write(PATH, results)
    if "balance" in parts:
        results["balance"] = {name: [game(options, seed) for seed in SEEDS] for name, options in GAMES.items()}
        write(PATH, results)
    if "bounds" in parts:
        results["bounds"] = [bounds(seed) for seed in SEEDS]
        write(PATH, results)


if __name__ == "__main__":
    main()
