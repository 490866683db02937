"""Show notebooks without nbdev's ``#|`` lines: each line becomes the cell tag that MyST-NB understands."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

TAGS = {
    "default_exp": "remove-cell",
    "hide": "remove-cell",
    "export": "exported",  # styled by book.css
    "exporti": "exported",
    "exports": "exported",
    "echo: false": "remove-input",
    "output: false": "remove-output",
    "code-fold: true": "hide-input",
    "eval: false": "skip-execution",
}


def split_directives(source):
    """Split a cell's source into its leading directives and the code below them."""
    lines, directives = source.splitlines(keepends=True), []
    while lines and lines[0].startswith("#|"):
        directives.append(" ".join(lines.pop(0)[2:].split()))
    return directives, "".join(lines).lstrip("\n") if directives else source


def tags_of(directives):
    """List the tags that stand for some directives, each once."""
    tags = [TAGS.get(d) or TAGS.get(d.split(" ")[0]) for d in directives if d]
    return [tag for tag in dict.fromkeys(tags) if tag]


def package_files(root):
    """List what a notebook's outputs depend on besides the notebook: the package's modules and weights."""
    package = Path(root, "ddpm_nb")
    weights = (p for p in package.glob("weights/**/*") if p.is_file())
    return sorted([*package.rglob("[!_]*.py"), *weights])


@lru_cache
def package_stamp(root):
    """Hash the package, so that a change in it makes every cached output stale."""
    digest = hashlib.sha256()
    for path in package_files(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def translate(source, stamp):
    """Turn the directives of a notebook, given as JSON, into tags and stamp its code cells."""
    notebook = json.loads(source)
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
        content[0] = translate(content[0], package_stamp(app.srcdir))


def on_outdated(app, env, added, changed, removed):
    """Read every page again when the package has changed since the last build."""
    before, env.package_stamp = getattr(env, "package_stamp", None), package_stamp(app.srcdir)
    return [] if env.package_stamp == before else sorted(env.found_docs)


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("env-get-outdated", on_outdated)
    return {"version": "1", "env_version": 2, "parallel_read_safe": True}
