"""Every numbered equation of the book has an executed assertion that names it, and every reference to an equation finds one."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import measures
import nbformat
import pytest
import rules

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))

CODE_SPAN = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]*`", re.M | re.S)
DOLLARS = re.compile(r"\$\$(?P<body>.+?)\$\$[ \t]*(?:\((?P<label>[^()\s]+)\))?", re.S)
ENVIRONMENT = re.compile(r"\\begin\{(equation|align|gather|multline|eqnarray|alignat|flalign)\}(?P<body>.*?)\\end\{\1\}", re.S)
DIRECTIVE = re.compile(r"^[`:]{3,}\{math\}[^\n]*\n(?P<body>.*?)^[`:]{3,}\s*$", re.M | re.S)
REFERENCE = re.compile(r"\{eq\}`(?:[^`<]*<)?(?P<label>[^`<>]+)>?`|\\eqref\{(?P<tex>[^{}]+)\}")
CHECKS = re.compile(r"^[ \t]*#[ \t]*checks[ \t:]+(?P<labels>.+?)[ \t]*$", re.M)
SKIPPED = re.compile(r"(#\|.*\n)*#\|\s*eval:\s*false")


@dataclass
class Source:
    """Hold what one page says about equations; positions are numbers of cells."""

    name: str
    equations: list = field(default_factory=list)  # (label, cell); the label is "" where there is none
    references: list = field(default_factory=list)  # (label, cell)
    checks: list = field(default_factory=list)  # (label, cell, does the cell assert something?)


def numbered_equations(text):
    """List the labels of the numbered equations in Markdown, in order; "" for one that has a number but no label."""
    found = [(m.start(), label) for m in DIRECTIVE.finditer(text) for label in re.findall(r"^:label:[ \t]*(\S+)", m["body"], re.M)]
    rest = DIRECTIVE.sub(lambda m: " " * len(m[0]), text)
    rest = CODE_SPAN.sub(lambda m: " " * len(m[0]), rest)
    for m in DOLLARS.finditer(rest):
        labels = [label for label in (m["label"], *re.findall(r"\\label\{([^{}]+)\}", m["body"])) if label]
        found += [(m.start(), label) for label in labels]
    outside = DOLLARS.sub(lambda m: " " * len(m[0]), rest)
    for m in ENVIRONMENT.finditer(outside):
        found += [(m.start(), label) for label in re.findall(r"\\label\{([^{}]+)\}", m["body"]) or [""]]
    return [label for _, label in sorted(found)]


def references(text):
    """List the labels that Markdown refers to; code fences do not count, as they are shown and not rendered."""
    text = re.sub(r"^(```|~~~)(?!\{).*?^\1\s*$", "", text, flags=re.M | re.S)
    return [m["label"] or m["tex"] for m in REFERENCE.finditer(text)]


def asserts_something(source):
    """Tell whether running a cell runs an assertion: `assert` of something that can be false, `assert_close(...)`, `pytest.raises`."""
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))
    todo = list(ast.parse(code).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue  # defined here, but perhaps never called
        if isinstance(node, ast.Assert) and not (isinstance(node.test, ast.Constant) or _is_message_pair(node.test)):
            return True
        if isinstance(node, ast.Call) and (called(node).startswith("assert_") or called(node) == "raises"):
            return True
        todo += ast.iter_child_nodes(node)
    return False


def _is_message_pair(test):
    """Recognise `assert (condition, message)`, which is always true."""
    return isinstance(test, ast.Tuple) and bool(test.elts)


def called(node):
    """Name the function that a call calls, without the modules before it."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def check_labels(source):
    """List the labels that a cell's `# checks` lines name."""
    return [label.strip() for m in CHECKS.finditer(source) for label in m["labels"].split(",")]


def scan(name, cells):
    """Collect what a page says about equations from its (kind, source) cells."""
    page = Source(name)
    for i, (kind, source) in enumerate(cells):
        if kind == "markdown":
            page.equations += [(label, i) for label in numbered_equations(source)]
            page.references += [(label, i) for label in references(source)]
        elif kind == "code" and (labels := check_labels(source)):
            real = not SKIPPED.match(source) and asserts_something(source)
            page.checks += [(label, i, real) for label in labels]
    return page


def scan_notebook(path):
    """Scan a notebook."""
    return scan(path.name, [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells])


def scan_page(path):
    """Scan a Markdown page."""
    return scan(path.name, [("markdown", path.read_text(encoding="utf-8"))])


def faults(pages):
    """List, in words, everything that is wrong with the equations of some pages."""
    where, found = {}, []
    for page in pages:
        found += [f"{page.name}: a numbered equation in cell {i} has no label" for label, i in page.equations if not label]
        for label, _ in page.equations:
            if label and not label.startswith("eq-"):
                found.append(f"{page.name}: label {label} does not begin with eq-")
            if label and label in where:
                found.append(f"{page.name}: label {label} is also in {where[label]}")
            where.setdefault(label, page.name)
        found += [f"{page.name}: {label}: a page cannot check its equations; number them in a chapter"
                  for label, _ in page.equations if page.name.endswith(".md")]  # fmt: skip
    for page in pages:
        found += [f"{page.name}: a reference to the unknown equation {label}" for label, _ in page.references if label not in where]
        found += page_faults(page)
    return found


def page_faults(page):
    """List what is wrong with the checks of one page."""
    position, found, checked = dict(page.equations), [], set()
    for label, i, real in page.checks:
        if label not in position:
            found.append(f"{page.name}: cell {i} says that it checks {label}, which is no equation of this page")
        elif i < position[label]:
            found.append(f"{page.name}: cell {i} checks {label} before the equation is written")
        elif not real:
            found.append(f"{page.name}: cell {i} says that it checks {label}, but runs no assertion")
        else:
            checked.add(label)
    unchecked = [label for label in position if label and label not in checked and not page.name.endswith(".md")]
    return found + [f"{page.name}: no cell after {label} checks it" for label in unchecked]


@pytest.fixture(scope="module")
def book():
    """Scan the whole book once."""
    return [*map(scan_notebook, NOTEBOOKS), *map(scan_page, PAGES)]


def test_every_equation_of_the_book_is_checked(book):
    assert sum(len(page.equations) for page in book) > 0, "the walker found no equation at all"
    assert faults(book) == []


def test_equations_of_the_text_are_checked_in_the_text():
    """A check in the folded solution of an exercise is enough for an equation of an exercise only."""
    for notebook in rules.read_book(ROOT):
        told = list(zip(notebook.cells, measures.in_exercises(notebook), strict=True))
        text = {label for cell, solves in told if cell.kind == "markdown" and not solves for label in numbered_equations(cell.source)}
        checked = {label for cell, solves in told if cell.kind == "code" and not solves for label in check_labels(cell.source)}
        assert not text - checked, f"{notebook.name}: only a solution checks {sorted(text - checked)}"


def test_walker_finds_what_sphinx_numbers(book):
    """A label that follows no rule of the walker would escape it: count the labels in the raw text as well."""
    for path, page in zip([*NOTEBOOKS, *PAGES], book, strict=True):
        text = path.read_text(encoding="utf-8")
        raw = re.findall(r"\((eq-[\w-]+)\)", text) + re.findall(r"label\{(eq-[\w-]+)\}|:label: (eq-[\w-]+)", text)
        assert len(raw) == len(page.equations), page.name


# The walker itself, on pages with planted faults.

EQUATION = "Words.\n\n$$\na = b\n$$ (eq-a)\n\nMore."
CHECK = "# checks eq-a\nassert a == b"


def planted(*cells, name="01_planted.ipynb"):
    """Scan cells written as strings; those that begin with `>>>` are code."""
    kinds = [("code", cell[4:]) if cell.startswith(">>> ") else ("markdown", cell) for cell in cells]
    return scan(name, kinds)


def test_sound_page_has_no_fault():
    page = planted(EQUATION, f">>> {CHECK}", "See {eq}`eq-a` and {eq}`the rule <eq-a>`.")
    assert page.equations == [("eq-a", 0)]
    assert page.checks == [("eq-a", 1, True)]
    assert page.references == [("eq-a", 2), ("eq-a", 2)]
    assert faults([page]) == []


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ((EQUATION,), "no cell after eq-a checks it"),
        ((EQUATION, ">>> assert a == b"), "no cell after eq-a checks it"),
        ((f">>> {CHECK}", EQUATION), "checks eq-a before the equation is written"),
        ((EQUATION, ">>> # checks eq-a\nprint(a == b)"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\nassert True"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\nassert (a == b, 'message')"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\n# assert a == b"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\nprint('assert a == b')"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\ntorch.allclose(a, b)"), "runs no assertion"),
        ((EQUATION, ">>> # checks eq-a\ndef never_called():\n    assert a == b"), "runs no assertion"),
        ((EQUATION, f">>> #| eval: false\n{CHECK}"), "runs no assertion"),
        ((EQUATION, f">>> #| hide\n#| eval: false\n{CHECK}"), "runs no assertion"),
        ((EQUATION, f">>> {CHECK}", ">>> # checks eq-b\nassert a"), "checks eq-b, which is no equation of this page"),
        ((EQUATION, ">>> # checks eq-a, eq-b\nassert a"), "checks eq-b, which is no equation of this page"),
        ((EQUATION, EQUATION, f">>> {CHECK}"), "label eq-a is also in 01_planted.ipynb"),
        ((EQUATION, f">>> {CHECK}", "By {eq}`eq-lost`, ..."), "unknown equation eq-lost"),
        ((EQUATION, f">>> {CHECK}", r"By \eqref{eq-lost}, ..."), "unknown equation eq-lost"),
        (("$$\na\n$$ (sum)", ">>> # checks sum\nassert a"), "label sum does not begin with eq-"),
        ((r"\begin{align} a \end{align}",), "a numbered equation in cell 0 has no label"),
        ((r"\begin{align} a \label{eq-x} \\ b \label{eq-y} \end{align}", ">>> # checks eq-x\nassert a"), "no cell after eq-y"),
        ((r"$$\begin{aligned} a \label{eq-x} \end{aligned}$$",), "no cell after eq-x checks it"),
        (("```{math}\n:label: eq-m\na = b\n```",), "no cell after eq-m checks it"),
        ((":::{math}\n:label: eq-m\na = b\n:::",), "no cell after eq-m checks it"),
    ],
)
def test_planted_fault_is_found(cells, fault):
    assert any(fault in line for line in faults([planted(*cells)])), faults([planted(*cells)])


@pytest.mark.parametrize(
    "code",
    [
        "assert a == b",
        "if True:\n    assert a == b",
        "for t in range(3):\n    torch.testing.assert_close(a, b)",
        "assert_close(a, b)",
        "np.testing.assert_allclose(a, b)",
        "with pytest.raises(ValueError):\n    f()",
        "%time x\nassert a",
    ],
)
def test_real_assertions_count(code):
    assert faults([planted(EQUATION, f">>> # checks eq-a\n{code}")]) == []


def test_one_cell_checks_several_equations():
    both = EQUATION + "\n\n$$\nc = d\n$$ (eq-c)"
    assert faults([planted(both, ">>> # checks eq-a, eq-c\nassert a")]) == []
    assert faults([planted(both, ">>> # checks eq-a\n# checks eq-c\nassert a")]) == []


def test_labels_are_unique_in_the_whole_book():
    pages = [planted(EQUATION, f">>> {CHECK}", name=name) for name in ("01_a.ipynb", "02_b.ipynb")]
    assert faults(pages) == ["02_b.ipynb: label eq-a is also in 01_a.ipynb"]


def test_check_in_another_chapter_does_not_count():
    lines = faults([planted(EQUATION, name="01_a.ipynb"), planted(f">>> {CHECK}", name="02_b.ipynb")])
    assert any("01_a.ipynb: no cell after eq-a checks it" in line for line in lines)
    assert any("no equation of this page" in line for line in lines)


def test_reference_to_another_chapter_is_known():
    assert faults([planted(EQUATION, f">>> {CHECK}"), planted("{eq}`eq-a`", name="intro.md")]) == []


def test_pages_may_not_number_equations():
    assert any("a page cannot check" in line for line in faults([planted(EQUATION, name="notation.md")]))


@pytest.mark.parametrize(
    "text",
    [
        "$$\na = b\n$$",  # displayed, not numbered
        "Inline $a = b$ (see below).",
        "Write `$$ a $$ (eq-name)`.",  # shown as code
        "```\n$$\na\n$$ (eq-name)\n```",
        r"\begin{align*} a \end{align*}",
        r"$$\begin{aligned} a \end{aligned}$$",
    ],
)
def test_what_is_not_numbered_needs_no_check(text):
    assert planted(text).equations == []
