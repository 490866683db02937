"""Fill the API page: one section a module, in the chapters' order, with each parameter's comment beside it."""

import configparser
import json
import re
from dataclasses import is_dataclass
from inspect import isclass
from pathlib import Path

from fastcore.docments import docments

PLACEHOLDER = "<!-- modules -->"
SECTIONS = ("Args:", "Returns:")  # which tools/docstrings.py writes
SECTION = """({label})=
## `{module}`

```{{eval-rst}}
.. automodule:: {module}
   :members:
```
"""


def exported_modules(root):
    """List the modules that the notebooks export, in the notebooks' order."""
    settings = configparser.ConfigParser()
    settings.read(Path(root, "settings.ini"))
    package, modules = settings["DEFAULT"]["lib_path"], []
    for path in sorted(Path(root, settings["DEFAULT"]["nbs_path"]).glob("[0-9]*.ipynb")):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
        modules += [
            f"{package}.{found[1]}"
            for cell in cells
            if (found := re.match(r"#\|\s*default_exp (\w+)", cell))
        ]
    modules = [m for m in modules if not m.endswith(".__init__")]  # names of the others
    return [m for m in modules if Path(root, *m.split(".")).with_suffix(".py").exists()]


def on_source_read(app, docname, content):
    """Write the modules' sections in place of the API page's placeholder."""
    if PLACEHOLDER in content[0]:
        sections = [
            SECTION.format(module=m, label=f"api-{m.split('.')[-1]}")
            for m in exported_modules(app.srcdir)
        ]
        content[0] = content[0].replace(PLACEHOLDER, "\n".join(sections))


def rst(text):
    """Turn Markdown's single backticks into the double ones of reStructuredText."""
    return re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", text)


def is_ours(cls):
    """Tell whether what makes an object of a class is written in the package, rather than in a library."""
    maker = next(base for base in cls.__mro__ if {"__init__", "__new__"} & set(vars(base)))
    return maker.__module__.split(".")[0] == "ddpm_nb"


def parameter_comments(obj, returned=False):
    """Map the parameters of a function, or of what makes an object of a class, to the comments beside them.

    The constructor may be inherited, written by a dataclass or patched on. `returned` adds the comment on the result.
    """
    if isclass(obj) and not is_ours(obj):
        return {}
    comments = docments(obj, args_kwargs=True)
    for base in filter(
        is_dataclass, obj.__mro__ if isclass(obj) else ()
    ):  # docments reads the fields of one class only
        comments = {name: text or docments(base).get(name) for name, text in comments.items()}
    return {
        name: text
        for name, text in comments.items()
        if name != "self" and (returned or name != "return")
    }


def on_docstring(app, what, name, obj, options, lines):
    """Append the comments of an object's parameters to its docstring as a field list, in place of the section for `help()`."""
    ends = [i for i, line in enumerate(lines) if line.strip() in SECTIONS]
    del lines[min(ends, default=len(lines)) :]
    lines[:] = [line if ":" in line[:1] else rst(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    comments = parameter_comments(obj, returned=True)
    fields = [(f":param {key}:", value) for key, value in comments.items() if key != "return"]
    fields.append((":returns:", comments.get("return")))
    written = "\n".join(lines)
    new = [
        f"{field} {rst(' '.join(text.split()))}"
        for field, text in fields
        if text and field not in written
    ]
    lines += ["", *new, ""] if new else []


def setup(app):
    """Register the extension with Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
    return {"version": "1", "env_version": 1, "parallel_read_safe": True}
