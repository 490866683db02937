"""Rules that the project keeps about itself: one address, one version, pinned actions, notebooks of one form."""

import ast
import configparser
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import address
import pytest
import yaml
from fastcore.docments import docments

import ddpm_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = [f"ddpm_nb.{path.stem}" for path in sorted((ROOT / "ddpm_nb").glob("[!_]*.py"))]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Written in halves, so that this file passes its own test.
REGISTRIES = ["pypi" + ".org", "pythonhosted" + ".org", "anaconda" + ".org", "download.pytorch" + ".org", "npmjs" + ".org"]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("name", MODULES)
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def settings():
    """Read settings.ini."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def tracked_text():
    """Yield the name and content of every text file under version control."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield name, data.decode("utf-8")


def cells(path, kind="code"):
    """List the sources of a notebook's cells of one kind."""
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def is_exported(source):
    """Tell whether a code cell goes into the package."""
    return re.match(r"(#\|.*\n)*#\|\s*export", source) is not None


def definitions(source):
    """List the public functions and classes that a cell defines at its top level."""
    code = re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.M)
    return [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]


def public_objects(name):
    """Yield the functions and classes that a module exports."""
    module = importlib.import_module(name)
    for key in module.__all__:
        if inspect.isfunction(getattr(module, key)) or inspect.isclass(getattr(module, key)):
            yield key, getattr(module, key)


def test_settings_and_packaging_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings()["version"] == ddpm_nb.__version__
    assert settings()["lib_name"] == project["name"]
    assert project["requires-python"] == f">={settings()['min_python']}"
    assert (settings()["license"], project["license"]) == ("apache2", "Apache-2.0")
    assert "requirements" not in settings(), "requirements are listed in pyproject.toml alone"


def test_address_is_in_settings_and_install_cells_only():
    assert address.disagreeing() == []
    wanted = f"{settings()['user']}/{settings()['repo']}"
    holders = {name for name, text in tracked_text() if wanted in text and not name.startswith("nbs/")}
    assert holders <= {"ddpm_nb/_modidx.py"}, "nbdev_export writes that one; nothing else repeats settings.ini"


def test_no_registry_is_named():
    assert [name for name, text in tracked_text() if any(host in text for host in REGISTRIES)] == []


def test_workflows_fit_their_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@each_workflow
def test_actions_are_pinned(path):
    uses = re.findall(r"uses:\s*(.+)", path.read_text())
    assert uses
    assert [line for line in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line)] == []


@each_workflow
def test_workflows_ask_for_little(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, f"{name} has no time limit"
        writes = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert writes <= ({"pages", "id-token"} if (path.stem, name) == ("pages", "deploy") else set())
    assert "concurrency" in workflow


def test_book_lists_every_chapter():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"] if chapter["file"].startswith("nbs/")]
    assert listed == [f"nbs/{path.stem}" for path in NOTEBOOKS if not path.stem.startswith("00_")]


@each_notebook
def test_notebook_begins_as_all_do(path):
    title, code = cells(path, "markdown")[0], cells(path)
    assert re.match(r"# .+\n\n> .+", title), "the first cell is a title and a one-line quote"
    assert code[0] == address.install_cell()
    exports = any(is_exported(source) for source in code)
    assert bool(re.fullmatch(r"#\|\s*default_exp \w+", code[1])) == exports, "a notebook names its module if it exports one"


@each_notebook
def test_outputs_name_no_path_of_a_machine(path):
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert re.findall(r"(?:/[\w.-]+)+/[\w.-]+\.py\b|/(?:home|root|tmp|Users)/", outputs) == []


@each_notebook
def test_code_cells_are_short(path):
    assert [source for source in cells(path) if len(source.splitlines()) > 30] == []


@each_notebook
def test_exported_names_are_shown(path):
    shown = "\n".join(source for source in cells(path)[1:] if not is_exported(source))
    names = [n for source in cells(path) if is_exported(source) for n in definitions(source)]
    assert [n for n in names if not re.search(rf"\b{n}\b", shown)] == []


def test_each_name_is_defined_once():
    found = Counter(name for path in NOTEBOOKS for source in cells(path) if is_exported(source) for name in definitions(source))
    assert [name for name, count in found.items() if count > 1] == []
    pasted = [(path.stem, n) for path in NOTEBOOKS for s in cells(path) if not is_exported(s) for n in definitions(s) if n in found]
    assert pasted == []


@each_module
def test_exports_are_documented(name):
    missing = [key for key, value in public_objects(name) if not (value.__doc__ or "").strip()]
    assert missing == []


@each_module
def test_parameters_are_commented(name):
    missing = []
    for key, value in public_objects(name):
        if inspect.isclass(value) and "__init__" not in vars(value):
            continue
        comments = docments(value, args_kwargs=True)
        missing += [f"{key}({p})" for p, comment in comments.items() if not comment and p not in ("self", "return")]
    assert missing == []
