"""The rules that notebooks and package keep about themselves, as lists of offenders in words.

Usage: python tools/rules.py [NAME ...]
NAME is the beginning of a notebook's name, such as 07; without one all notebooks, the package and the pages are looked at.
tests/test_project.py asserts that each list is empty.
"""

import argparse
import ast
import builtins
import importlib
import inspect
import json
import re
import symtable
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "book" / "_ext"))

from docments_autodoc import parameter_comments  # noqa: E402
from notebooks import defined_name, slug  # noqa: E402

PACKAGE = "ddpm_nb"
FREE = {
    "checks",
    "plots",
    "files",
    "progress",
    "precision",
}  # every chapter may use them, and they use nothing but each other
EARLY = {
    ("data", "load_images"),
    ("data", "load_dataset"),
    ("hub", "load_pretrained"),
}  # what a demonstration may use before its chapter
LATE = {
    "__init__",  # loads what is asked for
    "cli",  # loads PyTorch once the options are read
    "data",  # `load_dataset("folder")`
    "captions",  # a stored tokenizer may be one of chapter 29
}  # modules that import others while they run, by name
LONGEST, LONGEST_DEFINITION, WIDEST = 30, 45, 100
KINDS = "exercise|solution-start|solution-end"
BLOCK = re.compile(
    rf"^(?P<fence>`{{3,}})\{{(?P<kind>{KINDS})\}}(?P<title>[^\n]*)\n(?P<body>.*?)^(?P=fence)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Cell:
    """Hold one cell of a notebook."""

    kind: str  # "code" or "markdown"
    id: str
    directives: tuple  # what follows nbdev's `#|`, a line each
    source: str  # the lines after the directives
    tags: tuple
    outputs: tuple

    @property
    def exported(self):
        """Tell whether the cell goes into the package."""
        return any(
            line.split()[0] in ("export", "exporti", "exports") for line in self.directives if line
        )

    @property
    def code(self):
        """Give the source without the lines that only IPython understands."""
        return re.sub(r"^(\s*)[%!].*$", r"\1pass", self.source, flags=re.M)

    @property
    def tree(self):
        """Parse the code."""
        return ast.parse(self.code)

    @property
    def definitions(self):
        """List the functions and classes that the cell defines at its top level."""
        return [
            node
            for node in self.tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]


@dataclass(frozen=True)
class Notebook:
    """Hold one notebook."""

    path: Path
    cells: tuple

    @property
    def name(self):
        """Give the file's name without its ending."""
        return self.path.stem

    @property
    def number(self):
        """Read the chapter's number from the file's name."""
        return int(re.match(r"\d+", self.name)[0])

    @property
    def module(self):
        """Name the module that the notebook exports; None where there is none."""
        lines = [line.split() for cell in self.cells for line in cell.directives]
        return next((words[1] for words in lines if words[:1] == ["default_exp"]), None)

    @property
    def code(self):
        """List the code cells."""
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def text(self):
        """Join the text cells."""
        return "\n\n".join(cell.source for cell in self.cells if cell.kind == "markdown")


def read_cell(cell):
    """Read a cell of a notebook's JSON."""
    lines, directives = "".join(cell["source"]).splitlines(), []
    while cell["cell_type"] == "code" and lines and lines[0].startswith("#|"):
        directives.append(" ".join(lines.pop(0)[2:].split()))
    tags = tuple(cell["metadata"].get("tags", ()))
    return Cell(
        cell["cell_type"],
        cell.get("id", ""),
        tuple(directives),
        "\n".join(lines),
        tags,
        tuple(map(json.dumps, cell.get("outputs", ()))),
    )


def read_notebook(path):
    """Read a notebook."""
    return Notebook(
        Path(path),
        tuple(map(read_cell, json.loads(Path(path).read_text(encoding="utf-8"))["cells"])),
    )


def read_book(root=ROOT, names=()):
    """Read the notebooks whose names begin with one of those given, or all, in order."""
    paths = sorted(Path(root, "nbs").glob("[0-9]*.ipynb"))
    return [
        read_notebook(path) for path in paths if not names or path.name.startswith(tuple(names))
    ]


# Order: what may use what.


@cache
def offered(root=ROOT):
    """Map each name that the package offers at its top to its module."""
    tree = ast.parse(Path(root, PACKAGE, "__init__.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_OFFERED"
    )
    return {
        name: module for module, names in ast.literal_eval(table).items() for name in names.split()
    }


def uses(tree):
    """Yield the (module, name) pairs that code takes from the package; the name is "" for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            for alias in node.names:
                yield (
                    offered().get(alias.name, alias.name),
                    alias.name if alias.name in offered() else "",
                )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            yield from ((node.module.split(".")[1], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name.split(".")[1], "")
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE}.")
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (found := re.fullmatch(rf"{PACKAGE}\.(\w+)", node.value))
        ):
            yield found[1], ""


def imports_by_name(tree):
    """Say whether code imports what it computes the name of, which `uses` cannot read."""
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any("import_module" in (getattr(f, "id", ""), getattr(f, "attr", "")) for f in called)


def order_of_modules(book, chapters):
    """A module imports only modules of earlier notebooks, and those that are everybody's."""
    for nb in book:
        if nb.module not in LATE and any(imports_by_name(c.tree) for c in nb.code if c.exported):
            yield f"{nb.name}: module {nb.module} imports by name, which hides its order"
    for nb in book:
        for cell in nb.code:
            for module, _ in uses(cell.tree) if cell.exported else ():
                if module in FREE or (
                    nb.module not in FREE and chapters.get(module, -1) < nb.number
                ):
                    continue
                yield f"{nb.name}: module {nb.module} imports {module}, which is no earlier one (cell {cell.id})"


def order_of_cells(book, chapters):
    """The cells of a chapter that are not exported use nothing later than the chapter, but for a few helpers and data."""
    for nb in book:
        for cell in nb.code if nb.number else ():
            for module, name in uses(cell.tree) if not cell.exported else ():
                if (
                    module in FREE
                    or (module, name) in EARLY
                    or chapters.get(module, 1000) <= nb.number
                ):
                    continue
                yield f"{nb.name}: a cell uses {module}{'.' + name if name else ''}, which comes later (cell {cell.id})"


MADE = ("__init__", "__post_init__", "__new__")  # methods that run where a class is called


def names_of(table):
    """Collect the names of the page that a function's body takes, with those inside it."""
    own = {name.get_name() for name in table.get_symbols() if name.is_global()}
    return own.union(*map(names_of, table.get_children()))


def taken(statement, code):
    """Tell of a statement the names that it takes at once, those that it binds, and what the body of each of these will take when called."""
    first = min(node.lineno for node in (statement, *getattr(statement, "decorator_list", ())))
    lines = "\n".join(code.splitlines()[first - 1 : statement.end_lineno])
    table = symtable.symtable(lines, "cell", "exec")
    names = table.get_symbols()
    now = {name.get_name() for name in names if name.is_referenced()}
    bound = {name.get_name() for name in names if name.is_assigned() or name.is_imported()}
    later = {}
    for part in table.get_children():
        if part.get_type() == "class":
            now |= {name.get_name() for name in part.get_symbols() if name.is_global()}
            made = (names_of(method) for method in part.get_children() if method.get_name() in MADE)
            later[part.get_name()] = set().union(*made)
        elif isinstance(statement, ast.FunctionDef) and part.get_name() == statement.name:
            later[statement.name] = names_of(part)
        elif isinstance(statement, ast.Assign) and part.get_name() == "lambda":
            later |= {name: later.get(name, set()) | names_of(part) for name in bound}
        else:  # a comprehension, or a function handed to a call
            now |= names_of(part)
    if isinstance(statement, ast.Assign):  # a class that gets a method is not called
        targets = [target for target in statement.targets if isinstance(target, ast.Attribute)]
        now -= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return now, bound, later


def used_too_early(book):
    """What a cell calls, and what that calls in turn, is defined in a cell above: a page that runs from the top finds all it needs."""
    for nb in book:
        cells = [cell for cell in nb.code if "eval: false" not in cell.directives]
        said = [(cell, taken(statement, cell.code)) for cell in cells for statement in cell.tree.body]
        of_page = set().union(*(bound for _, (_, bound, _) in said)) - set(dir(builtins))
        known, bodies = set(), {}
        for cell, (now, bound, later) in said:
            reached, ahead = set(), sorted(now, reverse=True)
            while ahead:
                name = ahead.pop()
                if name in of_page - known - bound - reached:
                    yield f"{nb.name}: cell {cell.id} needs {name}, which is defined further down"
                ahead += sorted(bodies.get(name, set()) - reached, reverse=True)
                reached.add(name)
            known |= bound
            bodies = {name: body for name, body in bodies.items() if name not in bound} | later


# Form: what a cell looks like.


def long_cells(book):
    """A cell with one class or function may have 45 lines, any other 30; the first page shows its program in four."""
    for nb in book:
        for cell in nb.code:
            whole = len(cell.definitions) == 1 or nb.name == "00_start"
            allowed, lines = LONGEST_DEFINITION if whole else LONGEST, len(cell.source.splitlines())
            if lines > allowed:
                yield f"{nb.name}: cell {cell.id} has {lines} lines, {allowed} are allowed"


def wide_lines(book):
    """A line of code has at most 100 columns."""
    for nb in book:
        for cell in nb.code:
            for line in cell.source.splitlines() if "google.colab" not in cell.source else ():
                if len(line) > WIDEST:
                    yield f"{nb.name}: a line of {len(line)} columns in cell {cell.id}: {line.strip()[:50]} ..."


def untrue_ids(book):
    """A cell is called after what it defines, since nbdev prints its id into the module."""
    for nb in book:
        defined = {slug(name) for cell in nb.code if (name := defined_name(cell.source))}
        for cell in nb.code:
            name = defined_name(cell.source)
            if name and not re.fullmatch(rf"{re.escape(slug(name))}(-\d+)?", cell.id):
                yield f"{nb.name}: cell {cell.id} defines {name}; run tools/notebooks.py sync"
            if not name and cell.id in defined:
                yield f"{nb.name}: cell {cell.id} defines nothing; run tools/notebooks.py sync"


def hidden_cells(book):
    """Nothing is hidden but the cell that installs the package."""
    for nb in book:
        for i, cell in enumerate(nb.code):
            hidden = [line for line in cell.directives if line.split()[:1] == ["hide"]]
            hidden += [tag for tag in cell.tags if tag.startswith("remove-")]
            if hidden and (i > 0 or "google.colab" not in cell.source):
                yield f'{nb.name}: cell {cell.id} hides by {hidden[0]}; fold it with tags=["hide-input"]'


def pytest_in_cells(book):
    """No chapter needs pytest: `checks.assert_refused` shows a refusal."""
    for nb in book:
        yield from (
            f"{nb.name}: cell {cell.id} uses pytest"
            for cell in nb.code
            if re.search(r"\bpytest\b", cell.code)
        )


def broken_formulas(book):
    """In a formula within a line every command has one backslash: two are a break, and the name of the command is set as letters."""
    for nb in book:
        for formula in re.findall(r"(?<!\$)\$(?!\$)([^$\n]+)\$", nb.text):
            if re.search(r"\\\\[a-zA-Z]", formula):
                yield f"{nb.name}: two backslashes in the formula {formula}"


def numbered_exercises(book):
    """An exercise of the chapter is named by its label, since a number is another one once there is a new exercise."""
    for nb in book:
        for found in re.findall(r"(?i)\bexercises? \d+", nb.text):
            yield f"{nb.name}: {found!r} stands for a label, as in {{ref}}`ex-...`"


def exercise_faults(book):
    """Exercises stand under one heading in all chapters; each has a label of its own and, right after it, a folded solution that ends in the same notebook."""
    seen = {}
    for nb in book:
        blocks = [m.group("kind", "title", "body") for m in BLOCK.finditer(nb.text)]
        label = None
        for kind, title, body in blocks:
            if kind == "exercise":
                if label:
                    yield f"{nb.name}: exercise {label} has no solution after it"
                label = next(iter(re.findall(r"^:label: (ex-[\w-]+)$", body, re.M)), None)
                if label is None or label in seen:
                    words = title.strip() or " ".join(body.split())[:40]
                    yield f"{nb.name}: exercise {words!r} has no label ex-..., or that of another"
                seen[label] = nb.name
            elif kind == "solution-start":
                if title.strip() != label or ":class: dropdown" not in body:
                    yield f"{nb.name}: the solution of {title.strip()} does not follow its exercise or is not folded"
                label = None
        if label:
            yield f"{nb.name}: exercise {label} has no solution after it"
        if re.search(r"^#+ Exercises", nb.text, re.M) and not blocks:
            yield f"{nb.name}: its exercises are not written with the book's directive"
        if blocks and not re.search(r"^## Exercises$", nb.text.split("{exercise}")[0], re.M):
            yield f"{nb.name}: its exercises do not stand under the heading Exercises"
        kinds = [kind for kind, _, _ in blocks if kind != "exercise"]
        if kinds != ["solution-start", "solution-end"] * (len(kinds) // 2):
            yield f"{nb.name}: a solution does not end, or ends twice"


def dead_links(book, pages, root=ROOT):
    """A link leads to a page that is there, and a chapter that the text names by its number exists."""
    numbers = {nb.number for nb in read_book(root)}
    sources = [(nb.path, nb.text) for nb in book] + [
        (path, path.read_text(encoding="utf-8")) for path in pages
    ]
    for path, text in sources:
        for link in re.findall(r"\]\(([^()\s#]+\.(?:ipynb|md))(?:#[^()\s]*)?\)", text):
            if not re.match(r"[a-z]+:", link) and not (path.parent / link).is_file():
                yield f"{path.name}: links to {link}, which does not exist"
        for found in re.finditer(r"\b[Cc]hapters? (\d+)(?:(?:, | and | to | or )(\d+))*", text):
            missing = {int(n) for n in re.findall(r"\d+", found[0])} - numbers
            if missing:
                yield f"{path.name}: names chapter {', '.join(map(str, sorted(missing)))}, which does not exist: {found[0]!r}"


def contents_faults(root=ROOT):
    """The table of contents lists every notebook, in order."""
    toc = yaml.safe_load(Path(root, "_toc.yml").read_text(encoding="utf-8"))
    listed = [
        chapter["file"]
        for part in toc["parts"]
        for chapter in part["chapters"]
        if chapter["file"].startswith("nbs/")
    ]
    wanted = [f"nbs/{nb.name}" for nb in read_book(root)]
    yield from (
        f"_toc.yml lists {file}, which does not exist" for file in listed if file not in wanted
    )
    yield from (f"_toc.yml does not list {file}" for file in wanted if file not in listed)
    if sorted(listed) == sorted(wanted) != listed:
        yield "_toc.yml lists the notebooks out of order"


# The package: what its API page shows.


def public_objects(module):
    """Yield the name and value of each function and class that a module exports."""
    if module == "__init__":  # it offers names of the others
        return
    module = importlib.import_module(f"{PACKAGE}.{module}")
    for name in module.__all__:
        if inspect.isfunction(value := getattr(module, name)) or inspect.isclass(value):
            yield name, value


def undocumented(modules):
    """A public function or class has a docstring of its own and a comment beside each parameter that it takes."""
    for module in modules:
        for name, value in public_objects(module):
            if not (
                vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__ or ""
            ).strip():
                yield f"{module}: {name} has no docstring"
            silent = [p for p, text in parameter_comments(value).items() if not text]
            if silent:
                yield f"{module}: {name} has no comment for {', '.join(silent)}"


def open_signatures(modules):
    """A public signature names its options, rather than to collect them with `**`."""
    for module in modules:
        for name, value in public_objects(module):
            if not inspect.isfunction(
                getattr(value, "__init__", None) if inspect.isclass(value) else value
            ):
                continue
            open_ones = [
                p for p in inspect.signature(value).parameters.values() if p.kind is p.VAR_KEYWORD
            ]
            if open_ones and (
                value.__module__ if inspect.isfunction(value) else value.__init__.__module__
            ).startswith(PACKAGE):
                yield f"{module}: {name} hides options behind **{open_ones[0].name}"


def is_method(node):
    """Tell whether a function belongs to a class, onto which a decorator such as `patch` puts it."""
    return isinstance(node, ast.FunctionDef) and any(
        "patch" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def unshown(book):
    """A cell that is not exported uses each public name that its chapter exports."""
    for nb in book:
        shown = "\n".join(cell.source for cell in nb.code if not cell.exported)
        names = [
            node.name
            for cell in nb.code
            if cell.exported
            for node in cell.definitions
            if node.name[0] != "_" and not is_method(node)
        ]
        yield from (
            f"{nb.name}: nothing shows {name}"
            for name in names
            if not re.search(rf"\b{name}\b", shown)
        )


def defined_twice(book):
    """A name is defined once in the package, and no cell pastes a definition that the package has."""
    homes = {}
    for exported in (True, False):
        for nb in book:
            for cell in nb.code:
                for node in cell.definitions if cell.exported is exported else ():
                    if node.name[0] == "_" or is_method(node):
                        continue
                    if node.name in homes:
                        yield f"{nb.name}: {node.name} is defined in {homes[node.name]}, too"
                    if exported:
                        homes.setdefault(node.name, nb.name)


def offenders(book, root=ROOT):
    """List what breaks a rule, rule by rule."""
    chapters = {nb.module: nb.number for nb in read_book(root) if nb.module}
    modules = [nb.module for nb in book if nb.module]
    return {
        "a module imports only earlier ones": list(order_of_modules(book, chapters)),
        "a chapter's cells use nothing later": list(order_of_cells(book, chapters)),
        "a page can be run from its top": list(used_too_early(book)),
        "cells are short": list(long_cells(book)),
        "lines are short": list(wide_lines(book)),
        "cells are called after what they define": list(untrue_ids(book)),
        "nothing is hidden": list(hidden_cells(book)),
        "no pytest": list(pytest_in_cells(book)),
        "formulas within lines": list(broken_formulas(book)),
        "exercises by their labels": list(numbered_exercises(book)),
        "exercises and solutions": list(exercise_faults(book)),
        "public names are documented": list(undocumented(modules)),
        "no options behind **": list(open_signatures(modules)),
        "public names are shown": list(unshown(book)),
    }


def main():
    """Print the offenders and fail if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    book = read_book(names=names)
    if not book:
        sys.exit(f"no notebook begins with {' or '.join(names)}")
    found = offenders(book)
    found["links"] = list(dead_links(book, [] if names else sorted((ROOT / "book").glob("*.md"))))
    if not names:
        found |= {
            "defined once": list(defined_twice(book)),
            "table of contents": list(contents_faults()),
        }
    for rule, lines in found.items():
        print(f"{rule}: {len(lines)}", *(f"   {line}" for line in lines), sep="\n")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
