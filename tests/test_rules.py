"""Each rule over notebooks finds the fault that it is for, and lets a sound notebook pass."""

import json
import tempfile

import pytest
import rules
from notebooks import defined_name

from ddpm_nb.checks import assert_refused

INSTALL = "#| hide\n#| eval: false\nimport sys\nif 'google.colab' in sys.modules:\n    pass"
SOUND = [
    "md: # A chapter\n\n> One line.",
    INSTALL,
    "#| default_exp forward",
    "#| export\nfrom ddpm_nb.gaussian import reparameterize\nfrom ddpm_nb.checks import check_int",
    "#| export\ndef jump(x):\n    return x",
    "from ddpm_nb.data import load_images\nfrom ddpm_nb import load_pretrained\nassert jump(1) == 1",
    "md: ## Exercises\n\n```{exercise}\n:label: ex-one\n\nProve it.\n```\n\n"
    "```{solution-start} ex-one\n:class: dropdown\n```\n\nWords.",
    "assert jump(2) == 2",
    "md: ```{solution-end}\n```",
]
CHAPTERS = {"gaussian": 1, "forward": 2, "elbo": 3, "data": 8, "hub": 25}


def notebook(tmp_path, cells, name="02_planted", ids=None):
    """Write cells, those that begin with `md:` as text, into a notebook and read it."""
    written = []
    for i, source in enumerate(cells):
        kind = "markdown" if source.startswith("md: ") else "code"
        tags = ["remove-input"] if source.startswith("REMOVED") else []
        source = source.removeprefix("md: ").removeprefix("REMOVED")
        cell = {"cell_type": kind, "source": source, "metadata": {"tags": tags}}
        cell["id"] = (ids or {}).get(i) or (
            "jump"
            if source.startswith("#| export\ndef jump")
            else f"imports-{i}"
            if defined_name(source) == "imports"
            else f"cell-{i}"
        )
        written.append(cell | ({"outputs": []} if kind == "code" else {}))
    path = tmp_path / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": written}))
    return rules.read_notebook(path)


def faults(nb):
    """List what the rules say about one notebook."""
    found = [*rules.order_of_modules([nb], CHAPTERS), *rules.order_of_cells([nb], CHAPTERS)]
    for rule in (
        rules.used_too_early,
        rules.long_cells,
        rules.wide_lines,
        rules.untrue_ids,
        rules.hidden_cells,
        rules.pytest_in_cells,
        rules.broken_formulas,
        rules.numbered_exercises,
        rules.exercise_faults,
        rules.unshown,
        rules.defined_twice,
    ):
        found += rule([nb])
    return found


def test_an_import_by_name_is_seen(tmp_path):
    by_name = [
        "#| default_exp unet",
        "#| export\nimport importlib\nruns = importlib.import_module(f'{__package__}.runs')",
    ]
    found = list(rules.order_of_modules([notebook(tmp_path, by_name, "07_unet")], CHAPTERS))
    assert found == ["07_unet: module unet imports by name, which hides its order"]


def test_sound_notebook_passes(tmp_path):
    assert faults(notebook(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("#| export\nfrom ddpm_nb.elbo import simple_loss", "module forward imports elbo"),
        ("#| export\nfrom ddpm_nb.data import load_images", "module forward imports data"),
        ("#| export\nfrom ddpm_nb import simple_loss", "module forward imports elbo"),
        ("#| export\nx = [lambda: __import__('ddpm_nb.elbo')]", "module forward imports elbo"),
        ("if True:\n    import ddpm_nb.elbo", "a cell uses elbo, which comes later"),
        ("from ddpm_nb import simple_loss", "a cell uses elbo.simple_loss, which comes later"),
        ("from ddpm_nb.data import train_batches", "a cell uses data.train_batches"),
        ("import ddpm_nb.data", "a cell uses data, which comes later"),
        ("from ddpm_nb.unheard import x", "a cell uses unheard.x"),
        ("x = 1\n" * 31, "has 31 lines, 30 are allowed"),
        ("def f():\n" + "    x = 1\n" * 45 + "f()", "has 47 lines, 45 are allowed"),
        ("def f():\n    pass\ndef g():\n" + "    x = 1\n" * 29, "has 32 lines, 30 are allowed"),
        ("x = '" + "x" * 95 + "'", "a line of 101 columns"),
        ("def walk():\n    pass", "defines walk; run"),
        ("#| hide\nx = 1", "hides by hide"),
        ("REMOVEDx = 1", "hides by remove-input"),
        ("import pytest", "uses pytest"),
        (
            "md: So $\\\\ln x$ and $$\na \\\\\nb\n$$ differ.",
            "two backslashes in the formula \\\\ln x",
        ),
        ("md: As Exercise 2 shows, two exercises do.", "'Exercise 2' stands for a label"),
        ("#| export\nclass Unheard:\n    pass", "nothing shows Unheard"),
        ("#| export\ndef jump(x):\n    return x", "jump is defined in 02_planted, too"),
        ("md: ```{exercise}\n:label: ex-two\n\nx\n```", "exercise ex-two has no solution"),
        ("md: ```{exercise}\nProve.\n```", "exercise 'Prove.' has no label"),
        ("md: ```{solution-start} ex-one\n:class: dropdown\n```", "does not follow its exercise"),
        ("md: ```{solution-end}\n```", "a solution does not end, or ends twice"),
    ],
)
def test_planted_fault_is_found(tmp_path, cell, fault):
    found = faults(notebook(tmp_path, [*SOUND, cell]))
    assert any(fault in line for line in found), found


def below(tmp_path, *cells):
    """List the names that cells need and that are defined further down."""
    return [
        line.split()[4].rstrip(",")
        for line in rules.used_too_early([notebook(tmp_path, [*SOUND[:3], *cells])])
    ]


def test_what_is_defined_further_down_is_found(tmp_path):
    private = "def _check(x):\n    return x", "def walk(x):\n    return _check(x)"
    assert below(tmp_path, private[1], private[0], "walk(1)") == []
    assert below(tmp_path, private[1], "walk(1)", private[0]) == ["_check"]
    assert below(tmp_path, private[1], "assert all(walk(i) for i in range(3))", private[0]) == [
        "_check"
    ]
    assert below(tmp_path, private[1], "refused(lambda: walk(1))", private[0]) == ["_check"]
    assert below(tmp_path, private[1], "go = lambda: walk(1)", private[0], "go()") == []
    assert below(tmp_path, private[1], "go = lambda: walk(1)", "go()", private[0]) == ["_check"]
    assert below(tmp_path, "walk(1)", *private) == ["walk"]
    assert below(tmp_path, "def sit(x=LIMIT):\n    pass", "LIMIT = 1") == ["LIMIT"]
    assert below(tmp_path, "class Way(Base):\n    pass", "class Base:\n    pass") == ["Base"]
    made = "class Way:\n    def __init__(self):\n        _check(1)\n    def go(self):\n        _later(1)\ndef _later(x): ..."
    assert below(tmp_path, made, "Way.stop = 1\nWay.go.long = 2", private[0], "Way()") == []
    assert below(tmp_path, made, "Way()", private[0]) == ["_check"]
    assert below(tmp_path, "max(1, 2)", "max = 3", "%matplotlib inline\nx = max") == []


def test_open_solution_and_bold_exercises_are_found(tmp_path):
    folded = [cell.replace(":class: dropdown\n", "") for cell in SOUND]
    assert any("is not folded" in line for line in faults(notebook(tmp_path, folded)))
    bold = [*SOUND[:6], "md: ## Exercises\n\n**1.** Prove it."]
    assert any("book's directive" in line for line in faults(notebook(tmp_path, bold)))
    named = [cell.replace("## Exercises", "## To change and try") for cell in SOUND]
    assert any("under the heading Exercises" in line for line in faults(notebook(tmp_path, named)))


def test_a_name_that_no_notebook_has_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["rules.py", "77"])
    with pytest.raises(SystemExit, match="no notebook begins with 77"):
        rules.main()


def test_labels_of_exercises_are_unique_in_the_book(tmp_path):
    first, second = (notebook(tmp_path, SOUND, name) for name in ("02_a", "03_b"))
    assert len(list(rules.exercise_faults([first, second]))) == 1


def test_first_page_may_use_everything_but_reference_modules_nothing(tmp_path):
    start = notebook(tmp_path, [*SOUND[:2], "from ddpm_nb import TextToImage"], "00_start")
    assert list(rules.order_of_cells([start], CHAPTERS)) == []
    checks = ["#| default_exp checks", "#| export\nfrom ddpm_nb.gaussian import seeded"]
    found = list(rules.order_of_modules([notebook(tmp_path, checks, "91_checks")], CHAPTERS))
    assert found == [
        "91_checks: module checks imports gaussian, which is no earlier one (cell imports-1)"
    ]


def test_dead_links_are_found(tmp_path):
    (tmp_path / "nbs").mkdir()
    text = (
        "md: See [](03_b.ipynb), [](02_a.ipynb#part), [x](https://e.org/a.md); chapters 2 and 14."
    )
    nb = notebook(tmp_path / "nbs", [text], "02_a")
    page = tmp_path / "page.md"
    page.write_text("[here](nbs/02_a.ipynb), [there](nbs/09_c.ipynb), chapter 2, chapter 9")
    found = [line.split(": ")[1] for line in rules.dead_links([nb], [page], root=tmp_path)]
    assert found == [
        "links to 03_b.ipynb, which does not exist",
        "names chapter 14, which does not exist",
        "links to nbs/09_c.ipynb, which does not exist",
        "names chapter 9, which does not exist",
    ]


def test_table_of_contents_is_compared(tmp_path):
    (tmp_path / "nbs").mkdir()
    for name in ("01_a", "02_b"):
        notebook(tmp_path / "nbs", SOUND, name)
    toc = "parts:\n- chapters:\n  - file: nbs/02_b\n  - file: nbs/"
    (tmp_path / "_toc.yml").write_text(toc + "01_a\n")
    assert list(rules.contents_faults(tmp_path)) == ["_toc.yml lists the notebooks out of order"]
    (tmp_path / "_toc.yml").write_text(toc + "03_c\n")
    assert list(rules.contents_faults(tmp_path)) == [
        "_toc.yml lists nbs/03_c, which does not exist",
        "_toc.yml does not list nbs/01_a",
    ]


MODULE = '''
from dataclasses import dataclass
__all__ = ["silent", "Child", "Fields", "More", "swallow", "Layer"]
class Base:
    """A base."""
    def __init__(self, x,  # the x
                 y): ...
class Child(Base):
    """A child."""
@dataclass
class Fields:
    """Fields."""
    a: int  # the a
@dataclass
class More(Fields):
    """More fields."""
    b: int = 1
def silent(
    x,  # the x
): ...
def swallow(
    **options,  # all of them
):
    """Swallow."""
class Layer(dict):
    """Made by a library."""
'''


def test_what_the_package_must_say_is_found(tmp_path, monkeypatch):
    import ddpm_nb

    (tmp_path / "planted.py").write_text(MODULE)
    monkeypatch.setattr(ddpm_nb, "__path__", [*ddpm_nb.__path__, str(tmp_path)])
    assert list(rules.undocumented(["planted"])) == [
        "planted: silent has no docstring",
        "planted: Child has no comment for y",
        "planted: More has no comment for b",
    ]
    assert list(rules.open_signatures(["planted"])) == [
        "planted: swallow hides options behind **options"
    ]


def test_a_refusal_on_a_page_names_no_temporary_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail():
        raise ValueError(f"{tmp_path}/tmp1a_b/mine does not fit")

    assert_refused(fail, "does not fit")
    assert capsys.readouterr().out == "FOLDER/mine does not fit\n"
