"""Measure latent diffusion against diffusion of pixels on MNIST and store it in ddpm_nb/measured/mnist_latent.json.

Usage: python studies/mnist_latent.py --root data --hardware "what it runs on"

The network of pixels is the first variant of studies/mnist_tables.py, whose distances after each number of iterations are in
ddpm_nb/measured/mnist.json. Here an autoencoder is trained, then the same network on its latents, measured with the same yardstick.
It predicts v under the cosine schedule, and trains longer, since its steps are cheaper. The autoencoder is kept in --work, so that a
run that was cut short goes on after it.
"""

import argparse
import copy
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import MEASURED, checksums, setting, write
from mnist_tables import CONFIG as TABLES
from mnist_tables import N_REFERENCE, NETWORK
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nb.data import load_images
from ddpm_nb.elbo import predict_noise
from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.files import replaced_file
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.latent import Autoencoder, from_latents, psnr, to_latents, train_autoencoder
from ddpm_nb.results import Yardstick, measure_images
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import fit
from ddpm_nb.unet import UNet

OUT = MEASURED / "mnist_latent.json"
AUTOENCODER = {"latent_channels": 4, "base_channels": 8, "n_downs": 2, "padding": 2}
FITTING = {"n_iterations": 2000, "batch_size": 64, "lr": 2e-3, "kl_weight": 1e-3, "seed": 0}
PIXELS = replace(TABLES, precision="float32")  # as the tables were computed
CONFIG = replace(PIXELS, n_iterations=6000, lr=2e-3, objective="v")
SCHEDULE, SNAPSHOTS = "cosine", (375, 750, 1500, 3000, 6000)
N_SAMPLES, SAMPLE_STEPS, ETA, N_TIMED = 256, 50, 1.0, 12


def new_network(shape):
    """Build the network of pixels for other images; it attends at its coarsest level."""
    torch.manual_seed(CONFIG.seed)
    return UNet(shape[1], shape[0], **NETWORK | {"attn_resolutions": (shape[1] // 4,)})


def operations(call, *shapes):
    """Count the floating-point operations of a call, without computing it."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*(torch.zeros(shape) for shape in shapes))
    return counter.get_total_flops()


def seconds_per_step(shape):
    """Time a training step of a network, with processor time of this process, which other work does not stretch."""
    data, marks = torch.rand(256, *shape, generator=seeded(0)) * 2 - 1, []
    config = replace(PIXELS, n_iterations=N_TIMED + 3)
    callback = lambda trainer: marks.append(time.process_time())
    fit(new_network(shape), make_schedule("linear", 1000), data, config, callback=callback, progress=False)
    return (marks[-1] - marks[2]) / N_TIMED


def fitted_autoencoder(images, work):
    """Train the autoencoder, or read the one that an earlier run left with these settings; return it and the seconds it took."""
    made, path = {"autoencoder": AUTOENCODER, "fitting": FITTING, "images": len(images)}, work / "autoencoder.pt"
    if not path.is_file() or torch.load(path, weights_only=True).get("made with") != made:
        started = time.process_time()
        with seeded_init(FITTING["seed"]):
            model = Autoencoder(28, **AUTOENCODER)
        train_autoencoder(model, images, **FITTING)
        with replaced_file(path) as file:
            facts = {"seconds": time.process_time() - started, "made with": made}
            torch.save({"weights": model.state_dict()} | facts, file)
    kept, model = torch.load(path, weights_only=True), Autoencoder(28, **AUTOENCODER)
    model.load_state_dict(kept["weights"])
    return model.eval().requires_grad_(False), kept["seconds"]


def describe_autoencoder(model, seconds, yardstick):
    """Measure how well images of the test set come back, and what the two halves cost."""
    test, meta = yardstick.held_out, copy.deepcopy(model).to("meta")
    back = from_latents(model, to_latents(model, test))
    decibels = psnr(test, back)
    row = {"psnr": float(decibels.mean()), "psnr of the worst hundredth": float(decibels.quantile(0.01)), "test images": len(test)}
    drawn = from_latents(model, to_latents(model, test, generator=seeded(0)))
    row |= {"psnr of drawn latents": float(psnr(test, drawn).mean()), "seconds": seconds}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= {"operations of encoding": operations(meta.encode, (1, 1, 28, 28)), "latent std": model.latent_std.flatten().tolist()}
    row |= {"operations of decoding": operations(meta.decode, (1, *model.latent_shape)), "latent shape": list(model.latent_shape)}
    return row | {"restored": measure_images(back[:N_SAMPLES], yardstick)}


def sample_row(network, model, schedule, yardstick):
    """Draw latents, decode them and measure the images."""
    options = {"n_steps": SAMPLE_STEPS, "eta": ETA, "clip_x_0": False, "generator": seeded(0)}
    drawn = [sample_ddim(network, schedule, (64, *model.latent_shape), **options) for _ in range(N_SAMPLES // 64)]
    return {"n": N_SAMPLES} | measure_images(torch.cat([from_latents(model, z) for z in drawn]), yardstick)


def train_on_latents(images, model, yardstick):
    """Train the network on latents, and measure it after some numbers of iterations."""
    schedule, kept, latents = make_schedule(SCHEDULE, 1000), {}, to_latents(model, images)

    def keep(trainer):
        if trainer.n_steps in SNAPSHOTS:
            kept[trainer.n_steps] = predict_noise(copy.deepcopy(trainer.ema.model), schedule, CONFIG.objective)

    fit(new_network(model.latent_shape), schedule, latents, CONFIG, callback=keep, range_check=False, progress=False)
    return [{"iteration": i, **sample_row(network, model, schedule, yardstick)} for i, network in kept.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/latent"), help="folder for the autoencoder")
    parser.add_argument("--hardware", required=True, help="what it runs on, in words")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    images, test = (load_images("mnist", root=args.root, split=split) for split in ("train", "test"))
    classifier, chosen = load_classifier("mnist"), torch.randperm(len(images), generator=seeded(0))[:N_REFERENCE]
    yardstick = Yardstick(test, 256, classifier, classifier_features(classifier, images[chosen]))
    model, seconds = fitted_autoencoder(images, args.work)
    study = {"data": "mnist", "T": 1000, "autoencoder": AUTOENCODER, "fitting": FITTING, "network": NETWORK, "training": asdict(CONFIG)}
    study |= {"schedule": SCHEDULE, "reference images": N_REFERENCE, "sampling steps": SAMPLE_STEPS, "eta": ETA}
    facts = {"study": study, "sha256": checksums("classifiers/mnist")} | setting(args.hardware)
    facts["autoencoder"] = describe_autoencoder(model, seconds, yardstick)
    facts["cost"] = {}
    for name, shape in {"pixels": (1, 28, 28), "latents": model.latent_shape}.items():
        counted = operations(new_network(shape).to("meta"), (1, *shape), (1,))
        facts["cost"][name] = {"operations of a call": counted, "seconds of a training step": seconds_per_step(shape)}
    facts["training steps"] = train_on_latents(images, model, yardstick)
    write(OUT, facts)


if __name__ == "__main__":
    main()
