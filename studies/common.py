"""What several studies share: writing results, and saying what they were measured with."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from ddpm_nb.files import write_json

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PICTURES = ROOT / "ddpm_nb" / "measured", ROOT / "book" / "_static"


def write(path, facts):
    """Write JSON whole or not at all, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def setting(hardware, packages=("ddpm_nb", "torch", "numpy")):
    """Describe what a study was measured with: the machine in words, versions, threads."""
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"hardware": hardware, "versions": versions, "threads of a process": torch.get_num_threads()}
