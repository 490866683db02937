"""Networks that are told a class: what guidance buys, over several trainings on the digits, and in one training on the latents of MNIST.

Usage: python studies/classes.py {digits,mnist} --hardware "what it runs on" [--root data] [--work runs/classes]

`digits` trains the network of chapter 20 from several seeds and draws from each at several scales of guidance. `mnist` trains a network
that is told the digit on latents of the pipeline that ships, which its decoder turns into pictures; one training, several draws. Trained
networks stay in --work, and are not trained again. Written are ddpm_nb/measured/classes.json (figures a training or a draw, so that
differences can be paired) and, by `mnist`, book/_static/mnist-classes.png: a row for each digit that was asked for, without guidance and with it.
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import MEASURED, PICTURES, as_stored, checksums, save_grey, setting, write

from ddpm_nb.conditioning import ClassUNet, of_class
from ddpm_nb.data import load_dataset
from ddpm_nb.elbo import simple_loss
from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.hub import describe_model, load_pretrained, save_pretrained
from ddpm_nb.latent import from_latents, to_latents
from ddpm_nb.pipeline import TextToImage
from ddpm_nb.plots import tile
from ddpm_nb.runs import train
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import EMA, TrainConfig, descend
from ddpm_nb.unet import PRESETS

PATH, SHEET = MEASURED / "classes.json", PICTURES / "mnist-classes.png"
DIGITS = TrainConfig(800, lr=5e-3, batch_size=64, ema_decay=0.99, precision="float32", conditional="class", checkpoint_every=400)
MNIST = TrainConfig(3000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.995, conditional="class")
LATENT = {"base_channels": 32, "channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (4,), "norm_groups": 8, "n_heads": 4}
SCALES = {"digits": (0.0, 1.0, 2.0, 4.0), "mnist": (1.0, 2.0)}
EACH = {"digits": 40, "mnist": 10}  # pictures of a class, for each training or draw
N_CALLS = {"digits": 20, "mnist": 25}
N_TRAININGS, N_DRAWS, ETA = 5, 4, 1.0


def new_network():
    """Build the network of chapter 20 that is told a class."""
    return ClassUNet(10, **PRESETS["digits"] | {"base_channels": 16})


def diversity(features, labels):
    """Return the mean distance of the features of two pictures of one class."""
    distances = []
    for k in range(10):
        own = features[labels == k]
        distances.append(torch.cdist(own, own).sum() / (len(own) * (len(own) - 1)))
    return torch.stack(distances).mean().item()


@torch.inference_mode()
def judge(classifier, x, labels):
    """Return the share of pictures that are right, of right and sure ones, and their diversity within a class."""
    p = classifier(x).softmax(1)
    right = p.argmax(1) == labels
    sure = right & (p.amax(1) > 0.9)
    shares = {"right": right.double().mean().item(), "right and sure": sure.double().mean().item()}
    return shares | {"diversity": diversity(classifier_features(classifier, x), labels)}


def draw(model, schedule, name, shape, scale, seed, **options):
    """Draw pictures or latents of every class; also return what was asked for."""
    labels = torch.arange(10).repeat_interleave(EACH[name])
    told = of_class(model, labels, scale)
    options |= {"n_steps": N_CALLS[name], "eta": ETA, "generator": seeded(seed)}
    return sample_ddim(told, schedule, (len(labels), *shape), **options), labels


def study_digits(root, work):
    """Train several networks on the digits, and judge what each draws at each scale."""
    data, schedule = load_dataset("digits"), make_schedule("cosine", 1000)
    classifier = load_classifier("digits")
    real = judge(classifier, data.images(), data.labels)
    rows = {str(scale): [] for scale in SCALES["digits"]}
    for seed in range(N_TRAININGS):
        with seeded_init(seed):
            network = new_network()
        config = TrainConfig(**asdict(DIGITS) | {"seed": seed})
        train(network, schedule, data, config, out=work / f"digits-{seed}", resume=True, origin={"dataset": "digits"})
        model, own_schedule = load_pretrained(work / f"digits-{seed}")
        for scale in SCALES["digits"]:
            x, labels = draw(model, own_schedule, "digits", (1, 8, 8), scale, seed=0)
            rows[str(scale)].append(judge(classifier, x, labels))
            print(f"training {seed}, scale {scale:g}: {rows[str(scale)][-1]}", flush=True)
    facts = {"settings": asdict(DIGITS), "trainings": N_TRAININGS, "sha256": checksums("classifiers/digits")}
    return facts | {"scales": rows, "real": real}


def train_on_latents(z, labels, schedule):
    """Train a network that is told a class on latents, and forgets it one time of ten; return its average."""
    g = seeded(MNIST.seed)
    with seeded_init(MNIST.seed):
        model = ClassUNet(10, z.shape[-1], z.shape[1], **LATENT)
    ema = EMA(model, MNIST.ema_decay)

    def loss_of(i):
        which = torch.randint(len(z), (MNIST.batch_size,), generator=g)
        forgotten = torch.rand(MNIST.batch_size, generator=g) < MNIST.label_dropout
        told = partial(model, labels=labels[which].masked_fill(forgotten, model.n_classes))
        return simple_loss(told, schedule, z[which], generator=g)

    for i, loss in descend(model, MNIST, loss_of):
        ema.update(model)
        if (i + 1) % 100 == 0:
            print(f"iteration {i + 1}: loss {loss.item():.3f}", flush=True)
    return ema.model


def study_mnist(root, work):
    """Train on latents of MNIST, told the digit; judge several draws, and save a sheet."""
    pipeline = TextToImage.from_pretrained("mnist")
    data, test = [load_dataset("mnist", root=root, split=split) for split in ("train", "test")]
    if not (work / "mnist").is_dir():
        started = time.process_time()
        z = to_latents(pipeline.autoencoder, data.images())
        network = train_on_latents(z, data.labels, pipeline.schedule)
        minutes = (time.process_time() - started) / 60
        save_pretrained(work / "mnist", network, pipeline.schedule, card={"CPU minutes": round(minutes, 1)})
    model, schedule = load_pretrained(work / "mnist")
    classifier = load_classifier("mnist")
    real = judge(classifier, test.images(), test.labels)
    rows, sheets = {str(scale): [] for scale in SCALES["mnist"]}, []
    for scale in SCALES["mnist"]:
        for seed in range(N_DRAWS):
            z, labels = draw(model, schedule, "mnist", pipeline.autoencoder.latent_shape, scale, seed, clip_x_0=False)
            x = from_latents(pipeline.autoencoder, z)
            rows[str(scale)].append(judge(classifier, x, labels))
            print(f"draw {seed}, scale {scale:g}: {rows[str(scale)][-1]}", flush=True)
            if seed == 0:
                sheets.append(tile(x, EACH["mnist"]))
    gap = np.zeros_like(sheets[0][:, :20])
    save_grey(SHEET, np.concatenate([sheets[0], gap, sheets[1]], 1), 2)
    epochs = round(MNIST.n_iterations * MNIST.batch_size / len(data), 1)
    facts = {"settings": asdict(MNIST), "network": LATENT, "epochs": epochs, "draws": N_DRAWS} | describe_model(work / "mnist")["card"]
    return facts | {"scales": rows, "real": real, "sha256": checksums("pipelines/mnist", "classifiers/mnist")}


def main():
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SCALES, help="data set")
    parser.add_argument("--root", default="data", help="folder with the files of MNIST")
    parser.add_argument("--hardware", required=True, help="what the study runs on, in words")
    parser.add_argument("--work", type=Path, default=Path("runs/classes"), help="folder of the runs")
    args = parser.parse_args()
    study = {"digits": study_digits, "mnist": study_mnist}[args.name]
    facts = {"pictures of a class": EACH[args.name], "network calls": N_CALLS[args.name], "eta": ETA}
    facts |= study(args.root, args.work) | setting(args.hardware)
    write(PATH, (read_json(PATH) if PATH.exists() else {}) | {args.name: as_stored(facts)})


if __name__ == "__main__":
    main()
