"""Train the five variants of the papers on digits from three seeds, and measure them with one yardstick.

Run `python studies/objectives.py` (about twenty minutes on one core); chapter 12 reads ddpm_nb/measured/objectives.json.
A run that was stopped goes on with the variant and seed that is not finished; if a setting was changed, all are trained anew.
"""

import argparse
from dataclasses import asdict

from common import MEASURED, checksums, kept, setting, write

from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.gaussian import seeded_init
from ddpm_nb.results import (
    VARIANTS,
    Yardstick,
    measure_bound,
    measure_images,
    measure_samples,
    train_variant,
)
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import UNet

SEEDS, N_BOUND, N_SAMPLES, STEPS = 3, 32, 500, 25
NETWORK = {"channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (4,), "norm_groups": 4}
CONFIG = TrainConfig(n_iterations=300, batch_size=64, lr=3e-3, warmup=25, ema_decay=0.98, precision="float32")
PATH = MEASURED / "objectives.json"


def settings():
    """Return what all rows have in common."""
    facts = {"network": {"base_channels": 16} | NETWORK, "training": asdict(CONFIG), "variants": VARIANTS}
    return facts | {"held-out images": N_BOUND, "samples": N_SAMPLES, "steps": STEPS, "sha256": checksums("classifiers/digits")}


def row(name, seed, images, digits):
    """Train one variant from one seed and measure it; the noise of the measuring is equal for all."""
    with seeded_init(seed):
        network = UNet(8, 1, 16, **NETWORK)
    config = TrainConfig(**asdict(CONFIG) | {"seed": seed})
    model, schedule, _, seconds = train_variant(name, network, images, config)
    bound, bits = measure_bound(model, schedule, digits, N_BOUND, batch_size=N_BOUND)
    samples, _ = measure_samples(model, schedule, digits, N_SAMPLES, STEPS, batch_size=250)
    each = [round(value, 4) for value in bits.terms.total.tolist()]
    return {"bound": bound, "bits of each image": each, "samples": samples, "training seconds": round(seconds, 1)}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    train_set, test_set = load_dataset("digits"), load_dataset("digits", split="test")
    judge, images = load_classifier("digits"), train_set.images()
    digits = Yardstick(test_set.images(), train_set.n_levels, judge, classifier_features(judge, images))
    facts = (kept(PATH, settings()) or {"rows": {}}) | settings() | setting("one thread of an x86-64 CPU")
    facts["real"] = measure_images(digits.held_out, digits)
    for seed in range(SEEDS):
        for name in VARIANTS:
            rows = facts["rows"].setdefault(name, [])
            if len(rows) > seed:
                continue
            rows.append(row(name, seed, images, digits))
            write(PATH, facts)
            print(seed, name, rows[-1]["bound"]["bits/dim"], rows[-1]["samples"]["frechet"], rows[-1]["training seconds"], flush=True)


if __name__ == "__main__":
    main()
