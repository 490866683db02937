"""What the README shows runs as it stands."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import first_picture_time as first
import pytest
from PIL import Image

from ddpm_nb.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """List the README's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_blocks_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, "README.md", "exec"), {})
    assert "False" not in output.getvalue()
    (name,) = re.findall(r'"(\w+\.png)"', source)  # each example ends with a picture that one can look at
    with Image.open(tmp_path / name) as picture:
        assert min(picture.size) > 50


def test_shell_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ddpm-nb")]
    assert [line.split()[1] for line in lines] == ["train", "sample", "generate", "generate", "resume"]
    short = {"train": ["--iterations", "2"], "resume": []}
    for words in map(shlex.split, lines):
        assert main([*words[1:], *short.get(words[1], ["--steps", "2"])]) == 0
    for name in ("samples.png", "sevens.png", "rows.png"):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) >= 512


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"`make (\w+)`|^make (\w+)", text, flags=re.M))
    assert [name for pair in targets for name in pair if name and f"\n{name}:" not in makefile] == []


def test_linked_files_exist():
    links = re.findall(r"\]\(((?!https?:|\.\./)[^)]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_downloads_are_added_up():
    told = "Collecting six\n  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)\nDownloading torch (2.5MiB)\nProcessing ./torch.whl\n"
    assert first.downloaded(told) == 11_000 + 2.5 * 2**20


def measured(**changes):
    """Make up what was measured at one door."""
    steps = [{"step": "git clone", "downloaded bytes": 0, "processor seconds": 10.0}, {"step": "pip", "downloaded bytes": 2_400_000_000, "processor seconds": 102.0}]
    steps += [{"step": "generate", "downloaded bytes": 0, "processor seconds": seconds} for seconds in (8.0, 6.5)]
    about = {"hardware": "one core", "python": "3.11.7", "day": "2026-01-01", "cache": "empty"}
    return about | {"steps": steps, "clone bytes": 100_000_000, "disk bytes": 5_512_345_678} | changes


def test_what_a_first_picture_costs_finds_its_place_in_the_readme():
    text = first.with_table(README, {"make": measured(cache="filled"), "pip": measured()})
    assert "| `pip install .` | 2.5 GB | 5.5 GB | 120 s | 6.5 s |\n| `make setup` |  | 5.5 GB |" in text
    assert first.with_table(text, {"pip": measured()}) == first.with_table(README, {"pip": measured()})
    with pytest.raises(ValueError, match="one place"):
        first.with_table("no place", {"pip": measured()})


def test_the_readme_says_what_was_measured_of_a_first_picture():
    if first.FILE.exists():
        assert first.with_table(README, first.read_json(first.FILE)) == README
