"""Repeat the MNIST experiment of the widely copied notes in small: a plain network, and a U-Net.

Usage: python studies/mnist_notes.py --root data --hardware "what it runs on" [--epochs 10]

As in the notes: 28 x 28 pixels, T = 500, linear variances rescaled to T, Adam at a constant rate of
5e-4, batches of 64, no average of the weights. Scaled: their U-Net has 96 channels and 14 million
weights, this one 16 and 0.7 million, so that two processor cores train it in an hour; the plain
network has 32 channels and six blocks, which costs about as many operations for an image. Each run
is kept in --work and goes on where it was stopped. Written are ddpm_nb/measured/mnist_notes.json
and book/_static/notes-*.png; the pictures show drawn digits alone, none of the data.
"""

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from common import MEASURED, PICTURES, checksums, save_grey, setting, write
from mnist_tables import NETWORK, make_yardstick
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nb.data import load_dataset
from ddpm_nb.forward import NoiseSchedule, q_sample
from ddpm_nb.gaussian import randn, seeded, seeded_init
from ddpm_nb.hub import load_pretrained
from ddpm_nb.plots import tile
from ddpm_nb.results import measure_images, measure_samples
from ddpm_nb.runs import LOG_FILE, read_log, train
from ddpm_nb.sampling import sample_ddpm
from ddpm_nb.schedules import linear_betas
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import ResNetBaseline, UNet

MAKERS = {
    "plain": lambda: ResNetBaseline(1, channels=32, n_blocks=6),
    "unet": lambda: UNet(28, 1, **NETWORK),
}
N_STEPS, BATCH, N_SHEET, N_WALK = 500, 64, 64, 16
FORWARD = (0, 50, 100, 200, 499)  # code indices
SMOOTH = 50  # iterations that a point of a loss curve averages


def settings(n_iterations):
    """Return the notes' settings."""
    return TrainConfig(
        n_iterations=n_iterations,
        batch_size=BATCH,
        lr=5e-4,
        warmup=0,
        lr_decay="constant",
        grad_clip=math.inf,
        ema_decay=0.0,
        checkpoint_every=200,
    )


def train_network(name, schedule, data, config, folder):
    """Train a network, or go on; return its model, the loss of each iteration, and its seconds."""
    with seeded_init(0):
        network = MAKERS[name]()
    card = {"name": f"the notes' experiment, {name}", "data": "mnist"}
    train(network, schedule, data, config, out=folder, resume=True, card=card)
    lines = read_log(folder / LOG_FILE)
    losses = [loss for line in lines for loss in line["losses"]]
    model, _ = load_pretrained(folder)
    return model, torch.tensor(losses), sum(line["seconds"] for line in lines)


def cost(model):
    """Return the number of weights of a network and its operations for an image, in millions."""
    t = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), t)
    weights = sum(p.numel() for p in model.parameters())
    return {"weights": weights, "million operations": round(counter.get_total_flops() / 1e6, 1)}


def draw_walk(model, schedule, n_sheet):
    """Draw samples with all steps; return them and sixteen moments of the first sixteen walks."""
    last, moments = schedule.n_steps - 1, []
    wanted = {round(last * i / (N_WALK - 1)) for i in range(N_WALK)}

    def keep(t, x, x_0_hat):
        if t in wanted:
            moments.append(x[:N_WALK])

    shape = (n_sheet, 1, 28, 28)
    samples = sample_ddpm(model, schedule, shape, generator=seeded(0), callback=keep)
    walks = torch.stack(moments, 1)  # (walks, moments, 1, 28, 28)
    return samples, walks.flatten(0, 1)


def forward_pictures(schedule, x_0):
    """Return drawn digits (N, 1, 28, 28) at five steps of the forward process, a row for each."""
    eps = randn(x_0.shape, generator=seeded(1))
    last = schedule.n_steps - 1
    rows = [q_sample(schedule, x_0, min(t, last), eps) for t in FORWARD]
    return torch.cat(rows)


def run(name, schedule, data, config, yardstick, n_samples, folder, pictures):
    """Train and measure one network; write its pictures; return its row."""
    model, losses, seconds = train_network(name, schedule, data, config, folder / name)
    n_sheet = min(N_SHEET, n_samples)
    samples, walk = draw_walk(model, schedule, n_sheet)
    save_grey(pictures / f"notes-{name}.png", tile(samples, 8), 2)
    if name == "unet":
        save_grey(pictures / "notes-walk.png", tile(walk, N_WALK), 1)
        save_grey(
            pictures / "notes-forward.png", tile(forward_pictures(schedule, samples[:8]), 8), 2
        )
    curve = losses[: len(losses) // SMOOTH * SMOOTH].view(-1, SMOOTH).mean(1).tolist()  # whole points only
    steps = min(50, schedule.n_steps)
    row, _ = measure_samples(model, schedule, yardstick, n_samples, steps)
    row |= cost(model) | {"training seconds": round(seconds)}
    return row | {"curve": curve, "last loss": losses[-len(losses) // 4 :].mean().item()}


def study(data, yardstick, n_iterations, n_samples, folder, pictures, n_steps=N_STEPS):
    """Train and measure all networks; return what is stored."""
    schedule = NoiseSchedule(linear_betas(n_steps, rescale=True))
    config = settings(n_iterations)
    facts = {"T": n_steps, "training": asdict(config) | {"grad_clip": None}}
    facts |= {"images": len(data), "epochs": n_iterations * BATCH / len(data)}
    facts |= {"iterations of a point": SMOOTH, "sha256": checksums("classifiers/mnist")}
    for name in MAKERS:
        facts[name] = run(name, schedule, data, config, yardstick, n_samples, folder, pictures)
    return facts | {"floor": measure_images(yardstick.held_out[:n_samples], yardstick)}


def main():
    """Run the study as the options say, or go on with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--hardware", required=True, help="what it runs on, in words")
    parser.add_argument("--work", type=Path, default=Path("runs/notes"), help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=10, help="as in the notes: 10")
    parser.add_argument("--samples", type=int, default=256, help="samples that are measured")
    args = parser.parse_args()
    data, test = (load_dataset("mnist", root=args.root, split=s) for s in ("train", "test"))
    n_iterations = args.epochs * (len(data) // BATCH)
    folder = args.work / f"{args.epochs} epochs"
    yardstick = make_yardstick(data, test)
    facts = study(data, yardstick, n_iterations, args.samples, folder, PICTURES)
    write(MEASURED / "mnist_notes.json", setting(args.hardware) | facts)


if __name__ == "__main__":
    main()
