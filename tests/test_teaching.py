"""What teachers and slow machines are offered: notebooks without solutions, plans with hours, tests for any versions, a script for a GPU."""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import exercises
import gpu
import matplotlib.pyplot as plt
import measures
import nbdev_directives
import portable
import pytest
import rules
import slow
import torch
from PIL import Image

from ddpm_nb.files import read_json
from ddpm_nb.hub import save_pretrained
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import make_unet

ROOT = Path(__file__).resolve().parent.parent
SOLUTION = """import math
side = 3
def area(x):
    return x * x
assert area(side) == 9
assert_refused(lambda: area("a"), "number")
print(side)"""


def test_a_solution_becomes_a_cell_to_fill():
    filled = exercises.to_fill(SOLUTION)
    wanted = 'import math\n\n# Your code. The checks below use area, side.\n...\n\nassert area(side) == 9\nassert_refused(lambda: area("a"), "number")'
    assert filled == wanted
    assert exercises.to_fill("x = 1") == "# Your code.\n..."
    of_digits = 'if dataset == "digits":\n    assert x > 3'
    assert exercises.to_fill(f"x = 4\n{of_digits}") == f"# Your code. The checks below use x.\n...\n\n{of_digits}"


def test_checks_in_loops_stay_and_the_work_beside_them_goes():
    loop = """for n in (1, 2):
    square = n * n
    if n > 1:
        root = square ** 0.5
        assert_close(
            root, n
        )
    assert square > 0"""
    wanted = """# Your code. The checks below use root, square.
...

for n in (1, 2):
    ...  # your code
    if n > 1:
        ...  # your code
        assert_close(
            root, n
        )
    assert square > 0"""
    assert exercises.to_fill(loop) == wanted
    assert exercises.to_fill("for n in (1, 2):\n    print(n)") == "# Your code.\n..."


@pytest.mark.parametrize("kept", ["with no_grad():\n    assert x", "while x:\n    assert x"])
def test_checks_in_other_blocks_stay(kept):
    assert exercises.to_fill(f"x = 1\n{kept}").endswith(f"...\n\n{kept}")


def test_a_loop_in_one_line_shows_no_work():
    assert exercises.to_fill("for x in y: z = 1; assert z").endswith("...\n\nfor x in y:\n    ...  # your code\n    assert z")


def test_both_ways_of_an_if_are_never_mixed():
    assert "assert" not in exercises.to_fill("if a:\n    assert p\nelse:\n    assert q")


def test_what_somebody_filled_in_is_not_overwritten(tmp_path):
    exercises.write(tmp_path, ["01", "02"])
    exercises.write(tmp_path, ["01", "02"])  # nothing was changed: written again
    path = next(tmp_path.glob("02*"))
    begun = path.read_text().replace("# Your code.", "x = 1  # my code.", 1)
    path.write_text(begun)
    (tmp_path / "01_reparameterization.ipynb").unlink()
    with pytest.raises(SystemExit, match=r"02_forward_process\.ipynb with other cells.*--out.*--force"):
        exercises.write(tmp_path, ["01", "02"])
    assert path.read_text() == begun
    assert not (tmp_path / "01_reparameterization.ipynb").exists()  # nothing was written at all
    exercises.write(tmp_path, ["01", "02"], force=True)
    assert path.read_text() != begun
    with pytest.raises(SystemExit, match="no notebook begins with 77"):
        exercises.write(tmp_path, ["77"])


def count_checks(tree):
    """Count the assertions of a cell that stand in no function."""
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for node in ast.walk(f)}
    return sum(isinstance(node, ast.stmt) and exercises.judges(node) for node in ast.walk(tree) if node not in inside)


def test_no_solution_is_left_and_every_check_is(tmp_path):
    n = exercises.write(tmp_path)
    assert n > 100
    for nb in rules.read_book():
        written = json.loads((tmp_path / nb.path.name).read_text())
        text = "".join("".join(cell["source"]) for cell in written["cells"] if cell["cell_type"] == "markdown")
        assert "{solution-start}" not in text
        assert text.count("```{exercise}") == nb.text.count("```{exercise}")
        ids = [cell["id"] for cell in written["cells"]]
        assert len(ids) == len(set(ids)), nb.name
        code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
        assert len(code) == len(nb.code)  # in the same order
        for cell, old in zip(code, nb.code, strict=True):
            if "exercise" in cell["metadata"].get("tags", []):
                assert count_checks(ast.parse(cell["source"])) == count_checks(old.tree), (nb.name, cell["source"])
                assert cell["outputs"] == []


def test_plans_name_chapters_and_their_hours():
    page = (ROOT / "book" / "teachers.md").read_text()
    shown = re.search(r"<!-- plans -->\n(.*?)\n<!-- end -->", page, re.S)[1].splitlines()
    wanted = exercises.table().splitlines()
    assert len(shown) == len(wanted), "run tools/exercises.py --plans"
    for old, new in zip(shown, wanted, strict=True):
        told, counted = (re.findall(r"\d+\.\d+", line) for line in (old, new))
        assert re.sub(r"\d+\.\d+", "", old) == re.sub(r"\d+\.\d+", "", new)
        assert all(abs(float(a) - float(b)) <= 0.1 + 0.15 * float(b) for a, b in zip(told, counted, strict=True)), (old, new)
    known = set(measures.reading_hours(ROOT)["hours"])
    assert {c for meetings in exercises.PLANS.values() for chapters in meetings for c in chapters} <= known


def test_hours_that_the_first_page_adds_up_are_those_of_the_chapters():
    stored = json.loads((ROOT / "ddpm_nb" / "measured" / "reading.json").read_text())["hours"]
    counted = measures.reading_hours(ROOT)["hours"]
    assert set(stored) == set(counted), "run tools/measures.py --hours ddpm_nb/measured/reading.json"
    assert all(abs(stored[name] - hours) <= 0.1 + 0.15 * hours for name, hours in counted.items())


def test_tests_for_any_versions_need_no_development_tool():
    files = portable.portable()
    assert "tests/test_training.py" in files and len(files) >= 15
    assert not {"tests/test_sampling.py", "tests/test_project.py", "tests/test_equations.py"} & set(files)


def test_a_slow_notebook_is_told():
    cells = [(130.0, "train"), (20.0, "plot"), (1.0, "import")]
    assert slow.line("09_training", cells, None).endswith("TOO LONG")
    assert slow.line("09_training", cells[1:], None).endswith("plot 20, import 1")
    assert "STOPPED at cell x: KeyError: 1" in slow.line("09_training", [], "cell x: KeyError: 1")
    long = [(70.0, "train"), (60.0, "sample")]
    assert slow.line("00_start", long, None).endswith("TOO LONG") and not slow.line("01_x", long, None).endswith("TOO LONG")


def test_slow_runs_say_what_is_not_emulated(monkeypatch, capsys):
    monkeypatch.setattr(slow, "selected", lambda *_: [])
    monkeypatch.setattr(slow.os, "environ", {})
    with pytest.raises(SystemExit) as end:
        slow.main()
    text = capsys.readouterr().out
    assert not end.value.code and "Emulated: two threads" in text and "Not emulated: a slower clock" in text


def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    """Tiny numbers, the parts that measure; whoever has a GPU needs one call."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "studies/gpu.py", "--device", "cpu", "--tiny", "--parts", "speed", "network", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for part in ("speed", "network"):
        (row,) = found[part]["rows"]
        assert row["train seconds"] > 0 and row["sample seconds"] > 0 and row["parameters"] > 1000
        assert row["train flops"] == 3 * row["sample flops"]

    shown = shown_by_the_page(tmp_path)
    assert len(re.findall(r"^  tiny +float32 +False +4 +\d+\.\d ms +\? +\d+\.\d ms +\?$", shown, re.M)) == 2
    assert "tests: never run" in shown.splitlines() and "notebooks: never run" in shown.splitlines()


def shown_by_the_page(folder):
    """Run the cell of the page on performance that shows the figures of a GPU, with the files of this folder."""
    (cell,) = [cell for nb in rules.read_book() for cell in nb.code if cell.source.startswith("def gpu_steps")]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(cell.source, {"MEASURED": folder, "read_json": read_json})
    return output.getvalue()


def test_the_page_shows_what_a_gpu_measured_and_what_was_never_run(tmp_path):
    assert shown_by_the_page(tmp_path) == ""  # no file, no words; the text beside says so
    row = {"network": "small", "precision": "bfloat16", "compiled": True, "batch": 128}
    row |= {"train seconds": 0.01, "train flops": 3e12, "sample seconds": 0.004, "sample flops": 1e12}
    cut, failed = {"cut": ["small", "float32", True, 1024]}, {"failed": ["small", "float32", True, 512], "why": "MemoryError: much"}
    speed = {"peaks": {"bfloat16": {"gflops": 6e5}, "float32": {"failed": []}}, "rows": [row, cut, failed]}
    notebooks = {"01_a": {"seconds": 3, "failed": []}, "02_b": "not reached", "03_c": {"failed": [{"cell": "x", "why": "y"}]}}
    found = {"machine": {"gpu": "A GPU", "torch": "2"}, "tests": {"code": 0, "tail": ["5 passed"]}, "speed": speed, "notebooks": notebooks}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    lines = shown_by_the_page(tmp_path).splitlines()
    assert lines[0] == "A GPU with PyTorch 2" and "network: never run" in lines and "  5 passed" in lines
    assert [" ".join(line.split()) for line in lines if line.startswith("  small")] == [
        "small bfloat16 True 128 10.0 ms 50 % 4.0 ms 42 %",
        "small float32 True 1024 not reached",
        "small float32 True 512 failed: MemoryError: much",
    ]
    assert "  01_a: passed" in lines and "  02_b: not reached" in lines and any("'cell': 'x'" in line for line in lines)


def test_what_failed_on_a_gpu_is_told():
    fine = {"tests": {"code": 0}, "notebooks": {"01_x": {"failed": []}, "02_y": "not reached"}}
    assert not gpu.went_wrong(fine)
    assert gpu.went_wrong(fine | {"tests": {"code": 1}})
    assert gpu.went_wrong({"notebooks": {"01_x": {"failed": [{"cell": "a", "why": "b"}]}}})


# pictures of one's own


def own_pictures(folder, n_train, n_test, size=16):
    """Draw small colour pictures of two classes, discs and bars, into the parts and sub-folders that the page for teachers asks for."""
    g, grid = torch.Generator().manual_seed(0), torch.arange(size)
    for part, n in (("train", n_train), ("test", n_test)):
        for i in range(n):
            kind, (row, column, width) = ("disc", "bar")[i % 2], torch.randint(4, 12, (3,), generator=g).tolist()
            down, across = (grid[:, None] - row).abs(), (grid - column).abs()
            inside = down**2 + across**2 < width**2 / 4 if kind == "disc" else (down < 2) & (across < width)
            paper, ink = torch.randint(0, 100, (3,), generator=g), torch.randint(156, 256, (3,), generator=g)
            path = folder / part / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.where(inside[..., None], ink, paper).byte().numpy()).save(path)


class Shorter(ast.NodeTransformer):
    """Let every training of a notebook take at most 100 iterations: what is asserted of any pictures holds from the first step."""

    def visit_keyword(self, node):
        """Shorten `n_iterations=300` in a call."""
        if node.arg == "n_iterations" and isinstance(node.value, ast.Constant):
            node.value.value = min(node.value.value, 100)
        return self.generic_visit(node)


def run_chapter(path, cell):
    """Execute the cells of a notebook as they stand, but for the one that loads its pictures; return what they define."""
    space, exchanged = {"__name__": path.stem}, 0
    for old in rules.read_notebook(path).code:
        if "eval: false" in old.directives:
            continue
        is_data = old.code.startswith('dataset = "digits"')
        exchanged += is_data
        tree = ast.parse(cell if is_data else old.code)
        if exchanged:  # what is trained before that has pictures or numbers of its own, of which its page asserts
            tree = Shorter().visit(tree)
        exec(compile(tree, f"{path.stem}: {old.id}", "exec"), space)
        plt.close("all")
    assert exchanged == 1, f"{path.stem} loads its pictures in {exchanged} cells that can be exchanged"
    return space


PAGE = (ROOT / "book" / "teachers.md").read_text()
OWN = re.search(r"## Pictures of your own\n(.*?)\n## ", PAGE, re.S)[1]
OWN_CELL, OWN_NETWORK = re.findall(r"```python\n(.*?)```", OWN, re.S)
OWN_CHAPTERS = re.findall(r"nbs/(\w+)\.ipynb", OWN.split("\n\n")[0])


def test_the_page_names_every_chapter_whose_pictures_can_be_exchanged():
    exchangeable = [nb.name for nb in rules.read_book() if any(c.code.startswith('dataset = "digits"') for c in nb.code)]
    assert exchangeable == OWN_CHAPTERS == ["08_data", "09_training", "10_sampling", "11_evaluation", "12_results", "16_vae", "17_gan"]


class WithoutDigits(ast.NodeTransformer):
    """Leave out what a notebook does with the digits alone."""

    def visit_If(self, node):
        """Leave out `if dataset == "digits":` and what stands under it."""
        return None if ast.unparse(node.test) == "dataset == 'digits'" else self.generic_visit(node)


def own_faults(cells):
    """List what ties cells to the digits after their pictures were loaded: a second loading, a shape in figures."""
    first = next(i for i, cell in enumerate(cells) if cell.code.startswith('dataset = "digits"'))
    faults = []
    for cell in cells[first + 1 :]:
        if cell.exported:
            continue
        for node in ast.walk(WithoutDigits().visit(cell.tree)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            loads = called in ("load_dataset", "load_images", "load_digits", "load_pretrained")
            values = getattr(node, "elts", None) or getattr(node, "args", None)
            figures = [getattr(value, "value", None) for value in values] if isinstance(values, list) else []
            faults += [f"{cell.id}: {ast.unparse(node)}"] if loads or (8, 8) in pairwise(figures) else []
    return faults


@pytest.mark.parametrize("name", OWN_CHAPTERS)
def test_after_its_pictures_a_chapter_follows_them(name):
    cells = rules.read_notebook(ROOT / "nbs" / f"{name}.ipynb").code
    assert own_faults(cells) == []
    wrong = replace(cells[-1], directives=(), source='x = torch.randn(4, 1, 8, 8)\ny = load_images("digits")')
    assert len(own_faults([*cells, wrong])) == 2


@pytest.mark.skipif("OWN_PICTURES" not in os.environ, reason="takes minutes; OWN_PICTURES=1 runs it")
@pytest.mark.parametrize("name", OWN_CHAPTERS)
def test_a_chapter_runs_on_pictures_of_ones_own(name, tmp_path, monkeypatch):
    """The page's own words, word for word: 64 colour pictures to learn from and 20 held out."""
    own_pictures(tmp_path / "pictures", 64, 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm_nb.unet.make_unet", lambda preset, **size: make_unet(preset, **size | {"base_channels": 4, "norm_groups": 2}))
    cell = OWN_CELL
    if name in ("10_sampling", "11_evaluation"):
        network = make_unet("digits", in_channels=3, image_size=16, base_channels=4, norm_groups=2)
        save_pretrained("runs/mine", network, make_schedule("cosine", 1000))
        cell += OWN_NETWORK
    if name == "10_sampling":  # the first line and this one
        cell = OWN_CELL.splitlines()[0] + "\n" + OWN_NETWORK
    found = run_chapter(ROOT / "nbs" / f"{name}.ipynb", cell)
    if name == "10_sampling":
        assert found["digits"].shape == (16, 3, 16, 16)
        return
    assert found["train_set"].images().shape == (64, 3, 16, 16) and len(found["test_set"]) == 20


LABEL = re.compile(r"\$\$ \(([\w-]+)\)|^:label: ([\w-]+)|^\(([\w-]+)\)=", re.M)
REFERENCE = re.compile(r"\{(?:eq|ref|numref|prf:ref)\}`(?:[^`<]*<)?([\w-]+)>?`")


def shown(source, solutions):
    """Return the texts and the labels of what a page shows."""
    notebook = json.loads(nbdev_directives.translate(source, "", solutions=solutions))
    cells = [cell for cell in notebook["cells"] if "remove-cell" not in cell["metadata"].get("tags", [])]
    texts = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    figures = {cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") for cell in cells}
    return texts, {name for names in LABEL.findall(texts) for name in names if name} | figures - {None}


def test_a_book_without_solutions_refers_to_nothing_that_is_gone():
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "nbs").glob("*.ipynb"))]
    whole, left = ([shown(source, solutions) for source in sources] for solutions in (True, False))
    assert sum(text.count("{solution-start}") for text, _ in whole) > 100
    assert not any("{solution-" in text for text, _ in left)
    assert all(text.count("{exercise}") == other.count("{exercise}") for (text, _), (other, _) in zip(whole, left, strict=True))
    gone = set().union(*(labels for _, labels in whole)) - set().union(*(labels for _, labels in left))
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "book").glob("*.md")]
    named = {name for text in [*pages, *(text for text, _ in left)] for name in REFERENCE.findall(text)}
    assert gone and not gone & named  # solutions have equations and figures of their own; only they refer to them
