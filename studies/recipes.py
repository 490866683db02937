"""Measure what average, warm-up, decay and clipping are worth: held-out losses of short and longer runs, over four seeds.

The longer run without any of the last three is also judged by quarters of the timesteps: where its averaged weights still lose.

Run `python studies/recipes.py` (about fifteen minutes on one core); chapter 9 reads ddpm_nb/measured/recipes.json.
A run that was stopped goes on with the seed that is not finished; if a setting was changed, all seeds are trained anew.
"""

import argparse
import math

import torch
from common import MEASURED, kept, setting, write

from ddpm_nb.data import load_images
from ddpm_nb.elbo import simple_loss
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import EMA, TrainConfig, descend
from ddpm_nb.unet import make_unet

SEEDS, LENGTHS, BATCH, LR, EMA_DECAY = 4, (120, 360), 32, 3e-3, 0.98
NOTHING = {"warmup": 0, "lr_decay": "constant", "grad_clip": math.inf}
RECIPES = {"nothing": {}, "warm-up": {"warmup": 30}, "decay": {"lr_decay": "cosine"}, "clipping": {"grad_clip": 1.0}}
NETWORK, T = {"base_channels": 16, "norm_groups": 4}, 200
PATH = MEASURED / "recipes.json"


def settings():
    """Return what all rows have in common."""
    facts = {"batch": BATCH, "lr": LR, "ema_decay": EMA_DECAY, "network": NETWORK, "T": T, "schedule": "cosine"}
    return facts | {"recipes": {name: {k: str(v) for k, v in (NOTHING | recipe).items()} for name, recipe in RECIPES.items()}}


def learn(config, seed, schedule, images, score):
    """Train as chapter 9's `learn` does; return the scores of the last weights and of their average."""
    with seeded_init(seed):
        model = make_unet("digits", **NETWORK)
    g, ema = seeded(seed), EMA(model, EMA_DECAY)

    def loss_of(i):
        x_0 = images[torch.randint(len(images), (config.batch_size,), generator=g)]
        return simple_loss(model, schedule, x_0, generator=g)

    for _ in descend(model, config, loss_of):
        ema.update(model)
    return score(model.eval()), score(ema.model)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    schedule, images = make_schedule("cosine", T), load_images("digits")
    held_out = load_images("digits", split="test")
    t = torch.arange(len(held_out)) * schedule.n_steps // len(held_out)
    eps = torch.randn(held_out.shape, generator=seeded(0))

    @torch.no_grad()
    def score(model):
        return simple_loss(model, schedule, held_out, t=t, eps=eps).item()

    @torch.no_grad()
    def by_quarter(model):
        losses = simple_loss(model, schedule, held_out, t=t, eps=eps, reduction="none")
        return [losses[4 * t // schedule.n_steps == k].mean().item() for k in range(4)]

    facts = (kept(PATH, settings()) or {"scores": {}}) | settings() | setting("one thread of an x86-64 CPU")
    for seed in range(SEEDS):
        for length in LENGTHS:
            for name, recipe in RECIPES.items():
                rows = facts["scores"].setdefault(str(length), {}).setdefault(name, [])
                if len(rows) > seed:
                    continue
                config = TrainConfig(n_iterations=length, batch_size=BATCH, lr=LR, **NOTHING | recipe)
                rows.append([round(value, 5) for value in learn(config, seed, schedule, images, score)])
                write(PATH, facts)
                print(seed, length, name, rows[-1], flush=True)
        quarters = facts.setdefault("quarters of t", [])
        if len(quarters) == seed:
            config = TrainConfig(n_iterations=LENGTHS[-1], batch_size=BATCH, lr=LR, **NOTHING)
            _, losses = learn(config, seed, schedule, images, by_quarter)
            quarters.append([round(value, 5) for value in losses])
            write(PATH, facts)
            print(seed, "quarters of t", losses, flush=True)


if __name__ == "__main__":
    main()
