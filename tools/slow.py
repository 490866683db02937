"""Run notebooks as on two cores without bfloat16, and print the slowest cells of each.

Usage: python tools/slow.py [NAME ...]
NAME is the beginning of a notebook's name, such as 09; all notebooks without. `make slow` calls this.

Emulated: two threads; oneDNN held to AVX-512 without bfloat16 or AMX; the package's own question for bfloat16 answered with no, so
that `precision="auto"` is float32. Not emulated: a slower clock, half the float32 speed of a core, less memory bandwidth, other work
beside it, the kernels of PyTorch and MKL that ask the processor themselves. Double the seconds for a processor of half the speed.
"""

import os
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import NBS, SKIPPED, selected

LONGEST_CELL = 120  # seconds that a slow machine may take
LONGEST_NOTEBOOK = 240
FIRST_PAGE = 120  # whoever opens the book runs 00_start first
SETTINGS = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
NO_BFLOAT16 = """import torch.cpu
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False"""


def run(path):
    """Run a notebook; return the seconds and the id of each code cell, the slowest first, and why it stopped, if it did."""
    nb, cells = nbformat.read(path, as_version=4), []
    client = NotebookClient(nb, timeout=1800, resources={"metadata": {"path": str(NBS)}})
    with client.setup_kernel():
        client.kc.execute(NO_BFLOAT16, silent=True, store_history=False)
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or SKIPPED.match(cell.source):
                continue
            began = time.perf_counter()
            try:
                client.execute_cell(cell, i)
            except CellExecutionError as error:
                return sorted(cells, reverse=True), f"cell {cell.id}: {error.ename}: {error.evalue}"
            cells.append((time.perf_counter() - began, cell.id))
    return sorted(cells, reverse=True), None


def line(name, cells, problem):
    """Say how long a notebook took, where, and whether that is too long."""
    total = sum(seconds for seconds, _ in cells)
    slowest = ", ".join(f"{cell} {seconds:.0f}" for seconds, cell in cells[:3])
    limit = FIRST_PAGE if name == "00_start" else LONGEST_NOTEBOOK
    too_long = total > limit or (cells and cells[0][0] > LONGEST_CELL)
    verdict = f"STOPPED at {problem}" if problem else "TOO LONG" if too_long else ""
    return f"{name:28} {total:5.0f} s   {slowest}   {verdict}".rstrip()


def main():
    """Run the notebooks and fail if one is too slow, or stops."""
    os.environ.update(SETTINGS)
    print(__doc__.strip().rpartition("\n\n")[2], end="\n\n", flush=True)  # what is emulated
    lines = []
    for path in selected(NBS, ".ipynb", sys.argv[1:]):
        lines.append(line(path.stem, *run(path)))
        print(lines[-1], flush=True)
    sys.exit(any("STOPPED" in one or "TOO LONG" in one for one in lines))


if __name__ == "__main__":
    main()
