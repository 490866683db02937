"""Edit notebooks as text: percent scripts in _text/, which git ignores.

Usage: python tools/notebooks.py text|sync|run|execute [--force] [NAME ...]
       python tools/notebooks.py new NUMBER NAME
       python tools/notebooks.py export

text     write notebooks as scripts; refused where a script has edits that were not synced
sync     read scripts back, export the package and clean; refused where a notebook has changed since
         its script was written or is gone. Outputs of unchanged cells stay, those of changed ones go
run      sync, then run the notebooks and store their outputs
execute  run the notebooks as they are and store their outputs
new      begin a chapter: its notebook and its script
export   write the package: nbdev_export

NAME is the beginning of a notebook's name, such as 02; without one a command takes every notebook.
`--force` does what would be refused.
"""

import argparse
import ast
import hashlib
import json
import keyword
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import address
import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS, TEXT = ROOT / "nbs", ROOT / "_text"
SKIPPED = re.compile(r"(#\|.*\n)*#\|\s*eval:\s*false")  # cells that no run executes
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
# What a kernel runs before the first cell: an assertion that fails shows both sides.
EXPLAIN = f"""def _install():
    import sys
    sys.path.append({str(ROOT / "tools")!r})
    import asserts
    sys.path.pop()
    asserts.install(get_ipython())
_install()
del _install"""
EXERCISE = """## Exercises

```{exercise}
:label: ex-chapter-word

A question.
```

```{solution-start} ex-chapter-word
:class: dropdown
```

The answer."""


def slug(words):
    """Turn words into a short cell id."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:32].strip("-") or "cell"


def only_imports(source):
    """Say whether a cell imports and does nothing else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a line for the shell
        return False
    return bool(statements) and all(isinstance(s, ast.Import | ast.ImportFrom) for s in statements)


def defined_name(source):
    """Return the first public function or class that code defines, else any, else a constant."""
    if only_imports(source):
        return "imports"
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)", source, re.M)
    public = [name for name in names if not name.startswith("_")]
    constant = re.search(r"^(_?[A-Z][A-Z0-9_]+)\b.* = ", source, re.M)
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


def still_fits(cell):
    """Tell whether a word of a cell's id still occurs in what its author writes."""
    written = f"{cell.source} {json.dumps(cell.metadata)}".lower()
    return any(word in written for word in cell.id.lower().split("-") if len(word) > 2)


def name_cells(nb, known):
    """Name each cell that defines something after it, others after their words; no two alike.

    What a definition is called after belongs to it alone, whatever another cell was called before.
    """
    defined = {slug(own_name(cell)) for cell in nb.cells if own_name(cell)}
    others = [cell for cell in nb.cells if own_name(cell) is None]
    stay = [
        cell.get("id") in known and cell.id not in defined and still_fits(cell) for cell in others
    ]
    taken = {cell.id for cell, stays in zip(others, stay, strict=True) if stays}
    renamed = [cell for cell in nb.cells if own_name(cell)]  # definitions choose first
    renamed += [cell for cell, stays in zip(others, stay, strict=True) if not stays]
    for cell in renamed:
        name, n = readable_id(cell), 2
        cell.id = name
        while cell.id in taken:
            cell.id, n = f"{name}-{n}", n + 1
        taken.add(cell.id)


def as_text(path):
    """Write a notebook's text and code, without outputs, as a percent script."""
    nb = nbformat.read(path, as_version=4)
    wanted = {"cell_metadata_filter": "tags,mystnb,-all", "notebook_metadata_filter": "-all"}
    nb.metadata["jupytext"] = wanted
    return jupytext.writes(nb, "py:percent")


def digest(nb):
    """Hash what an author writes in a notebook, to see later whether it has changed."""
    kept = ("tags", "mystnb")
    cells = [
        [c.cell_type, c.source.strip(), {k: c.metadata[k] for k in kept if c.metadata.get(k)}]
        for c in nb.cells
    ]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def digests(path):
    """Hash a notebook and its script, which agree if the two are equal."""
    script = TEXT / f"{path.stem}.py"
    return digest(nbformat.read(path, as_version=4)), digest(
        jupytext.read(script, fmt="py:percent")
    )


def agreed():
    """Read the hash that each notebook and its script had when they last agreed."""
    record = TEXT / ".agreed.json"
    return json.loads(record.read_text()) if record.exists() else {}


def agree(path):
    """Note that a notebook and its script hold the same now."""
    entry = {path.stem: digests(path)[0]}
    (TEXT / ".agreed.json").write_text(json.dumps(agreed() | entry, indent=1))


def refusal(path, command):
    """Say why a command would lose an edit of a notebook or its script; None if it would not."""
    script = TEXT / f"{path.stem}.py"
    if not script.exists():
        return None
    if not path.exists():
        way_out = f"remove _text/{script.name}, or `sync --force {path.stem}` writes it again"
        known = command == "sync" and path.stem in agreed()
        return f"{path.name} is gone: {way_out}" if known else None
    notebook, written = digests(path)
    noted, name = agreed().get(path.stem), f"_text/{script.name}"
    if command == "text" and written not in (notebook, noted):
        way_out = f"sync {path.stem}` reads them back, `text --force {path.stem}` throws them away"
        return f"{name} has edits that are not in its notebook: `{way_out}"
    if command == "sync" and noted and notebook not in (noted, written):
        way_out = f"`text --force {path.stem}` writes it anew (keep a copy of what you edited)"
        other = f"`sync --force {path.stem}` undoes what has changed in the notebook"
        return f"{path.name} has changed since {name} was written: {way_out}, {other}"
    return None


def stop_if_refused(paths, command, force):
    """Leave the program, before anything is written, if a command would lose an edit."""
    reasons = [refusal(NBS / f"{path.stem}.ipynb", command) for path in paths]
    if any(reasons) and not force:
        sys.exit("\n".join(filter(None, reasons)))


def to_text(path):
    """Write a notebook as a percent script."""
    TEXT.mkdir(exist_ok=True)
    (TEXT / f"{path.stem}.py").write_text(as_text(path))
    agree(path)


def drop_outputs_of_changed_cells(nb, old):
    """Empty the outputs of cells whose code is not in the old notebook, which other code printed; return how many had some."""
    unchanged, n = {cell.source.strip() for cell in old.cells}, 0
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.source.strip() not in unchanged:
            n += bool(cell.get("outputs"))
            cell.outputs = []
    return n


def from_text(path):
    """Read a script back into its notebook, keeping the ids of known and the outputs of unchanged cells; return how many lost theirs."""
    nb, target, n_lost = jupytext.read(path, fmt="py:percent"), NBS / f"{path.stem}.ipynb", 0
    nb.nbformat, nb.nbformat_minor, known = 4, 5, set()
    if target.exists():
        old = nbformat.read(target, as_version=4)
        known = {cell.id for cell in old.cells}
        nb = combine_inputs_with_outputs(nb, old, fmt="py:percent")
        n_lost = drop_outputs_of_changed_cells(nb, old)
    nb.metadata = KERNEL
    name_cells(nb, known)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
    nbformat.write(nb, target)
    agree(target)
    return n_lost


def begin(number, name):
    """Begin a chapter: write a script with the cells that every chapter has, and its notebook."""
    well_formed = re.fullmatch(r"\d\d", number) and re.fullmatch(r"[a-z]\w*", name)
    if not well_formed or keyword.iskeyword(name):
        sys.exit("new takes a number of two digits and a name of a module: new 31 consistency")
    taken = [path.name for path in (*NBS.glob(f"{number}_*.ipynb"), *TEXT.glob(f"{number}_*.py"))]
    if taken:
        sys.exit(f"number {number} is taken by {taken[0]}")
    same = [*NBS.glob(f"[0-9]*_{name}.ipynb"), *TEXT.glob(f"[0-9]*_{name}.py")]
    same += (ROOT / address.settings(ROOT)["lib_name"]).glob(f"{name}.py")  # by any chapter
    if same:
        sys.exit(f"name {name} is taken by {same[0].relative_to(ROOT)}")
    cells = [
        f"# {name.replace('_', ' ').capitalize()}\n\n> What the module {name} holds, in one line.",
        address.install_cell(ROOT),
        f"#| default_exp {name}",
        "#| export\nimport torch",
        "## Summary",
        EXERCISE,
        "assert True",
        "```{solution-end}\n```",
        "## References",
    ]
    nb = nbformat.v4.new_notebook()
    for source in cells:
        code = source.startswith(("#|", "assert"))
        make = nbformat.v4.new_code_cell if code else nbformat.v4.new_markdown_cell
        nb.cells.append(make(source))
    nb.metadata = KERNEL
    name_cells(nb, set())
    path = NBS / f"{number}_{name}.ipynb"
    nbformat.write(nb, path)
    to_text(path)
    print(f"begun: _text/{path.stem}.py; list nbs/{path.stem} in _toc.yml, then sync {number}")


def execute(path, folder=NBS):
    """Run a notebook in a fresh kernel and store its outputs; stop at the first error."""
    nb, started = nbformat.read(path, as_version=4), time.perf_counter()
    client = NotebookClient(nb, timeout=1800, resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():
        client.kc.execute(EXPLAIN, silent=True, store_history=False)
        for i, cell in enumerate(nb.cells):
            if not SKIPPED.match(cell.source):
                client.execute_cell(cell, i)
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


def clean(path):
    """Remove execution counts and metadata from a notebook."""
    nbdev("nbdev_clean", "--fname", str(path))


def export():
    """Write the package from all notebooks."""
    nbdev("nbdev_export")


def main():
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["text", "sync", "run", "execute", "new", "export"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_intermixed_args()
    os.environ["TQDM_DISABLE"] = "1"  # stored outputs hold no progress bars
    os.environ.pop("JUPYTER_PATH", None)  # a kernel of another interpreter must not run these
    if args.command == "new":
        if len(args.names) != 2:
            parser.error("new takes a number and a name")
        begin(*args.names)
        return
    if args.command == "export":
        export()
        return
    if args.command == "text":
        paths = selected(NBS, ".ipynb", args.names)
        stop_if_refused(paths, "text", args.force)
        for path in paths:
            to_text(path)
        return
    if args.command in ("sync", "run"):
        paths = selected(TEXT, ".py", args.names)
        stop_if_refused(paths, "sync", args.force)
        for path in paths:
            n_lost = from_text(path)
            if n_lost and args.command == "sync":
                told = "changed cells have no outputs now, and what stands below them may be old"
                print(f"{path.stem}: {n_lost} {told}: run {path.stem[:2]}")
        export()
    paths = selected(NBS, ".ipynb", args.names)
    if args.command in ("sync", "run"):
        for path in paths:
            clean(path)
    if args.command in ("run", "execute"):
        for path in paths:
            execute(path)
            clean(path)


if __name__ == "__main__":
    main()
