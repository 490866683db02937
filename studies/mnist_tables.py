"""Measure the papers' tables in small on MNIST and store them in ddpm_nb/measured/mnist.json.

Usage: python studies/mnist_tables.py --root data --hardware "what it runs on"

Each row is written to --work as soon as it is measured, with its settings and the checksums of the shipped weights it rests on. A row
that is there, with those of today, is not measured again, so a run that was cut short goes on where it stopped. Two runs may share the
work: name the rows of each with --rows. The last to finish collects the table.

With --renew, rows that are not in --work are taken from the stored table where they hold: after another network was shipped,
    python studies/mnist_tables.py --renew --root data --hardware ...
measures the rows of that network again, and nothing else. Rows that are named with --rows are measured though the table has them.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch
from common import MEASURED, PICTURES, as_stored, checksums, setting, write
from PIL import Image

from ddpm_nb.bound import rate_distortion
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import (
    CLASSIFIERS,
    classifier_features,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.plots import show_images
from ddpm_nb.results import (
    VARIANTS,
    Yardstick,
    measure_bound,
    measure_images,
    measure_samples,
    train_variant,
)
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import UNet

OUT = MEASURED / "mnist.json"
NETWORK = {"base_channels": 16, "channel_mults": (1, 2, 4), "n_res_blocks": 1, "attn_resolutions": (7,), "norm_groups": 8}
CONFIG = TrainConfig(n_iterations=1500, batch_size=64, lr=1e-3, warmup=100, ema_decay=0.995)
SNAPSHOTS = (100, 200, 400, 800, 1500)
N_BOUND, N_SAMPLES, SAMPLE_STEPS, N_REFERENCE, N_CURVE = 64, 500, 100, 5000, 32
GRID, N_GRID = [(n, eta) for n in (10, 20, 50) for eta in (0.0, 1.0)], 256
CURVE = (1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 1000)
CLASSIFIER = {"n_iterations": 3000, "channels": 32}


def make_classifier(train_set, test_set):
    """Train the classifier of MNIST and ship it, unless it is there."""
    if (path := CLASSIFIERS / "mnist").is_dir():
        return
    x, labels = train_set.images(), train_set.labels
    model = train_classifier(x, labels, **CLASSIFIER)
    right = torch.cat([model(part).argmax(1) for part in test_set.images().split(1000)]) == test_set.labels
    card = {"name": "classifier of MNIST", "data": f"mnist, the {len(x)} training images", "iterations": CLASSIFIER["n_iterations"]}
    card |= {"batch size": 128, "seed": 0, "test images": len(right), "test accuracy": round(right.float().mean().item(), 4)}
    save_classifier(path, model, card=card)


def make_yardstick(train_set, test_set):
    """Collect what all rows are measured with."""
    classifier, chosen = load_classifier("mnist"), torch.randperm(len(train_set), generator=seeded(0))[:N_REFERENCE]
    reference = classifier_features(classifier, train_set.images()[chosen])
    return Yardstick(test_set.images(), test_set.n_levels, classifier, reference)


def variant_row(name, train_set, yardstick, work):
    """Train and measure one variant; the first also at its snapshots."""
    torch.manual_seed(CONFIG.seed)
    model, first = UNet(28, 1, **NETWORK), name == next(iter(VARIANTS))
    snapshots = SNAPSHOTS if first else ()
    predictor, schedule, kept, seconds = train_variant(name, model, train_set.images(), CONFIG, snapshots=snapshots)
    bound, bits = measure_bound(predictor, schedule, yardstick, N_BOUND)
    drawn, samples = measure_samples(predictor, schedule, yardstick, N_SAMPLES, SAMPLE_STEPS)
    row = {"variant": name, **VARIANTS[name], "training seconds": seconds, "bound": bound, "samples": drawn}
    row["bits of each image"] = bits.terms.total.tolist()
    show_images(samples[:32], n_cols=16, cell=0.42).figure.savefig(work / f"{name}.png", dpi=100)
    if first:
        found = {i: measure_samples(network, schedule, yardstick, 256, 50) for i, network in kept.items()}
        row["training steps"] = [{"iteration": i, **figures} for i, (figures, _) in found.items()]
        pictures = torch.cat([x[:16] for _, x in found.values()])
        figure = show_images(pictures, n_cols=16, row_titles=[str(i) for i in found], cell=0.42).figure
        figure.savefig(PICTURES / "mnist-training-steps.png", dpi=100)
    return row


def draw(model, schedule, shape, n, n_steps, eta):
    """Draw as `measure_samples` does; return the samples and the seconds, those of judging left out."""
    started, g = time.perf_counter(), seeded(0)
    options = {"n_steps": n_steps, "eta": eta, "generator": g}
    parts = [sample_ddim(model, schedule, (min(64, n - i), *shape), **options) for i in range(0, n, 64)]
    return torch.cat(parts), time.perf_counter() - started


def grid_row(n_steps, eta, yardstick, n=N_GRID):
    """Sample the shipped network with one setting of DDIM, time the drawing alone, and measure."""
    model, schedule = load_pretrained("mnist")
    samples, seconds = draw(model, schedule, yardstick.held_out.shape[1:], n, n_steps, eta)
    row = {"n": n, "steps": n_steps, "eta": eta, "seconds of drawing an image": seconds / n}
    return row | measure_images(samples, yardstick)


def curve_row(yardstick):
    """Measure bound, rate and distortion of the shipped network."""
    model, schedule = load_pretrained("mnist")
    bound, bits = measure_bound(model, schedule, yardstick, N_CURVE)
    rate, rmse = rate_distortion(bits.terms, n_levels=yardstick.n_levels)
    points = [{"reverse steps": n, "rate": float(rate[1000 - n]), "rmse": float(rmse[1000 - n])} for n in CURVE]
    return {"bound": bound, "points": points}


def rows_to_measure(train_set, yardstick, work):
    """Return every row by name, as a function that measures it."""
    test = yardstick.held_out
    rows = {name: (lambda name=name: variant_row(name, train_set, yardstick, work)) for name in VARIANTS}
    rows["floor"] = lambda: {str(n): {"n": n, **measure_images(test[:n], yardstick)} for n in (N_GRID, N_SAMPLES)}
    rows["curve"] = lambda: curve_row(yardstick)
    return rows | {f"ddim {n} {eta}": (lambda n=n, eta=eta: grid_row(n, eta, yardstick)) for n, eta in GRID}


def study():
    """Return the settings of all rows."""
    facts = {"data": "mnist", "T": 1000, "network": NETWORK, "training": asdict(CONFIG), "variants": VARIANTS, "held-out images": N_BOUND}
    facts |= {"samples": N_SAMPLES, "sampling steps": SAMPLE_STEPS, "snapshots": SNAPSHOTS, "reference images": N_REFERENCE}
    return facts | {"sha256": checksums("weights/mnist", "classifiers/mnist")}


def made_with(name, facts):
    """Return what a row rests on, of the settings of a study: the shipped network's rows on its weights, the variants' on the training."""
    facts = as_stored(facts)
    trained = {key: value for key, value in facts.items() if key != "sha256"}
    judged = {"reference images": facts["reference images"], "classifier": facts["sha256"]["classifiers/mnist"]}
    if name in VARIANTS:
        return judged | trained
    return judged if name == "floor" else judged | {"weights": facts["sha256"]["weights/mnist"]}


def stored_rows():
    """Return the rows of the stored table that rest on the settings and weights of today."""
    facts = read_json(OUT)
    rows = {row["variant"]: row for row in facts["objectives"]} | {"floor": facts["floor"], "curve": facts["curve"]}
    rows |= {f"ddim {row['steps']} {row['eta']}": row for row in facts["ddim"]}
    rows[next(iter(VARIANTS))]["training steps"] = facts["training steps"]
    return {name: row for name, row in rows.items() if made_with(name, facts["study"]) == made_with(name, study())}


def rows_in(work, names):
    """Return those of the rows that lie in a folder and rest on the settings and weights of today."""
    rows = {name: read_json(path) for name in names if (path := work / f"{name}.json").is_file()}
    return {name: row for name, row in rows.items() if row.pop("made with", None) == made_with(name, study())}


def join_pictures(work):
    """Put the samples of the two losses below each other in one picture, if both rows were measured anew."""
    names = ("eps, L_simple", "eps, L")
    if len(rows_in(work, names)) < 2:
        return
    pictures = [Image.open(work / f"{name}.png").convert("RGB") for name in names]
    height = sum(picture.height for picture in pictures)
    joined = Image.new("RGB", (pictures[0].width, height), "white")
    for picture, top in zip(pictures, (0, pictures[0].height), strict=True):
        joined.paste(picture, (0, top))
    joined.save(PICTURES / "mnist-objectives.png")


def collect(work, rows, hardware):
    """Put the rows together, with all that is needed to repeat them."""
    join_pictures(work)
    facts = {"study": study()} | setting(hardware)
    facts["minutes of all rows"] = round(sum(row["minutes"] for row in rows.values()), 1)
    facts["objectives"] = [rows[name] for name in VARIANTS]
    facts["training steps"] = facts["objectives"][0].pop("training steps")
    facts |= {"ddim": [rows[f"ddim {n} {eta}"] for n, eta in GRID], "curve": rows["curve"], "floor": rows["floor"]}
    write(OUT, facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder for the rows")
    parser.add_argument("--rows", nargs="*", help="rows to measure; all without")
    parser.add_argument("--renew", action="store_true", help="take rows that are not in --work from the stored table")
    parser.add_argument("--hardware", required=True, help="what it runs on, in words; with --renew also what the rows that stay ran on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train_set, test_set = (load_dataset("mnist", root=args.root, split=split) for split in ("train", "test"))
    make_classifier(train_set, test_set)
    rows = rows_to_measure(train_set, make_yardstick(train_set, test_set), args.work)
    if unknown := set(args.rows or ()) - rows.keys():
        parser.error(f"--rows must be of {', '.join(rows)}; got {', '.join(sorted(unknown))}")
    stored = stored_rows() if args.renew else {}
    for name in args.rows if args.rows is not None else [name for name in rows if name not in stored]:
        if not rows_in(args.work, [name]):
            started = time.perf_counter()
            row = rows[name]()
            row |= {"minutes": (time.perf_counter() - started) / 60, "made with": made_with(name, study())}
            write(args.work / f"{name}.json", row)
            print(f"{name}: {row['minutes']:.1f} min", flush=True)
    found = stored | rows_in(args.work, rows)
    if found.keys() >= rows.keys():
        collect(args.work, found, args.hardware)


if __name__ == "__main__":
    main()
