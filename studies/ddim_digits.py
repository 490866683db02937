"""Compare DDIM with 10 and 50 network calls, with and without noise, by 2,000 samples of the digits' network.

Run `python studies/ddim_digits.py` (a few minutes on one core); chapter 11 reads ddpm_nb/measured/ddim_digits.json. Samples are drawn in
parts of 500 from one generator. So both settings of eta 0 begin with the same noise; with eta 1, which takes noise from that generator at
each step, only the first part does. The error of a difference is that of leaving out the same places on both sides.
"""

import argparse
from itertools import product

import torch
from common import MEASURED, checksums, setting, write

from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    classifier_features,
    distance_with_error,
    frechet_distance,
    gap_with_error,
    load_classifier,
)
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.sampling import sample_ddim

N, PART, SHIPPED = 2000, 500, ("weights/digits", "classifiers/digits")
PATH = MEASURED / "ddim_digits.json"
CLAIMS = {
    "eta 0: 50 steps beat 10": ((0.0, 10), (0.0, 50)),
    "eta 1: 50 steps beat 10": ((1.0, 10), (1.0, 50)),
    "10 steps: eta 0 beats eta 1": ((1.0, 10), (0.0, 10)),
    "50 steps: eta 0 beats eta 1": ((1.0, 50), (0.0, 50)),
}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, schedule = load_pretrained("digits")
    classifier, found, rows, gaps = load_classifier("digits"), {}, [], []
    reference = classifier_features(classifier, load_images("digits"))
    for eta, n_steps in product((0.0, 1.0), (10, 50)):
        g, options = seeded(0), {"n_steps": n_steps, "eta": eta}
        parts = [sample_ddim(model, schedule, (PART, 1, 8, 8), generator=g, **options) for _ in range(N // PART)]
        found[eta, n_steps] = classifier_features(classifier, torch.cat(parts))
        value, error = distance_with_error(frechet_distance, reference, found[eta, n_steps])
        rows.append({"eta": eta, "steps": n_steps, "frechet": value, "error": error})
        print(rows[-1], flush=True)
    for claim, (worse, better) in CLAIMS.items():
        gap, error = gap_with_error(frechet_distance, reference, found[worse], found[better])
        gaps.append({"claim": claim, "gap": gap, "error": error})
        print(gaps[-1], flush=True)
    facts = {"n": N, "rows": rows, "gaps": gaps, "sha256": checksums(*SHIPPED)}
    write(PATH, facts | setting("one thread of an x86-64 CPU"))


if __name__ == "__main__":
    main()
