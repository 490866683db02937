"""Train the unconditional MNIST model for twenty epochs; a run that was stopped goes on where it was.

Usage: python studies/train_mnist.py --root data --out runs/mnist

The network predicts v under the cosine schedule. `python studies/ship.py` then measures the run and
ships its averaged weights.
"""

import argparse

from ddpm_nb.data import load_dataset
from ddpm_nb.gaussian import seeded_init
from ddpm_nb.runs import train
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import UNet

EPOCHS, BATCH = 20, 64


def new_network():
    """Build the network: 2.6 million weights, attention at 7 x 7."""
    with seeded_init(0):
        return UNet(28, 1, 32, (1, 2, 3), 2, (7,), norm_groups=8)


def settings(n_images):
    """Return the settings for twenty epochs."""
    return TrainConfig(
        n_iterations=EPOCHS * (n_images // BATCH),
        batch_size=BATCH,
        lr=1e-3,
        warmup=500,
        ema_decay=0.999,
        objective="v",
        checkpoint_every=200,
    )


def main():
    """Start the run, or go on with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--out", default="runs/mnist", help="folder of the run")
    args = parser.parse_args()
    data, schedule = load_dataset("mnist", root=args.root), make_schedule("cosine", 1000)
    card = {"name": "mnist, cosine, v", "data": "mnist", "grey levels": 256}
    card |= {"schedule": "cosine", "T": 1000}
    options = {"out": args.out, "resume": True, "card": card, "origin": {"dataset": "mnist"}}
    train(new_network(), schedule, data, settings(len(data)), **options)


if __name__ == "__main__":
    main()
