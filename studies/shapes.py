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

import numpy as np
import torch
from common import MEASURED, PICTURES, Clock, checksums, setting, write
from PIL import Image
from torch.nn import functional as F

from ddpm_nb.clip import TextEncoder
from ddpm_nb.conditioning import TextUNet
from ddpm_nb.files import read_json, replaced_file
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.latent import to_latents
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.plots import tile
from ddpm_nb.runs import LOG_FILE, StopSignals, TrainLog, read_log
from ddpm_nb.schedules import make_schedule
from ddpm_nb.texts import (
    CaptionLoss,
    Pairs,
    StageCheckpoints,
    TextConfig,
    TextDenoiser,
    colour_masks,
    describe_scenes,
    draw_shapes,
    exchange_words,
    map_scores,
    score_shapes,
    split_scenes,
    train_text,
    turn_round,
    word_maps,
)
from ddpm_nb.training import TrainConfig, fit

N_PICTURES, N_TRIED, ROUNDS, N_RULE = 24000, 90, 6, 5000
N_UNMIXED, N_EDITED, N_SEEDS, N_SHOWN = 10000, 12, 2, 4  # steps; scenes with an exchanged word, noises of each; rows of the sheet
WORDS, AGAINST, SIDES = ("first colour", "first kind", "second colour", "second kind"), ("the rest", "the other shape"), {8: 90, 4: 45}  # scenes
N_TRIED_SHEET = 16
PATH, MAPS_PATH = MEASURED / "shapes.json", MEASURED / "words.json"
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
    starts = read_json(out / "starts.json") if (out / "starts.json").exists() else []
    done = len([loss for line in read_log(out / LOG_FILE) for loss in line["losses"]]) if starts else 0
    if done < n_iterations:
        write(out / "starts.json", [*starts, {"at step": done, "steps planned": n_iterations}])
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


def by_scenes(values, numbers, n_scenes):
    """Return means of values (..., N) and their standard errors over scenes, each rounded; `numbers` (N,) tell the scene."""
    shape = (*values.shape[:-1], n_scenes)
    counts = torch.bincount(numbers, minlength=n_scenes)
    sums = torch.zeros(shape, dtype=torch.float64).index_add(-1, numbers, values.double())
    each = (sums / counts)[..., counts > 0]
    errors = each.std(-1) / each.shape[-1] ** 0.5
    return {"mean": rounded(each.mean(-1)), "error": rounded(errors)}


def rounded(values):
    """Return a tensor as plain numbers of four digits."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: round(float(text), 4))


def places_of_words(prompts):
    """Return for the first colour and kind and the second colour and kind their tokens, (4, N): a word is one piece."""
    lengths = torch.tensor([len(prompt.split()) for prompt in prompts])
    first = torch.ones_like(lengths)  # "a" is token 1, after <begin>
    return torch.stack([first + 1, first + 2, lengths - 1, lengths])


def follow(pipeline, rows, n_scenes, guidance, seed, side):
    """Score the maps of colours and kinds against the shapes in the pictures that are right; return the facts, pictures and maps."""
    prompts = describe_scenes(rows)
    parts = []
    for i in range(0, len(rows), 90):
        options = {"guidance": guidance, "side": side, "generator": seeded(seed + i)}
        parts.append(word_maps(pipeline, prompts[i : i + 90], **options))
    pictures = torch.cat([part[0] for part in parts])
    maps = torch.cat([part[1] for part in parts], 1)  # (3, N, L, h, w)
    parts = score_shapes(pictures, rows)  # (N, 3)
    right = parts.all(1)
    shown = right.nonzero()[:, 0]
    numbers = shown % n_scenes  # both wordings and all rounds of a scene count as one
    found = colour_masks(pictures) > 0.5  # (N, 6, H, W)
    on = [found[shown, rows[shown, column]] for column in (0, 3)]
    scores = {what: [] for what in AGAINST}
    for place, own in zip(places_of_words(prompts), (0, 0, 1, 1), strict=True):
        large = F.interpolate(maps[:, shown, place[shown]], pictures.shape[-2:], mode="bilinear")
        for what, off in zip(AGAINST, (None, on[1 - own]), strict=True):
            scores[what].append(torch.stack([map_scores(third, on[own], off) for third in large]))
    facts = {}
    for what, each in scores.items():
        every = torch.stack(each)  # (4 words, 3 thirds, n)
        facts[what] = dict(zip(WORDS, (by_scenes(word, numbers, n_scenes) for word in every), strict=True))
        facts[what]["all four"] = by_scenes(every.mean(0), numbers, n_scenes)
    shares = by_scenes(torch.cat([parts, right[:, None]], 1).T, torch.arange(len(rows)) % n_scenes, n_scenes)
    share = {name: list(both) for name, *both in zip((*NAMES, "all three"), *shares.values(), strict=True)}
    told = {"prompts": len(rows), "right, error": share, "pictures scored": len(shown), "scenes scored": len(numbers.unique())}
    return told | facts, pictures, maps


def other_colour(c_1, k_1, r, c_2, k_2):
    """Exchange the first colour."""
    other = (c_1 + 1) % 6 if (c_1 + 1) % 6 != c_2 else (c_1 + 2) % 6
    return other, k_1, r, c_2, k_2


def other_kind(c_1, k_1, r, c_2, k_2):
    """Exchange the first kind."""
    return c_1, (k_1 + 1) % 3, r, c_2, k_2


def moved_share(one, other):
    """Return which share of two masks (N, H, W) does not overlap, (N,)."""
    union = torch.maximum(one, other).sum((1, 2)).clamp(min=1)
    return 1 - torch.minimum(one, other).sum((1, 2)) / union


def edit(pipeline, scenes, guidance):
    """Exchange a word with the maps kept and with free ones: what moved, which pictures are right, and the differences."""
    facts = {"scenes": len(scenes), "pictures of each": N_SEEDS}
    for name, change in (("colour", other_colour), ("kind", other_kind)):
        found = {"kept": [], "free": []}
        for row in scenes.tolist():
            wanted = torch.tensor([row, change(*row)])
            prompts = describe_scenes(wanted)
            for how, share in (("kept", 0.6), ("free", 0.0)):
                first, edited = exchange_words(pipeline, *prompts, list(range(N_SEEDS)), share=share, guidance=guidance)
                before, after = colour_masks(first), colour_masks(edited)
                changed = moved_share(before[:, wanted[0, 0]], after[:, wanted[1, 0]])
                other = moved_share(before[:, row[3]], after[:, row[3]])
                right = score_shapes(edited, wanted[1:].expand(N_SEEDS, -1)).all(1).double()
                found[how].append(torch.stack([changed, other, right]).mean(1))
        values = {how: torch.stack(each, -1) for how, each in found.items()}  # (3, scenes)
        values["free - kept"] = values["free"] - values["kept"]
        numbers = torch.arange(len(scenes))
        by_how = {how: by_scenes(each, numbers, len(scenes)) for how, each in values.items()}
        facts[name] = {"of": ["changed shape moved", "other shape moved", "edited picture right"]} | by_how
    return facts


def sheet_of_maps(pictures, maps, prompts, chosen):
    """Return pictures and, beside each, the late maps of its colours and kinds, in [-1, 1]: five columns."""
    rows = []
    for i in chosen:
        places = places_of_words(prompts)[:, i]
        large = F.interpolate(maps[2, i, places][:, None], pictures.shape[-2:], mode="bilinear")
        least, most = large.amin((2, 3), True), large.amax((2, 3), True)
        grey = ((large - least) / (most - least) * 15).round() / 7.5 - 1  # sixteen greys: a small file
        rows.append(torch.cat([pictures[i : i + 1], grey.expand(-1, 3, -1, -1)]))
    return torch.cat(rows)


def judge_words(pipeline, held_out, seen, guidance):
    """Measure maps and edits of a pipeline."""
    even = (torch.arange(len(held_out)) % 2 == 0)[:, None]
    rows = torch.where(even, held_out, turn_round(held_out))  # one wording or the other
    facts = {}
    for side, n in SIDES.items():
        facts[f"side {side}"] = follow(pipeline, rows[:n], len(rows[:n]), guidance, 5, side)[0]
    return facts | {"edits": edit(pipeline, seen[:N_EDITED], guidance)}


def sheets_of_maps(pipelines, held_out, guidance):
    """Return the first prompts whose pictures are right by all pipelines, and the sheet of maps of each."""
    rows = held_out[:N_TRIED_SHEET]
    drawn = [follow(pipeline, rows, len(rows), guidance, 6, 8)[1:] for pipeline in pipelines]
    right = torch.stack([score_shapes(pictures, rows).all(1) for pictures, _ in drawn]).all(0)
    chosen = right.nonzero()[:N_SHOWN, 0].tolist()
    prompts = describe_scenes(rows)
    return [prompts[i] for i in chosen], [sheet_of_maps(*found, prompts, chosen) for found in drawn]


def save_sheets(sheets):
    """Write sheets of maps, five columns each, beside each other as a PNG of the book."""
    tiles = [tile(sheet, 5) for sheet in sheets]
    gap = np.full((len(tiles[0]), 6, 3), 255, np.uint8)
    pixels = np.concatenate([tiles[0], gap, tiles[1]], 1).repeat(2, 0).repeat(2, 1)
    with replaced_file(PICTURES / "words-maps.png") as file:
        Image.fromarray(pixels).save(file, format="png", optimize=True)


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
        guidance = read_json(PATH)["held out"]["guidance"]
        data = draw_shapes(N_PICTURES, scenes=seen, generator=seeded(0))
        unmixed = train_unmixed(shipped, data, out, args.steps)
        if not (out / "mixed.json").exists():
            write(out / "mixed.json", judge_words(shipped, held_out, seen, guidance))
        facts = {"steps": {"mixed": RECIPE.unet.n_iterations, "unmixed": args.steps}, "starts": read_json(out / "starts.json"), "guidance": guidance}
        facts["CPU minutes"] = {"mixed": read_json(PATH)["CPU minutes"]["unet"], "unmixed": round(read_json(out / "minutes.json")["unet"], 1)}
        facts |= {"mixed": read_json(out / "mixed.json"), "unmixed": judge_words(unmixed, held_out, seen, guidance)}
        facts["prompts shown"], sheets = sheets_of_maps((shipped, unmixed), held_out, guidance)
        save_sheets(sheets)
        write(MAPS_PATH, facts | {"sha256": checksums("pipelines/shapes")} | setting(args.hardware))
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
