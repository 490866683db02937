"""Show notebooks without nbdev's ``#|`` lines: each line becomes the cell tag that MyST-NB understands.

Where Sphinx's setting `hide_solutions` is on, the solutions of the exercises are left out, with the code cells in them.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

TAGS = {
    "default_exp": "remove-cell",
    "hide": "hide-input",  # folded: what a page uses can be seen on it
    "export": "exported",  # styled by book.css
    "exporti": "exported",
    "exports": "exported",
    "code-fold: true": "hide-input",
    "eval: false": "skip-execution",
}
INSTALL = ["hide", "eval: false"]  # the cell that installs the package on Colab
STARTS, ENDS, CLOSING = "```{solution-start}", "```{solution-end}", "closing"


def split_directives(source):
    """Split a cell's source into its leading directives and the code below them."""
    lines, directives = source.splitlines(keepends=True), []
    while lines and lines[0].startswith("#|"):
        directives.append(" ".join(lines.pop(0)[2:].split()))
    return directives, "".join(lines).lstrip("\n") if directives else source


def tags_of(directives):
    """List the tags that stand for some directives, each once."""
    tags = [TAGS.get(d) or TAGS.get(d.split(" ")[0]) for d in directives if d]
    if directives == INSTALL:
        tags = [
            "remove-cell",
            "skip-execution",
        ]  # the book runs on this package: only elsewhere need it be installed
    return [tag for tag in dict.fromkeys(tags) if tag]


def package_files(root):
    """List what a notebook's outputs depend on besides the notebook: the package's modules, models and measured tables."""
    package = Path(root, "ddpm_nb")
    files = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p for p in files if p.name != "_modidx.py")  # nbdev's own index, which nothing reads


@lru_cache
def package_stamp(root):
    """Hash the package, so that a change in it makes every cached output stale."""
    digest = hashlib.sha256()
    for path in package_files(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def split_solutions(cells):
    """Yield each cell with the solutions cut from its text, and whether it is code inside a solution."""
    inside = False
    for cell in cells:
        if cell["cell_type"] != "markdown":
            yield cell, inside and cell["cell_type"] == "code"
            continue
        kept = []
        for line in "".join(cell["source"]).splitlines(keepends=True):
            if line.startswith(STARTS):
                inside = True
            elif line.startswith(ENDS):
                inside = CLOSING
            elif inside is CLOSING and line.strip() == "```":
                inside = False
            elif not inside:
                kept.append(line)
        yield cell | {"source": "".join(kept)}, False


def without_solutions(source):
    """Cut the solutions from a notebook that is given as JSON, for whoever downloads it."""
    notebook = json.loads(source)
    notebook["cells"] = [cell for cell, solves in split_solutions(notebook["cells"]) if not solves]
    return json.dumps(notebook, indent=1)


def translate(source, stamp, solutions=True):
    """Turn the directives of a notebook, given as JSON, into tags and stamp its code cells."""
    notebook = json.loads(source)
    if not solutions:  # their code runs all the same: later cells may use what it defines
        for i, (cell, solves) in enumerate(split_solutions(notebook["cells"])):
            notebook["cells"][i] = cell
            if solves:
                cell["metadata"].setdefault("tags", []).append("remove-cell")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        directives, cell["source"] = split_directives("".join(cell["source"]))
        tags = cell["metadata"].setdefault("tags", [])
        tags += [tag for tag in tags_of(directives) if tag not in tags]
        cell["metadata"]["package"] = stamp  # the execution cache compares metadata, too
    return json.dumps(notebook)


def on_source_read(app, docname, content):
    """Translate each notebook before MyST-NB reads it."""
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        content[0] = translate(
            content[0], package_stamp(app.srcdir), solutions=not app.config.hide_solutions
        )


def on_outdated(app, env, added, changed, removed):
    """Read every page again when the package has changed since the last build."""
    before, env.package_stamp = getattr(env, "package_stamp", None), package_stamp(app.srcdir)
    return [] if env.package_stamp == before else sorted(env.found_docs)


def on_build_finished(app, exception):
    """Leave the solutions out of the notebooks that the site offers for download, too."""
    if exception or app.builder.format != "html" or not app.config.hide_solutions:
        return
    for path in Path(app.outdir, "_sources").rglob("*.ipynb"):
        path.write_text(without_solutions(path.read_text(encoding="utf-8")), encoding="utf-8")


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("env-get-outdated", on_outdated)
    app.connect("build-finished", on_build_finished)
    return {"version": "1", "env_version": 3, "parallel_read_safe": True}
