"""Measure how long a newcomer waits for a first picture, step by step from a clone, and write it into the README.

Usage: python studies/first_picture_time.py --hardware "what it runs on" [--doors pip cpu make] [--torch WHEEL] [--uv-cache FOLDER]
       python studies/first_picture_time.py --readme      write the README's table anew, from what was measured

Each door begins with `git clone` into an empty folder and ends with a sheet of pictures by `ddpm-nb generate`. `pip` and `cpu` install the package
into a new environment, with an empty cache and without settings of pip; `cpu` installs another build of PyTorch first, from the file WHEEL.
`make` is `make setup`, with an empty cache as well, unless `--uv-cache` names a filled one: then nothing is downloaded but what that lacks.
A door that is measured again replaces what the file, studies/first_picture.json, has of it; each has its machine beside it.
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

FILE, README = ROOT / "studies" / "first_picture.json", ROOT / "README.md"
PLACE = re.compile(r"(<!-- first picture -->\n).*?(<!-- end -->\n)", re.S)
DOORS = {"pip": "`pip install .`", "cpu": "the same after PyTorch's CPU build", "make": "`make setup`"}
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


def told(value, unit):
    """Write a number with two digits."""
    return f"{float(f'{value / UNITS.get(unit, 1):.2g}'):g} {unit}"


def table(measured):
    """Write the README's table: of each door what is fetched and kept, and what a processor works before the first picture and for the second."""
    lines = ["| | download | on the disk | work before the first picture | for the next |", "|---|---|---|---|---|"]
    for key in (key for key in DOORS if key in measured):
        door = measured[key]
        loaded = door["clone bytes"] + sum(step["downloaded bytes"] for step in door["steps"])
        *before, again = (step["processor seconds"] for step in door["steps"])
        cells = [told(loaded, "GB") if door["cache"] == "empty" else "", told(door["disk bytes"], "GB"), told(sum(before), "s"), told(again, "s")]
        lines.append(f"| {' | '.join([DOORS[key], *cells])} |")
    where = dict.fromkeys(f"{door['hardware']}, Python {door['python']}, {door['day']}" for door in measured.values())
    return "\n".join([*lines, "", f"*From `git clone` on, in seconds of one core; what the network takes comes on top. {'; '.join(where)}.*", ""])


def with_table(text, measured):
    """Return the README's text with what was measured in its place."""
    if len(PLACE.findall(text)) != 1:
        raise ValueError("README.md needs one place for the table: a line <!-- first picture --> and below it a line <!-- end -->")
    return PLACE.sub(lambda found: found[1] + table(measured) + found[2], text)


def main():
    """Walk through the doors, or write the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", help="what it runs on, in words")
    parser.add_argument("--doors", nargs="+", choices=("pip", "cpu", "make"), default=["pip"])
    parser.add_argument("--torch", type=Path, help="a wheel of another build of PyTorch, for the door cpu")
    parser.add_argument("--uv-cache", type=Path, help="a filled cache for the door make, to download once")
    parser.add_argument("--python", default=sys.executable, help="the Python that makes the environments (default: this one)")
    parser.add_argument("--readme", action="store_true", help="write README.md from what was measured")
    args = parser.parse_args()
    measured = read_json(FILE) if FILE.exists() else {}
    if args.readme:
        if not measured:
            parser.error(f"nothing was measured yet: there is no {FILE.relative_to(ROOT)}")
        README.write_text(with_table(README.read_text(encoding="utf-8"), measured), encoding="utf-8")
        return
    if not args.hardware:
        parser.error("--hardware is needed: what it runs on, in words")
    if ("cpu" in args.doors) != bool(args.torch):
        parser.error("--torch is needed for the door cpu, and for no other")
    args.torch, args.uv_cache = (path and path.resolve() for path in (args.torch, args.uv_cache))  # commands run elsewhere
    about = {"hardware": args.hardware, "python": sys.version.split()[0], "day": date.today().isoformat()}
    for door in args.doors:
        measured[door] = about | walk_through(door, ROOT, args)
        write(FILE, measured)


if __name__ == "__main__":
    main()
