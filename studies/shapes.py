"""Train the text-to-image pipeline of coloured shapes, measure it on combinations that it has never seen, and ship it in ddpm_nb/pipelines/shapes.

Usage: python studies/shapes.py train --out runs/shapes          train, or go on with a run that was stopped
       python studies/shapes.py measure --out runs/shapes        measure what the run's folder holds now, with a few prompts
       python studies/shapes.py ship --out runs/shapes --hardware "what it runs on"
       python studies/shapes.py again --hardware "what it runs on"        measure the pipeline that ships; what is known of its training stays
       python studies/shapes.py words --out runs/words --hardware "what it runs on"        train on words that are not mixed, or go on, and measure their maps

`ship` chooses the least guidance that is as good as any by prompts that were trained on, measures with held-out ones, and writes the pipeline with its card and
ddpm_nb/measured/shapes.json: shares with their errors. The steps have as much noise as the posterior (eta 1, the default of `generate`); the same held-out
prompts are drawn without noise (eta 0), too, and the difference is taken scene by scene.
"""

import argparse
import inspect
import json
import platform
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import MEASURED, Clock, checksums, setting, write

from ddpm_nb.clip import TextEncoder
from ddpm_nb.conditioning import TextUNet
from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.latent import to_latents
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.runs import LOG_FILE, StopSignals, TrainLog
from ddpm_nb.schedules import make_schedule
from ddpm_nb.texts import (
    CaptionLoss,
    Pairs,
    StageCheckpoints,
    TextConfig,
    TextDenoiser,
    describe_scenes,
    draw_shapes,
    score_shapes,
    split_scenes,
    train_text,
    turn_round,
)
from ddpm_nb.training import TrainConfig, fit

N_PICTURES, N_TRIED, ROUNDS, N_RULE = 24000, 90, 6, 5000
N_UNMIXED = 8000  # steps
PATH = MEASURED / "shapes.json"
RECIPE = TextConfig(
    dim=48,
    autoencoder_channels=12,
    unet_channels=32,
    channel_mults=(1, 2),
    attn_resolutions=(8,),
    max_weight=20.0,
    clip=TrainConfig(5000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.98, checkpoint_every=300, precision="float32"),
    autoencoder=TrainConfig(1800, batch_size=32, lr=3e-3, ema_decay=0.99, checkpoint_every=300, precision="float32"),
    unet=TrainConfig(12000, batch_size=32, lr=1.5e-3, warmup=200, ema_decay=0.999, checkpoint_every=1000, precision="float32"),
)
GUIDANCES = (1.0, 2.0, 3.0, 5.0)
NAMES = ("colours", "shapes", "relation")
NOISE = inspect.signature(TextToImage.generate).parameters["eta"].default


def both_ways(scenes):
    """Return scenes in both wordings."""
    return torch.cat([scenes, turn_round(scenes)])


def draw(pipeline, rows, guidance, seed, eta):
    """Draw a picture for each row of scenes."""
    prompts = describe_scenes(rows)
    options = {"guidance": guidance, "eta": eta, "generator": seeded(seed)}
    parts = [pipeline.generate(prompts[i : i + 180], **options) for i in range(0, len(prompts), 180)]
    return torch.cat(parts)


def shares(pipeline, rows, guidance, seed, eta):
    """Return for each prompt whether colours, shapes, relation and whole are right, (N, 4)."""
    right = score_shapes(draw(pipeline, rows, guidance, seed, eta), rows).double()
    whole = right.prod(1, keepdim=True)
    return torch.cat([right, whole], 1)


def by_scene(right, n_scenes):
    """Return the mean (4,) and its standard error over scenes: pictures of one scene are no independent draws."""
    each = right.reshape(-1, n_scenes, right.shape[1]).mean(0)  # rounds of the same scenes
    return each.mean(0), each.std(0) / n_scenes**0.5


def named(mean, error):
    """Return shares and their errors by their names."""
    facts = {}
    for name, share, spread in zip((*NAMES, "all three"), mean.tolist(), error.tolist(), strict=True):
        facts |= {name: round(share, 4), f"{name}, standard error": round(spread, 4)}
    return facts


def measure(pipeline, rows, guidance, n_rounds, seed, *, eta=NOISE):
    """Measure with every row of scenes `n_rounds` times; return the facts, and what is right in each picture."""
    started = time.perf_counter()
    right = shares(pipeline, rows.repeat(n_rounds, 1), guidance, seed, eta)
    half = len(rows) // 2  # both wordings of a scene count as one
    facts = {"n": len(right), "scenes": half, "guidance": guidance, "eta": eta, "seconds": round(time.perf_counter() - started, 1)}
    return facts | named(*by_scene(right, half)), right


def least_within_error(trials):
    """Choose the least guidance within a standard error of the best: more guidance draws less of what a prompt allows."""
    top = max(trials.values(), key=lambda found: found["all three"])
    enough = top["all three"] - top["all three, standard error"]
    return min(scale for scale, found in trials.items() if found["all three"] >= enough)


def judge(pipeline, seen, held_out):
    """Choose the guidance by scenes that were trained on and measure with both kinds; return the facts."""
    tried = both_ways(seen[:N_TRIED])
    trials = {scale: measure(pipeline, tried, scale, 1, 1)[0] for scale in GUIDANCES}
    best = least_within_error(trials)
    with_noise, noisy = measure(pipeline, both_ways(held_out), best, ROUNDS, 2)
    without, plain = measure(pipeline, both_ways(held_out), best, ROUNDS, 2, eta=0.0)
    facts = {"held out": with_noise, "held out, eta 0": without}
    facts["gain of noise, held out"] = named(*by_scene(noisy - plain, len(held_out)))
    facts["seen"] = measure(pipeline, tried, best, ROUNDS, 3)[0]
    facts["trials"] = {str(scale): found for scale, found in trials.items()}
    drawings = draw_shapes(N_RULE, generator=seeded(4))
    right = score_shapes(drawings.images, drawings.scenes).double().mean(0).tolist()
    return facts | {f"rule on {N_RULE} drawings": dict(zip(NAMES, right, strict=True))}


def card_of(facts):
    """Return what the card says of the measuring."""
    found = facts["held out"]
    card = {f"least guidance within a standard error of the most right of {2 * N_TRIED} trial prompts": found["guidance"], "eta": found["eta"]}
    for name in (*NAMES, "all three"):
        share, error = found[name], found[f"{name}, standard error"]
        card[f"{name} right, {found['n']} held-out prompts"] = f"{share:.1%} +- {error:.1%}"
    for stage, minutes in facts["CPU minutes"].items():
        card[f"CPU minutes of training, {stage}"] = minutes
    return card


# Words that are not mixed


def unmixed_encoder(config):
    """Build an encoder without layers: the context of a token is its embedding plus that of its position."""
    encoder = TextEncoder(**config | {"n_layers": 1})
    encoder.blocks = torch.nn.ModuleList()
    return encoder


class LearningDenoiser(TextDenoiser):
    """Hold a U-Net and the words that it hears, which learn with it."""

    def forward(self, x, t, tokens):
        """Return the noise in `x` at steps `t`, given captions."""
        return self.unet(x, t, self.text_encoder(tokens))


def unmixed_network(shipped):
    """Build the shipped U-Net anew, with words that are not mixed."""
    with seeded_init(RECIPE.unet.seed):
        words = unmixed_encoder(shipped.text_encoder.config)
        return LearningDenoiser(TextUNet(**shipped.unet.config), words)


def train_unmixed(shipped, data, out, n_iterations):
    """Train the U-Net's stage alone, on the latents of the shipped autoencoder; return its pipeline."""
    pairs = Pairs(data.images, shipped.tokenizer.encode(data.captions)[:, None])
    loss = CaptionLoss(pairs, to_latents(shipped.autoencoder, data.images), RECIPE.drop, RECIPE.max_weight)
    settings = replace(RECIPE.unet, n_iterations=n_iterations, checkpoint_every=500)
    numbers = torch.arange(len(pairs), dtype=torch.float64)
    stop = StopSignals()
    watchers = [TrainLog(out / LOG_FILE), StageCheckpoints(out, pairs.to_bytes(), resume=True), loss, stop]
    clock = partial(Clock(out / "minutes.json"), "unet")
    options = {"callback": clock, "progress": False, "range_check": False, "watchers": watchers, "loss": loss}
    found = fit(unmixed_network(shipped), make_schedule("cosine", RECIPE.n_steps), numbers, settings, **options)
    if stop.number:
        raise SystemExit("stopped: saved; the same command goes on")
    network = found.ema
    parts = {"text_encoder": network.text_encoder, "unet": network.unet, "autoencoder": shipped.autoencoder}
    return TextToImage(shipped.tokenizer, **parts, schedule=shipped.schedule)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "ship", "again", "words"))
    parser.add_argument("--out", default="runs/shapes", help="folder of the run")
    parser.add_argument("--hardware", default="", help="what it runs on, in words")
    parser.add_argument("--steps", type=int, default=N_UNMIXED, help="of the training on words that are not mixed")
    args = parser.parse_args()
    if args.what in ("ship", "again", "words") and not args.hardware:
        parser.error("--hardware is needed: what it runs on, in words")
    out = Path(args.out)
    seen, held_out = split_scenes()
    if args.what == "train":
        data = draw_shapes(N_PICTURES, scenes=seen, generator=seeded(0))
        out.mkdir(parents=True, exist_ok=True)
        prompts = describe_scenes(held_out[:8])
        card = {"name": "text to image, shapes", "data": f"{N_PICTURES} drawings of {len(seen)} scenes", "image size": 32}
        options = {"resume": True, "prompts": prompts, "card": card, "callback": Clock(out / "minutes.json")}
        train_text((data.images, data.captions), out, RECIPE, **options)
        return
    if args.what == "words":
        out.mkdir(parents=True, exist_ok=True)
        shipped = TextToImage.from_pretrained(PIPELINES / "shapes")
        train_unmixed(shipped, draw_shapes(N_PICTURES, scenes=seen, generator=seeded(0)), out, args.steps)
        return
    pipeline = TextToImage.from_pretrained(PIPELINES / "shapes" if args.what == "again" else out)
    if args.what == "measure":
        for name, rows in (("seen", both_ways(seen[:N_TRIED])), ("held out", both_ways(held_out))):
            print(name, measure(pipeline, rows, 3.0, 1, 1)[0], flush=True)
        return
    facts = judge(pipeline, seen, held_out)
    if args.what == "again":
        facts["CPU minutes"] = read_json(PATH)["CPU minutes"]
        pipeline.card = pipeline.card | card_of(facts)
    else:
        facts["CPU minutes"] = {k: round(v, 1) for k, v in read_json(out / "minutes.json").items()}
        versions = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
        pipeline.card = pipeline.card | card_of(facts) | {"hardware": args.hardware} | versions
    pipeline.save_pretrained(PIPELINES / "shapes", overwrite=True, half=True)
    facts["sha256"] = checksums("pipelines/shapes")
    write(PATH, facts | setting(args.hardware))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
