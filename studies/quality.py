"""Train one library on the digits from a cold start and print, as JSON, how the Frechet distance of its samples falls with time.

Usage: python studies/quality.py LIBRARY {own,ours} DEVICE THREADS

With "own" every library trains with the batch size, optimiser, learning rate, objective, schedule and precision of its own training
script; with "ours" with those of `ddpm-nb train`. The network is the same or the nearest equal one. The clock starts with the process and
stops while samples are drawn and measured, with 50 steps of DDIM from the average that the library keeps.
"""

import json
import sys
import time
from contextlib import suppress

START = time.perf_counter()  # before anything is imported

import torch  # noqa: E402
from peers import LIBRARIES, Case  # noqa: E402

LIMIT, EVERY, N_SAMPLES, SAMPLE_STEPS = 120.0, 10.0, 256, 50  # seconds, seconds, images, steps
BATCH = {"diffusers": 16, "denoising-diffusion-pytorch": 16, "labml-nn": 64}  # of their scripts
N_ITERATIONS = {"diffusers": 100 * 1500 // 16}  # its 100 epochs, over which its learning rate falls


class Judge:
    """Measure samples from time to time, with the clock stopped."""

    def __init__(self, device):
        self.device, self.paused, self.curve, self.yardstick = device, 0.0, [], None

    @property
    def seconds(self):
        return time.perf_counter() - START - self.paused

    def wait(self):
        """Wait until a GPU has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def due(self):
        """Say whether the next measurement is due."""
        return self.seconds >= EVERY * (len(self.curve) + 1)

    def measure(self, draw, n_steps):
        """Draw samples and note their distance from the training images."""
        self.wait()
        began, seconds = time.perf_counter(), self.seconds
        if self.yardstick is None:
            from ddpm_nb.data import load_images
            from ddpm_nb.evaluation import classifier_features, load_classifier

            classifier = load_classifier("digits")
            features = lambda x: classifier_features(classifier, x.clamp(-1, 1).cpu())
            self.yardstick = features, features(load_images("digits"))
            self.floor = distance(self.yardstick[1], features(load_images("digits", split="test")))
        features, reference = self.yardstick
        with torch.random.fork_rng():
            drawing = time.perf_counter()
            samples = draw()
            self.wait()
            drawing = time.perf_counter() - drawing
        row = {"seconds": round(seconds + drawing, 1), "iterations": n_steps, "frechet": round(distance(reference, features(samples)), 2)}
        self.curve.append(row)
        print(row, file=sys.stderr, flush=True)
        self.paused += time.perf_counter() - began


def distance(a, b):
    """Return the Frechet distance of two sets of features."""
    from ddpm_nb.evaluation import frechet_distance

    return frechet_distance(a, b)


class Enough(Exception):
    """End a run at the limit of time."""


def train_ours(case, judge):
    """Train with the defaults of `ddpm-nb train --dataset digits`."""
    from ddpm_nb.cli import default_options
    from ddpm_nb.data import load_images
    from ddpm_nb.sampling import sample_ddim
    from ddpm_nb.schedules import make_schedule
    from ddpm_nb.training import fit
    from ddpm_nb.unet import make_unet

    def watch(trainer):
        if judge.due() or trainer.n_steps == trainer.config.n_iterations:
            judge.measure(lambda: sample_ddim(trainer.ema.model, schedule, (N_SAMPLES, 1, 8, 8), n_steps=SAMPLE_STEPS), trainer.n_steps)
        if judge.seconds > LIMIT:
            raise Enough

    options = default_options()
    schedule = make_schedule(options["schedule"], options["n_steps"])
    fit(make_unet("digits").to(case.device), schedule, load_images("digits"), callback=watch, progress=False)


def prepare_own(peer, name):
    """Set a peer as its own script does; return the batch size, a function for each step, and how to draw."""
    scheduled = lambda: None
    if name == "diffusers":
        from diffusers.optimization import get_scheduler

        peer.start()
        scheduled = get_scheduler("cosine", peer.adam, num_warmup_steps=500, num_training_steps=N_ITERATIONS[name]).step
    elif name == "denoising-diffusion-pytorch":
        peer.options = {}  # it predicts v under the sigmoid schedule
        peer.diffusion = peer.make(peer.network)
        peer.start()
    else:
        peer.start()
    return BATCH[name], scheduled


def prepare_ours(peer, name):
    """Give a peer our optimiser, batch size, precision and, where it keeps one, average; its objective stays the noise."""
    from ddpm_nb.training import TrainConfig, lr_factor

    config, count = TrainConfig(), [0]
    peer.start(lr=config.lr)
    peer.adam = torch.optim.AdamW(peer.adam.param_groups[0]["params"], config.lr, weight_decay=0.0, fused=True)
    if name == "diffusers":
        peer.ema.decay, peer.ema.inv_gamma, peer.ema.power, peer.ema.use_ema_warmup = config.ema_decay, 1.0, 1.0, True
    if name == "denoising-diffusion-pytorch":
        peer.ema.update_every = 1

    def scheduled():
        count[0] += 1
        for group in peer.adam.param_groups:
            group["lr"] = config.lr * lr_factor(config, min(count[0], config.n_iterations - 1))

    return config.batch_size, scheduled


def train_peer(case, judge, name, setting):
    """Train a peer until the limit."""
    from ddpm_nb.data import load_images, train_batches

    peer = LIBRARIES[name](case)
    batch, scheduled = (prepare_own if setting == "own" else prepare_ours)(peer, name)
    n_steps, batches = 0, train_batches(load_images("digits"), batch, device=case.device, seed=0)
    while True:
        peer.step(next(batches))
        scheduled()
        n_steps += 1
        if judge.due():
            judge.measure(lambda: peer.draw(N_SAMPLES, SAMPLE_STEPS), n_steps)
        if judge.seconds > LIMIT:
            raise Enough


def main():
    """Train, and print the curve."""
    name, setting, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    precision = "float32" if setting == "own" else "bfloat16"
    case, judge = Case("digits", 8, precision, torch.device(device)), Judge(device)
    with suppress(Enough):
        train_ours(case, judge) if name == "ddpm_nb" else train_peer(case, judge, name, setting)
    facts = {"library": name, "setting": setting, "limit": LIMIT, "n_samples": N_SAMPLES, "floor": round(judge.floor, 2)}
    print(json.dumps(facts | {"curve": judge.curve}))


if __name__ == "__main__":
    main()
