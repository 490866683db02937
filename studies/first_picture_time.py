"""Measure how long a newcomer waits for a first picture, step by step from a clone: no page shows it yet.

Usage: python studies/first_picture_time.py --hardware "what it runs on" [--doors pip cpu make] [--torch WHEEL] [--uv-cache FOLDER]

Each door begins with `git clone` into an empty folder and ends with a sheet of pictures by `ddpm-nb generate`. `pip` and `cpu` install the package
into a new environment, with an empty cache and without settings of pip; `cpu` installs another build of PyTorch first, from the file WHEEL.
`make` is `make setup`, with an empty cache as well, unless `--uv-cache` names a filled one: then nothing is downloaded but what that lacks.
A door that is measured again replaces what the file, runs/first_picture.json, has of it; each has its machine beside it.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from common import ROOT, read_json, write

FILE = ROOT / "runs" / "first_picture.json"
SETTINGS = ("PIP_", "UV_", "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
UNITS = {"bytes": 1, "kB": 1e3, "KiB": 2**10, "MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30}
GENERATE = ["generate", "a bold seven leaning right", "--out", "sevens.png"]


def environment(work, uv_cache=None):
    """Return the environment of a newcomer: no settings of the package managers but certificates, and caches that are empty."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(SETTINGS) or key.endswith("_CERT")}
    caches = {"PIP_CACHE_DIR": f"{work}/pip-cache", "UV_CACHE_DIR": str(uv_cache or f"{work}/uv-cache")}
    return kept | caches | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def downloaded(told):
    """Add up the bytes of the files that pip and uv say they download: to the tenth of a unit; uv names those above a megabyte alone."""
    found = re.findall(r"Downloading \S+ \(([\d.]+) ?(bytes|kB|KiB|MB|MiB|GB|GiB)\)", told)
    return round(sum(float(number) * UNITS[unit] for number, unit in found))


def size(folder):
    """Return the bytes of all files below a folder; a file with two names counts once."""
    files = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            told = path.stat()
            files[told.st_dev, told.st_ino] = told.st_size
    return sum(files.values())


def timed(name, command, cwd, env):
    """Run a command; return its seconds, those of processors, and the bytes that it says it downloads."""
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-3000:]}")
    row = {"step": name, "seconds": round(seconds, 1), "processor seconds": round(now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime, 1)}
    row["downloaded bytes"] = downloaded(done.stdout)
    print(row, flush=True)
    return row


def walk_through(door, source, args):
    """Go through one door in an empty folder; return its steps and what it takes on the disk."""
    with tempfile.TemporaryDirectory() as work:
        env, clone = environment(work, args.uv_cache if door == "make" else None), Path(work, "clone")
        home = clone / ".venv" if door == "make" else Path(work, "env")
        steps = [timed("git clone", ["git", "clone", "--quiet", f"file://{source}", str(clone)], work, env)]
        if door == "make":
            steps.append(timed("make setup", ["make", "setup", f"PYTHON={args.python}"], clone, env))
        else:
            pip = [str(home / "bin" / "python"), "-m", "pip", "install"]
            steps.append(timed("python -m venv", [args.python, "-m", "venv", str(home)], work, env))
            if door == "cpu":
                steps.append(timed("pip install torch torchvision", [*pip, str(args.torch), "torchvision"], work, env))
                steps[-1]["downloaded bytes"] += args.torch.stat().st_size
            steps.append(timed("pip install .", [*pip, "."], clone, env))
        generate = [str(home / "bin" / "ddpm-nb"), *GENERATE]
        steps += [timed(f"ddpm-nb generate, the {time_} time", generate, work, env) for time_ in ("first", "second")]
        assert Path(work, "sevens.png").stat().st_size > 1000
        return {
            "steps": steps,
            "clone bytes": size(clone / ".git"),
            "disk bytes": size(home),
            "cache": "filled" if door == "make" and args.uv_cache else "empty",
        }


def main():
    """Walk through the doors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="what it runs on, in words")
    parser.add_argument("--doors", nargs="+", choices=("pip", "cpu", "make"), default=["pip"])
    parser.add_argument("--torch", type=Path, help="a wheel of another build of PyTorch, for the door cpu")
    parser.add_argument("--uv-cache", type=Path, help="a filled cache for the door make, to download once")
    parser.add_argument("--python", default=sys.executable, help="the Python that makes the environments (default: this one)")
    args = parser.parse_args()
    if ("cpu" in args.doors) != bool(args.torch):
        parser.error("--torch is needed for the door cpu, and for no other")
    args.torch, args.uv_cache = (path and path.resolve() for path in (args.torch, args.uv_cache))  # commands run elsewhere
    measured = read_json(FILE) if FILE.exists() else {}
    about = {"hardware": args.hardware, "python": sys.version.split()[0], "day": date.today().isoformat()}
    for door in args.doors:
        measured[door] = about | walk_through(door, ROOT, args)
        write(FILE, measured)


if __name__ == "__main__":
    main()
