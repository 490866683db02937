"""What several studies share: writing results, and saying what they were measured with."""

import hashlib
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_nb.files import PACKAGE, WEIGHTS_FILE, read_json, replaced_file, write_json
from ddpm_nb.training import pick_precision

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PICTURES = ROOT / "ddpm_nb" / "measured", ROOT / "book" / "_static"


def write(path, facts):
    """Write JSON whole or not at all, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def checksums(*folders):
    """Return the SHA-256 of weights that ship, by their folders in the package, such as "weights/digits"."""
    return {folder: hashlib.sha256((PACKAGE / folder / WEIGHTS_FILE).read_bytes()).hexdigest() for folder in folders}


def as_stored(facts):
    """Return facts as they are read back from a file: tuples are lists."""
    return json.loads(json.dumps(facts))


def kept(path, settings):
    """Return what a file holds if it was measured with these settings; else say what differs, and return nothing."""
    if not path.exists():
        return {}
    stored, settings = read_json(path), as_stored(settings)
    different = sorted(name for name in settings if stored.get(name, "not there") != settings[name])
    if different:
        print(f"{path.name} is measured anew: its rows have another {', another '.join(different)}", flush=True)
    return {} if different else stored


def setting(hardware, packages=("ddpm_nb", "torch", "numpy")):
    """Describe what a study was measured with: the machine in words, versions, threads, what `precision="auto"` is here."""
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "hardware": hardware,
        "versions": versions,
        "threads of a process": torch.get_num_threads(),
        "auto precision": str(pick_precision("auto", torch.device("cpu"))).removeprefix("torch."),
    }


def processor():
    """Name the processor that the study runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def save_grey(path, sheet, scale=1):
    """Write bytes (H, W, 1) as a PNG of sixteen greys, half the size of one of 256."""
    levels = (sheet[..., 0].astype(np.float32) / 17).round().astype(np.uint8)
    picture = Image.fromarray(levels.repeat(scale, 0).repeat(scale, 1), "P")
    picture.putpalette([grey for level in range(16) for grey in [17 * level] * 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        picture.save(file, format="png", optimize=True, bits=4)


class Clock:
    """Add up the CPU time of each stage of `train_text` in a file, over interruptions."""

    def __init__(self, path):
        self.path, self.last = path, time.process_time()
        self.minutes = read_json(path) if path.exists() else {}

    def __call__(self, stage, trainer):
        """Note the time and the loss."""
        now = time.process_time()
        self.minutes[stage] = self.minutes.get(stage, 0.0) + (now - self.last) / 60
        self.last = now
        if trainer.n_steps % 50 == 0 or trainer.n_steps == trainer.config.n_iterations:
            write_json(self.path, self.minutes)
            loss = sum(trainer.history[-50:]) / max(1, len(trainer.history[-50:]))
            print(f"{stage} {trainer.n_steps}: loss {loss:.4f}, {self.minutes[stage]:.1f} CPU minutes", flush=True)
