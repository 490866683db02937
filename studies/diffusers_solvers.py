"""Measure what the solvers of diffusers, and the noise levels of k-diffusion, make of the shipped digits network, whose schedule is a cosine.

Run `python studies/diffusers_solvers.py` (a few minutes on one core); chapter 28 reads ddpm_nb/measured/diffusers_solvers.json.
What is there already stays, if no setting has changed; a number after the command does so many samplers and stops, and the next run goes on.
"""

import argparse
from importlib.metadata import version
from itertools import pairwise

import diffusers
import torch
from common import MEASURED, checksums, kept, setting, write

from ddpm_nb.convert import unet_to_diffusers
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
from ddpm_nb.sampling import sample_ddim, sample_dpm_solver

SEEDS, N, CALLS, LAMBDA_MIN = (0, 1, 2, 3), 64, 20, -5.1
PATH = MEASURED / "diffusers_solvers.json"
BASE = "ours, DDIM"  # what the others are compared with
CLAMPED = {"thresholding": True, "sample_max_value": 1.0}  # of x_0_hat to [-1, 1]


def by_diffusers(kind, calls=CALLS, cut=False, **changed):
    """Return a sampler that walks as a scheduler of diffusers does, made from the converted one."""

    def draw(model, schedule, x_T):
        _, converted = unet_to_diffusers(model, schedule)
        options = dict(changed)
        if cut:  # without the last steps, in which nothing is left of the image
            n_kept = int((schedule.log_snr / 2 >= LAMBDA_MIN).sum())
            options |= {"trained_betas": schedule.exact_betas[:n_kept].tolist(), "num_train_timesteps": n_kept}
        scheduler = getattr(diffusers, kind).from_config(converted.config, **options)
        scheduler.set_timesteps(calls)
        x = x_T * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(model(scaled, t.expand(len(x))), t, x).prev_sample
        return x

    return draw


def by_sigmas(levels):
    """Return Euler's method over the noise levels of k-diffusion: all of the schedule's, or those of Karras et al. up to 80."""

    def draw(model, schedule, x_T):
        logs = (-schedule.log_snr.double() / 2).float()  # log sigma, rising
        if levels == "schedule":
            places = torch.linspace(len(logs) - 1, 0, CALLS)
            low = places.floor().long().clamp(max=len(logs) - 2)
            sigmas = torch.lerp(logs[low], logs[low + 1], places - low).exp()
        else:
            ends = torch.tensor([80.0, float(logs[0].exp())]) ** (1 / 7)
            sigmas = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, CALLS)) ** 7
        x = x_T * sigmas[0]
        for sigma, after in pairwise([*sigmas, torch.tensor(0.0)]):
            t = (logs[:, None] <= sigma.log()).sum(0).clamp(1, len(logs) - 1) - 1
            t = t + ((sigma.log() - logs[t]) / (logs[t + 1] - logs[t])).clamp(0, 1)  # between two steps
            eps_hat = model(x / (1 + sigma**2).sqrt(), t.expand(len(x)))
            x = x + (after - sigma) * eps_hat
        return x

    return draw


def ours(sample, **options):
    """Return one of our samplers."""
    return lambda model, schedule, x_T: sample(model, schedule, x_T.shape, x_T=x_T, n_steps=CALLS, **options)


SAMPLERS = {
    BASE: ours(sample_ddim),
    "ours, second order": ours(sample_dpm_solver),
    "ours, second order, not clipped": ours(sample_dpm_solver, clip_x_0=False),
    "DDIM": by_diffusers("DDIMScheduler"),
    "DPMSolverMultistep": by_diffusers("DPMSolverMultistepScheduler"),
    "DPMSolverMultistep, lambda_min_clipped": by_diffusers("DPMSolverMultistepScheduler", lambda_min_clipped=LAMBDA_MIN),
    "DPMSolverMultistep, thresholding": by_diffusers("DPMSolverMultistepScheduler", **CLAMPED),
    "UniPCMultistep": by_diffusers("UniPCMultistepScheduler"),
    "UniPCMultistep, thresholding": by_diffusers("UniPCMultistepScheduler", **CLAMPED),
    "EulerDiscrete": by_diffusers("EulerDiscreteScheduler"),
    "EulerDiscrete, cut, Karras": by_diffusers("EulerDiscreteScheduler", cut=True, use_karras_sigmas=True),
    "HeunDiscrete": by_diffusers("HeunDiscreteScheduler", CALLS // 2),
    "HeunDiscrete, cut, Karras": by_diffusers("HeunDiscreteScheduler", CALLS // 2, cut=True, use_karras_sigmas=True),
    "k-diffusion, get_sigmas": by_sigmas("schedule"),
    "k-diffusion, Karras up to 80": by_sigmas("karras"),
    "DEISMultistep": by_diffusers("DEISMultistepScheduler"),
    "DEISMultistep, thresholding": by_diffusers("DEISMultistepScheduler", **CLAMPED),
    "LMSDiscrete": by_diffusers("LMSDiscreteScheduler"),
    "LMSDiscrete, cut, Karras": by_diffusers("LMSDiscreteScheduler", cut=True, use_karras_sigmas=True),
    "KDPM2Discrete": by_diffusers("KDPM2DiscreteScheduler", CALLS // 2),
    "KDPM2Discrete, cut, Karras": by_diffusers("KDPM2DiscreteScheduler", CALLS // 2, cut=True, use_karras_sigmas=True),
}


def settings():
    """Return what all rows have in common."""
    facts = {"model": "digits", "schedule": "cosine", "lambda_min": LAMBDA_MIN, "seeds": SEEDS, "samples of a seed": N}
    facts |= {"calls of the network": CALLS, "compared with": BASE, "solvers of": f"diffusers {version('diffusers')}"}
    return facts | {"sha256": checksums("weights/digits", "classifiers/digits")}


def main():
    """Draw, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_samplers", nargs="?", type=int, help="samplers to do now; all without")
    n_samplers = parser.parse_args().n_samplers
    torch.set_num_threads(1)
    model, schedule = load_pretrained("digits")
    judge, x_T = load_classifier("digits"), torch.cat([torch.randn(N, 1, 8, 8, generator=seeded(seed)) for seed in SEEDS])
    reference = classifier_features(judge, load_images("digits"))
    facts = settings() | {"images": len(reference)} | setting("CPU, one thread", ("ddpm_nb", "torch", "diffusers"))
    rows, seen = kept(PATH, settings()).get("samplers", {}), {}
    left = [name for name in SAMPLERS if name not in rows and name != BASE]
    for name in [BASE, *left[:n_samplers]]:
        with torch.no_grad():
            seen[name] = pooled = classifier_features(judge, SAMPLERS[name](model, schedule, x_T).float())
        distance, error = distance_with_error(frechet_distance, reference, pooled)
        gap = gap_with_error(frechet_distance, reference, pooled, seen[BASE])
        each = [round(frechet_distance(reference, part), 2) for part in pooled.split(N)]
        rows[name] = {"distance": distance, "error": error, "gap": gap[0], "error of the gap": gap[1], "by seed": each}
        print(f"{name:40} {distance:8.2f} +- {error:.2f}, gap {gap[0]:.2f} +- {gap[1]:.2f}, {each}", flush=True)
        write(PATH, facts | {"samplers": rows})


if __name__ == "__main__":
    main()
