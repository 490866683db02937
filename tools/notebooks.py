"""Edit notebooks as text: `text` writes percent scripts to _text/, `sync` reads them back, `run` also executes and cleans.

Usage: python tools/notebooks.py {text,sync,run,execute} [NAME ...]
NAME is the beginning of a notebook's name, such as 02; without one the command takes every notebook.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS, TEXT = ROOT / "nbs", ROOT / "_text"
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def slug(words):
    """Turn words into a short cell id."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:32].strip("-") or "cell"


def defined_name(source):
    """Return the first name that code defines: a public function or class, else any, else a constant; None without one."""
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)", source, re.M)
    public = [name for name in names if not name.startswith("_")]
    constant = re.search(r"^([A-Z][A-Z0-9_]+)\b.* = ", source, re.M)
    return (public or names or ([constant[1]] if constant else []) or [None])[0]


def own_name(cell):
    """Return what a cell is called after because it defines it; None where it defines nothing."""
    return defined_name(cell.source) if cell.cell_type == "code" else None


def readable_id(cell):
    """Derive a short cell id from the first definition, heading or words of a cell."""
    if name := own_name(cell):
        return slug(name)
    heading = re.search(r"^#+ (.+)", cell.source, re.M) if cell.cell_type == "markdown" else None
    return slug(
        heading[1]
        if heading
        else " ".join(w for w in cell.source.split("\n") if not w.startswith("#|"))
    )


def name_cells(nb, known):
    """Name each cell that defines something after it, and give new cells a readable id; all unique in their notebook."""
    stays = [cell.get("id") in known and own_name(cell) is None for cell in nb.cells]
    taken = {cell.id for cell, stay in zip(nb.cells, stays, strict=True) if stay}
    for cell, stay in zip(nb.cells, stays, strict=True):
        if stay:
            continue
        name, n = readable_id(cell), 2
        cell.id = name
        while cell.id in taken:
            cell.id, n = f"{name}-{n}", n + 1
        taken.add(cell.id)


def to_text(path):
    """Write a notebook as a percent script."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata["jupytext"] = {
        "cell_metadata_filter": "tags,mystnb,-all",
        "notebook_metadata_filter": "-all",
    }
    TEXT.mkdir(exist_ok=True)
    (TEXT / f"{path.stem}.py").write_text(jupytext.writes(nb, "py:percent"))


def from_text(path):
    """Read a percent script back into its notebook, keeping the outputs and ids of unchanged cells."""
    nb, target = jupytext.read(path, fmt="py:percent"), NBS / f"{path.stem}.ipynb"
    nb.nbformat, nb.nbformat_minor, known = 4, 5, set()
    if target.exists():
        old = nbformat.read(target, as_version=4)
        known = {cell.id for cell in old.cells}
        nb = combine_inputs_with_outputs(nb, old, fmt="py:percent")
    nb.metadata = KERNEL
    name_cells(nb, known)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
    nbformat.write(nb, target)


def execute(path):
    """Run a notebook in a fresh kernel and store its outputs; stop at the first error."""
    nb, started = nbformat.read(path, as_version=4), time.perf_counter()
    for cell in nb.cells:
        if re.match(r"(#\|.*\n)*#\|\s*eval:\s*false", cell.source):
            cell.metadata.setdefault("tags", []).append("skip-execution")
    client = NotebookClient(
        nb,
        timeout=1800,
        skip_cells_with_tag="skip-execution",
        resources={"metadata": {"path": str(NBS)}},
    )
    client.execute()
    for cell in nb.cells:
        if "skip-execution" in cell.metadata.get("tags", []):
            cell.metadata["tags"].remove("skip-execution")
            if not cell.metadata["tags"]:
                del cell.metadata["tags"]
    nbformat.write(nb, path)
    print(f"{path.name}: executed in {time.perf_counter() - started:.0f} s", flush=True)


def selected(folder, suffix, names):
    """List the files whose names begin with one of the given names, or all."""
    files = [
        p
        for p in sorted(folder.glob(f"[0-9]*{suffix}"))
        if not names or p.name.startswith(tuple(names))
    ]
    if not files:
        sys.exit(
            f"no {suffix} file in {folder.relative_to(ROOT)} begins with {' or '.join(names) or 'a number'}"
        )
    return files


def nbdev(command, *args):
    """Run one of nbdev's commands in the project."""
    subprocess.run([str(Path(sys.executable).parent / command), *args], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["text", "sync", "run", "execute"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    os.environ.pop(
        "JUPYTER_PATH", None
    )  # a kernel of another interpreter must not run these notebooks
    if args.command == "text":
        for path in selected(NBS, ".ipynb", args.names):
            to_text(path)
        return
    if args.command in ("sync", "run"):
        for path in selected(TEXT, ".py", args.names):
            from_text(path)
        nbdev("nbdev_export")
    paths = selected(NBS, ".ipynb", args.names)
    for path in paths if args.command in ("run", "execute") else []:
        execute(path)
    for path in paths:
        nbdev("nbdev_clean", "--fname", str(path))


if __name__ == "__main__":
    main()
