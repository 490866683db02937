"""Train the digits in float32 and in bfloat16 from the same seeds and store both bounds in ddpm_nb/measured/bfloat16.json.

Usage: python studies/bfloat16.py --hardware "what it runs on"

Runs of one seed share the first weights, the order of the data, the steps and the noise. The bound is measured in float32, also for
the network whose weights are rounded to bfloat16 only for sampling.
"""

import argparse
from dataclasses import asdict, replace

import torch
from common import MEASURED, checksums, setting, write

from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    bits_per_dim,
    classifier_features,
    distance_with_error,
    frechet_distance,
    load_classifier,
)
from ddpm_nb.fast import optimize_for_sampling
from ddpm_nb.gaussian import seeded
from ddpm_nb.results import paired_difference
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import make_unet

OUT = MEASURED / "bfloat16.json"
CONFIG, SEEDS, T, N_SAMPLES = TrainConfig(n_iterations=300), (0, 1, 2), 300, 512


def distance(network, schedule, reference, classifier):
    """Return the Frechet distance of samples, with its error."""
    samples = sample_ddim(network, schedule, (N_SAMPLES, 1, 8, 8), eta=1.0, generator=seeded(0))
    return distance_with_error(frechet_distance, reference, classifier_features(classifier, samples))


def seed_row(seed, images, held_out):
    """Train twice from one seed and measure both."""
    schedule, classifier = make_schedule("cosine", T), load_classifier("digits")
    reference, row, bounds = classifier_features(classifier, images), {"seed": seed}, {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(seed)
        config = replace(CONFIG, precision=precision, seed=seed)
        result = fit(make_unet("digits"), schedule, images, config, progress=False)
        bounds[precision] = bits_per_dim(result.ema, schedule, held_out, n_levels=17, generator=seeded(0))
        drawn = {"frechet": distance(result.ema, schedule, reference, classifier)}
        rounded = optimize_for_sampling(result.ema, torch.bfloat16)
        drawn["frechet, sampled in bfloat16"] = distance(rounded, schedule, reference, classifier)
        row[precision] = {"bits/dim": bounds[precision].mean, "stderr": bounds[precision].stderr, **drawn}
        print(seed, precision, row[precision], flush=True)
    row["difference"] = paired_difference(bounds["bfloat16"].terms.total, bounds["float32"].terms.total)
    return row


def main():
    """Measure all seeds and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="what this runs on, in words")
    args = parser.parse_args()
    images, held_out = load_images("digits"), load_images("digits", split="test")
    facts = {"study": "bfloat16 against float32 on the digits", "config": asdict(CONFIG), "T": T}
    facts |= setting(args.hardware, ("torch",)) | {"sha256": checksums("classifiers/digits")}
    facts |= {"n_samples": N_SAMPLES, "n_held_out": len(held_out), "rows": [seed_row(seed, images, held_out) for seed in SEEDS]}
    write(OUT, facts)


if __name__ == "__main__":
    main()
