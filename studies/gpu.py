"""Do all that needs a GPU in one call of at most fifteen minutes, and write it as JSON for the book's page on performance.

Usage: python studies/gpu.py [--minutes 14] [--out ddpm_nb/measured/gpu.json] [--parts tests speed network notebooks]
       python studies/gpu.py --device cpu --tiny --out FILE      the same on a CPU with small numbers, to try the script

In this order, each within its share of the time: the tests marked `gpu`; training and sampling steps (float32, bfloat16; eager, compiled;
batches of 128 to 1024) with their share of the measured peak; the network of 35.7 million weights; one notebook after another, with the
cells that fail. What has been measured is written after each part and each notebook, so a cut run leaves what it has. --parts measures
some parts again; what the file holds of the others stays, if it is of the same machine and versions. The exit code is 1 if a test, a
measurement or a notebook of this call failed. What only ran out of time is no failure, but for the tests: nothing is known of them then.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, read_json, write
from torch.utils.flop_counter import FlopCounterMode

SHARES = {"tests": 0.2, "speed": 0.25, "network": 0.1, "notebooks": 0.45}  # of the minutes; what is left goes on to the next part
NETWORKS = {"tiny": ("digits", {"base_channels": 8, "norm_groups": 2}), "small": ("mnist", {}), "ddpm-cifar10": ("ddpm-cifar10", {})}


def run(command, seconds):
    """Run a command for so many seconds at most; return its code (None: cut) and the end of what it printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            told, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would hold the device
            told, _ = process.communicate()
            return None, told.splitlines()[-15:]
    return process.returncode, told.splitlines()[-15:]


def measure_tests(args, left, save):
    """Run the tests that need the device."""
    chosen = ["-k", "test_dropout_differs", "tests/test_processes.py"] if args.tiny else ["-m", "gpu", "tests"]
    code, lines = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], left())
    save({"code": code, "tail": lines})


def timed(call, device, n):
    """Return the median seconds of a call, after two that warm up."""
    seconds = []
    for i in range(n + 2):
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds += [time.perf_counter() - began] if i > 1 else []
    return statistics.median(seconds)


def steps_of(name, precision, compiled, batch, device, n):
    """Time a training step and a sampling step of one network; count their operations."""
    from ddpm_nb.fast import optimize_for_sampling
    from ddpm_nb.sampling import sample_ddim
    from ddpm_nb.schedules import make_schedule
    from ddpm_nb.training import TrainConfig, Trainer
    from ddpm_nb.unet import make_unet

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # or every row would tell the largest peak before it
    preset, options = NETWORKS[name]
    network, schedule = make_unet(preset, **options).to(device), make_schedule("linear", 1000).to(device)
    x_0 = torch.rand(batch, network.in_channels, network.image_size, network.image_size, device=device) * 2 - 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x_0[:2], torch.zeros(2, dtype=torch.long, device=device))
    flops = counter.get_total_flops() / 2 * batch
    row = {"network": name, "parameters": sum(p.numel() for p in network.parameters()), "precision": precision, "compiled": compiled, "batch": batch}
    config = TrainConfig(batch_size=batch, precision=precision)
    trainer = Trainer(torch.compile(network) if compiled else network, schedule, config)
    train = timed(lambda: trainer.step(x_0), device, n)
    model = optimize_for_sampling(network, getattr(torch, precision), compile=compiled)
    n_steps = 4
    sample = timed(lambda: sample_ddim(model, schedule, x_0.shape, n_steps=n_steps), device, n) / n_steps
    row |= {"train seconds": train, "train flops": 3 * flops, "sample seconds": sample, "sample flops": flops}
    return row | {"peak bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}


def settings_of(args, part):
    """List what is measured: (network, precision, compiled, batch)."""
    if args.tiny:
        return [("tiny", "float32", False, 4)]
    batches = (128, 256, 512, 1024) if part == "speed" else (128, 512)
    name = "small" if part == "speed" else "ddpm-cifar10"
    kinds = [("bfloat16", False), ("float32", False), ("bfloat16", True), ("float32", True)]  # what matters most comes first
    return [(name, precision, compiled, batch) for precision, compiled in kinds for batch in batches]


def measure_steps(args, left, save, part):
    """Measure the practical peak, then step after step while there is time; the share of the peak beside each."""
    device, rows = torch.device(args.device), []
    peaks = {}
    for precision in ("float32", "bfloat16"):
        code, lines = (0, ["{}"]) if args.tiny else run([sys.executable, str(ROOT / "studies" / "peak.py"), args.device, precision, "1"], left())
        peaks[precision] = json.loads(lines[-1]) if code == 0 else {"failed": lines}
    for name, precision, compiled, batch in settings_of(args, part):
        if left() < 15 and not args.tiny:
            rows.append({"cut": [name, precision, compiled, batch]})
            continue
        try:
            rows.append(steps_of(name, precision, compiled, batch, device, 2 if args.tiny else 10))
        except Exception as error:  # one setting that fails is a result, too
            rows.append({"failed": [name, precision, compiled, batch], "why": f"{type(error).__name__}: {error}"[:500]})
        save({"peaks": peaks, "rows": rows})
    save({"peaks": peaks, "rows": rows})


NOTEBOOK = """import json, re, sys, time
import nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
client = NotebookClient(nb, timeout=600, allow_errors=True, resources={"metadata": {"path": "nbs"}})
began, failed, slowest = time.perf_counter(), [], []
with client.setup_kernel():
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or re.match(r"(#\\|.*\\n)*#\\|\\s*eval:\\s*false", cell.source):
            continue
        at = time.perf_counter()
        client.execute_cell(cell, i)
        slowest.append((round(time.perf_counter() - at, 1), cell.id))
        wrong = [o for o in cell.outputs if o.output_type == "error"]
        if wrong and "raises-exception" not in cell.metadata.get("tags", []):
            failed.append({"cell": cell.id, "why": f"{wrong[0].ename}: {wrong[0].evalue}"[:300]})
print(json.dumps({"seconds": round(time.perf_counter() - began), "failed": failed, "slowest": sorted(slowest)[-3:]}))
"""


def measure_notebooks(args, left, save):
    """Run notebooks, those that put their networks on the device by the default of torch among them, and list the cells that fail."""
    paths = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    rows = {}
    for path in paths[:1] if args.tiny else paths:
        if left() < 20 and not args.tiny:
            rows[path.stem] = "not reached"
            continue
        code, lines = run([sys.executable, "-c", NOTEBOOK, str(path)], left())
        rows[path.stem] = json.loads(lines[-1]) if code == 0 else {"cut" if code is None else "died": lines[-3:]}
        save(rows)
    save(rows)


MEASURES = {
    "tests": measure_tests,
    "speed": lambda *args: measure_steps(*args, "speed"),
    "network": lambda *args: measure_steps(*args, "network"),
    "notebooks": measure_notebooks,
}


def machine(device):
    """Describe what it runs on."""
    facts = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts["memory bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def went_wrong(results):
    """Tell whether a test failed or was cut or none was found, a measurement failed, or a notebook or one of its cells."""
    found = [results["tests"]["code"] != 0] if "tests" in results else []
    for part in ("speed", "network"):
        if part in results:
            found += ["failed" in row for row in (*results[part]["rows"], *results[part]["peaks"].values())]
    rows = [row for row in results.get("notebooks", {}).values() if isinstance(row, dict)]
    return any(found) or any("died" in row or bool(row.get("failed")) for row in rows)


def of_this_machine(path, here):
    """Return what a file holds if it was measured on this machine with these versions, or only where."""
    found = read_json(path) if path.exists() else {}
    return found if found.get("machine") == here else {"machine": here}


def main():
    """Do one part after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14, help="for everything (default: 14)")
    parser.add_argument("--out", type=Path, default=ROOT / "ddpm_nb" / "measured" / "gpu.json")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small numbers, to try the script")
    args = parser.parse_args()
    began, until = time.monotonic(), 0.0
    results = of_this_machine(args.out, machine(args.device))
    for part in args.parts:
        results.pop(part, None)
    for part in args.parts:
        until += SHARES[part] / sum(SHARES[name] for name in args.parts) * 60 * args.minutes

        def left(until=until):
            return max(1.0, until - (time.monotonic() - began))

        def save(found, part=part):
            results[part] = found
            write(args.out, results)

        MEASURES[part](args, left, save)
        print(f"{part}: done after {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(went_wrong({part: results[part] for part in args.parts}))


if __name__ == "__main__":
    main()
