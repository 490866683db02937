"""The notebook tool loses no edit, names cells after what they define and begins a chapter."""

import sys
from pathlib import Path

import address
import nbformat
import notebooks
import pytest
import rules


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Let the tool work in an empty folder, and return a function that runs its commands."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = ddpm_nb\nuser = a\nrepo = b\nbranch = main\n")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "NBS", tmp_path / "nbs")
    monkeypatch.setattr(notebooks, "TEXT", tmp_path / "_text")
    monkeypatch.setattr(notebooks, "nbdev", lambda *words: None)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["notebooks.py", *words])
        notebooks.main()

    run.script, run.notebook = tmp_path / "_text/30_trial.py", tmp_path / "nbs/30_trial.ipynb"
    run("new", "30", "trial")
    return run


def change(path, old, new):
    """Replace words in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_new_chapter_keeps_the_rules(folder, tmp_path):
    nb = rules.read_notebook(folder.notebook)
    assert address.disagreeing(tmp_path) == []
    assert (nb.number, nb.module) == (30, "trial")
    found = [*rules.hidden_cells([nb]), *rules.exercise_faults([nb]), *rules.untrue_ids([nb])]
    assert found == []
    with pytest.raises(SystemExit, match=r"number 30 is taken by 30_trial\.ipynb"):
        folder("new", "30", "other")
    for words in (("3", "other"), ("31", "import")):
        with pytest.raises(SystemExit, match="a number of two digits"):
            folder("new", *words)


def test_new_chapter_takes_no_module_of_another(folder, tmp_path):
    """Two notebooks that export one module would overwrite each other's."""
    (tmp_path / "ddpm_nb").mkdir()
    (tmp_path / "ddpm_nb/walks.py").touch()  # exported by a chapter that is called otherwise
    for name, holder in (("trial", r"nbs/30_trial\.ipynb"), ("walks", r"ddpm_nb/walks\.py")):
        with pytest.raises(SystemExit, match=f"name {name} is taken by {holder}"):
            folder("new", "31", name)
    assert not list(tmp_path.glob("*/31_*"))


def test_outputs_of_changed_cells_go(folder):
    nb = nbformat.read(folder.notebook, as_version=4)
    printed = [nbformat.v4.new_output("stream", text="printed")]
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = printed
    nbformat.write(nb, folder.notebook)
    change(folder.script, "assert True", "assert 1 + 1 == 2")
    change(folder.script, "# ## Summary", "# ## Summary in words")
    folder("sync", "30")
    cells = [cell for cell in nbformat.read(folder.notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in cells] == [cell.source != "assert 1 + 1 == 2" for cell in cells]
    assert sum(bool(cell.outputs) for cell in cells) == len(code) - 1


def test_a_sync_names_what_it_emptied(folder, capsys):
    nb = nbformat.read(folder.notebook, as_version=4)
    nb.cells[6].outputs = [nbformat.v4.new_output("stream", text="printed")]
    nbformat.write(nb, folder.notebook)
    change(folder.script, "# ## Summary", "# ## In short")
    folder("sync")
    assert "outputs" not in capsys.readouterr().out
    change(folder.script, "assert True", "assert 1 + 1 == 2")
    folder("sync")
    assert "30_trial: 1 changed cells have no outputs now, and what stands below them may be old: run 30" in capsys.readouterr().out


def test_a_chapter_that_is_gone_does_not_come_back(folder):
    folder.notebook.rename(folder.notebook.with_name("31_trial.ipynb"))
    with pytest.raises(SystemExit, match=r"30_trial\.ipynb is gone: remove _text/30_trial\.py, or `sync --force 30_trial`"):
        folder("sync")
    assert not folder.notebook.exists()
    change(folder.script, "A question.", "Another question.")
    with pytest.raises(SystemExit, match=r"number 30 is taken by 30_trial\.py"):
        folder("new", "30", "trial")
    assert "Another question." in folder.script.read_text()
    folder("sync", "--force", "30")
    assert "Another question." in folder.notebook.read_text()


def test_what_ran_before_a_failure_is_clean(folder, monkeypatch):
    folder("new", "31", "other")
    cleaned = []
    monkeypatch.setattr(notebooks, "nbdev", lambda *words: cleaned.append(Path(words[-1]).stem))

    def execute(path):
        if path.stem == "31_other":
            raise RuntimeError("a cell failed")
        cleaned.append("executed")

    monkeypatch.setattr(notebooks, "execute", execute)
    with pytest.raises(RuntimeError, match="a cell failed"):
        folder("execute")
    assert cleaned == ["executed", "30_trial"]


def test_edit_is_synced_and_outputs_stay(folder):
    nb = nbformat.read(folder.notebook, as_version=4)
    nb.cells[6].outputs = [nbformat.v4.new_output("stream", text="kept")]
    nbformat.write(nb, folder.notebook)  # what execution does
    change(folder.script, "import torch", "import torch\n\n\ndef walk():\n    return 1")
    folder("sync", "30")
    cells = nbformat.read(folder.notebook, as_version=4).cells
    assert [cell.id for cell in cells if cell.source.startswith("#| export")] == ["walk"]
    assert cells[6].outputs[0].text == "kept"
    folder("sync")  # a second time changes nothing
    folder("text")


def test_text_keeps_unsynced_edits(folder):
    folder("text", "30")  # nothing to lose
    change(folder.script, "What the module", "New words on what the module")
    with pytest.raises(SystemExit, match=r"_text/30_trial\.py has edits .* `sync 30_trial` reads"):
        folder("text", "30")
    assert "New words" in folder.script.read_text()
    folder("text", "--force", "30")
    assert "New words" not in folder.script.read_text()


def test_text_follows_a_notebook_that_has_changed(folder):
    change(folder.notebook, "What the module", "In Jupyter: what the module")
    folder("text")
    assert "In Jupyter" in folder.script.read_text()


def test_sync_keeps_a_changed_notebook(folder):
    change(folder.notebook, "What the module", "In Jupyter: what the module")
    change(folder.script, "A question.", "Another question.")
    with pytest.raises(SystemExit, match=r"30_trial\.ipynb has changed since _text/30_trial\.py.*`sync --force 30_trial` undoes"):
        folder("sync", "30")
    assert "In Jupyter" in folder.notebook.read_text()
    with pytest.raises(SystemExit, match="has edits"):
        folder("text")
    folder("sync", "--force", "30")
    assert "Another question" in folder.notebook.read_text()


def test_script_without_a_record_is_not_overwritten(folder, tmp_path):
    (tmp_path / "_text/.agreed.json").unlink()
    change(folder.script, "A question.", "Another question.")
    with pytest.raises(SystemExit, match="has edits"):
        folder("text")
    folder("sync")
    assert "Another question" in folder.notebook.read_text()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def _help():\n    pass\ndef walk():\n    pass", "walk"),
        ("def _help():\n    pass", "_help"),
        ("LIMIT: int = 3\nx = 1", "LIMIT"),
        ("x = 1", None),
        ("if x:\n    def inner(): ...", None),
        ("@patch\ndef walk(self: UNet): ...", "walk"),
        ("#| export\nimport sys\nfrom math import (\n    pi,\n)", "imports"),
        ("import sys\nprint(1)", None),
        ("import sys\n!pip list", None),
    ],
)
def test_cells_are_called_after_what_they_define(source, name):
    assert notebooks.defined_name(source) == name


def test_cells_that_define_nothing_are_called_after_words_that_still_stand():
    """A name that its cell has outgrown is given up when the cell is written back, and no chapter has one."""
    cell = nbformat.v4.new_code_cell("clipped = images.clamp(-1, 1)", id="peakmemory")
    nb = nbformat.v4.new_notebook(cells=[cell])
    notebooks.name_cells(nb, {"peakmemory"})
    assert nb.cells[0].id == "clipped-images-clamp-1-1"
    notebooks.name_cells(nb, {nb.cells[0].id})
    assert nb.cells[0].id == "clipped-images-clamp-1-1"
    for path in sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        others = [c for c in cells if notebooks.own_name(c) is None and notebooks.readable_id(c) != "cell"]  # it has words
        assert [c.id for c in others if not notebooks.still_fits(c)] == [], path.stem
