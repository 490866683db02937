"""The command line, as a user meets it: real processes, exit codes, words on the screen, files on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_nb.cli import main, make_parser

QUICK = ["train", "--dataset", "digits", "--iterations", "2", "--batch-size", "8", "--n-steps", "20"]


def shell(*words, cwd):
    command = Path(sys.executable).with_name("ddpm-nb")
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run([str(command), *words], cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def test_train_then_sample_from_a_shell(tmp_path):
    trained = shell(*QUICK, "--out", "runs/digits", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "ddpm-nb sample --run runs/digits --out samples.png" in trained.stdout
    drawn = shell("sample", "--run", "runs/digits", "--n", "6", "--steps", "3", "--out", "samples.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    from PIL import Image

    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (4 * (2 * 9 + 1), 4 * (3 * 9 + 1))  # two columns, three rows, a gap of one, four times as large
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "samples.png"]


def test_help_needs_no_explanation(tmp_path):
    text = shell("train", "--help", cwd=tmp_path).stdout
    assert "--dataset" in text and "needs no download" in text and "(default: cosine)" in text
    assert shell("--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("words", ["", "paint", "train --dataset cats --out x", "train --out x", "sample --run digits --out x.png --n so"])
def test_options_that_cannot_be_understood(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args(words.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --run nowhere --out x.png", "no model at nowhere"),
        ("sample --run digits --out x.jpg", "--out must name a .png file; got x.jpg"),
        ("sample --run digits --out no/x.png", "the folder no does not exist"),
        ("sample --run digits --out x.png --n 0", "--n must be at least 1; got 0"),
        ("sample --run digits --out x.png --steps 5000", "n_steps must be in 1..1000; got 5000"),
        ("sample --run digits --out x.png --seed -1", "--seed must be at least 0; got -1"),
        ("info --run nowhere", "no model at nowhere"),
        ("train --dataset digits --out run --iterations 0", "n_iterations must be at least 1; got 0"),
        ("train --dataset digits --out run --lr -1", "lr must be finite"),
        ("train --dataset digits --out run --n-steps 0", "n_steps must be at least 1; got 0"),
        ("train --dataset digits --out run --batch-size 9999", "batch_size must be at most the number of images, 1500; got 9999"),
    ],
)
def test_errors_say_what_to_do_and_leave_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 1
    assert message in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_run_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "run"]) == 0
    before = Path("run/model.safetensors").read_bytes()
    assert main([*QUICK, "--out", "run"]) == 1
    assert "already holds a run" in capsys.readouterr().err and Path("run/model.safetensors").read_bytes() == before


def test_a_failing_write_keeps_the_picture_before(tmp_path, monkeypatch, capsys):
    import PIL.Image

    monkeypatch.chdir(tmp_path)
    Path("x.png").write_text("the picture before")

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    assert main(["sample", "--run", "digits", "--n", "1", "--steps", "1", "--out", "x.png"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.png", "the picture before")]


def test_equal_seeds_give_equal_pictures_and_equal_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert main([*QUICK, "--precision", "float32", "--out", name]) == 0
        assert main(f"sample --run {name} --n 2 --steps 2 --seed 5 --out {name}.png".split()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert json.loads(Path("a/config.json").read_text())["sha256"] == json.loads(Path("b/config.json").read_text())["sha256"]


def test_info_names_the_facts(capsys):
    assert main(["info", "--run", "digits"]) == 0
    text = capsys.readouterr().out
    assert "image_size" in text and "iterations" in text and "digits" in text
