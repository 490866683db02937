"""Progress: a bar on a terminal and in a Jupyter kernel, a line now and then where output is piped, nothing unless asked."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from ddpm_nb import evaluation, progress, sampling, scores
from ddpm_nb.evaluation import bits_per_dim
from ddpm_nb.progress import show_progress
from ddpm_nb.sampling import ddim_invert, inpaint, sample_ddim, sample_ddpm, sample_dpm_solver
from ddpm_nb.schedules import make_schedule
from ddpm_nb.scores import flow_log_likelihood, sample_sde
from ddpm_nb.training import TrainConfig, recent_loss

SHAPE = (2, 1, 4, 4)
SCHEDULE = make_schedule("cosine", 60)
IMAGES = torch.zeros(SHAPE) - 1


def silence(x_t, t):
    """Answer zero, in a way that can be differentiated."""
    return 0 * x_t


WALKS = {
    "ddpm": (sampling, 3, lambda o: sample_ddpm(silence, SCHEDULE, SHAPE, n_steps=3, **o)),
    "ddim": (sampling, 3, lambda o: sample_ddim(silence, SCHEDULE, SHAPE, n_steps=3, **o)),
    "dpm": (sampling, 3, lambda o: sample_dpm_solver(silence, SCHEDULE, SHAPE, n_steps=3, **o)),
    "invert": (sampling, 3, lambda o: ddim_invert(silence, SCHEDULE, IMAGES, n_steps=3, **o)),
    "inpaint": (sampling, 5, lambda o: inpaint(silence, SCHEDULE, IMAGES, torch.ones(4).bool(), n_steps=3, n_repeats=2, **o)),
    "sde": (scores, 60, lambda o: sample_sde(silence, SCHEDULE, SHAPE, **o)),
    "likelihood": (scores, 3, lambda o: flow_log_likelihood(silence, SCHEDULE, IMAGES, n_steps=3, n_probes=1, **o)),
    "bits": (evaluation, 1, lambda o: bits_per_dim(silence, SCHEDULE, IMAGES, n_levels=2, **o)),
    "bits in batches": (evaluation, 2, lambda o: bits_per_dim(silence, SCHEDULE, IMAGES, n_levels=2, batch_size=1, **o)),
}


@pytest.mark.parametrize("name", WALKS)
def test_every_walk_shows_progress_if_asked(name, monkeypatch):
    module, n, call = WALKS[name]
    asked, seen = [], []

    def note(items, text, shown=True, **options):
        asked.append((len(items), shown))
        for item in items:
            seen.append(shown)
            yield item

    monkeypatch.setattr(module, "show_progress", note)
    call({})
    call({"progress": True})
    assert asked == [(n, False), (n, True)] and len(seen) == 2 * n  # silent by default; walked to the end


def test_bars_change_no_number():
    options = lambda shown: {"progress": shown, "generator": torch.Generator().manual_seed(0)}
    for name in ("ddim", "sde", "bits"):
        one, other = (WALKS[name][2](options(shown)) for shown in (False, True))
        assert getattr(one, "mean", 0) == getattr(other, "mean", 0) if name == "bits" else one.equal(other)


class Clock:
    """Tell a time that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_piped_output_gets_a_line_about_every_ten_seconds(monkeypatch, capsys):
    clock, bar = Clock(monkeypatch), show_progress(range(7), "walking")
    for i in bar:
        bar.set_postfix(loss=f"{i}.5")
        clock.now += 4
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert [line.split(" [")[0] for line in lines] == ["walking:  43% 3/7", "walking:  86% 6/7", "walking: 100% 7/7"]
    assert lines[0].endswith("[00:12<00:16, loss=2.5]") and "\r" not in told.err and told.out == ""


def test_piped_output_of_a_quick_walk_stays_empty(capsys):
    sample_ddim(silence, SCHEDULE, SHAPE, progress=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_that_goes_on_begins_where_it_stopped(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    for _ in show_progress(range(6, 10), "training", start=6):
        clock.now += 11
    assert re.findall(r"% (\S+)", capsys.readouterr().err) == ["7/10", "8/10", "9/10", "10/10"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    screen.isatty = lambda: True
    sample_ddim(silence, SCHEDULE, SHAPE, progress=True)
    assert "sampling: 100%" in screen.getvalue() and "\r" in screen.getvalue()
    screen.truncate(0)
    sample_ddim(silence, SCHEDULE, SHAPE)
    assert screen.getvalue() == ""


def test_what_is_quick_need_not_show_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    screen.isatty = lambda: True
    assert list(show_progress(iter("abc"), "checking", total=3, delay=60)) == [*"abc"]
    assert screen.getvalue() == ""


def test_a_jupyter_kernel_gets_a_bar_and_no_widget():
    """In a real kernel, by Jupyter's own client: training and sampling show bars; a redirected call and a silent one do not."""
    begin = (
        "import torch\nfrom ddpm_nb.sampling import sample_ddim\nfrom ddpm_nb.schedules import make_schedule\n"
        "from ddpm_nb.training import TrainConfig, fit\nfrom ddpm_nb.unet import make_unet\n"
        "schedule, model = make_schedule('cosine', 60), make_unet('digits')\n"
    )
    cells = [
        begin,
        "fit(model, schedule, torch.zeros(8, 1, 8, 8) - 1, TrainConfig(n_iterations=3, batch_size=4));",
        "sample_ddim(model, schedule, (1, 1, 8, 8), n_steps=3, progress=True);",
        "sample_ddim(model, schedule, (1, 1, 8, 8), n_steps=3);",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n"
        "    sample_ddim(model, schedule, (1, 1, 8, 8), n_steps=3, progress=True)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    training, sampling = ("".join(output.text for output in book.cells[i].outputs) for i in (1, 2))
    assert "training: 100%" in training and "3/3" in training and "loss=" in training
    assert "sampling: 100%" in sampling and "3/3" in sampling
    assert {(output.output_type, output.name) for cell in book.cells for output in cell.outputs} == {("stream", "stdout")}
    assert all(book.cells[i].outputs == [] for i in (0, 3, 4))


def test_the_last_loss_of_the_bar_is_the_mean_over_a_line_of_the_log():
    config = TrainConfig(log_every=3)
    assert recent_loss(torch.tensor([9.0, 1.0, 2.0, 3.0]), config) == recent_loss([1.0, 2.0, 3.0], config) == 2
    assert recent_loss([4.0], config) == 4


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("nbs/*.ipynb")), ids=lambda path: path.stem)
def test_no_page_is_filled_by_bars(path):
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
    assert [text for output in outputs if re.search(r"\d%\|", text := str(output.get("text", "")))] == []


def test_a_kernel_starts_without_a_word():
    """What `make` sets up keeps a kernel's own warnings off the screen; those of Python stay in the notebook."""
    pytest.importorskip("nbclient")
    if not (Path(sys.prefix) / "etc" / "ipython" / "ipython_kernel_config.py").exists():
        pytest.skip("this environment was not made by `make`")
    script = "import nbclient, nbformat as n\nbook = n.v4.new_notebook(cells=[n.v4.new_code_cell('import warnings; warnings.warn(str(6 * 7))')])"
    script += "\nnbclient.NotebookClient(book, kernel_name='python3').execute()\nprint(book.cells[0].outputs[0].text)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "UserWarning: 42" in done.stdout and "WARNING" not in done.stderr


def test_bars_are_tested_whatever_the_shell_says_of_tqdm():
    """A caller's TQDM_DISABLE reaches neither these tests nor what `make` runs; a target may still set its own."""
    here, silent = Path(__file__), {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{here}::test_a_terminal_gets_a_bar"]
    done = subprocess.run(command, capture_output=True, text=True, env=silent, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    if not (makefile := here.parent.parent / "Makefile").exists() or not shutil.which("make"):
        return  # in the wheel's tests there is none
    rule = 'shown: ; @echo "[$$TQDM_DISABLE]"; TQDM_DISABLE=1 printenv TQDM_DISABLE'
    silent = {name: value for name, value in silent.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # `make test` around us
    told = subprocess.run(["make", "-f", makefile, "--eval", rule, "shown"], capture_output=True, text=True, env=silent, check=True)
    assert told.stdout.split() == ["[]", "1"]
