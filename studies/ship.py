"""Measure a finished run and ship its averaged model with the package: weights, configuration and card in ddpm_nb/weights/NAME.

Usage: python studies/ship.py runs/digits digits --hardware "1 thread of an AMD EPYC" [--images 256] [--samples 2000]

Every figure on the card is computed here or read from the run: nothing is typed but the description of the machine. The classifier
that judges the samples is trained here, on the same training images, from a fixed seed. The model that the new one takes the place
of is measured beside it, with as many samples. Weights are kept as float16, and measured so.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import (
    bits_per_dim,
    classifier_features,
    classifier_report,
    distance_with_error,
    frechet_distance,
    train_classifier,
)
from ddpm_nb.fast import optimize_for_sampling
from ddpm_nb.forward import q_sample
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import describe_model, load_pretrained, save_pretrained
from ddpm_nb.runs import LOG_FILE, read_log, read_settings
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.training import pick_precision

WEIGHTS = Path(__file__).resolve().parent.parent / "ddpm_nb" / "weights"


def rounded(model):
    """Round weights in place as they are kept: the card is of the network that ships."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def held_out_error(model, schedule, images, repeats=10):
    """Return the mean square of noise minus prediction on held-out images, several random steps each."""
    x_0, generator = images.repeat(repeats, 1, 1, 1), torch.Generator().manual_seed(4)
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.randint(schedule.n_steps, (len(x_0),), generator=generator)
    total = 0.0
    with torch.inference_mode():
        for x, steps, noise in zip(x_0.split(500), t.split(500), eps.split(500), strict=True):
            total += (model(q_sample(schedule, x, steps, noise), steps) - noise).square().sum().item()
    return total / eps.numel()


def training_facts(run, hardware, n_images):
    """Return what the run says about itself, its learning curve included."""
    config, _ = read_settings(run)
    lines = read_log(Path(run) / LOG_FILE)
    losses = torch.tensor([loss for line in lines for loss in line["losses"]])
    epoch = n_images // config.batch_size
    facts = describe_model(run)["card"] | {"images": n_images, "epochs": round(len(losses) / epoch, 1)}
    kept = ("lr", "warmup", "ema_decay", "precision")
    facts |= {name: asdict(config)[name] for name in kept}
    minutes = sum(line["seconds"] for line in lines) / 60
    facts |= {"hardware": hardware, "training minutes": round(minutes, 1)}
    for n in (1, 2, 5, 10, 20):
        if len(losses) >= n * epoch:
            facts[f"training loss in epoch {n}"] = round(losses[(n - 1) * epoch : n * epoch].mean().item(), 4)
    return facts


def draw(model, schedule, shape, n, eta):
    """Draw n samples with 50 network calls, in bfloat16 where the processor computes in it."""
    model = optimize_for_sampling(model, pick_precision("auto", torch.device("cpu")))
    g, sizes = seeded(0), [min(64, n - i) for i in range(0, n, 64)]
    parts = [sample_ddim(model, schedule, (size, *shape), n_steps=50, eta=eta, generator=g) for size in sizes]
    return torch.cat(parts)


def measured_facts(model, schedule, name, root, n_images, n_samples, eta, before):
    """Measure a model on held-out images and by its samples; `before` is the model it takes the place of, or None."""
    train, test = (load_dataset(name, root=root, split=split) for split in ("train", "test"))
    held_out = test.images()
    bits = bits_per_dim(model, schedule, held_out[:n_images], n_levels=test.n_levels, batch_size=64, generator=seeded(0))
    facts = {"test loss": round(held_out_error(model, schedule, held_out[:1000]), 3)}
    facts |= {"test bits/dim": round(bits.mean, 3), "its standard error": round(bits.stderr, 3), "test images": bits.n_images}
    classifier = train_classifier(train.images(), train.labels)
    with torch.inference_mode():
        right = torch.cat([classifier(x).argmax(1) for x in held_out.split(1000)]) == test.labels
    reference = train.images()[torch.randperm(len(train), generator=seeded(0))[:5000]]
    reference = classifier_features(classifier, reference)
    facts |= {"classifier's test accuracy": round(right.float().mean().item(), 4), "samples judged": n_samples}
    arithmetic = str(pick_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    facts |= {"sampler": f"DDIM with eta = {eta:g}, 50 network calls, {arithmetic}"}
    facts |= {"distances": f"from {len(reference)} training images"}
    sets = {"samples": draw(model, schedule, held_out.shape[1:], n_samples, eta), "test images": held_out[:n_samples]}
    if before is not None:
        sets["samples of the model before"] = draw(*before, held_out.shape[1:], n_samples, eta)
    for kind, images in sets.items():
        found = report_facts(classifier_report(classifier, images))
        value, error = distance_with_error(frechet_distance, reference, classifier_features(classifier, images))
        found |= {"Frechet distance": round(value, 1), "its standard error": round(error, 1)}
        facts |= {f"{kind}: {key}": value for key, value in found.items()}
    return facts


def same_weights(a, b):
    """Tell whether two networks have the same weights."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def report_facts(report):
    """Return what a classifier says of samples, rounded, for a card."""
    facts = {"mean confidence": round(report.mean_confidence, 3), f"share above {report.threshold}": round(report.confident, 3)}
    return facts | {"imbalance of classes": round(report.imbalance, 3), "imbalance of fair draws": round(report.imbalance_floor, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the finished run")
    parser.add_argument("name", help="name to ship it under")
    parser.add_argument("--hardware", required=True, help="what the run was trained on, in words")
    parser.add_argument("--root", default="data", help="folder with the data files")
    parser.add_argument("--images", type=int, default=256, help="held-out images for bits/dim (T network calls each)")
    parser.add_argument("--samples", type=int, default=2000, help="samples that the classifier judges")
    parser.add_argument("--before", help="folder of the model it takes the place of, instead of the one that ships under the name")
    parser.add_argument("--eta", type=float, default=1.0, help="noise of the sampler that is judged, 0 to 1")
    args = parser.parse_args()
    model, schedule = load_pretrained(args.run)
    weights = rounded(model).state_dict()
    config, data = read_settings(args.run)
    n_images = len(load_dataset(data["dataset"], root=args.root))
    facts = training_facts(args.run, args.hardware, n_images)
    if facts["iterations"] != config.n_iterations:
        parser.error(f"{args.run} is not finished: iteration {facts['iterations']} of {config.n_iterations}")
    shipped = WEIGHTS / args.name if (WEIGHTS / args.name).is_dir() else None
    before = load_pretrained(args.before or shipped) if args.before or shipped else None
    if before is not None and same_weights(before[0].state_dict(), weights):
        parser.error(f"this run ships as {args.name} already: name the model before it with --before")
    facts |= measured_facts(model, schedule, data["dataset"], args.root, args.images, args.samples, args.eta, before)
    options = {"n_levels": facts["grey levels"], "card": facts, "overwrite": True, "half": True}
    save_pretrained(WEIGHTS / args.name, model, schedule, **options)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
