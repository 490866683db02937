"""Rules that the project keeps about itself: one address, one version, pinned actions, notebooks of one form (tools/rules.py)."""

import ast
import configparser
import importlib
import inspect
import json
import operator
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import address
import pytest
import rules
import torch
import yaml

import ddpm_nb

ROOT = Path(__file__).resolve().parent.parent
BOOK = rules.read_book()
CHAPTERS = {nb.module: nb.number for nb in BOOK if nb.module}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Written in halves, so that this file passes its own test.
REGISTRIES = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "anaconda" + ".org",
    "download.pytorch" + ".org",
    "npmjs" + ".org",
]

# The names that users rely on, from the top of the package: see "The public contract" in the project's design.
SIGNATURES = {  # arguments that come by position, in this order; and those that are passed by name
    "reparameterize": "mean std eps=None * generator=None",
    "normal_kl": "mean_1 log_var_1 mean_2 log_var_2",
    "discretized_gaussian_log_likelihood": "x mean log_scale * n_levels=256",
    "NoiseSchedule": "betas",
    "q_step": "schedule x_prev t eps=None * generator=None",
    "q_sample": "schedule x_0 t eps=None * generator=None",
    "q_mean_variance": "schedule x_0 t",
    "q_posterior": "schedule x_0 x_t t",
    "predict_x_0": "schedule x_t t eps_hat",
    "predict_eps": "schedule x_t t x_0_hat",
    "linear_betas": "n_steps beta_start=0.0001 beta_end=0.02 * rescale=False",
    "cosine_betas": "n_steps s=0.008 max_beta=0.999",
    "sigmoid_betas": "n_steps start=-3.0 end=3.0 tau=1.0 max_beta=0.999",
    "make_schedule": "name n_steps * beta_start=None beta_end=None rescale=None s=None start=None end=None tau=None max_beta=None dtype=torch.float32",
    "simple_loss": "model schedule x_0 * t=None eps=None objective='eps' weighting='simple' generator=None",
    "vlb_terms": "model schedule x_0 * n_levels=256 clip_x_0=True variance='posterior' generator=None",
    "optimal_denoiser": "mixture schedule",
    "rate_distortion": "terms * n_levels=256",
    "sinusoidal_embedding": "t dim * layout='concat' max_period=10000.0",
    "UNet": "image_size in_channels base_channels=128 channel_mults=(1,2,2,2) n_res_blocks=2 attn_resolutions=(16,) dropout=0.0",
    "load_dataset": "name * root=None split='train' image_size=None",
    "load_images": "name * root=None split='train' image_size=None",
    "TrainConfig": "n_iterations=1500 batch_size=128",
    "train": "model schedule data config=None * out=None resume=False",
    "sample_ddpm": "model schedule shape * x_T=None variance='posterior' clip_x_0=True generator=None progress=False callback=None",
    "sample_ddim": "model schedule shape * n_steps=50 eta=0.0 x_T=None clip_x_0=True generator=None progress=False callback=None",
    "sample_dpm_solver": "model schedule shape * n_steps=20 x_T=None clip_x_0=True generator=None progress=False callback=None",
    "ddpm_step": "schedule x_t t eps_hat",
    "ddim_step": "schedule x_t t t_prev eps_hat * eta=0.0 clip_x_0=True generator=None",
    "p_sample": "model schedule x_t t",
    "load_pretrained": "name_or_path",
    "save_pretrained": "path model schedule * objective='eps' n_levels=None card=None overwrite=False",
    "unet_from_diffusers": "model_or_path * scheduler=None image_size=None",
    "unet_to_diffusers": "unet schedule",
    "TextToImage": "tokenizer text_encoder unet schedule autoencoder=None rule=None",
    "TextToImage.from_pretrained": "name_or_path * device='cpu'",
    "TextToImage.save_pretrained": "path * overwrite=False half=False",
    "TextToImage.generate": "prompt=None n=1 guidance=2.0 * negative=None image=None mask=None strength=None n_steps=50 eta=1.0 generator=None progress=False callback=None",
    "TextToImage.interpolate": "first second n=8 guidance=2.0 * n_steps=50 generator=None progress=False",
    "TextToImage.encode_text": "texts",
    "TextToImage.encode": "pictures",
    "TextToImage.decode": "z",
}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def settings():
    """Read settings.ini."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def tracked_text():
    """Yield the name and content of every text file under version control."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield name, data.decode("utf-8")


def test_settings_and_packaging_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings()["version"] == ddpm_nb.__version__
    assert settings()["lib_name"] == project["name"]
    assert project["requires-python"] == f">={settings()['min_python']}"
    assert (settings()["license"], project["license"]) == ("apache2", "Apache-2.0")
    assert "requirements" not in settings(), "requirements are listed in pyproject.toml alone"
    stage = next(line for line in project["classifiers"] if line.startswith("Development Status"))
    assert stage.endswith("Beta") == settings()["version"].startswith("0."), f"{settings()['version']} is called {stage}"


def test_address_is_in_settings_and_install_cells_only():
    assert address.disagreeing() == []
    wanted = f"{settings()['user']}/{settings()['repo']}"
    holders = {
        name for name, text in tracked_text() if wanted in text and not name.startswith("nbs/")
    }
    written = {"ddpm_nb/_modidx.py", "pyproject.toml", "README.md"}
    assert holders <= written, "make address writes these alone"
    readme = (ROOT / "README.md").read_text()
    assert readme.count(address.LINKS.format(**settings())) == 1, "the book and Colab, at the top"
    assert f"\n{address.INSTALL.format(**settings())}\n" in readme, "a line that one can paste"


def test_another_address_is_written_everywhere_and_a_wrong_one_is_told(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "ddpm_nb").mkdir()
    for name in ("settings.ini", "README.md", "pyproject.toml", "nbs/00_start.ipynb", "ddpm_nb/_modidx.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    old, new = f"{settings()['user']}/{settings()['repo']}", "somebody/a-copy"
    assert address.check(old, tmp_path) is None
    assert address.disagreeing(tmp_path) == []
    text = (tmp_path / "settings.ini").read_text()
    text = text.replace(f"repo = {settings()['repo']}", "repo = a-copy")
    (tmp_path / "settings.ini").write_text(text.replace(f"user = {settings()['user']}", "user = somebody"))
    assert address.check(new, tmp_path) is None
    assert "Set `user = x` and `repo = y` in settings.ini, run `make address`" in address.check("x/y", tmp_path)
    for path, correct in address.corrected(tmp_path).items():
        assert new in correct and old not in correct, path
        assert f"//{settings()['user']}." not in correct, path


@pytest.mark.parametrize("words", [["--check"], ["--check", "a-copy"], ["--chek", "somebody/a-copy"]])
def test_the_address_to_compare_with_is_asked_for(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["address.py", *words])
    with pytest.raises(SystemExit, match=r"--check OWNER/NAME"):
        address.main()


@pytest.mark.parametrize("path", sorted(ROOT.glob("ddpm_nb/[wp]*s/*/")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_ships_is_small_and_no_pickle(path):
    limit = {"weights": 4e6 if path.name == "digits" else 12e6, "pipelines": 15e6}[path.parent.name]
    assert sum(file.stat().st_size for file in path.iterdir()) <= limit
    assert [file.name for file in path.iterdir() if file.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"}] == []


def test_pins_are_releases():
    pins = [pin for path in ROOT.glob("requirements-*.txt") for pin in re.findall(r"^[\w.-]+==\S+", path.read_text(), re.M)]
    assert len(pins) > 100 and [pin for pin in pins if re.search(r"==[\d.]+(a|b|rc|\.dev)\d", pin)] == []


SUPPLIES = {"sklearn": "scikit-learn", "PIL": "pillow", "scipy": "scikit-learn", "huggingface_hub": "accelerate"}


def test_pages_import_only_what_their_install_cell_brings():
    """SUPPLIES names the distribution that a module comes from, or that always brings it along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + project["optional-dependencies"]["book"]
    brought = {re.match(r"[\w-]+", line)[0] for line in named} | {project["name"]}
    missing = set()
    for notebook in rules.read_book():
        for cell in notebook.code:
            for node in ast.walk(cell.tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                    if SUPPLIES.get(top, top) not in brought:
                        missing.add((notebook.path.name, top))
    none(sorted(missing))


def test_no_registry_is_named():
    none([name for name, text in tracked_text() if any(host in text for host in REGISTRIES)])


def test_pins_are_no_pre_releases():
    lines = [line for path in sorted(ROOT.glob("requirements-*.txt")) for line in path.read_text().splitlines()]
    pins = [line.split()[0] for line in lines if re.match(r"[\w.-]+==", line)]
    assert len(pins) > 50
    none([pin for pin in pins if re.search(r"==.*(a|b|rc|dev)\d", pin)])


def entries(text):
    """Map the packages of a lock to what it says of each."""
    return {part.partition("==")[0]: part for part in re.split(r"^(?=\w)", text, flags=re.M) if "==" in part}


def test_another_build_of_torch_replaces_cuda_alone(tmp_path):
    """What `make setup TORCH_INDEX=...` would run: all pins but PyTorch and CUDA, then PyTorch as pinned from that index."""
    command = ["make", "-n", "setup", f"VENV={tmp_path}", "TORCH_INDEX=https://somewhere/cpu"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (choose,) = [line for line in lines if line.startswith("awk")]
    sync, install = [line for line in lines if "uv pip sync" in line or "--default-index" in line]
    subprocess.run(choose, shell=True, cwd=ROOT, check=True)
    lock, chosen = entries((ROOT / "requirements-dev.txt").read_text()), entries((tmp_path / "requirements.txt").read_text())
    left = {name for name in lock if name not in chosen}
    assert {"torch", "torchvision", "triton"} < left and len(left) > 12
    assert all(re.fullmatch("(torch|torchvision|triton|(cuda|nvidia)-.*)", name) for name in left), left
    assert not any(name.startswith(("cuda", "nvidia")) for name in chosen)
    assert chosen == {name: lock[name] for name in chosen} and {"torchmetrics", "sympy", "numpy"} < set(chosen)
    assert f"--require-hashes {tmp_path}/requirements.txt" in sync
    assert install.split("--default-index ")[1].startswith("https://somewhere/cpu ")
    asked = subprocess.run(install.split("$(")[1].rstrip(")"), shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == [lock[name].split()[0] for name in ("torch", "torchvision")]
    plain = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--require-hashes requirements-dev.txt" in plain and "--default-index" not in plain and "awk" not in plain


def test_the_quick_check_holds_the_rules():
    """What CONTRIBUTING calls a rule is in `make check`, and each test that it names is there."""
    quick = (ROOT / "tools" / "test.sh").read_text().partition("= fast ]")[2].partition("exit")[0]
    files = "project equations glossary docstrings figures touch claims fonts first_picture front measures misuse devices teaching progress readme"
    named = dict(re.findall(r"tests/test_(\w+)\.py(?:::(\w+))?", quick))
    assert set(named) == set(files.split())
    for name, test in named.items():
        assert f"def {test or 'test_'}" in (ROOT / "tests" / f"test_{name}.py").read_text(), (name, test)


def test_what_is_long_runs_once_a_week():
    """Each target of the Makefile that no push runs is in a workflow with a time, so that somebody sees it fail."""
    text = (ROOT / ".github" / "workflows" / "weekly.yml").read_text()
    weekly = yaml.safe_load(text)
    assert weekly[True]["schedule"]  # YAML reads "on" so
    targets = {row["target"] for row in weekly["jobs"]["make"]["strategy"]["matrix"]["include"]}
    targets |= set(re.findall(r"run: make (\w+)$", text, re.M))
    known = set(re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    assert {"fresh", "oldest", "slow", "own", "look", "axe"} <= targets <= known


def test_axe_is_pinned_by_its_hash():
    package, lock = (json.loads((ROOT / "tools" / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert package["dependencies"] == lock["packages"][""]["dependencies"]
    brought = {name: entry for name, entry in lock["packages"].items() if name}
    assert {name: entry["version"] for name, entry in brought.items()} == {f"node_modules/{name}": v for name, v in package["dependencies"].items()}
    assert all(entry["integrity"].startswith("sha512-") for entry in brought.values())


def test_workflows_fit_their_schema():
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, WORKFLOWS),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@each_workflow
def test_actions_are_pinned(path):
    uses = re.findall(r"uses:\s*(.+)", path.read_text())
    assert uses
    none([line for line in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line)])


@each_workflow
def test_workflows_ask_for_little(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, f"{name} has no time limit"
        writes = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert writes <= (
            {"pages", "id-token"} if (path.stem, name) == ("pages", "deploy") else set()
        )
    assert "concurrency" in workflow


def none(found):
    """Assert that a list of offenders is empty, and name them all if it is not."""
    found = list(found)
    assert not found, "\n".join(map(str, found))


# Notebooks.


def test_order_of_modules():
    none(rules.order_of_modules(BOOK, CHAPTERS))


def test_order_of_cells():
    none(rules.order_of_cells(BOOK, CHAPTERS))


def test_form_of_cells():
    none([*rules.long_cells(BOOK), *rules.wide_lines(BOOK), *rules.untrue_ids(BOOK)])


def test_what_is_read_can_be_run():
    none([*rules.hidden_cells(BOOK), *rules.pytest_in_cells(BOOK), *rules.exercise_faults(BOOK)])


def test_formulas_and_exercises_of_the_text():
    texts = [(path, path.read_text(encoding="utf-8")) for path in (ROOT / "book").glob("*.md")]
    pages = [rules.Notebook(path, (rules.Cell("markdown", "", (), text, (), ()),)) for path, text in texts]
    none([*rules.broken_formulas(BOOK + pages), *rules.numbered_exercises(BOOK + pages)])


def test_no_rule_is_forgotten():
    none(line for lines in rules.offenders(BOOK).values() for line in lines)


def test_names_are_shown_and_defined_once():
    none([*rules.unshown(BOOK), *rules.defined_twice(BOOK)])


def test_notebooks_begin_as_all_do_and_name_no_machine():
    wrong = [
        nb.name for nb in BOOK if not re.match(r"# .+\n\n> .+", nb.cells[0].source)
    ]  # a title and a one-line quote
    wrong += [path.stem for path in address.disagreeing()]
    wrong += [
        nb.name
        for nb in BOOK
        if "google.colab" not in nb.code[0].source
        or bool(nb.module) != any(c.exported for c in nb.code)
    ]
    outputs = {
        nb.name: " ".join(output for cell in nb.code for output in cell.outputs) for nb in BOOK
    }
    machine = r"(?:/[\w.-]+)+/[\w.-]+\.py\b|/(?:home|root|tmp|Users)/"
    wrong += [
        f"{name}: {path}" for name, text in outputs.items() for path in re.findall(machine, text)
    ]
    none(wrong)


def test_links_and_contents():
    none([*rules.dead_links(BOOK, sorted((ROOT / "book").glob("*.md"))), *rules.contents_faults()])


def test_contributing_lists_the_chapters():
    rows = re.findall(
        r"^\|[^|]*\| (`\d\d_[^|]+) \|([^|]*)\|", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    names = [name for notebooks, _ in rows for name in re.findall(r"`(\w+)`", notebooks)]
    modules = [name for _, modules in rows for name in re.findall(r"`(\w+)`", modules)]
    assert names == [nb.name for nb in BOOK]
    assert modules == [nb.module for nb in BOOK if nb.module]


# The package.


def test_what_a_module_offers_is_there():
    """A method that a cell adds to a class is no name of the module: nbdev leaves out what `@patch` adds."""
    for module in CHAPTERS:
        loaded = ddpm_nb if module == "__init__" else importlib.import_module(f"ddpm_nb.{module}")
        assert [name for name in loaded.__all__ if getattr(loaded, name, None) is None] == [], module


def test_public_names_are_documented():
    none([*rules.undocumented(CHAPTERS), *rules.open_signatures(CHAPTERS)])


def test_every_module_comes_from_a_notebook():
    by_hand = {"__main__", "_modidx"}  # the second is nbdev's
    assert {path.stem for path in (ROOT / "ddpm_nb").glob("*.py")} - by_hand == set(CHAPTERS)


def test_top_offers_the_same_names_to_readers_and_to_python():
    """The imports that editors read and the table that Python reads agree, and the table agrees with the modules."""
    tree = ast.parse((ROOT / "ddpm_nb" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {alias.name: node.module.removeprefix("ddpm_nb.") for node in block.body for alias in node.names}
    assert read == rules.offered()
    homes = {
        name: getattr(ddpm_nb, name).__module__
        for name in read
        if hasattr(getattr(ddpm_nb, name), "__module__")
    }
    assert {name: home for name, home in homes.items() if home != f"ddpm_nb.{read[name]}"} == {}
    assert set(ddpm_nb.__all__) == set(read) <= set(dir(ddpm_nb))


def test_contract_is_offered_at_the_top():
    none([f"{name} is not offered" for name in SIGNATURES if name.split(".")[0] not in rules.offered()])
    with pytest.raises(AttributeError, match="no attribute 'sample_dpmm'"):
        ddpm_nb.sample_dpmm  # noqa: B018


def spelled(parameters):
    """Write parameters as SIGNATURES does."""
    words = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", ""))
    return words


def test_contract_keeps_its_signatures():
    """Each argument of the contract is there, in its place and with its default; options may be added at the end."""
    wrong = []
    for name, wanted in SIGNATURES.items():
        parameters = inspect.signature(operator.attrgetter(name)(ddpm_nb)).parameters
        found = spelled(p for p in parameters.values() if p.name != "self")
        positional, _, named = wanted.partition("*")
        in_place = found[: len(positional.split())] == positional.split()
        by_name = found[found.index("*") :] if "*" in found else []
        if not in_place or not set(named.split()) <= set(by_name):
            wrong.append(f"{name}({', '.join(found)}), wanted ({wanted})")
    none(wrong)


def test_contract_has_the_methods_that_draw_and_keep():
    """What a user calls on a pipeline is in the contract as the functions are; the rest is for who writes one."""
    own = {name for name, member in inspect.getmembers(ddpm_nb.TextToImage, callable) if name[0] != "_"}
    listed = {name.removeprefix("TextToImage.") for name in SIGNATURES if name.startswith("TextToImage.")}
    assert own - {"to_parts", "from_parts"} == listed


def test_no_function_reads_its_arguments_from_the_frame():
    """`locals()` hides which names a dictionary gets, and gives it the next variable, too."""
    calls = []
    for path in sorted((ROOT / "ddpm_nb").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("locals", "eval", "exec"):
                calls.append(f"{path.name}: {ast.unparse(node)}")
    none(calls)


def test_a_private_name_stays_in_its_module():
    """What another module needs is public where it is defined, with its parameters told, or is a method of what both hold."""
    taken = []
    for path in sorted([*(ROOT / "ddpm_nb").glob("*.py"), *(ROOT / "studies").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            ours = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ddpm_nb"))
            names = [alias.name for alias in node.names] if ours else []
            taken += [f"{path.name}: {name} of {node.module}" for name in names if name.startswith("_")]
    none(taken)


@pytest.mark.parametrize(
    "words", ["that is no run's and would be replaced", "already holds a run", "whole numbers in 0..{n_classes", "clip_grad_norm_("]
)
def test_what_several_modules_need_is_written_once(words):
    """The folder of a run, the numbers of classes, the limit of a gradient: one function each, which all call."""
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "ddpm_nb").glob("*.py"))]
    assert sum(text.count(words) for text in texts) == 1


def test_package_loads_nothing_before_it_is_used():
    code = "import sys, ddpm_nb; dir(ddpm_nb); print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'PIL')])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


# those that give closures and say it in words
UNTOLD = {"edm_denoiser", "optimal_denoiser", "predict_noise", "velocity_from_eps"}


def own_classes(cls):
    """List a class and those of its bases that are the package's own."""
    return [one for one in cls.__mro__ if one.__module__.startswith("ddpm_nb")]


def public_calls():
    """Yield the functions that are offered at the top, and the methods of the classes, inherited ones too, with their names."""
    for name in rules.offered():
        offered = getattr(ddpm_nb, name)
        if not inspect.isclass(offered):
            yield name, offered
            continue
        for cls in reversed(own_classes(offered)):
            for key, member in vars(cls).items():
                function = getattr(member, "__func__", member)  # of a classmethod
                if inspect.isfunction(function) and not key.startswith("_"):
                    yield f"{name}.{key}", function


def test_types_of_results_are_told():
    """What an editor or a type checker learns from an annotation: it is there, and its names resolve."""
    calls = dict(public_calls())
    assert {"load_pretrained", "train", "sample_ddim", "TextToImage.generate"} <= set(calls)
    hints = {name: typing.get_type_hints(function) for name, function in calls.items()}
    untold = [name for name in hints if "return" not in hints[name] and name not in UNTOLD]
    none([f"{name} says no type of what it returns" for name in untold])
    assert hints["vlb_terms"]["return"] is ddpm_nb.VLBTerms
    assert hints["load_pretrained"]["return"] == tuple[torch.nn.Module, ddpm_nb.NoiseSchedule]
    assert hints["TextToImage.from_pretrained"]["return"] is typing.Self
    assert hints["train"]["return"] is hints["fit"]["return"] is ddpm_nb.TrainResult
    samplers = [name for name in hints if name.startswith("sample_")]
    assert len(samplers) > 5 and {hints[name]["return"] for name in samplers} == {torch.Tensor}


def test_a_type_checker_sees_every_method_and_no_name_that_is_not_there():
    """It reads classes and does not run code: a method that is added later is announced in the body of the class."""
    unseen = []
    for name in rules.offered():
        cls = getattr(ddpm_nb, name)
        if not inspect.isclass(cls) or issubclass(cls, torch.nn.Module):  # a module has `__getattr__`, for a checker too
            continue
        seen = set()
        for one in own_classes(cls):
            body = ast.parse(inspect.getsource(one)).body[0].body
            seen |= {node.name for node in body if isinstance(node, ast.FunctionDef)}
            seen |= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
        methods = {key for key in dir(cls) if not key.startswith("_") and inspect.isfunction(getattr(cls, key))}
        unseen += [f"{name}.{key}" for key in sorted(methods - seen)]
    none(set(unseen) - {"FolderDataset.describe_files"})  # `runs` alone asks for it
    top = ast.parse((ROOT / "ddpm_nb" / "__init__.py").read_text()).body
    assert "__getattr__" not in {node.name for node in top if isinstance(node, ast.FunctionDef)}, "it would offer every name"


def test_types_ship():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["ddpm_nb"]
    assert "py.typed" in shipped
    assert (ROOT / "ddpm_nb" / "py.typed").is_file()


def test_only_install_cells_are_not_run():
    """`eval: false` keeps a cell from every check, so that "Run all" could fail in it."""
    kept = [
        (notebook.path.name, cell.source[:60])
        for notebook in rules.read_book()
        for cell in notebook.code
        if "eval: false" in cell.source and "google.colab" not in cell.source
    ]
    none(kept)
