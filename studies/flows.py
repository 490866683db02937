"""Measure what straight paths are worth on the digits: quality for each number of network calls, over five seeds.

Run `python studies/flows.py` (about twenty minutes on one core); chapter 15 reads ddpm_nb/measured/flows.json.
A number after it does so many seeds and stops; the next run goes on.
"""

import sys

import torch
from common import MEASURED, setting, write
from torch import nn

from ddpm_nb.data import load_images
from ddpm_nb.evaluation import (
    classifier_features,
    classifier_report,
    frechet_distance,
    load_classifier,
)
from ddpm_nb.files import read_json
from ddpm_nb.flows import (
    edm_denoiser,
    flow_matching_loss,
    logit_normal_times,
    sample_flow,
    sample_heun,
    straightness,
)
from ddpm_nb.gaussian import GaussianMixture, seeded, seeded_init
from ddpm_nb.sampling import sample_ddim, sample_ddpm, sample_dpm_solver
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, fit
from ddpm_nb.unet import UNet

SEEDS, CALLS, FEW = (0, 1, 2, 3, 4), (5, 10, 20, 50), (1, 2, 4)
ITERATIONS, BATCH, T, N, PAIRS = 800, 64, 1000, 500, 2000
PATH = MEASURED / "flows.json"


class PlaneVelocity(nn.Module):
    """Predict the velocity of points in the plane, as in chapter 15."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t):
        turns = torch.stack([t, (3 * t).sin(), (3 * t).cos(), (6 * t).sin()], 1)
        return self.net(torch.cat([x, turns], 1))


def learn(loss, seed, n_updates=1200):
    """Minimise loss(model, generator) in the plane."""
    with seeded_init(seed):
        model = PlaneVelocity()
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), seeded(3000 + seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    for _ in range(n_updates):
        optimizer.zero_grad()
        loss(model, generator).backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def energy_distance(x, y):
    """Estimate the energy distance of two sets of points, without bias."""
    own = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - own[0] - own[1])


def in_the_plane(seed):
    """Train a flow in the plane of chapter 15 and straighten it; return what it was and became."""
    means = torch.tensor([[-2.0, -0.4], [0.8, 1.0], [1.2, -1.1]])
    tall, slanted = [[0.06, 0.0], [0.0, 0.12]], [[0.16, 0.08], [0.08, 0.1]]
    covariances = torch.tensor([tall, slanted, [[0.05, -0.02], [-0.02, 0.1]]])
    plane = GaussianMixture(torch.tensor([0.15, 0.5, 0.35]), means, covariances)
    starts = torch.randn(8192, 2, generator=seeded(4000 + seed))

    def fresh(model, generator):
        x_0, t = plane.sample(256, generator=generator), logit_normal_times(256, generator=generator)
        return flow_matching_loss(model, x_0, t=t, generator=generator)

    def joined(model, generator):
        chosen = torch.randint(len(starts), (256,), generator=generator)
        return flow_matching_loss(model, ends[chosen], eps=starts[chosen], generator=generator)

    flow = learn(fresh, seed)
    ends = sample_flow(flow, starts.shape, n_steps=25, x_T=starts)
    straight = learn(joined, seed)
    data, noise = plane.sample(3000, generator=seeded(seed)), torch.randn(3000, 2, generator=seeded(5000 + seed))
    facts = {}
    for name, model in {"before": flow, "after": straight}.items():
        draw = lambda n, model=model: sample_flow(model, (3000, 2), n_steps=n, method="euler", x_T=noise)
        facts[name] = {str(n): energy_distance(draw(n), data) for n in FEW} | {"S": straightness(model, noise)}
    return facts


def timed(network):
    """Let a U-Net, which reads steps up to 1,000, be a velocity for times up to 1."""
    return lambda x, t: network(x, 1000 * t)


def trained(schedule, images, seed, loss=None, start=None):
    """Train a small U-Net, from its first weights or from those of `start`; return its average."""
    with seeded_init(seed):
        network = UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=8)
    if start is not None:
        network.load_state_dict(start.state_dict())
    config = TrainConfig(n_iterations=ITERATIONS, batch_size=BATCH, seed=seed, precision="float32")
    return fit(network, schedule, images, config, loss=loss, range_check=False, progress=False).ema


def flow_loss(seed):
    """Build the loss of flow matching with logit-normal times."""
    generator = seeded(1000 + seed)

    def loss(model, schedule, x_0, *, t, eps, reduction):
        times = logit_normal_times(len(x_0), generator=generator)
        return flow_matching_loss(timed(model), x_0, t=times, eps=eps, reduction=reduction)

    return loss


def pair_loss(model, schedule, x_0, *, t, eps, reduction):
    """Compute the loss of pairs, an image and its noise as two channels, with uniform times."""
    times = (t + 0.5) / schedule.n_steps
    image, noise = x_0.split(1, 1)
    return flow_matching_loss(timed(model), image, t=times, eps=noise, reduction=reduction)


def in_parts(sample, noise):
    """Call a sampler for 500 images at a time; return what is left after clipping."""
    with torch.inference_mode():
        return torch.cat([sample(part) for part in noise.split(500)]).clamp(-1, 1)


def samplers(ddpm, schedule, flow, straight, seed):
    """List for each sampler which numbers of calls it is measured at, and how it draws."""
    chain = lambda sampler: lambda x, n: sampler(ddpm, schedule, x.shape, n_steps=n, x_T=x, generator=seeded(seed))
    denoiser = edm_denoiser(ddpm, schedule, clip_x_0=True)
    heun = lambda network: lambda x, n: sample_flow(timed(network), x.shape, n_steps=(n + 1) // 2, x_T=x)
    euler = lambda network: lambda x, n: sample_flow(timed(network), x.shape, n_steps=n, method="euler", x_T=x)
    return {
        "DDPM": (CALLS, chain(sample_ddpm)),
        "DDIM": ((*FEW, *CALLS), chain(sample_ddim)),
        "2M": (CALLS, chain(sample_dpm_solver)),
        "EDM's Heun": (CALLS, lambda x, n: sample_heun(denoiser, x.shape, n_steps=(n + 1) // 2, x_T=x)),
        "flow, Euler": ((*FEW, *CALLS[:2]), euler(flow)),
        "flow, Heun": (CALLS, heun(flow)),
        "rectified, Euler": ((*FEW, *CALLS[:2]), euler(straight)),
        "rectified, Heun": (CALLS, heun(straight)),
    }


def as_text(images):
    """Write images as digits of sixteen greys, a string each."""
    levels = ((images.flatten(1) + 1) * 7.5).round().int().tolist()
    return ["".join(f"{level:x}" for level in image) for image in levels]


def one_seed(seed, schedule, digits, judge, results):
    """Train three networks, draw with all samplers, and append what is measured."""
    ddpm = trained(schedule, digits, seed)
    flow = trained(schedule, digits, seed, flow_loss(seed))
    starts = torch.randn(PAIRS, 1, 8, 8, generator=seeded(2000 + seed))
    ends = in_parts(lambda x: sample_flow(timed(flow), x.shape, n_steps=10, x_T=x), starts)
    straight = trained(schedule, torch.cat([ends, starts], 1), seed, pair_loss, start=flow)
    noise = torch.randn(N, 1, 8, 8, generator=seeded(seed))
    for name, network in {"before": flow, "after": straight}.items():
        results["straightness"][name].append(straightness(timed(network), noise[:300]))
    reference = classifier_features(judge, digits)
    for name, (counts, draw) in samplers(ddpm, schedule, flow, straight, seed).items():
        for n in counts:
            images = in_parts(lambda x, n=n, draw=draw: draw(x, n), noise)
            row = results["distance"].setdefault(name, {}).setdefault(str(n), [])
            row.append(frechet_distance(reference, classifier_features(judge, images)))
            sure = results["confident"].setdefault(name, {}).setdefault(str(n), [])
            sure.append(classifier_report(judge, images).confident)
            shown = ("Euler" in name and n in FEW) or (name, n) == ("flow, Heun", 50)
            if seed == SEEDS[0] and shown:
                results["pictures"].setdefault(name, {})[str(n)] = as_text(images[:10])


def main():
    """Train, measure and write."""
    torch.set_num_threads(1)
    schedule, digits = make_schedule("cosine", T), load_images("digits")
    judge = load_classifier("digits")
    results = {"seeds": list(SEEDS), "iterations": ITERATIONS, "batch": BATCH, "samples": N, "pairs": PAIRS}
    results |= setting("CPU, one thread")
    held_out = classifier_features(judge, load_images("digits", split="test"))
    results["floor"] = frechet_distance(classifier_features(judge, digits), held_out)
    results |= {"straightness": {"before": [], "after": []}, "distance": {}, "confident": {}, "pictures": {}}
    if PATH.exists() and (kept := read_json(PATH))["iterations"] == ITERATIONS:
        results = kept
    if "plane" not in results:
        results["plane"] = [in_the_plane(seed) for seed in SEEDS]
        print(results["plane"], flush=True)
    left = list(SEEDS)[len(results["distance"].get("DDPM", {}).get("50", [])) :]
    for seed in left[: int(sys.argv[1])] if len(sys.argv) > 1 else left:
        one_seed(seed, schedule, digits, judge, results)
        print(seed, results["straightness"], flush=True)
        print({name: {n: round(v[-1], 1) for n, v in rows.items()} for name, rows in results["distance"].items()}, flush=True)
        write(PATH, results)


if __name__ == "__main__":
    main()
