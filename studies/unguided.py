"""Go on with the U-Net of the MNIST pipeline, more captions left out, and ship it with its card: it has to draw without a sentence, too.

Usage: python studies/unguided.py --hardware "what it runs on" [--before FOLDER] [--root data] [--work runs/unguided]

`studies/train_pipeline.py mnist` leaves out one caption in ten, so of its 22,000 iterations the network drew without a sentence in a
tenth. Here it goes on from the weights that ship (or from --before, a pipeline's folder) in two legs, in which three and then five
captions in ten are left out, with twice the batch and half the rate, which falls to zero in each. Caption encoder and autoencoder
stay as they are. The same command goes on with a run that was stopped. Then the pipeline is measured as `train_pipeline.py`
measures it.
"""

import argparse
import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import Clock
from train_pipeline import RECIPES, judge, told_of_training

from ddpm_nb.captions import TEMPLATES, attributes, write_captions
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import load_classifier
from ddpm_nb.latent import to_latents
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.runs import LOG_FILE, StopSignals, TrainLog
from ddpm_nb.schedules import make_schedule
from ddpm_nb.texts import CaptionLoss, Pairs, StageCheckpoints, TextDenoiser
from ddpm_nb.training import TrainConfig, fit

DROPS = (0.3, 0.5)  # share of the captions that the network does not see, in each leg
LEG = TrainConfig(4000, batch_size=128, lr=5e-4, warmup=100, ema_decay=0.9995, checkpoint_every=500, seed=1)
LEGS = (LEG, replace(LEG, n_iterations=3000, seed=2))


def pairs_and_latents(pipeline, data):
    """Return pictures with all their captions, and the pictures' latents."""
    images = data.images()
    rows = attributes(pipeline.rule, images, data.labels)
    captions = [write_captions(rows, template=k) for k in range(len(TEMPLATES))]
    pairs = Pairs(images, torch.stack([pipeline.tokenizer.encode(texts) for texts in captions], 1))
    with torch.inference_mode():
        latents = torch.cat([to_latents(pipeline.autoencoder, part) for part in images.split(500)])
    return pairs, latents.clone()


def go_on(pipeline, pairs, latents, drop, settings, out):
    """Train the U-Net of a pipeline further in a run folder; return the pipeline with the averaged network, and the CPU minutes."""
    loss = CaptionLoss(pairs, latents, drop, RECIPES["mnist"].max_weight)
    network = TextDenoiser(copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)).requires_grad_(True)
    kept = StageCheckpoints(out, pairs.to_bytes(), resume=True)
    stop = StopSignals()
    options = {"watchers": [TrainLog(out / LOG_FILE), kept, loss, stop], "callback": partial(Clock(out / "minutes.json"), "unet")}
    numbers = torch.arange(len(pairs), dtype=torch.float64)
    schedule = make_schedule("cosine", RECIPES["mnist"].n_steps)  # whole, as `train_text` trains; the pipeline begins at its 980
    found = fit(network, schedule, numbers, settings, loss=loss, range_check=False, progress=False, **options)
    if stop.n_steps < settings.n_iterations:
        raise SystemExit(f"stopped after iteration {stop.n_steps} and saved; the same command goes on")
    return replace(pipeline, unet=found.ema.unet.eval()), json.loads((out / "minutes.json").read_text())["unet"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="what it runs on, in words")
    parser.add_argument("--before", default=PIPELINES / "mnist", help="folder of the pipeline to begin with")
    parser.add_argument("--root", default="data", help="folder with the data files")
    parser.add_argument("--work", default="runs/unguided", help="folder of the run")
    parser.add_argument("--prompts", type=int, default=1000, help="sentences to measure with")
    args = parser.parse_args()
    pipeline = TextToImage.from_pretrained(args.before)
    if any(name.startswith("further ") for name in pipeline.card):
        parser.error(f"{args.before} went on already: begin with the pipeline before it")
    train, test = [load_dataset("mnist", root=args.root, split=split) for split in ("train", "test")]
    card = told_of_training(pipeline.card)
    card |= {f"before further training, {key}": value for key, value in pipeline.card.items() if key.startswith("no prompt")}
    pairs, latents = pairs_and_latents(pipeline, train)
    for i, (drop, settings) in enumerate(zip(DROPS, LEGS, strict=True), start=1):
        pipeline, minutes = go_on(pipeline, pairs, latents, drop, settings, Path(args.work, f"leg-{i}"))
        facts = {"iterations": settings.n_iterations, "batch size": settings.batch_size, "learning rate at first": settings.lr}
        facts |= {"share of captions left out": drop, "seed": settings.seed, "CPU minutes": round(minutes, 1), "hardware": args.hardware}
        card |= {f"further training {i}, {key}": value for key, value in facts.items()}
    images = test.images()
    card |= judge(pipeline, attributes(pipeline.rule, images, test.labels), images, load_classifier("mnist"), args.prompts)
    replace(pipeline, card=card).save_pretrained(PIPELINES / "mnist", overwrite=True, half=True)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
