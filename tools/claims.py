"""Write the table of book/claims.md: what the book compares, over how many trainings, by how much, and whether that is decided.

Every figure is read from ddpm_nb/measured, where the studies put them. A difference is positive where the claim is right; its error is
that of the difference, over trainings that share a seed, or over the samples of one network.

Usage: python tools/claims.py            print the table
       python tools/claims.py --write    put it into the page
"""

import argparse
import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "claims.md"
MARKS = re.compile(r"(?<=<!-- claims -->\n).*?(?=<!-- end -->)", re.S)
WORDS = {"agrees": "yes", "DISAGREES": "no, the other way", "undecided": "undecided"}
CHAPTERS = {int(path.name[:2]): path.name for path in sorted((ROOT / "nbs").glob("[0-3]*.ipynb"))}


def read(name):
    """Read the figures of a study."""
    return json.loads((ROOT / "ddpm_nb" / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def over_seeds(worse, better):
    """Compare trainings that share a seed: (how many, mean difference, its standard error)."""
    gaps = [a - b for a, b in zip(worse, better, strict=True)]
    return len(gaps), statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def recipes():
    """Chapter 9: what to add to plain Adam; the error of the noise."""
    scores = read("recipes")["scores"]
    for length, rows in scores.items():
        last = {name: [pair[0] for pair in pairs] for name, pairs in rows.items()}
        for name in ("warm-up", "decay", "clipping"):
            yield f"{length} iterations: {name} lowers the loss", 9, "", *over_seeds(last["nothing"], last[name])
        average = [pair[1] for pair in rows["nothing"]]
        yield f"{length} iterations: averaged weights lower the loss", 9, "", *over_seeds(last["nothing"], average)


def steps_and_noise():
    """Chapter 11: few steps and eta, with one network."""
    study = read("ddim_digits")
    for row in study["gaps"]:
        yield f"Fréchet distance, {row['claim']}", 11, study["n"], 1, row["gap"], row["error"]


def objectives():
    """Chapter 12: what to predict, and how to weight it."""
    rows = read("objectives")["rows"]
    cosine = "eps, L_simple, cosine"
    pairs = [("samples", "frechet", *pair) for pair in (("eps, L", "eps, L_simple"), ("mu, L", "eps, L_simple"), ("mu, L_simple", "mu, L"))]
    pairs += [("bound", "bits/dim", "eps, L_simple", "eps, L"), ("bound", "bits/dim", "eps, L_simple", cosine), ("samples", "frechet", "eps, L_simple", cosine)]
    for part, figure, worse, better in pairs:
        one, other = ([row[part][figure] for row in rows[name]] for name in (worse, better))
        kind = "Fréchet distance" if part == "samples" else "bound"
        yield f"{kind}, {better} beats {worse}", 12, rows[worse][0][part]["n"], *over_seeds(one, other)


def epochs():
    """Chapter 12: the one training of the MNIST model, judged as it went."""
    for before, after in pairwise(read("mnist_epochs")["rows"]):
        words = f"MNIST, Fréchet distance: {after['epochs']:.0f} epochs beat {before['epochs']:.0f}"
        error = math.hypot(before["frechet error"], after["frechet error"])
        yield words, 12, after["n"], 1, before["frechet"] - after["frechet"], error


def variances():
    """Chapter 13: the learned variance of the steps."""
    study = read("variances")
    for steps, rows in study["bound"].items():
        n = study["images"].get(f"bound, T = {steps}", study["images"]["bound"])
        for name, symbol in (("beta", r"$\beta$"), ("posterior", r"$\tilde\beta$")):
            one, other = ([row[kind]["total"] for row in rows] for kind in (name, "learned"))
            yield f"bound, {steps} steps: learned variances beat {symbol}", 13, n, *over_seeds(one, other)
    errors = study["noise error"]
    yield "error of the noise: learning the variances costs some", 13, "", *over_seeds(errors["hybrid"], errors["simple"])
    draws = study["draws"]
    for figure, claim in (("loss variance", "the loss of a batch scatters less"), ("bound", "the bound is lower")):
        one, other = (draws[figure][how] for how in ("evenly", "by their losses"))
        n = draws["images"] if figure == "bound" else ""
        yield f"trained on the bound, steps drawn by their losses: {claim}", 13, n, *over_seeds(one, other)


def flows():
    """Chapter 15: straight paths."""
    study = read("flows")
    distance, n = study["distance"], study["samples"]
    yield "paths are straighter after reflow", 15, "", *over_seeds(study["straightness"]["before"], study["straightness"]["after"])
    yield "Fréchet distance, 1 call: reflow helps", 15, n, *over_seeds(distance["flow, Euler"]["1"], distance["rectified, Euler"]["1"])
    for calls in ("20", "50"):
        yield f"Fréchet distance, {calls} calls: reflow costs some", 15, n, *over_seeds(distance["rectified, Heun"][calls], distance["flow, Heun"][calls])
    for calls in ("5", "10", "20", "50"):
        yield f"Fréchet distance, {calls} calls: the flow beats DPM-Solver++ 2M", 15, n, *over_seeds(distance["2M"][calls], distance["flow, Heun"][calls])


def relatives():
    """Chapters 16 and 17, of a VAE's bound and of a GAN's balance."""
    study = read("relatives")
    of = {name: [row[name] for row in study["bounds"]] for name in study["bounds"][0]}
    yield "bound: the VAE beats DDPM", 16, "", *over_seeds(of["DDPM"], of["VAE"])
    yield "bound: DDPM, stopped early, beats the VAE", 16, "", *over_seeds(of["VAE"], of["DDPM, stopped"])
    found = {name: [row["frechet"] for row in rows] for name, rows in study["balance"].items()}
    for name, words in (("10 : 1", "ten steps of the generator for one"), ("minimax", "the minimax loss"), ("no penalty", "no penalty")):
        yield f"GAN, Fréchet distance: {words} is worse", 17, study["samples"], *over_seeds(found[name], found["1 : 1"])


def classes():
    """Chapter 20: guidance on a class, over trainings on the digits, and in the one training on MNIST."""
    for name, words in (("digits", "digits"), ("mnist", "MNIST")):
        study = read("classes")[name]
        plain, pushed = (study["scales"][scale] for scale in ("1.0", "2.0"))
        n = 10 * study["pictures of a class"]
        for figure, claim in (("right", "more are right"), ("diversity", "less diversity")):
            lower, higher = (plain, pushed) if figure == "right" else (pushed, plain)
            gaps = over_seeds([row[figure] for row in higher], [row[figure] for row in lower])
            n_trainings = study.get("trainings", 1)  # of MNIST the error is that of four draws
            yield f"a class, {words}: guidance 2 against 1, {claim}", 20, n * len(plain) // n_trainings, n_trainings, *gaps[1:]


def sentences():
    """Chapter 22: guidance, and noise in the steps, by what stands on the card of the one pipeline."""
    card, n = json.loads((ROOT / "ddpm_nb" / "pipelines" / "mnist" / "config.json").read_text(encoding="utf-8"))["card"], 1000
    settings = (
        ("with noise in the steps, guidance 2 beats 1", "guidance 1, eta 1: ", "guidance 2, eta 1: "),
        ("at guidance 1, noise in the steps helps", "guidance 1, eta 0: ", "guidance 1, eta 1: "),
        ("at guidance 2, noise in the steps helps", "guidance 2, eta 0: ", "guidance 2, eta 1: "),
    )
    for words, worse, better in settings:
        for word in ("digit", "weight", "slant", "size"):
            low, high = (card[f"{start}{word} right, share of {n} prompts"] for start in (worse, better))
            error = math.sqrt((low * (1 - low) + high * (1 - high)) / n)
            yield f"sentences on MNIST, {word} right: {words}", 22, n, 1, high - low, error


def shapes():
    """Chapter 29: combinations from training, and held-out ones, by one pipeline; the error is that over the scenes."""
    seen, held_out = (read("shapes")[name] for name in ("seen", "held out"))
    for what in ("colours", "shapes", "relation", "all three"):
        error = math.hypot(seen[f"{what}, standard error"], held_out[f"{what}, standard error"])
        yield f"shapes, {what} right: combinations from training are easier", 29, seen["n"], 1, seen[what] - held_out[what], error


def precision():
    """Chapter 27: bfloat16."""
    study = read("bfloat16")
    one, other = ([row[name]["bits/dim"] for row in study["rows"]] for name in ("bfloat16", "float32"))
    yield "bound: bfloat16 costs some", 27, study["n_held_out"], *over_seeds(one, other)
    one, other = ([row[name]["frechet"][0] for row in study["rows"]] for name in ("bfloat16", "float32"))
    yield "Fréchet distance: bfloat16 costs some", 27, study["n_samples"], *over_seeds(one, other)


def solvers():
    """Chapter 28: other people's solvers on a cosine schedule."""
    study = read("diffusers_solvers")
    n = len(study["seeds"]) * study["samples of a seed"]
    for name, row in study["samplers"].items():
        other = name.replace("ours, ", "our solver of ") if name.startswith("ours") else name if "k-diff" in name else f"diffusers' {name}"
        if row["error of the gap"]:
            yield f"Fréchet distance: our DDIM beats {other}", 28, n, 1, row["gap"], row["error of the gap"]


def rows():
    """Yield every claim: (words, chapter, samples or images, trainings, difference, error)."""
    for study in (recipes, steps_and_noise, objectives, epochs, variances, flows, relatives, classes, sentences, precision, solvers, shapes):
        yield from study()


def table():
    """Write the claims as a table."""
    from ddpm_nb.evaluation import verdict

    lines = ["| claim | chapter | trainings | images | difference | holds |", "|---|---|---|---|---|---|"]
    for words, chapter, n, trainings, gap, error in rows():
        digits = max(0, 1 - math.floor(math.log10(error)))
        told = f"{gap:.{digits}f} ± {error:.{digits}f}"
        link = f"[{chapter}](../nbs/{CHAPTERS[chapter]})"
        holds = WORDS[verdict(gap, error, trainings if trainings > 1 else None)]
        lines.append(f"| {words} | {link} | {trainings} | {n} | {told} | {holds} |")
    return "\n".join(lines)


def main():
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(MARKS.sub(lambda _: table() + "\n", PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
