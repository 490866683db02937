"""What is installed: the archives that are built, their metadata, and the package from the wheel alone."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import markdown_it
import pytest
from address import settings

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import setuptools.build_meta as b; b.build_{0}('..'); print()"
LARGE = {"nbs", "book", ".github", "examples"}  # not needed to build


def build(kind, folder):
    """Build an archive in a folder, and find it beside it."""
    command = [sys.executable, "-c", BUILD.format(kind)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.parent.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build an sdist from the files under version control, and from that the wheel: as whoever has only the sdist."""
    work = tmp_path_factory.mktemp("built")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if name.partition("/")[0] not in LARGE and (ROOT / name).is_file():
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "tree" / name)
    sdist = build("sdist", work / "tree")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian's Python 3.11.2 has no filters
    with tarfile.open(sdist) as archive:
        archive.extractall(work, **safely)
    wheel = build("wheel", work / sdist.name.removesuffix(".tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return sdist, wheel, work / "site"


@pytest.fixture(scope="module")
def told(built):
    """Read the metadata of the wheel."""
    (path,) = built[2].glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text(encoding="utf-8"))


def from_the_wheel(built, folder, *words):
    """Run Python with the wheel's package, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(built[2])}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_metadata_says_what_the_project_says(told):
    address = f"{settings()['user']}/{settings()['repo']}"
    assert (told["Name"], told["Version"]) == (settings()["lib_name"], settings()["version"])
    assert told["Requires-Python"] == f">={settings()['min_python']}"
    assert told["License-Expression"] == "Apache-2.0" and told.get_all("License-File") == ["LICENSE"]
    urls = dict(line.split(", ") for line in told.get_all("Project-URL"))
    assert urls["Repository"] == f"https://github.com/{address}" and {"Homepage", "Issues"} < set(urls)
    assert told["Keywords"].split(",") == PROJECT["keywords"]
    classifiers = told.get_all("Classifier")
    assert {"Typing :: Typed", "Framework :: Jupyter", "Intended Audience :: Education"} < set(classifiers)
    minors = [int(found[1]) for line in classifiers if (found := re.search(r"Python :: 3\.(\d+)$", line))]
    assert minors[0] == int(settings()["min_python"].partition(".")[2])
    assert minors == sorted(minors) and len(minors) == 3


def test_what_is_needed_is_named_and_what_is_not_is_an_extra(told):
    needs = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(needs) == sorted(PROJECT["dependencies"])
    assert set(told.get_all("Provides-Extra")) == {"book", "tensorboard"}
    book = {line.partition(";")[0].strip() for line in told.get_all("Requires-Dist") if 'extra == "book"' in line}
    assert book == set(PROJECT["optional-dependencies"]["book"])


def test_the_long_description_is_the_readme_and_its_links_lead_somewhere(told):
    assert told["Description-Content-Type"] == "text/markdown"
    shown = markdown_it.MarkdownIt("commonmark").render(told.get_payload())
    assert shown.startswith("<h1>ddpm_nb</h1>") and shown.count("<pre><code") >= 6
    targets = re.findall(r'(?:href|src)="([^"]*)"', shown)
    inside = [target for target in targets if target.startswith(PROJECT["urls"]["Repository"])]
    assert len(targets) > 8 and all(target.startswith("https://") and "/../" not in target for target in targets)
    assert sum("/raw/HEAD/" in target for target in inside) == 2
    for target in inside:
        found = re.search(r"/(?:raw|blob)/HEAD/(.+)", target)
        assert (ROOT / found[1]).exists() if found else "/actions/workflows/" in target, target
    assert any(target.endswith("/actions/workflows/ci.yml") for target in inside)


def test_the_sdist_ships_no_tests_and_what_it_needs_to_build(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in names if "test" in Path(name).name.lower()] == []
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py", "tools/docstrings.py", "ddpm_nb/unet.py"} <= names


def test_the_wheel_holds_the_package_and_nothing_else(built):
    held = {str(path.relative_to(built[2])) for path in (built[2] / "ddpm_nb").rglob("*") if path.is_file()}
    names = subprocess.run(["git", "ls-files", "ddpm_nb"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert held == {name for name in names.split("\n") if name and (ROOT / name).is_file()}
    assert "ddpm_nb/py.typed" in held
    assert {path.name for path in built[2].iterdir()} == {"ddpm_nb", f"ddpm_nb-{settings()['version']}.dist-info"}
    (entries,) = built[2].glob("*.dist-info/entry_points.txt")
    assert "ddpm-nb = ddpm_nb.__main__:run" in entries.read_text()
    assert built[1].stat().st_size < 25e6


def test_the_package_is_run_by_its_name(built, tmp_path):
    done = from_the_wheel(built, tmp_path, "-m", "ddpm_nb", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"ddpm-nb {settings()['version']}"), done.stderr


HELP = """
import pydoc, ddpm_nb
assert "site" in ddpm_nb.__file__, ddpm_nb.__file__
for name in ("sample_ddim", "NoiseSchedule", "UNet", "TrainConfig", "load_pretrained", "q_sample"):
    print(pydoc.plain(pydoc.render_doc(getattr(ddpm_nb, name))))
"""


def test_help_shows_each_parameter(built, tmp_path):
    done = from_the_wheel(built, tmp_path, "-c", HELP)
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("Python Library Documentation: ")[1:]
    assert len(pages) == 6 and all(re.search(r"^[ |]+Args:$", page, re.M) for page in pages)
    for page, parameter in zip(pages, ("n_steps", "betas", "base_channels", "n_iterations", "name_or_path", "eps"), strict=True):
        assert re.search(rf"^[ |]+{parameter}: \S", page, re.M), parameter
