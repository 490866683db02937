"""Many processes: two of them give what one gives, each reads its own images, the rate counts optimiser steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from ddpm_nb.data import batch_order, load_images
from ddpm_nb.gaussian import seeded_init
from ddpm_nb.runs import train
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig, lr_factor
from ddpm_nb.unet import make_unet

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "accelerate"
SCRIPT = (FOLDER / "train_digits.py").read_text()
CONFIG = TrainConfig(n_iterations=30, batch_size=32, lr=2e-3, warmup=10, precision="float32")  # the script's
SETTINGS = sorted(FOLDER.glob("*.yaml"))

# What huggingface/diffusers#4468 met: a scheduler that `prepare` has wrapped steps once for every process.
WRONG = """
from accelerate import Accelerator
from ddpm_nb.training import lr_factor

adamw = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=config.lr)
scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda i: lr_factor(config, i))
adamw, scheduler = Accelerator(cpu=True).prepare(adamw, scheduler)
wrong = []
for _ in range(10):
    wrong.append(adamw.param_groups[0]["lr"])
    adamw.step()
    scheduler.step()
tensors["wrong"] = torch.tensor(wrong, dtype=torch.float64)

# a run that dies after three of six steps
from ddpm_nb.runs import train

class Stop(Exception):
    pass

def die(trainer):
    if trainer.n_steps == 3:
        raise Stop

torch.manual_seed(0)
model = make_unet("digits", base_channels=8, norm_groups=2)
settings = dict(n_iterations=6, batch_size=8, n_accumulate=2, checkpoint_every=2, log_every=2, precision="float32")
options = {"out": "run", "callback": die, "progress": False, "processes": processes}
try:
    train(model, make_schedule("cosine", 300), load_images("digits"), TrainConfig(**settings), **options)
except Stop:
    pass
save_file(tensors, f"{path}-{os.environ.get('RANK', 0)}.safetensors")
"""


def run_here(folder, script=SCRIPT):
    """Run the script in this process and return the tensors that it wrote."""
    threads, arguments = torch.get_num_threads(), sys.argv
    try:
        sys.argv = ["train_digits.py", str(folder / "one"), "cpu"]
        with torch.random.fork_rng():
            exec(compile(script, "train_digits.py", "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = arguments
        torch.set_num_threads(threads)
    return load_file(folder / "one-0.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_folder(tmp_path_factory):
    """Run the script in two processes, started as a user starts them."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "train.py").write_text(SCRIPT + WRONG)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_2_processes.yaml")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "train.py", "two", "cpu"], cwd=folder, env=variables, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.safetensors"))) == 2, "a configuration that starts one process is no test of two"
    return folder


@pytest.fixture(scope="module")
def two(two_folder):
    """Return the tensors that two processes wrote."""
    return [load_file(two_folder / f"two-{rank}.safetensors") for rank in range(2)]


def assert_same_run(actual, expected):
    """Compare all tensors of a run; rounding leaves about 3e-7, any other difference more than 1e-4."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_give_the_run_of_one(one, two):
    assert one["losses"][-5:].mean() < 0.8 * one["losses"][:5].mean(), "there is something to compare"
    for run in two:
        assert_same_run({k: v for k, v in run.items() if k != "wrong"}, one)


def test_accumulated_parts_give_the_run_of_the_whole_batch(one, tmp_path):
    script = SCRIPT.replace("batch_size=32,", "batch_size=32, n_accumulate=2,")
    assert script != SCRIPT
    assert_same_run(run_here(tmp_path, script), one)


def test_another_seed_gives_another_run(one, tmp_path):
    other = run_here(tmp_path, SCRIPT.replace("batch_size=32,", "batch_size=32, seed=1,"))
    assert (other["losses"] - one["losses"]).abs().max() > 1e-2, "the tolerance tells runs apart"


def test_a_run_of_two_processes_goes_on_in_one(two_folder):
    """Two processes died after step 3 of 6; their folder is a run like any other."""

    def finish(**options):
        with seeded_init(0):
            model = make_unet("digits", base_channels=8, norm_groups=2)
        config = TrainConfig(n_iterations=6, batch_size=8, n_accumulate=2, checkpoint_every=2, log_every=2, precision="float32")
        return train(model, make_schedule("cosine", 300), load_images("digits"), config, progress=False, **options)

    assert {p.name for p in (two_folder / "run" / "checkpoints").glob("*.json")} == {"step-00000000.json", "step-00000002.json"}
    resumed, whole = finish(out=two_folder / "run", resume=True), finish()
    torch.testing.assert_close(resumed.losses, whole.losses, rtol=0, atol=1e-5)


def test_the_rate_counts_optimiser_steps(one, two):
    expected = torch.tensor([CONFIG.lr * lr_factor(CONFIG, i) for i in range(30)], dtype=torch.float64)
    assert one["rates"].equal(expected)
    for run in two:
        assert run["rates"].equal(expected)
        per_process = torch.tensor([CONFIG.lr * lr_factor(CONFIG, 2 * i) for i in range(10)], dtype=torch.float64)
        torch.testing.assert_close(run["wrong"], per_process, rtol=1e-12, atol=0)
        assert (run["wrong"] - run["rates"][:10]).abs().max() > 0.2 * CONFIG.lr


@pytest.mark.parametrize("n_processes", [2, 4, 8])
def test_processes_share_the_batches_of_one(n_processes):
    options = {"seed": 3, "start": 5}  # runs over the end of the epoch
    whole = batch_order(100, 16, **options)
    shares = [batch_order(100, 16, rank=rank, n_processes=n_processes, **options) for rank in range(n_processes)]
    for _ in range(7):
        parts = [next(share)[0] for share in shares]
        assert {len(part) for part in parts} == {16 // n_processes}
        assert len(torch.cat(parts).unique()) == 16, "no image is in two shares"
        assert torch.cat(parts).equal(next(whole)[0])


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    settings = load_config_from_file(str(path))
    n_machines, n_processes = {"cpu_2_processes": (1, 2), "one_node_8_gpus": (1, 8), "eight_nodes_64_gpus": (8, 64)}[path.stem]
    assert (settings.num_machines, settings.num_processes) == (n_machines, n_processes)
    assert settings.distributed_type == DistributedType.MULTI_GPU, "the launcher of several processes"
    assert settings.use_cpu == path.stem.startswith("cpu")
    assert settings.mixed_precision == "no", "TrainConfig decides"


def test_the_page_shows_the_files():
    page = (ROOT / "nbs" / "26_scaling.ipynb").read_text()
    readme = (FOLDER / "README.md").read_text()
    assert len(SETTINGS) == 3
    cells = ["".join(cell["source"]) for cell in json.loads(page)["cells"]]
    shown = next(re.search(r'configuration = \"{3}(.*?)\"{3}', cell, re.S)[1] for cell in cells if "configuration = " in cell)
    assert yaml.safe_load(shown) == yaml.safe_load((FOLDER / "cpu_2_processes.yaml").read_text())
    for path in [*SETTINGS, FOLDER / "train_digits.py"]:
        assert path.name in page and path.name in readme
    assert not re.search("fsdp", "".join(path.read_text() for path in SETTINGS)), "what does not work has no file"
