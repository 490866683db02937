"""Tell the shipped MNIST model the digit: train it on with a class, then measure what it draws when it is told one.

Usage: python studies/mnist_classes.py --root data --hardware "what it runs on" [--run runs/mnist-classes]

The network begins with the shipped weights and a table of classes at zero, so that it is at first the unconditional one. The run goes on
where it was stopped. Written are ddpm_nb/measured/mnist_classes.json and book/_static/mnist-classes.png: a row for each digit.
"""

import argparse
from pathlib import Path

import torch
from common import MEASURED, PICTURES, checksums, save_grey, setting, write

from ddpm_nb.conditioning import ClassUNet, of_class
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import classifier_features, load_classifier, mean_with_error
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.plots import tile
from ddpm_nb.runs import train
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.training import TrainConfig

TRAINING = {"n_iterations": 500, "batch_size": 64, "lr": 5e-4, "warmup": 50, "ema_decay": 0.99}
N_CALLS, ETA, N_SEEDS, EACH = 25, 1.0, 4, 10  # EACH: pictures of a digit for each seed
SCALES = (1.0, 2.0)


def told_network(network):
    """Return a class-conditional network with the weights of one that knows no classes."""
    with seeded_init(0):
        told = ClassUNet(10, **network.config)
    missing, surplus = told.load_state_dict(network.state_dict(), strict=False)
    if missing != ["classes.weight"] or surplus:
        raise RuntimeError(f"the networks differ in more than the classes: {missing}, {surplus}")
    return told


def spread(features, labels):
    """Return the mean variance of the features among pictures of one digit."""
    return torch.stack([features[labels == k].double().var(0).sum() for k in range(10)]).mean()


def measure(model, schedule, classifier, scale, seed):
    """Draw digits that were asked for; return the shares of right and of sure ones, the spread, and the pictures."""
    labels = torch.arange(10).repeat_interleave(EACH)
    options = {"n_steps": N_CALLS, "eta": ETA, "generator": seeded(seed)}
    x = sample_ddim(of_class(model, labels, scale), schedule, (len(labels), 1, 28, 28), **options)
    with torch.inference_mode():
        sure, found = classifier(x).softmax(1).max(1)
    right = (found == labels).double().mean().item()
    return {"right": right, "sure": (sure > 0.9).double().mean().item(), "spread": spread(classifier_features(classifier, x), labels).item()}, x


def main():
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--hardware", required=True, help="what the study runs on, in words")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist-classes"), help="folder of the run")
    args = parser.parse_args()
    first, schedule = load_pretrained("mnist")
    data, test = (load_dataset("mnist", root=args.root, split=split) for split in ("train", "test"))
    config = TrainConfig(**TRAINING, objective="v", conditional="class", checkpoint_every=50)
    done = train(told_network(first.network), schedule, data, config, out=args.run, resume=True, origin={"dataset": "mnist"})
    classifier = load_classifier("mnist")
    real = [test[i] for i in range(len(test))]
    labels = torch.tensor([label for _, label in real])
    real_spread = spread(classifier_features(classifier, torch.stack([x for x, _ in real])), labels).item()
    model, schedule = load_pretrained(args.run)
    rows, sheet = {}, None
    for scale in SCALES:
        found = []
        for seed in range(N_SEEDS):
            row, x = measure(model, schedule, classifier, scale, seed)
            sheet = x if seed == 0 and scale == SCALES[0] else sheet
            found.append(row | {"spread": row["spread"] / real_spread})
            print(scale, seed, found[-1], flush=True)
        rows[str(scale)] = {name: mean_with_error([row[name] for row in found]) for name in found[0]}
    save_grey(PICTURES / "mnist-classes.png", tile(sheet, EACH), 2)
    facts = {"training": TRAINING, "seconds": done.seconds, "images": len(data), "network calls": N_CALLS, "eta": ETA}
    facts |= {"seeds": N_SEEDS, "pictures of a digit a seed": EACH, "scales": rows} | setting(args.hardware)
    write(MEASURED / "mnist_classes.json", facts | {"sha256": checksums("weights/mnist", "classifiers/mnist")})


if __name__ == "__main__":
    main()
