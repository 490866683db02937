"""Measure this package beside its peers, in one run, and write the results as JSON for the book's performance page.

Usage: make bench, or python studies/bench.py --out FILE [--rows train ...] [--device cuda]

Every variant (library, precision, setting) runs in a process of its own. The processes of one row are started together, get their turns
in an order that changes with each round, and wait without using the processor in between. A row that is measured is written at once;
--rows measures some rows again and leaves the others as they are, which must be of the same machine. Everything takes more than two
hours on two cores. The other packages are needed for the rows that compare with them; `make bench` brings them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ddpm_nb.files import replaced_file

HERE = Path(__file__).parent
PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch", "labml-nn", "accelerate")
LIBRARIES = ("ddpm_nb", "diffusers", "denoising-diffusion-pytorch", "labml-nn")
PRECISIONS = ("float32", "bfloat16")
NETWORKS = ("small", "big", "ddpm-cifar10")
SIZES, BATCHES = (8, 16, 32, 64), (1, 4, 16, 64, 256)
CHAINS = ((50, 16), (50, 64), (1000, 16), (1000, 64))  # steps, images
ALONE = ("peak", "data", "means")  # rows that need no other package


class Worker:
    """Hold the process of one variant."""

    def __init__(self, args, **given):
        self.label = {k: v for k, v in given.items() if k != "size"}
        self.given = {"device": args.device, "threads": args.threads, "size": 32} | given
        command = [sys.executable, str(HERE / "worker.py"), json.dumps(self.given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": args.log, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.facts = self.hear()

    def hear(self):
        """Wait for an answer."""
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.label} ended with code {self.process.wait()}; see {HERE / 'bench.log'}")
        return json.loads(line)

    def ask(self, **order):
        """Give an order and return the answer."""
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.hear()

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.wait()


def turns(n, i):
    """Return 0..n-1 from another start each second round, forwards and backwards in turn."""
    order = [(k + i // 2) % n for k in range(n)]
    return order[::-1] if i % 2 else order


def take_turns(asks, n_rounds, warmup):
    """Call every function once a round; return what each gave, without the rounds that warm up."""
    answers = [[] for _ in asks]
    for i in range(warmup + n_rounds):
        for k in turns(len(asks), i):
            answer = asks[k]()
            if i >= warmup:
                answers[k].append(answer)
    return answers


def spread(values):
    """Reduce the rounds to a median and quartiles, and keep them all."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "rounds": [round(v, 3) for v in values]}


def summary(answers):
    """Reduce the answers of one worker to milliseconds for an operation, and its peak of memory."""
    clocks = {clock: spread([1000 * a[clock] / a["n"] for a in answers]) for clock in ("wall", "cpu")}
    return clocks | {"peak_bytes": max(a["peak_bytes"] for a in answers)}


def measure(args, variants, order, *, n_rounds=None, warmup=1, **common):
    """Start the variants, let them take turns at an order, end them; return a row for each."""
    workers = []
    try:
        workers += [Worker(args, **common, **variant) for variant in variants]
        asks = [lambda worker=worker: worker.ask(**order) for worker in workers]
        answers = take_turns(asks, n_rounds or args.rounds, warmup)
        return [order | w.label | {"size": w.given["size"]} | w.facts | summary(a) for w, a in zip(workers, answers, strict=True)]
    finally:
        for worker in workers:
            worker.close()


def variants(precisions, **options):
    """List every library in every one of the precisions."""
    return [{"library": name, "precision": p} | options for p in precisions for name in LIBRARIES]


def measure_peak(args):
    """Measure the fastest 3x3 convolution, forward and backward, in each precision: the practical peak."""
    rows = []
    for precision in args.precisions:
        command = [sys.executable, str(HERE / "peak.py"), args.device, precision, str(args.threads)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=args.log, text=True).stdout
        rows.append({"precision": precision} | json.loads(found))
    return rows


def measure_train(args):
    """Time training steps: forward, loss, backward, optimiser, average; also with freed memory kept, as the command keeps it.

    Everyone's default, ours in bfloat16 and the others' in float32, has rounds of its own on a CPU.
    """
    on_cpu, rows = args.device == "cpu", []
    batches = {"small": 64, "big": 64} if on_cpu else {"small": 512, "big": 512, "ddpm-cifar10": 128}
    for network, batch in batches.items():
        if network not in args.networks:
            continue
        order = {"do": "train", "batch": batch, "n": 1 if on_cpu else 20}
        for setting in ({}, {"allocator": True}) if on_cpu else ({},):
            for precision in args.precisions:  # apart, so that few processes hold their memory at once
                rows += measure(args, variants([precision], **setting), order, network=network)
        if on_cpu and "bfloat16" in args.precisions:
            defaults = [v for v in variants(PRECISIONS, defaults=True) if (v["library"] == "ddpm_nb") == (v["precision"] == "bfloat16")]
            rows += measure(args, defaults, order, network=network)
    return rows


def measure_means(args):
    """Time our training step without each of its means and without all, and with the allocator's setting and what was tried and dropped.

    What a means saves is as little as what distinguishes two processes that do the same, so one process does without them in turn.
    """
    order, rows = {"do": "train", "batch": 64 if args.device == "cpu" else 512, "n": 1}, []
    means = ["attention by matmul", "joined weights", "joined projections", "fused optimiser"]
    settings = [[], *([m] for m in means), means]
    for precision in PRECISIONS:
        with closing(Worker(args, library="ddpm_nb", precision=precision, network="small")) as worker:
            asks = [partial(worker.ask, **order, without=without) for without in settings]
            found = [summary(answers) for answers in take_turns(asks, 3 * args.rounds, warmup=1)]
        rows += [order | worker.label | {"without": w, "wall": a["wall"], "cpu": a["cpu"]} for w, a in zip(settings, found, strict=True)]
    apart = [{"precision": p} for p in PRECISIONS]
    apart += [{"precision": p, "allocator": True} for p in PRECISIONS if args.device == "cpu"]
    apart += [{"precision": "bfloat16", "tried": t} for t in ("compiled network", "compiled norm and SiLU", "channels-last")]
    return rows + measure(args, [{"library": "ddpm_nb"} | row for row in apart], order, n_rounds=2 * args.rounds, network="small")


def sampling_variants(args):
    """List what samples: every library, and this one compiled."""
    compiled = [{"library": "ddpm_nb", "precision": p, "compiled": True} for p in args.precisions]
    return [*variants(args.precisions), *compiled]


def measure_sample(args):
    """Time single steps of the 1000-step chain."""
    rows = []
    for batch in (16, 64) if args.device == "cpu" else (16, 64, 256):
        n = 5 if batch == 16 else 2
        order = {"do": "chain", "batch": batch, "n_steps": 1000, "piece": n}
        rows += measure(args, sampling_variants(args), order, network="small")
    return rows


def measure_chain(args):
    """Time whole chains of 50 and of 1000 steps, cut into as many pieces as there are rounds, which the variants take in turn."""
    rows = []
    for n_steps, batch in CHAINS:
        if n_steps == 1000:  # what is fastest, and the default of diffusers
            chosen = [v for v in sampling_variants(args) if v["precision"] == "bfloat16" or v["library"] == "diffusers"]
        else:
            chosen = [v for v in variants(args.precisions) if v["library"] != "labml-nn"]
        order = {"do": "chain", "batch": batch, "n_steps": n_steps, "piece": n_steps // args.rounds}
        rows += measure(args, chosen, order, warmup=0, network="small")
    return rows


def measure_growth(args):
    """Time training steps and find their peak of memory against the size of the images and of the batch."""
    points = [(size, 16) for size in SIZES] + [(32, batch) for batch in BATCHES if batch != 16]
    rows = []
    for size, batch in points:
        order = {"do": "train", "batch": batch, "n": max(1, 64 // batch // (size // 8))}
        rows += measure(args, variants(["bfloat16"]), order, network="small", size=size)
    return rows


STARTS = {
    "torch": "import torch",
    "ddpm_nb": "import ddpm_nb",
    "ddpm_nb, network and samplers": "import ddpm_nb.unet, ddpm_nb.hub, ddpm_nb.sampling, ddpm_nb.schedules",
    "ddpm_nb, training": "import ddpm_nb.training",
    "ddpm_nb, load_pretrained and 16 samples": (
        "from ddpm_nb.hub import load_pretrained; from ddpm_nb.sampling import sample_ddim; "
        "sample_ddim(*load_pretrained('digits'), (16, 1, 8, 8))"
    ),
    "diffusers": "from diffusers import UNet2DModel, DDPMScheduler, DDIMScheduler",
    "denoising-diffusion-pytorch": "import denoising_diffusion_pytorch",
    "labml-nn": "import labml_nn.diffusion.ddpm, labml_nn.diffusion.ddpm.unet",
}


def measure_start(args):
    """Time new interpreters that import a library, up to a first sample; its compiled bytecode is kept, as Python does by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def start(code):
        began = time.perf_counter()
        command = [sys.executable, "-c", code]
        subprocess.run(command, check=True, stdout=args.log, stderr=args.log, env=environment)
        return time.perf_counter() - began

    asks = [lambda code=code: start(code) for code in STARTS.values()]
    found = take_turns(asks, max(7, args.rounds), warmup=1)
    return [{"what": what, "code": STARTS[what], "seconds": spread(v)} for what, v in zip(STARTS, found, strict=True)]


def measure_data(args):
    """Time epochs of shuffled batches of 128 digits: from memory, as here, and through a DataLoader, as the peers' scripts do."""
    from torch.utils.data import DataLoader

    from ddpm_nb.data import load_dataset, load_images, train_batches

    began = time.perf_counter()
    images, n_batches = load_images("digits"), 200
    loading = time.perf_counter() - began

    def from_memory():
        began, batches = time.perf_counter(), train_batches(images, 128, device="cpu", n_workers=0, seed=0)
        for _ in range(n_batches):
            next(batches)
        return 128 * n_batches / (time.perf_counter() - began)

    def from_loader():
        began, loader, n = time.perf_counter(), DataLoader(data, 128, shuffle=True, drop_last=True), 0
        while n < n_batches:
            for _ in loader:
                n += 1
        return 128 * n / (time.perf_counter() - began)

    data = load_dataset("digits")
    asks = {"ddpm_nb, in memory": from_memory, "DataLoader": from_loader}
    found = take_turns(list(asks.values()), args.rounds, warmup=1)
    rows = [{"what": what, "images_per_second": spread(v)} for what, v in zip(asks, found, strict=True)]
    return [{"what": "load_images('digits')", "seconds": round(loading, 3)}, *rows]


def measure_quality(args):
    """Find the seconds from a cold start until samples of the digits come within a Frechet distance; see quality.py."""
    rows = []
    for setting in ("own", "ours"):
        for library in LIBRARIES if setting == "own" else LIBRARIES[1:]:
            command = [sys.executable, str(HERE / "quality.py"), library, setting, args.device, str(args.threads)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=args.log, text=True).stdout
            rows.append(json.loads(found.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


ROWS = {
    "peak": measure_peak,
    "start": measure_start,
    "data": measure_data,
    "train": measure_train,
    "means": measure_means,
    "sample": measure_sample,
    "growth": measure_growth,
    "quality": measure_quality,
    "chain": measure_chain,
}


def machine(args):
    """Describe what the figures were measured on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    facts = {"processor": names[0], "cores": len(names), "bfloat16 arithmetic": bf16, "system": platform.platform(terse=True)}
    return facts | gpu


def versions():
    """Return the versions of the packages that are here."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_rows(names, facts, stored):
    """Refuse, before anything is measured, what would end in an error or in one table of two machines."""
    missing = [name for name in PACKAGES if name not in facts["versions"]]
    if missing and (needing := [name for name in names if name not in ALONE]):
        raise ValueError(f"--rows {' '.join(needing)} need {', '.join(missing)}: `make bench` brings them; without them: --rows {' '.join(ALONE)}")
    if "chain" in names and any(n_steps % facts["rounds"] for n_steps, _ in CHAINS):
        raise ValueError(f"--rounds must divide {' and '.join(map(str, sorted({n for n, _ in CHAINS})))}; got {facts['rounds']}")
    same = lambda facts: [facts["device"], facts["threads"], *(facts["machine"].get(key) for key in ("processor", "cores", "gpu"))]
    others = {name: same(part["facts"]) for name, part in stored.items() if name not in names}
    if other := [name for name, found in others.items() if found != same(facts)]:
        told = f"{', '.join(other)}: {others[other[0]]}, here: {same(facts)}"
        raise ValueError(f"--out holds rows of another machine ({told}); measure all rows, or write another file")


def parse():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure (default: everything)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of peak, training, sampling and chains (default: both)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="of training (default: all that suit the device)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the variants take turns (default: 5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of a process (default: torch's own)")
    return parser, parser.parse_args()


def main():
    """Measure row after row."""
    parser, args = parse()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    facts = {"device": args.device, "threads": args.threads, "rounds": args.rounds, "machine": machine(args), "versions": versions()}
    try:
        check_rows(args.rows, facts, results)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    with open(HERE / "bench.log", "w") as args.log:
        for name in (name for name in ROWS if name in args.rows):
            began = time.perf_counter()
            rows = ROWS[name](args)
            results[name] = {"facts": facts | {"minutes": round((time.perf_counter() - began) / 60, 1)}, "rows": rows}
            with replaced_file(args.out) as file:
                file.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {results[name]['facts']['minutes']} min", flush=True)


if __name__ == "__main__":
    main()
