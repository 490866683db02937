"""The measures count what they say, on a planted notebook."""

import ast
import json
from pathlib import Path

import measures
import pytest
import rules

import ddpm_nb

CODE = '''#| export
def visible(x):
    """Add up."""
    # why
    y = x + late  # and so

    return _hidden(y)'''
HELPERS = '''#| export
late = 1
def _hidden(y):
    """Refuse what is negative."""
    if y < 0:
        raise ValueError("no")
    return y'''
CHECK = "#| export\ndef check_int(n):\n    return n\ndef save_checkpoint():\n    return 1"
CELLS = [
    ("markdown", "# A chapter\n\n> One line with $a + b$ and `code`.\n\n$$\na = b\n$$ (eq-a)"),
    ("code", "import sys\nif 'google.colab' in sys.modules:\n    pass"),
    ("code", "#| default_exp training"),
    ("code", CODE),
    ("code", HELPERS),
    ("code", CHECK),
    ("code", "x, z = 1, late\n\n# only words\n" + "y = " + "1" * 90),
    ("markdown", "## Exercises\n\n```{exercise}\n:label: ex-a\n\nProve it.\n```"),
    ("code", "assert x"),
    ("markdown", "## Summary\n\nThe end."),
]


@pytest.fixture
def chapter(tmp_path):
    """Write the planted notebook into a small repository and read it."""
    (tmp_path / "nbs").mkdir()
    path = tmp_path / "nbs" / "09_training.ipynb"
    cells = [{"cell_type": kind, "source": source, "metadata": {}} for kind, source in CELLS]
    cells[5]["metadata"]["tags"] = ["hide-input"]
    cells[6]["outputs"] = [{"data": {"image/png": ""}}]
    path.write_text(json.dumps({"cells": cells}))
    return rules.read_notebook(path)


def test_chapter_is_counted(chapter):
    assert measures.measure_chapter(chapter) == {
        "chapter": "09_training",
        "words": 2 + 6 + 3 + 3,
        "in ex.": 3,
        "code": 4 + 6 + 4 + 2 + 1,
        "in ex. ": 1,
        "shown": 4 + 6 + 2,
        "cells": 10,
        "longest": 6,
        "> 88": 1,
        "> 100": 0,
        "figure": 8,
        "pairs": 1,  # x and z, in a cell that is not exported
    }


ALIKE = """
c, d = 1, 2
mean, variance = f()
e = f(), 1
low, high = -1, 1
x, y = x.to(d), y.to(d)
least, most = (x + y).min(1), (x + y).max()
cos, sin = math.cos(a), math.sin(a)
fine, coarse = Block(4, 4), Block(4, 8)
x, y = torch.randn(3, 4), torch.randn(5)
x, y = torch.randn(3), np.random.randn(n)
"""
UNLIKE = """
a, b = f(), 1
time, skip = nn.Linear(64, n), nn.Conv2d(n, n, 1)
t, eps = torch.randint(T, (64,)), torch.randn_like(x)
x, y = p.sample(9), q.draw(8)
n, rho = check_int("n", n), check_number("rho", rho, 1)
x, y, z = f(1), f(2), g(3)
"""


def test_pairs_of_different_kinds_are_counted():
    assert measures.unlike_pairs(ALIKE) == []
    found = measures.unlike_pairs(UNLIKE)
    assert len(found) == measures.count_pairs(UNLIKE) == len(UNLIKE.splitlines()) - 1, found


# Chapters whose pages may still bind together what is of different kinds, by the number of such lines.
UNEVEN = {"04": 2, "06": 3, "09": 1, "16": 1, "20": 1, "25": 1, "27": 6, "29": 2, "30": 1, "90": 1}


def test_chapters_have_no_pairs_of_different_kinds():
    for nb in rules.read_book():
        found = [pair for cell in nb.code for pair in measures.unlike_pairs(cell.code)]
        assert len(found) <= UNEVEN.get(nb.name[:2], 0), (nb.name, found)


def test_module_is_counted(chapter):
    row, density = measures.measure_module(chapter)
    # y = x + late: Assign, Name, BinOp, Name, Add, Name; return _hidden(y): Return, Call, Name, Name
    assert density[0] == pytest.approx((6 + 4) / 2)
    assert row["functions"] == 4
    assert (row["private"], row["public"]) == (1, 3)
    assert row["early"] == 2  # late and _hidden
    assert row["comments"] == pytest.approx(100 * 2 / (2 + 3 + 1 + 1), abs=0.05)


def test_purposes_are_counted(chapter):
    row = measures.measure_purposes(chapter)
    assert (row["subject"], row["check"], row["disk"]) == (4 + 3, 2 + 2, 2)
    assert row["lines"] == 13
    assert row["share"] == "54 %"


def test_methods_and_patches_have_the_purpose_of_their_name(tmp_path):
    source = (
        "#| export\nclass TextToImage:\n    def from_pretrained(self):\n        return 1\n"
        "    def generate(self):\n        return 1\n@patch\ndef save_pretrained(self: TextToImage):\n    pass"
    )
    path = tmp_path / "22_planted.ipynb"
    cells = [
        {"cell_type": "code", "source": s, "metadata": {}}
        for s in ("#| default_exp pipeline", source)
    ]
    path.write_text(json.dumps({"cells": cells}))
    row = measures.measure_purposes(rules.read_notebook(path))
    assert (row["subject"], row["disk"]) == (3, 5)


def test_every_name_with_a_purpose_exists():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(ddpm_nb.__file__).parent.glob("*.py")]
    there = {node.name for tree in trees for node in ast.walk(tree) if hasattr(node, "name")}
    assert [name for name in measures.TAGS if name.split(".")[-1] not in there] == []


def test_report_holds_three_tables(chapter):
    text = measures.report(chapter.path.parent.parent)
    assert [line for line in text.splitlines() if line[:1].isupper()] == [
        "Chapters",
        "Modules",
        "Purposes of exported lines",
    ]
    assert text.count("training") == 3


@pytest.mark.parametrize("module", ["data", "training", "sampling", "unet", "pipeline", "evaluation"])
def test_three_quarters_of_a_module_are_what_its_chapter_is_about(module):
    row = next(measures.measure_purposes(nb) for nb in rules.read_book() if nb.module == module)
    assert row["subject"] >= 0.75 * row["lines"], row


def test_the_first_page_is_a_whole_model_in_seventy_lines():
    """Its first four cells that are not folded: schedule, network, sampler, loop."""
    [page] = rules.read_book(names=["00"])
    shown = [cell for cell in page.code if not cell.tags and not cell.directives][:4]
    assert [word for cell, word in zip(shown, ("betas", "nn.Module", "sample", "AdamW"), strict=True) if word not in cell.source] == []
    assert sum(measures.is_code(line) for cell in shown for line in cell.source.splitlines()) <= 70
