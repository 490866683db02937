"""Measure on digits, over five seeds, what a learned variance is worth to the bound of short chains, and what steps
that are drawn by their losses are worth to a training on the bound (three seeds).

Run `python studies/variances.py` (about a quarter of an hour on one core); chapter 13 reads ddpm_nb/measured/variances.json.
A number after it does so many seeds of the first part and stops; the next run goes on. What is stored is not measured again,
unless a setting was changed: then all is.
"""

import argparse

import torch
from common import MEASURED, kept, setting, write

from ddpm_nb.bound import vlb_terms
from ddpm_nb.data import load_images
from ddpm_nb.elbo import drop_variance
from ddpm_nb.forward import q_sample
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.improved import LossHistory, hybrid_loss, respaced_model, step_bits
from ddpm_nb.sampling import respace, respaced_steps
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import UNet

SEEDS, STEPS, VARIANCES = (0, 1, 2, 3, 4), (10, 25, 50, 100, 1000), ("learned", "posterior", "beta")
ITERATIONS, BATCH, T = 800, 64, 1000
DRAWS, T_DRAWS, DRAWS_ITERATIONS, DRAWS_SEEDS = ("evenly", "by their losses"), 100, 500, (0, 1, 2)
NETWORK = {"base_channels": 16, "channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (4,), "norm_groups": 8}
N_IMAGES, N_LONG = 96, 32  # held-out images for a bound, and for one over all T steps
PATH = MEASURED / "variances.json"


def settings():
    """Return what all rows of the first part have in common, and what those of the second have."""
    facts = {"iterations": ITERATIONS, "batch": BATCH, "T": T, "schedule": "cosine", "network": NETWORK}
    facts |= {"steps": STEPS, "variances": VARIANCES}
    facts["images"] = {"bound": N_IMAGES, f"bound, T = {T}": N_LONG}
    return facts, {"T": T_DRAWS, "iterations": DRAWS_ITERATIONS, "images": N_IMAGES}


def hybrid(model, schedule, x_0, **options):
    """Compute the hybrid loss of digits, which have 17 grey levels."""
    return hybrid_loss(model, schedule, x_0, n_levels=17, **options)


def trained(schedule, images, seed, learns):
    """Train a small U-Net; return its average."""
    with seeded_init(seed):
        network = UNet(8, 1, **NETWORK, out_channels=2 if learns else None)
    config = TrainConfig(n_iterations=ITERATIONS, batch_size=BATCH, seed=seed, variance="learned" if learns else "fixed")
    return fit(network, schedule, images, config, loss=hybrid if learns else None).ema


def noise_error(model, schedule, images):
    """Measure the simple loss on images that were not trained on, with the same noise for all networks."""
    x_0 = images.repeat(10, 1, 1, 1)
    eps = torch.randn(x_0.shape, generator=seeded(0))
    t = torch.arange(len(x_0)) * schedule.n_steps // len(x_0)
    x_t = q_sample(schedule, x_0, t, eps)
    with torch.inference_mode():
        parts = zip(x_t.split(500), t.split(500), strict=True)
        eps_hat = torch.cat([drop_variance(x, model(x, i)) for x, i in parts])
    return float((eps_hat - eps).square().mean())


def bounds(model, schedule, images, n_steps):
    """Compute the bound with each variance on one set of outputs; return the parts in bits per dimension."""
    kept = respaced_steps(schedule.n_steps, n_steps)
    short, told, outputs = respace(schedule, kept), respaced_model(model, kept), []

    def first(x_t, i):
        outputs.append(told(x_t, i))
        return outputs[-1]

    facts = {}
    eps = torch.randn(n_steps, *images.shape, generator=seeded(1))
    for variance in VARIANCES:
        again = iter(outputs)
        model = first if variance == "learned" else lambda x_t, i, again=again: drop_variance(x_t, next(again))
        terms = vlb_terms(model, short, images, n_levels=17, variance=variance, eps=eps)
        facts[variance] = {"total": float(terms.total.mean()), "last step": float(terms.decoder.mean())}
    return facts


def bound_loss(seed, history=None):
    """Build the loss T L_{t-1} of the bound alone, in bits; with a history it draws t and weighs by it."""
    generator = seeded(seed)

    def loss(model, schedule, x_0, *, t, eps, reduction):
        weight = torch.ones(len(x_0))
        if history is not None:
            t, weight = history.draw(len(x_0), generator)
        x_t = q_sample(schedule, x_0, t, eps)
        bits = schedule.n_steps * step_bits(schedule, x_0, x_t, t, model(x_t, t), n_levels=17)
        if history is not None:
            history.update(t, bits.detach())
        return weight * bits

    return loss


def trained_on_bound(images, held_out, seed, draw):
    """Train a small U-Net on the bound alone; return its bound, and the variance of a batch's loss around its neighbours."""
    schedule = make_schedule("cosine", T_DRAWS)
    with seeded_init(seed):
        network = UNet(8, 1, **NETWORK, out_channels=2)
    config = TrainConfig(n_iterations=DRAWS_ITERATIONS, batch_size=BATCH, seed=seed, precision="float32", variance="learned")
    history = None if draw == "evenly" else LossHistory(T_DRAWS)
    result = fit(network, schedule, images, config, loss=bound_loss(seed, history), progress=False)
    later = result.losses[DRAWS_ITERATIONS // 2 :].double()
    terms = vlb_terms(result.ema, schedule, held_out[:N_IMAGES], n_levels=17, variance="learned", generator=seeded(1))
    return float(terms.total.mean()), float(later.diff().square().mean() / 2)


def draw_steps(results, digits, held_out):
    """Compare both ways to draw the steps, from the same first weights, and write after each seed."""
    _, facts = settings()
    if not facts.items() <= results.get("draws", {}).items():
        results["draws"] = facts | {"bound": {}, "loss variance": {}}
    found = results["draws"]
    for seed in DRAWS_SEEDS[len(found["bound"].get(DRAWS[-1], [])) :]:
        for draw in DRAWS:
            bound, scatter = trained_on_bound(digits, held_out, seed, draw)
            found["bound"].setdefault(draw, []).append(bound)
            found["loss variance"].setdefault(draw, []).append(scatter)
        print(seed, found, flush=True)
        write(PATH, results)


def main():
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_seeds", nargs="?", type=int, help="seeds of the first part to do now; all without")
    n_seeds = parser.parse_args().n_seeds
    torch.set_num_threads(1)
    schedule, digits, held_out = make_schedule("cosine", T), load_images("digits"), load_images("digits", split="test")
    results = kept(PATH, settings()[0]) or {"bound": {str(n): [] for n in STEPS}, "noise error": {"hybrid": [], "simple": []}}
    results |= settings()[0] | setting("CPU, one thread")
    for seed in list(SEEDS)[len(results["noise error"]["simple"]) :][:n_seeds]:
        network = trained(schedule, digits, seed, True)
        for n in STEPS:
            images = held_out[: N_LONG if n == T else N_IMAGES]
            results["bound"][str(n)].append(bounds(network, schedule, images, n))
        results["noise error"]["hybrid"].append(noise_error(network, schedule, held_out))
        plain = trained(schedule, digits, seed, False)
        results["noise error"]["simple"].append(noise_error(plain, schedule, held_out))
        results["seeds"] = list(SEEDS)[: len(results["noise error"]["simple"])]
        print(seed, results["noise error"], results["bound"][str(STEPS[0])][-1], flush=True)
        write(PATH, results)
    if len(results["noise error"]["simple"]) == len(SEEDS):
        draw_steps(results, digits, held_out)


if __name__ == "__main__":
    main()
