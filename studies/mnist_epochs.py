"""Tell what loss and what pictures the shipped MNIST model had after 1, 2, 5, 10 and 20 epochs.

Usage: python studies/mnist_epochs.py --run runs/mnist --root data [--replay] [--keep-only]

The rows come from the checkpoints of the model's own run (studies/train_mnist.py). A run keeps only
its newest, so call this now and then while it trains: a checkpoint near one of the epochs is copied
to --work, measured and tabled, and what was measured is not measured again. With --keep-only it
copies, which takes a second, and stops. --replay trains the first five epochs once more, with the
seed and the settings of the run, for checkpoints that are gone; it too goes on where it was stopped.
Written are ddpm_nb/measured/mnist_epochs.json and book/_static/mnist-epochs.png.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import MEASURED, PICTURES, as_stored, checksums, save_grey, write
from mnist_tables import make_yardstick
from safetensors.torch import load_file, save_file
from train_mnist import BATCH, EPOCHS, new_network, settings

from ddpm_nb.data import load_dataset
from ddpm_nb.elbo import predict_noise
from ddpm_nb.files import read_json, replaced_file
from ddpm_nb.plots import tile
from ddpm_nb.results import measure_images, measure_samples
from ddpm_nb.runs import (
    CHECKPOINTS,
    LOG_FILE,
    list_checkpoints,
    read_checkpoint,
    read_log,
    read_settings,
    train,
)
from ddpm_nb.schedules import make_schedule

WANTED = (1, 2, 5, 10, EPOCHS)
NEAR = 0.03  # of an epoch's number: a checkpoint that is no further away stands for it
N_SAMPLES, N_CALLS, N_SHOWN = 500, 50, 16


class Enough(Exception):
    """End a replay that has come as far as it is wanted."""


def nearest_epoch(iteration, epoch):
    """Return the wanted epoch that an iteration stands for, or None."""
    for wanted in WANTED:
        if abs(iteration / epoch - wanted) <= NEAR * wanted:
            return wanted
    return None


def keep_checkpoints(run, work, epoch):
    """Copy the averaged weights of the checkpoint that is nearest to each wanted epoch."""
    here = {int(path.stem[5:]): path for path in list_checkpoints(Path(run, CHECKPOINTS))}
    for wanted in WANTED:
        near = [i for i in here if nearest_epoch(i, epoch) == wanted]
        if not near or list(work.glob(f"epoch-{wanted:02}-*.safetensors")):
            continue
        iteration = min(near, key=lambda i: abs(i - wanted * epoch))
        tensors, _ = read_checkpoint(here[iteration])
        ema = {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
        with replaced_file(work / f"epoch-{wanted:02}-{iteration:08}.safetensors") as file:
            save_file(ema, file)
        print(f"kept iteration {iteration}", flush=True)


def check_run(run, work):
    """Refuse a folder of rows that are those of a run with other settings; note this run's."""
    config, data = read_settings(run)
    told = as_stored({"config": asdict(config), "data": data})
    if (path := work / "run.json").exists() and read_json(path) != told:
        raise SystemExit(f"--work {work} holds rows of another run than {run}: name another folder")
    write(path, told)


def replay(data, folder, epoch):
    """Train the first five epochs again, with a checkpoint after each."""
    config = replace(settings(len(data)), checkpoint_every=epoch, keep=5)

    def stop(trainer):
        if trainer.n_steps > 5 * epoch:
            raise Enough

    try:
        schedule = make_schedule("cosine", 1000)
        train(new_network(), schedule, data, config, out=folder, resume=True, callback=stop)
    except Enough:
        pass


def measure(path, losses, epoch, yardstick, n_samples, n_calls):
    """Measure kept weights, and write the row and its first samples beside them."""
    iteration, schedule = int(path.stem[9:]), make_schedule("cosine", 1000)
    network = new_network()
    network.load_state_dict(load_file(path))
    model = predict_noise(network.eval(), schedule, settings(BATCH).objective)
    row, samples = measure_samples(model, schedule, yardstick, n_samples, n_calls)
    recent = losses[max(0, iteration - epoch) : iteration]
    row |= {"iteration": iteration, "epochs": iteration / epoch}
    row["loss"] = sum(recent) / max(1, len(recent))
    save_file({"samples": samples[:N_SHOWN].contiguous()}, path.with_suffix(".samples"))
    write(path.with_suffix(".json"), row)


def collect(work, floor, out, picture):
    """Put the rows that are there together."""
    paths = sorted(work.glob("epoch-*.json"))
    rows = [read_json(path) for path in paths]
    shown = [load_file(path.with_suffix(".samples"))["samples"] for path in paths]
    save_grey(picture, tile(torch.cat(shown), N_SHOWN), 2)
    facts = {"batch size": BATCH, "epochs of the run": EPOCHS, "rows": rows, "floor": floor}
    write(out, facts | {"sha256": checksums("classifiers/mnist")})


def main():
    """Keep, measure and table what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--run", default="runs/mnist", help="folder of the run")
    parser.add_argument("--work", type=Path, default=Path("runs/epochs"), help="folder of the rows")
    parser.add_argument("--replay", action="store_true", help="train the first five epochs again")
    parser.add_argument("--keep-only", action="store_true", help="copy checkpoints and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = load_dataset("mnist", root=args.root)
    epoch = len(data) // BATCH
    check_run(args.run, args.work)
    keep_checkpoints(args.run, args.work, epoch)
    if args.replay:
        replay(data, args.work / "replay", epoch)
        keep_checkpoints(args.work / "replay", args.work, epoch)
    if args.keep_only:
        return
    yardstick = make_yardstick(data, load_dataset("mnist", root=args.root, split="test"))
    losses = [loss for line in read_log(Path(args.run, LOG_FILE)) for loss in line["losses"]]
    for path in sorted(args.work.glob("epoch-*.safetensors")):
        if not path.with_suffix(".json").exists():
            measure(path, losses, epoch, yardstick, N_SAMPLES, N_CALLS)
            print(f"measured {path.stem}", flush=True)
    floor = measure_images(yardstick.held_out[:N_SAMPLES], yardstick)
    collect(args.work, floor, MEASURED / "mnist_epochs.json", PICTURES / "mnist-epochs.png")


if __name__ == "__main__":
    main()
