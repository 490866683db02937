"""Train a text-to-image pipeline on digits and their measured captions; ship it in ddpm_nb/pipelines/NAME with its card.

Usage: python studies/train_pipeline.py {digits,mnist} --hardware "what it runs on" [--root data] [--work runs/pipelines]
       python studies/train_pipeline.py {digits,mnist} --measure-again [--root data]

Training is one call of `train_text`: its run folder lies in --work, and the same command goes on with a run that was stopped.
Measuring follows training, with prompts from the captions of test images: with the guidance that `generate` takes without being
told, without guidance, and without a prompt; each with as much noise in the steps as the posterior has (eta 1, the default), and
without (eta 0). Every figure on the card is computed here, and its name says with which setting. --measure-again measures the
pipeline that ships; what its card says of the training stays.
"""

import argparse
import inspect
import json
import platform
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from common import Clock

from ddpm_nb.captions import (
    TEMPLATES,
    WORDS,
    attributes,
    fit_caption_rule,
    fit_tokenizer,
    write_captions,
)
from ddpm_nb.clip import make_clip, zero_shot
from ddpm_nb.conditioning import score_attributes
from ddpm_nb.data import load_dataset
from ddpm_nb.evaluation import classifier_features, classifier_report, load_classifier
from ddpm_nb.gaussian import seeded
from ddpm_nb.latent import from_latents, psnr, to_latents
from ddpm_nb.pipeline import PIPELINES, TextToImage
from ddpm_nb.runs import load_checkpoint
from ddpm_nb.texts import TextConfig, train_text
from ddpm_nb.training import TrainConfig

GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0)
USUAL, NOISE = (inspect.signature(TextToImage.generate).parameters[name].default for name in ("guidance", "eta"))
JUDGED = ("guidance", " right, ", "sure", "imbalance", "spread")  # words in the names of what `judge` measures
CLIP = TrainConfig(1500, batch_size=128, lr=2e-3, warmup=49, weight_decay=0.05, ema_decay=0.98, checkpoint_every=300)
AUTOENCODER = TrainConfig(4000, batch_size=64, lr=2e-3, ema_decay=0.99, checkpoint_every=500)
RECIPES = {
    "digits": TextConfig(
        dim=48,
        n_downs=0,
        unet_channels=32,
        attn_resolutions=(8, 4),
        n_alike=1,
        clip=CLIP,
        unet=TrainConfig(6000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.999, checkpoint_every=1000),
    ),
    "mnist": TextConfig(
        dim=64,
        unet_channels=48,
        attn_resolutions=(4,),
        n_alike=1,
        clip=CLIP,
        autoencoder=AUTOENCODER,
        unet=TrainConfig(22000, batch_size=64, lr=1e-3, warmup=200, ema_decay=0.999, checkpoint_every=1000),
    ),
}


def full_templates(n_attributes):
    """Return the templates that name every attribute of the captions."""
    names = list(WORDS)[:n_attributes]
    return [k for k, text in enumerate(TEMPLATES) if all("{" + name + "}" in text for name in names)]


def clip_of(out, recipe, tokenizer, images):
    """Return CLIP as the first stage of a run left it; the caption encoder is the pipeline's, too."""
    tensors, _ = load_checkpoint(out / "clip" / "checkpoints")
    image = {"image_size": images.shape[-1], "in_channels": images.shape[1], "dim": recipe.dim}
    text = {"n_words": len(tokenizer), "length": tokenizer.length, "dim": recipe.dim}
    clip = make_clip(image, text, recipe.dim)
    clip.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    return clip.eval()


def part_sizes(n, largest=250):
    """Split n pictures into parts that fit the memory."""
    return [min(largest, n - i) for i in range(0, n, largest)]


def draw(pipeline, prompts, guidance, generator, eta=NOISE):
    """Draw a picture for each prompt."""
    options = {"guidance": guidance, "eta": eta, "generator": generator}
    pictures, first = [], 0
    for size in part_sizes(len(prompts)):
        pictures.append(pipeline.generate(prompts[first : first + size], **options))
        first += size
    return torch.cat(pictures)


def measure(pipeline, rows, classifier, n, guidance, *, seed=0, eta=NOISE):
    """Return the share of pictures that show each attribute that their sentences ask for, and of those that are sure."""
    g = seeded(seed)
    wanted = rows[torch.randint(len(rows), (n,), generator=g)]
    full = full_templates(rows.shape[1])
    which = torch.randint(len(full), (n,), generator=g).tolist()
    prompts = [write_captions(row[None], template=full[k])[0] for row, k in zip(wanted, which, strict=True)]
    pictures = draw(pipeline, prompts, guidance, g, eta)
    right = score_attributes(pictures, wanted, classifier, pipeline.rule).double().mean(0)
    found = {f"{name} right": round(share, 4) for name, share in zip(WORDS, right.tolist(), strict=False)}
    return found | {"sure": round(classifier_report(classifier, pictures.clamp(-1, 1)).confident, 4)}


def relative_spread(pipeline, rows, images, classifier, guidance, n_captions=30, n=32, *, eta=NOISE):
    """Return how widely pictures of one caption spread in features, over real images of that caption, with its error over captions."""
    g, ratios = seeded(3), []
    kinds, kind_of, sizes = rows.unique(dim=0, return_inverse=True, return_counts=True)
    often = sizes.argsort(descending=True)[:n_captions]
    n = min(n, int(sizes[often].min()))
    for k in often.tolist():
        real = images[(kind_of == k).nonzero()[:n, 0]]
        prompt = write_captions(kinds[k][None], template=0)
        drawn = draw(pipeline, prompt * n, guidance, g, eta).clamp(-1, 1)
        spreads = [classifier_features(classifier, x).var(0).sum() ** 0.5 for x in (drawn, real)]
        ratios.append(float(spreads[0] / spreads[1]))
    ratios = torch.tensor(ratios)
    return round(ratios.mean().item(), 3), round((ratios.std() / len(ratios) ** 0.5).item(), 3)


def setting_of(scale, eta):
    """Say what a figure of the card was measured with."""
    return f"guidance {scale:g}, eta {eta:g}"


def judge(pipeline, rows, images, classifier, n):
    """Try guidances with n / 4 prompts and measure the usual one with n others; return the facts of the card."""
    trials = {scale: measure(pipeline, rows, classifier, n // 4, scale, seed=1) for scale in GUIDANCES}
    best = max(trials, key=lambda scale: sum(trials[scale].values()))
    facts = {f"guidance with the most right of {n // 4} trial prompts, eta {NOISE:g}": best, "guidance": USUAL, "eta": NOISE}
    for scale, eta in product((USUAL, 1.0), (1.0, 0.0)):
        for name, value in measure(pipeline, rows, classifier, n, scale, seed=2, eta=eta).items():
            facts[f"{setting_of(scale, eta)}: {name}, share of {n} prompts"] = value
    for eta in (1.0, 0.0):
        g = seeded(4)
        free = torch.cat([pipeline.generate(None, size, eta=eta, generator=g) for size in part_sizes(n)])
        report = classifier_report(classifier, free.clamp(-1, 1))
        facts[f"no prompt, eta {eta:g}: sure, share of {n}"] = round(report.confident, 4)
        facts[f"no prompt, eta {eta:g}: imbalance of digits"] = round(report.imbalance, 3)
    facts["imbalance of fair draws"] = round(report.imbalance_floor, 3)
    facts[f"{len(images)} test images: sure"] = round(classifier_report(classifier, images).confident, 4)
    for scale, eta in [*((scale, NOISE) for scale in sorted({1.0, USUAL, best})), (USUAL, 1 - NOISE)]:
        spread, error = relative_spread(pipeline, rows, images, classifier, scale, eta=eta)
        facts[f"spread within a caption over that of test images, {setting_of(scale, eta)}"] = f"{spread} +- {error}"
    return facts


def told_of_training(card):
    """Return a card without what `judge` measured; what was measured of a network before stays."""
    judged = {key for key in card if any(word in key for word in JUDGED) and not key.startswith("before ")}
    return {key: value for key, value in card.items() if key not in judged}


def measure_again(name, test, images, n):
    """Measure the pipeline that ships under a name and write it with the new figures on its card, which is returned."""
    pipeline = TextToImage.from_pretrained(PIPELINES / name)
    kept = told_of_training(pipeline.card)
    rows = attributes(pipeline.rule, images, test.labels)
    pipeline = replace(pipeline, card=kept | judge(pipeline, rows, images, load_classifier(name), n))
    pipeline.save_pretrained(PIPELINES / name, overwrite=True, half=True)
    return pipeline.card


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--hardware", help="what it runs on, in words")
    parser.add_argument("--root", default="data", help="folder with the data files")
    parser.add_argument("--work", default="runs/pipelines", help="folder of the runs")
    parser.add_argument("--prompts", type=int, default=1000, help="sentences to measure with")
    parser.add_argument("--measure-again", action="store_true", help="measure the pipeline that ships, without training")
    parser.add_argument("--no-ship", action="store_true", help="print the card, and write nothing into the package")
    args = parser.parse_args()
    if not args.hardware and not args.measure_again:
        parser.error("--hardware is needed: what it runs on, in words")
    recipe, out = RECIPES[args.name], Path(args.work, args.name)
    train, test = [load_dataset(args.name, root=args.root, split=split) for split in ("train", "test")]
    x, x_test = train.images(), test.images()
    if args.measure_again:
        print(json.dumps(measure_again(args.name, test, x_test, args.prompts), indent=1))
        return
    rule = fit_caption_rule(x, train.labels, with_size=args.name == "mnist")
    rows, rows_test = attributes(rule, x, train.labels), attributes(rule, x_test, test.labels)
    written = [write_captions(rows, template=k) for k in range(len(TEMPLATES))]
    captions = [tuple(dict.fromkeys(texts)) for texts in zip(*written, strict=True)]
    tokenizer = fit_tokenizer([text for texts in captions for text in texts], 12)
    card = {"name": f"text to image, {args.name}", "data": args.name, "grey levels": train.n_levels, "training images": len(x)}
    out.mkdir(parents=True, exist_ok=True)
    options = {"resume": True, "tokenizer": tokenizer, "prompts": [f"a {word}" for word in WORDS["digit"]], "card": card}
    trained = train_text((x, captions), out, recipe, **options, callback=Clock(out / "minutes.json"))
    parts = {"text_encoder": trained.text_encoder, "unet": trained.unet, "autoencoder": trained.autoencoder}
    pipeline = TextToImage(tokenizer, **parts, schedule=trained.schedule, rule=rule, card=card)
    right = zero_shot(clip_of(out, recipe, tokenizer, x), tokenizer, x_test, options["prompts"]) == test.labels
    card["CLIP zero-shot digit accuracy, test"] = round(right.double().mean().item(), 4)
    if pipeline.autoencoder is not None:
        restored = from_latents(pipeline.autoencoder, to_latents(pipeline.autoencoder, x_test))
        card["PSNR of the autoencoder, dB, test"] = round(psnr(x_test, restored).mean().item(), 2)
    card |= judge(pipeline, rows_test, x_test, load_classifier(args.name), args.prompts)
    config = recipe.unet
    card |= {"iterations": config.n_iterations, "epochs": round(config.n_iterations * config.batch_size / len(x), 1)}
    card |= {"batch size": config.batch_size, "learning rate": config.lr, "seed": config.seed}
    for stage, minutes in json.loads((out / "minutes.json").read_text()).items():
        card[f"CPU minutes of training, {stage}"] = round(minutes, 1)
    card |= {"hardware": args.hardware, "torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    if not args.no_ship:
        pipeline.save_pretrained(PIPELINES / args.name, overwrite=True, half=True)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
