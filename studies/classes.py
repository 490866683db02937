"""Measure what a class and guidance buy on digits, over four trainings; ship none of them.

Run `python studies/classes.py` (about ten minutes on one core); chapter 20 reads ddpm_nb/measured/classes.json.
"""

import torch
from common import MEASURED, setting, write

from ddpm_nb.conditioning import ClassUNet, of_class
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import PRESETS

SEEDS, SCALES = (1, 2, 3, 4), (0, 1, 2, 3, 5)
ITERATIONS, BATCH, T, A_CLASS, STEPS = 1200, 64, 1000, 20, 20


def trained(schedule, seed):
    """Train a class-conditional U-Net as chapter 20 does; return its average."""
    with seeded_init(seed):
        net = ClassUNet(10, **PRESETS["digits"] | {"base_channels": 16})
    settings = {"n_iterations": ITERATIONS, "batch_size": BATCH, "ema_decay": 0.99, "precision": "float32"}
    return fit(net, schedule, load_dataset("digits"), TrainConfig(**settings, conditional="class", seed=seed)).ema


@torch.no_grad()
def judge(classifier, images, labels):
    """Return the shares that are right, and right and sure, and the mean distance within a class."""
    p = classifier(images.clamp(-1, 1)).softmax(1)
    right = p.argmax(1) == labels
    sure = right & (p.amax(1) > 0.9)
    distances = []
    for y in range(10):
        features = classifier_features(classifier, images[labels == y])
        n = len(features)
        distances.append(float(torch.cdist(features, features).sum() / (n * (n - 1))))
    return [right.double().mean().item(), sure.double().mean().item(), sum(distances) / 10]


def main():
    schedule, classifier, found = make_schedule("cosine", T), load_classifier("digits"), []
    labels = torch.arange(10).repeat_interleave(A_CLASS)
    for seed in SEEDS:
        net, rows = trained(schedule, seed), []
        for scale in SCALES:
            options = {"n_steps": STEPS, "generator": seeded(seed)}
            x = sample_ddim(of_class(net, labels, scale), schedule, (len(labels), 1, 8, 8), **options)
            rows.append(judge(classifier, x, labels))
        found.append(rows)
        print(seed, rows, flush=True)
    facts = {"seeds": SEEDS, "scales": SCALES, "figures": ["right", "right and sure", "diversity"], "found": found}
    facts |= {"iterations": ITERATIONS, "batch": BATCH, "T": T, "pictures": len(labels), "DDIM steps": STEPS}
    write(MEASURED / "classes.json", facts | setting("CPU, one thread"))


if __name__ == "__main__":
    main()
