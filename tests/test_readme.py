"""What the README shows runs as it stands."""

import contextlib
import io
import json
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


def test_shell_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ddpm-nb")]
    assert [line.split()[1] for line in lines] == ["train", "sample", "generate", "resume"]
    short = {"train": ["--iterations", "2"], "resume": []}
    for words in map(shlex.split, lines):
        assert main([*words[1:], *short.get(words[1], ["--steps", "2"])]) == 0
    for name in ("samples.png", "sevens.png"):
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


def test_times_to_a_first_picture_are_those_that_were_measured():
    """The table is there if the file is, and says what it holds: python studies/first_picture_time.py --readme."""
    assert bool(first.PLACE.search(README)) == first.FILE.exists()
    if first.FILE.exists():
        assert first.with_figures(README, json.loads(first.FILE.read_text())) == README


def test_downloads_are_added_up_and_told():
    told = "Collecting six\n  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)\nDownloading torch (2.5MiB)\nProcessing ./torch.whl\n"
    assert first.downloaded(told) == 11_000 + 2.5 * 2**20
    steps = [{"processor seconds": 9, "downloaded bytes": 9e9}]  # the clone does not count
    steps += [{"processor seconds": seconds, "downloaded bytes": 1.5e9} for seconds in (3, 4)]
    steps += [{"processor seconds": seconds, "downloaded bytes": 0} for seconds in (5.04, 4)]
    door = {"steps": steps, "disk bytes": 6.12e9, "cache": "empty"}
    measured = {"hardware": "a machine", "python": "3.11", "doors": {"pip": door, "make": door | {"cache": "filled"}}}
    lines = first.with_figures("a\n<!-- first picture -->\nold\n<!-- end -->\nb\n", measured).splitlines()
    assert lines[5] == "| `pip install .` | 3000 MB | 6.1 GB | 7 s | 5 s |" and "old" not in lines
    assert lines[6] == "| `make setup` | (not measured) | 6.1 GB | 7 s | 5 s |" and (lines[0], lines[-1]) == ("a", "b")
