"""Train the text-to-image pipeline of coloured shapes, measure it on combinations that it has never seen, and ship it in ddpm_nb/pipelines/shapes.

Usage: python studies/shapes.py train --out runs/shapes          train, or go on with a run that was stopped
       python studies/shapes.py measure --out runs/shapes        measure what the run's folder holds now, with a few prompts
       python studies/shapes.py ship --out runs/shapes --hardware "what it runs on"

`ship` chooses the least guidance that is as good as any by prompts that were trained on, measures with held-out ones, and writes the pipeline with its card and
ddpm_nb/measured/shapes.json: shares with their errors.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from common import MEASURED, Clock, checksums, setting, write

from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.texts import (
    TextConfig,
    describe_scenes,
    draw_shapes,
    score_shapes,
    split_scenes,
    train_text,
    turn_round,
)
from ddpm_nb.training import TrainConfig

N_PICTURES, N_TRIED, ROUNDS, N_RULE = 24000, 90, 6, 5000
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


def both_ways(scenes):
    """Return scenes in both wordings."""
    return torch.cat([scenes, turn_round(scenes)])


def draw(pipeline, rows, guidance, seed):
    """Draw a picture for each row of scenes."""
    prompts, g = describe_scenes(rows), seeded(seed)
    parts = [pipeline.generate(prompts[i : i + 180], guidance=guidance, generator=g) for i in range(0, len(prompts), 180)]
    return torch.cat(parts)


def shares(pipeline, rows, guidance, seed):
    """Return the share of prompts whose colours, shapes, relation and whole are right."""
    right = score_shapes(draw(pipeline, rows, guidance, seed), rows).double()
    whole = right.prod(1, keepdim=True)
    return torch.cat([right, whole], 1)


def by_scene(right, n_scenes):
    """Return the mean (4,) and its standard error over scenes: pictures of one scene are no independent draws."""
    each = right.reshape(-1, n_scenes, right.shape[1]).mean(0)  # rounds of the same scenes
    return each.mean(0), each.std(0) / n_scenes**0.5


def measure(pipeline, rows, guidance, n_rounds, seed):
    """Measure with every row of scenes `n_rounds` times; return the facts."""
    started = time.perf_counter()
    right = shares(pipeline, rows.repeat(n_rounds, 1), guidance, seed)
    half = len(rows) // 2  # both wordings of a scene count as one
    mean, error = by_scene(right, half)
    facts = {"n": len(right), "scenes": half, "guidance": guidance, "seconds": round(time.perf_counter() - started, 1)}
    for name, share, spread in zip((*NAMES, "all three"), mean.tolist(), error.tolist(), strict=True):
        facts |= {name: round(share, 4), f"{name}, standard error": round(spread, 4)}
    return facts


def least_within_error(trials):
    """Choose the least guidance within a standard error of the best: more guidance draws less of what a prompt allows."""
    top = max(trials.values(), key=lambda found: found["all three"])
    enough = top["all three"] - top["all three, standard error"]
    return min(scale for scale, found in trials.items() if found["all three"] >= enough)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "ship"))
    parser.add_argument("--out", default="runs/shapes", help="folder of the run")
    parser.add_argument("--hardware", default="", help="what it runs on, in words")
    args = parser.parse_args()
    if args.what == "ship" and not args.hardware:
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
    pipeline = TextToImage.from_pretrained(out)
    if args.what == "measure":
        for name, rows in (("seen", both_ways(seen[:N_TRIED])), ("held out", both_ways(held_out))):
            print(name, measure(pipeline, rows, 3.0, 1, 1), flush=True)
        return
    trials = {scale: measure(pipeline, both_ways(seen[:N_TRIED]), scale, 1, 1) for scale in GUIDANCES}
    best = least_within_error(trials)
    facts = {"held out": measure(pipeline, both_ways(held_out), best, ROUNDS, 2)}
    facts["seen"] = measure(pipeline, both_ways(seen[:N_TRIED]), best, ROUNDS, 3)
    facts["trials"] = {str(scale): found for scale, found in trials.items()}
    drawings = draw_shapes(N_RULE, generator=seeded(4))
    right = score_shapes(drawings.images, drawings.scenes).double().mean(0).tolist()
    facts[f"rule on {N_RULE} drawings"] = dict(zip(NAMES, right, strict=True))
    facts["CPU minutes"] = {k: round(v, 1) for k, v in read_json(out / "minutes.json").items()}
    found, card = facts["held out"], dict(pipeline.card)
    card[f"least guidance within a standard error of the most right of {2 * N_TRIED} trial prompts"] = best
    for name in (*NAMES, "all three"):
        share, error = found[name], found[f"{name}, standard error"]
        card[f"{name} right, {found['n']} held-out prompts"] = f"{share:.1%} +- {error:.1%}"
    for stage, minutes in facts["CPU minutes"].items():
        card[f"CPU minutes of training, {stage}"] = minutes
    card |= {"hardware": args.hardware, "torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    pipeline.card = card
    pipeline.save_pretrained(PIPELINES / "shapes", overwrite=True, half=True)
    facts["sha256"] = checksums("pipelines/shapes")
    write(PATH, facts | setting(args.hardware))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
