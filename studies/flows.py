"""Measure what straight paths are worth, in the plane and on the digits, with five small networks that are trained side by side.

Run `python studies/flows.py` (four minutes on one idle core); chapter 15 reads ddpm_nb/measured/flows.json.
`python studies/flows.py costs` measures only what a network call costs, and leaves the other figures as they are.
The networks have fully connected layers, so that five of each kind train in a minute; each has its own first weights and draws.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from common import MEASURED, checksums, processor, setting, write
from torch import nn

from ddpm_nb.data import load_images
from ddpm_nb.elbo import simple_loss
from ddpm_nb.embeddings import sinusoidal_embedding
from ddpm_nb.evaluation import classifier_features, frechet_distance, load_classifier
from ddpm_nb.files import read_json
from ddpm_nb.flows import (
    edm_denoiser,
    flow_matching_loss,
    logit_normal_times,
    sample_flow,
    sample_heun,
)
from ddpm_nb.gaussian import GaussianMixture, seeded, seeded_init
from ddpm_nb.sampling import sample_ddim, sample_ddpm, sample_dpm_solver
from ddpm_nb.schedules import make_schedule

SEEDS, CALLS, FEW = 5, (5, 10, 20, 50), (1, 2, 4)
ITERATIONS, BATCH, T, N, PAIRS = {"plane": 800, "digits": 1200}, 100, 1000, 600, 2000
TIMED, ROUNDS, PATH = 21, 20, MEASURED / "flows.json"


class Networks(nn.Module):
    """Five networks on d values, side by side: a batch is that of the first, then of the second, ..."""

    def __init__(self, d, width=128, depth=2):
        super().__init__()
        self.d = d
        sizes = {"enter": (d, width), "leave": (width, d)}
        for i in range(depth):
            sizes |= {f"time_{i}": (64, width), f"first_{i}": (width, width), f"second_{i}": (width, width)}
        weights = {name: torch.randn(SEEDS, *size) / math.sqrt(size[0]) for name, size in sizes.items()}
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in weights.items()})
        self.biases = nn.ParameterDict({name: nn.Parameter(torch.zeros(SEEDS, 1, size[1])) for name, size in sizes.items()})
        self.depth = depth

    def linear(self, name, x):
        """Apply a layer of each network to its own part; (SEEDS, B, in) -> (SEEDS, B, out)."""
        return torch.baddbmm(self.biases[name], x, self.weights[name])

    def forward(self, x, t):
        waves = sinusoidal_embedding(t, 64).view(SEEDS, -1, 64)
        h = self.linear("enter", x.reshape(SEEDS, -1, self.d))
        for i in range(self.depth):
            inner = self.linear(f"first_{i}", F.layer_norm(h, h.shape[-1:])) + self.linear(f"time_{i}", waves)
            h = h + self.linear(f"second_{i}", F.silu(inner))
        return self.linear("leave", h).view_as(x)


def timed(networks):
    """Let networks that read steps up to 1,000 be velocities for times up to 1."""
    return lambda x, t: networks(x, 1000 * t)


def learn(loss, d, n_iterations, start=None):
    """Minimise loss(networks), from first weights or from those of `start`; return the average of the last weights."""
    with seeded_init(0):
        networks = Networks(d)
    if start is not None:
        networks.load_state_dict(start.state_dict())
    average = Networks(d).requires_grad_(False)
    average.load_state_dict(networks.state_dict())
    optimizer = torch.optim.Adam(networks.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_iterations)
    for _ in range(n_iterations):
        optimizer.zero_grad()
        loss(networks).backward()
        optimizer.step()
        decay.step()
        torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 0.01)
    return average


def trained(draw, d, n_iterations, seed):
    """Train flows on data that `draw(n)` draws, let them join pairs, and train once more on these; return both."""
    generator = seeded(seed)

    def fresh(networks):
        x_0, t = draw(SEEDS * BATCH), logit_normal_times(SEEDS * BATCH, generator=generator)
        return flow_matching_loss(timed(networks), x_0, t=t, generator=generator)

    flow = learn(fresh, d, n_iterations)
    starts = torch.randn(SEEDS * PAIRS, *draw(1).shape[1:], generator=generator)
    ends = sample_flow(timed(flow), starts.shape, n_steps=12, x_T=starts)
    first = torch.arange(SEEDS)[:, None] * PAIRS  # each network keeps to its own pairs

    def joined(networks):
        chosen = (first + torch.randint(PAIRS, (SEEDS, BATCH), generator=generator)).flatten()
        return flow_matching_loss(timed(networks), ends[chosen], eps=starts[chosen], generator=generator)

    return flow, learn(joined, d, n_iterations, start=flow)


def straightness(networks, noise, n_steps=50):
    """Measure S of each network, as the chapter's `straightness` does of one."""
    x, speeds = noise, []
    for i in range(n_steps):
        speeds.append(timed(networks)(x, torch.full((len(x),), 1 - i / n_steps)))
        x = x - speeds[-1] / n_steps
    gaps = [(noise - x - v).flatten(1).square().sum(1).view(SEEDS, -1).mean(1) for v in speeds]
    return torch.stack(gaps).mean(0).tolist()


def energy_distance(x, y):
    """Estimate the energy distance of two sets of points, without bias."""
    own = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - own[0] - own[1])


def in_the_plane():
    """Train and straighten flows in the plane of the chapter; return S and distances from the data."""
    means = torch.tensor([[-2.0, -0.4], [0.8, 1.0], [1.2, -1.1]])
    tall, slanted = [[0.06, 0.0], [0.0, 0.12]], [[0.16, 0.08], [0.08, 0.1]]
    covariances = torch.tensor([tall, slanted, [[0.05, -0.02], [-0.02, 0.1]]])
    plane, generator = GaussianMixture(torch.tensor([0.15, 0.5, 0.35]), means, covariances), seeded(1)
    flow, straight = trained(lambda n: plane.sample(n, generator=generator), 2, ITERATIONS["plane"], 2)
    data, noise = plane.sample(2000, generator=seeded(3)), torch.randn(SEEDS * 2000, 2, generator=seeded(4))
    facts = {}
    for name, networks in {"before": flow, "after": straight}.items():
        facts[name] = {"S": straightness(networks, noise)}
        for n in FEW:
            x = sample_flow(timed(networks), noise.shape, n_steps=n, method="euler", x_T=noise)
            facts[name][str(n)] = [energy_distance(part, data) for part in x.split(2000)]
    return facts


def samplers(ddpm, schedule, flow, straight):
    """List for each sampler which numbers of calls it is measured at, and how it draws."""
    chain = lambda sampler: lambda x, n: sampler(ddpm, schedule, x.shape, n_steps=n, x_T=x, generator=seeded(5))
    denoiser = edm_denoiser(ddpm, schedule, clip_x_0=True)
    heun = lambda networks: lambda x, n: sample_flow(timed(networks), x.shape, n_steps=(n + 1) // 2, x_T=x)
    euler = lambda networks: lambda x, n: sample_flow(timed(networks), x.shape, n_steps=n, method="euler", x_T=x)
    return {
        "DDPM": (CALLS, chain(sample_ddpm)),
        "DDIM": (CALLS, chain(sample_ddim)),
        "2M": (CALLS, chain(sample_dpm_solver)),
        "EDM's Heun": (CALLS, lambda x, n: sample_heun(denoiser, x.shape, n_steps=(n + 1) // 2, x_T=x)),
        "flow, Euler": (FEW, euler(flow)),
        "flow, Heun": (CALLS, heun(flow)),
        "rectified, Euler": (FEW, euler(straight)),
        "rectified, Heun": (CALLS, heun(straight)),
    }


def as_text(images):
    """Write images as digits of sixteen greys, a string each."""
    levels = ((images.flatten(1) + 1) * 7.5).round().int().tolist()
    return ["".join(f"{level:x}" for level in image) for image in levels]


def on_digits():
    """Train all three kinds on the digits; return S, distances and a few pictures."""
    schedule, digits, judge = make_schedule("cosine", T), load_images("digits"), load_classifier("digits")
    generator = seeded(6)
    draw = lambda n: digits[torch.randint(len(digits), (n,), generator=generator)]
    loss = lambda networks: simple_loss(networks, schedule, draw(SEEDS * BATCH), generator=generator)
    ddpm = learn(loss, 64, ITERATIONS["digits"])
    flow, straight = trained(draw, 64, ITERATIONS["digits"], 7)
    noise = torch.randn(SEEDS * N, 1, 8, 8, generator=seeded(8))
    few = noise.view(SEEDS, N, 1, 8, 8)[:, :200].flatten(0, 1)
    reference = classifier_features(judge, digits)
    facts = {"straightness": {"before": straightness(flow, few), "after": straightness(straight, few)}}
    held_out = classifier_features(judge, load_images("digits", split="test"))
    facts |= {"floor": frechet_distance(reference, held_out), "distance": {}, "pictures": {}}
    for name, (counts, sample) in samplers(ddpm, schedule, flow, straight).items():
        facts["distance"][name] = {}
        for n in counts:
            images = sample(noise, n).clamp(-1, 1)
            parts = [classifier_features(judge, part) for part in images.split(N)]
            facts["distance"][name][str(n)] = [frechet_distance(reference, part) for part in parts]
            if "Euler" in name or (name, n) == ("flow, Heun", 50):
                facts["pictures"].setdefault(name, {})[str(n)] = as_text(images[:10])
        print(name, {n: [round(v, 1) for v in values] for n, values in facts["distance"][name].items()}, flush=True)
    return facts


def costs():
    """Measure what a network call costs each sampler, its own arithmetic included, as a share of a step of DDPM.

    All take turns in each round and are compared within it, in processor time, which other work does not stretch.
    """
    networks, noise = Networks(64).requires_grad_(False), torch.randn(SEEDS * BATCH, 1, 8, 8, generator=seeded(8))
    table = samplers(networks, make_schedule("cosine", T), networks, networks)
    names, rounds = [name for name, (counts, _) in table.items() if counts == CALLS], []
    for i in range(-1, ROUNDS):  # the first round warms up
        spent = {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begun = time.process_time()
            table[name][1](noise, TIMED)  # an odd number: Heun's method takes it exactly, too
            spent[name] = time.process_time() - begun
        rounds.append(spent)
    rounds = rounds[1:]
    shares = {name: [spent[name] / spent["DDPM"] for spent in rounds] for name in names}
    seconds = torch.tensor([spent["DDPM"] for spent in rounds]).median() / TIMED
    facts = {"processor": processor(), "calls": TIMED, "images": len(noise), "seconds of a call, DDPM": float(seconds)}
    return facts | {"rounds": shares}


def main():
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("costs",), help="measure only this; everything without")
    part = parser.parse_args().part
    torch.set_num_threads(1)
    if part == "costs":
        write(PATH, read_json(PATH) | {"costs": costs()})
        return
    results = {"trainings": SEEDS, "iterations": ITERATIONS, "batch": BATCH, "samples": N, "pairs": PAIRS}
    results |= setting("CPU, one thread") | {"sha256": checksums("classifiers/digits")}
    results["plane"] = in_the_plane()
    print(results["plane"], flush=True)
    write(PATH, results | on_digits() | {"costs": costs()})


if __name__ == "__main__":
    main()
