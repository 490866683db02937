"""Train a whole text-to-image pipeline and ship it in ddpm_nb/pipelines/NAME, with its measured card.

Usage: python studies/train_pipeline.py {digits,mnist} --hardware "what it runs on" [--root data] [--work runs/pipelines]

Each part is written to --work when it is finished, and a part that is there is not trained again. Measuring follows training.
"""

import argparse
import hashlib
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_nb.captions import (
    TEMPLATES,
    WORDS,
    attributes,
    fit_caption_rule,
    fit_tokenizer,
    write_captions,
)
from ddpm_nb.clip import CLIP_CONFIG, make_clip, train_clip, zero_shot
from ddpm_nb.conditioning import TextUNet, score_attributes, train_conditional
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import load_classifier
from ddpm_nb.files import replaced_file
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.latent import Autoencoder, from_latents, psnr, to_latents, train_autoencoder
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.sampling import respace
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig

FULL = [k for k, template in enumerate(TEMPLATES) if all("{" + name + "}" in template for name in WORDS)]
FULL_WITHOUT_SIZE = [k for k, text in enumerate(TEMPLATES) if all("{" + name + "}" in text for name in ("digit", "weight", "slant"))]
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0)
# Latents are not clipped, so the walk begins where a little signal is left: from pure noise the first prediction of z_0 would be
# the error of the network divided by almost nothing.
WALKED = 980  # of the 1000 steps that the U-Net is trained on


@dataclass(frozen=True)
class Recipe:
    """Hold the settings of one pipeline."""

    dataset: str
    clip: dict  # steps of `train_clip`, and the dimension of all vectors
    autoencoder: dict | None  # of `Autoencoder` and `train_autoencoder`
    unet: dict  # of `TextUNet`
    config: TrainConfig  # of `train_conditional`


RECIPES = {
    "digits": Recipe(
        dataset="digits",
        clip={"n_iterations": 1500, "dim": 48},
        autoencoder=None,
        unet={"base_channels": 32, "channel_mults": (1, 2), "attn_resolutions": (8, 4)},
        config=TrainConfig(n_iterations=6000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.999),
    ),
    "mnist": Recipe(
        dataset="mnist",
        clip={"n_iterations": 1500, "dim": 64},
        autoencoder={"n_iterations": 2500, "latent_channels": 4, "base_channels": 16, "n_downs": 2, "padding": 2, "kl_weight": 1e-3},
        unet={"base_channels": 48, "channel_mults": (1, 2), "attn_resolutions": (4,)},
        config=TrainConfig(n_iterations=9000, batch_size=64, lr=1e-3, warmup=200, ema_decay=0.999),
    ),
}


class Clock:
    """Print what is going on."""

    def __init__(self):
        self.started = time.perf_counter()

    def say(self, text):
        """Print a line with the time since the beginning."""
        print(f"{time.perf_counter() - self.started:7.0f} s  {text}", flush=True)


def kept_or_made(file, build, make):
    """Return a module with the weights of a file, or make it and write them with the minutes that the process computed."""
    if file.exists():
        module = build()
        module.load_state_dict(load_file(file))
        return module.eval().requires_grad_(False)
    before, module = time.process_time(), make()
    minutes = {f"CPU minutes of training, {file.stem}": str(round((time.process_time() - before) / 60, 1))}
    with replaced_file(file) as temporary:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary, metadata=minutes)
    return module.eval().requires_grad_(False)


def training_minutes(work):
    """Read how long each part took from the files of the parts."""
    facts = {}
    for file in sorted(work.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            facts |= {key: float(value) for key, value in (opened.metadata() or {}).items() if key.startswith("CPU minutes")}
    return facts


def train_text(recipe, x, rows, work, clock):
    """Train CLIP; return it with its tokenizer."""
    captions = [caption for k in range(len(TEMPLATES)) for caption in write_captions(rows[:2000], template=k)]
    tokenizer = fit_tokenizer(captions, 12)
    shape = {"image_size": x.shape[-1], "in_channels": x.shape[1], "channels": 32, "dim": recipe.clip["dim"]}
    text = {"n_words": len(tokenizer), "length": tokenizer.length, "dim": recipe.clip["dim"]}
    build = lambda: make_clip(shape, text, recipe.clip["dim"])
    config = replace(CLIP_CONFIG, n_iterations=recipe.clip["n_iterations"])

    def make():
        with seeded_init(0):
            clip = build().to(x.device)
        return train_clip(clip, x, rows, tokenizer, config, callback=log)

    log = lambda clip, i, loss: clock.say(f"clip {i}: {loss:.3f}") if i % 250 == 0 else None
    return kept_or_made(work / "clip.safetensors", build, make), tokenizer


def train_compression(recipe, x, work, clock):
    """Train the autoencoder."""
    names = ("latent_channels", "base_channels", "n_downs", "padding")
    shape = {k: v for k, v in recipe.autoencoder.items() if k in names}
    options = {k: v for k, v in recipe.autoencoder.items() if k not in names}
    log = lambda i, parts: clock.say(f"autoencoder {i + 1}: mse {parts['mse']:.4f}") if (i + 1) % 250 == 0 else None
    build = lambda: Autoencoder(x.shape[-1], x.shape[1], **shape)

    def fitted():
        with seeded_init(0):
            model = build()
        return train_autoencoder(model, x, callback=log, **options)

    return kept_or_made(work / "autoencoder.safetensors", build, fitted)


def train_unet(recipe, z, rows, clip, tokenizer, work, clock, snapshot):
    """Train the U-Net on images or latents; hand the average to `snapshot` now and then."""
    text_encoder, schedule = clip.text_encoder, make_schedule("cosine", 1000)
    tokens = torch.stack([tokenizer.encode(write_captions(rows, template=k)) for k in range(len(TEMPLATES))], 1)
    options = {"context_dim": text_encoder.config["dim"], **recipe.unet}
    torch.manual_seed(recipe.config.seed)
    unet, losses = TextUNet(z.shape[-1], z.shape[1], **options), []

    def log(i, loss, average):
        losses.append(loss)
        if (i + 1) % 250 == 0:
            clock.say(f"unet {i + 1}: {torch.stack(losses[-250:]).mean():.4f}")
        if (i + 1) % 2000 == 0:
            snapshot(average, schedule)

    build = lambda: TextUNet(z.shape[-1], z.shape[1], **options)
    train = lambda: train_conditional(unet, schedule, z, tokens, text_encoder, recipe.config, callback=log)
    return kept_or_made(work / "unet.safetensors", build, train), schedule


def measure(pipeline, rows, classifier, n, guidance, *, seed=0):
    """Return the share of pictures that show each attribute that their sentences ask for."""
    g = seeded(seed)
    wanted = rows[torch.randint(len(rows), (n,), generator=g)]
    full = FULL if rows.shape[1] == 4 else FULL_WITHOUT_SIZE
    which = torch.randint(len(full), (n,), generator=g).tolist()
    prompts = [write_captions(row[None], template=full[k])[0] for row, k in zip(wanted, which, strict=True)]
    pictures = torch.cat([pipeline.generate(prompts[i : i + 250], guidance=guidance, generator=g) for i in range(0, n, 250)])
    right = score_attributes(pictures, wanted, classifier, pipeline.rule).double().mean(0)
    return [round(float(share), 3) for share in right]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--hardware", required=True, help="what it runs on, in words")
    parser.add_argument("--root", default="data", help="folder with the data files")
    parser.add_argument("--work", default="runs/pipelines", help="folder for the finished parts")
    parser.add_argument("--prompts", type=int, default=1000, help="sentences to measure with")
    parser.add_argument("--iterations", type=int, help="steps of the U-Net, instead of the recipe's")
    args = parser.parse_args()
    recipe, work, clock = RECIPES[args.name], Path(args.work, args.name), Clock()
    if args.iterations:
        recipe = replace(recipe, config=replace(recipe.config, n_iterations=args.iterations))
    work = work / hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]  # parts of another recipe are not taken for these
    work.mkdir(parents=True, exist_ok=True)
    sets = [load_dataset(recipe.dataset, root=args.root, split=split) for split in ("train", "test")]
    (x, labels), (x_test, labels_test) = [(data.images(), data.labels) for data in sets]
    rule = fit_caption_rule(x, labels, with_size=recipe.dataset == "mnist")
    rows, rows_test = attributes(rule, x, labels), attributes(rule, x_test, labels_test)
    clip, tokenizer = train_text(recipe, x, rows, work, clock)
    digits = [f"a {word}" for word in WORDS["digit"]]
    right = zero_shot(clip, tokenizer, x_test, digits) == labels_test
    card = {"name": f"text to image, {args.name}", "data": recipe.dataset, "grey levels": sets[0].n_levels, "training images": len(x)}
    card["CLIP zero-shot digit accuracy, test"] = round(right.double().mean().item(), 4)
    autoencoder = None if recipe.autoencoder is None else train_compression(recipe, x, work, clock)
    if autoencoder is not None:
        restored = from_latents(autoencoder, to_latents(autoencoder, x_test))
        card["PSNR of the autoencoder, dB, test"] = round(psnr(x_test, restored).mean().item(), 2)
    clock.say(card)
    z = x if autoencoder is None else to_latents(autoencoder, x)
    classifier = load_classifier(recipe.dataset)

    def make(unet, schedule):
        walked = schedule if autoencoder is None else respace(schedule, list(range(WALKED)))
        return TextToImage(tokenizer, clip.text_encoder, unet, walked, autoencoder, rule, card)

    def snapshot(average, schedule):
        path = work / "snapshot"
        make(average, schedule).save_pretrained(path, overwrite=True)
        clock.say(f"snapshot: {measure(make(average, schedule), rows_test, classifier, 250, 3.0)}")

    unet, schedule = train_unet(recipe, z, rows, clip, tokenizer, work, clock, snapshot)
    pipeline, names = make(unet, schedule), list(WORDS)[: rows.shape[1]]
    trials = {scale: measure(pipeline, rows_test, classifier, 250, scale, seed=1) for scale in GUIDANCES}
    clock.say(trials)
    best = max(trials, key=lambda scale: sum(trials[scale]))
    card["guidance with the most right of 250 trial prompts"] = best
    shares = measure(pipeline, rows_test, classifier, args.prompts, best, seed=2)
    card |= {f"{name} right, share of {args.prompts} prompts": share for name, share in zip(names, shares, strict=True)}
    config = recipe.config
    card |= {"iterations": config.n_iterations, "batch size": config.batch_size, "learning rate": config.lr, "seed": config.seed}
    card |= training_minutes(work)
    card |= {"hardware": args.hardware, "torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    pipeline.save_pretrained(PIPELINES / args.name, overwrite=True)
    clock.say(card)


if __name__ == "__main__":
    main()
