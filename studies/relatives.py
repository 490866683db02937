"""Measure the shipped DDPM of the digits with 2,000 samples, GANs in and out of balance and the bounds of VAE and DDPM, four seeds each.

Run `python studies/relatives.py` (about fifteen minutes on one core); chapters 16 and 17 read ddpm_nb/measured/relatives.json.
With the name of a part (shipped, balance, bounds) only that part is measured anew.
"""

import math
import platform
import sys

import torch

from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    load_classifier,
)
from ddpm_nb.files import PACKAGE, read_json, write_json
from ddpm_nb.forward import predict_x_0, q_sample
from ddpm_nb.gan import Discriminator, Generator, sample_gan, train_gan
from ddpm_nb.gaussian import discretized_gaussian_log_likelihood, seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.results import train_variant
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import make_unet
from ddpm_nb.vae import VAE, train_vae, vae_bound

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
    vae = train_vae(vae, digits, n_levels=17, seed=seed, n_iterations=1800, batch_size=128)
    settings = {"n_iterations": 280, "batch_size": 64, "warmup": 25, "ema_decay": 0.98, "seed": seed}
    config = TrainConfig(**settings, precision="float32")
    ddpm, schedule, _, _ = train_variant("eps, L_simple, cosine", network, digits, config, n_steps=200)
    with torch.no_grad():
        vae_bits = vae_bound(vae, held_out, n_levels=17, generator=seeded(0)).total
    terms, k = vlb_terms(ddpm, schedule, held_out, n_levels=17, generator=seeded(0)), 4  # k: fixed beforehand
    scales = torch.linspace(-4, 0, 25)
    best = scales[pixel_bits(ddpm, schedule, digits[:300], k, scales, 7).mean(1).argmin()]
    decoder = pixel_bits(ddpm, schedule, held_out, k, best[None], 9)[0]
    stopped = terms.prior + terms.kl[:, k:].sum(1) + decoder
    return {"VAE": float(vae_bits.mean()), "DDPM": float(terms.total.mean()), "DDPM, stopped": float(stopped.mean())}


def main():
    """Measure everything, or the parts that are named, and write it."""
    torch.set_num_threads(1)
    path = PACKAGE / "measured" / "relatives.json"
    parts = sys.argv[1:] or ["shipped", "balance", "bounds"]
    results = read_json(path) if sys.argv[1:] else {}
    results |= {"seeds": list(SEEDS), "samples": N, "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    if "shipped" in parts:
        results["floor"] = measure(held_out)
        model, schedule = load_pretrained("digits")
        results["shipped"] = [
            measure(draw(model, schedule, (1, 8, 8), n_steps, 0)) | {"steps": n_steps} for n_steps in (10, 20, 50)
        ]
    if "balance" in parts:
        results["balance"] = {name: [game(options, seed) for seed in SEEDS] for name, options in GAMES.items()}
    if "bounds" in parts:
        results["bounds"] = [bounds(seed) for seed in SEEDS]
    write_json(path, results)


if __name__ == "__main__":
    main()
