"""The command as a newcomer meets it: own pictures, progress, words, interruptions, longer runs, held-out pictures."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

import ddpm_nb
from ddpm_nb import cli
from ddpm_nb.cli import main, shell_words, suit
from ddpm_nb.evaluation import bits_per_dim
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import load_pretrained
from ddpm_nb.pictures import FolderDataset
from ddpm_nb.progress import _Lines
from ddpm_nb.runs import read_settings
from ddpm_nb.training import OneProcess

QUICK = ["train", "--dataset", "digits", "--iterations", "2", "--batch-size", "8", "--n-steps", "20", "--device", "cpu", "--out", "run"]


pytestmark = pytest.mark.usefixtures("own_folder")


def draw_pictures(folder, n=40, size=(32, 32), mode="RGB"):
    """Fill a folder with pictures of noise."""
    Path(folder).mkdir(parents=True)
    for i in range(n):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=seeded(i)).numpy()
        Image.fromarray(pixels).save(f"{folder}/{i:03d}.png")


def ok(*words, capsys):
    """Run the command, which must succeed; return what it prints."""
    capsys.readouterr()
    assert main([*words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(*words, capsys):
    """Run the command, which must fail; return what it says."""
    capsys.readouterr()
    assert main([*words]) == 1
    return capsys.readouterr().err


def python(code):
    """Run a program."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


# --- before torch is loaded ---


def test_help_is_quick_and_loads_no_torch():
    done = python(
        "import sys, time\nfrom ddpm_nb.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['--version'], ['paint']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm', 'matplotlib', 'accelerate', 'safetensors'} & {*sys.modules}\n"
        "assert not heavy, heavy\nassert time.process_time() < 1\n"
    )
    assert done.returncode == 0, done.stderr
    assert "--dataset" in done.stdout and f"ddpm-nb {ddpm_nb.__version__}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--dataset", "digits", "--itterations", "2"], "unrecognized arguments: --itterations 2 (nearest: --iterations)"),
        (["sample", "--run", "digits", "--out", "x.png", "--setps=3"], "unrecognized arguments: --setps=3 (nearest: --steps)"),
        (["info", "--run", "digits", "mnist"], "unrecognized arguments: mnist"),
    ],
)
def test_a_misspelt_option_is_told_with_its_verb_and_the_nearest(words, told, capsys):
    with pytest.raises(SystemExit) as left:
        cli.make_parser().parse_args(words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"usage: ddpm-nb {words[0]} ")
    assert said.endswith(f"\nddpm-nb {words[0]}: error: {told}\n")


INTERRUPTED = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["ddpm-nb", "info", "--run", "digits"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
from ddpm_nb.__main__ import run
sys.exit(run())
"""


@pytest.mark.parametrize("name", ["ddpm_nb.cli", "argparse", "torch", "numpy", "ddpm_nb.runs"])
def test_ctrl_c_while_libraries_are_loaded_leaves_a_line(name):
    done = python(INTERRUPTED.format(name=name))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ddpm-nb: interrupted\n")


def test_ctrl_c_at_work_leaves_a_line():
    code = (
        "import signal, sys\nimport ddpm_nb.sampling\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background begins with it ignored
        "ddpm_nb.sampling.walk = lambda *_, **__: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = ['ddpm-nb', 'sample', '--run', 'digits', '--out', 'x.png']\n"
        "from ddpm_nb.cli import main\nsys.exit(main())\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ddpm-nb sample: interrupted\n")


def test_a_program_that_calls_main_keeps_its_signals():
    import signal

    before = signal.getsignal(signal.SIGINT)
    assert main(["info", "--run", "digits"]) == 0 and signal.getsignal(signal.SIGINT) == before


# --- words ---


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("image_size must be 8", "--image-size must be 8"),
        ("pass unreadable='skip' to", "pass --unreadable skip to"),
        ("out='my run' holds a run; resume it (resume=True)", "--out 'my run' holds a run; resume it (--resume)"),
        ("tensorboard=True needs out=, the folder", "--tensorboard needs --out, the folder"),
        ("16 with n_accumulate=4", "16 with --n-accumulate 4"),
        ("lr must be finite", "--lr must be finite"),
        ("a smaller lr or precision='float32'", "a smaller lr or --precision float32"),
        ("n_iterations must be", "--iterations must be"),
        ("the root of root/image_size 'lr must' seed", "the root of root/image_size 'lr must' seed"),
    ],
)
def test_errors_are_said_in_the_words_of_the_shell(says, told):
    assert shell_words(says, {name: cli._flag(name) for name in cli.default_options()}) == told


def test_what_functions_say_reaches_the_shell_in_its_words(monkeypatch, capsys):
    assert main(QUICK) == 0
    assert "--out run already holds a run; resume it (--resume), or choose another folder" in refused(*QUICK, capsys=capsys)
    draw_pictures("pics", 3)
    Path("pics/bad.png").write_text("no picture")
    words = ["train", "--dataset", "folder", "--root", "pics", "--out", "other", "--iterations", "1", "--n-steps", "5", "--network", "digits"]
    assert "pass --unreadable skip to leave them out" in refused(*words, capsys=capsys)
    assert main([*words, "--unreadable", "skip"]) == 0
    monkeypatch.setattr("ddpm_nb.runs.find_spec", lambda name: None)
    told = refused(*QUICK[:-1], "new", "--tensorboard", capsys=capsys)
    assert "--tensorboard needs the package tensorboard: pip install 'ddpm_nb[tensorboard]'" in told


def test_warnings_of_other_libraries_are_their_own(monkeypatch, capsys):
    def warn(args):
        warnings.warn_explicit("is old", UserWarning, "/site/pyparsing/core.py", 3)
        warnings.warn_explicit("is torn", UserWarning, str(Path(ddpm_nb.__file__).with_name("runs.py")), 3)

    monkeypatch.setitem(cli._VERBS, "info", warn)
    with pytest.warns(UserWarning, match="is old") as others:
        assert main(["info", "--run", "digits"]) == 0
    assert [(str(w.message), w.filename) for w in others] == [("is old", "/site/pyparsing/core.py")]  # as Python shows it
    assert capsys.readouterr().err == "ddpm-nb info: is torn\n"


# --- progress ---


def test_every_long_verb_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(_Lines, "seconds", 0.0)
    assert main([*QUICK, "--log-every", "1"]) == 0
    assert re.search(r"^training: 100% 2/2 \[.*loss=\d\.\d{4}\]$", capsys.readouterr().err, re.M)
    for words, said in (
        ("sample --run run --n 2 --steps 3 --out x.png", "sampling: 100% 3/3"),
        ("generate --n 1 --steps 3 --out x.png", "sampling: 100% 3/3"),
        ("evaluate --run run --n 2", "measuring: 100% 1/1"),
    ):
        assert main(words.split()) == 0
        assert said in capsys.readouterr().err


def test_the_last_loss_of_the_bar_is_the_one_that_is_told_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(_Lines, "seconds", 0.0)
    assert main([*QUICK, "--iterations", "7", "--log-every", "3"]) == 0  # the last line of the log has one loss
    told = capsys.readouterr()
    shown = re.findall(r"loss=(\d\.\d{4})", told.err)[-1]
    assert f"loss {shown}\n" in told.out


# --- samplers ---


@pytest.mark.parametrize(("sampler", "default"), [("ddim", 50), ("ddpm", 60), ("dpm-solver", 20)])
def test_steps_count_for_every_sampler(sampler, default, monkeypatch, capsys):
    assert main([*QUICK, "--n-steps", "60"]) == 0
    import ddpm_nb.fast as fast

    calls, optimize = [], fast.optimize_for_sampling

    def count(*args, **options):
        model = optimize(*args, **options)
        return lambda x, t: calls.append(len(x)) or model(x, t)

    monkeypatch.setattr(fast, "optimize_for_sampling", count)
    words = ["sample", "--run", "run", "--n", "1", "--out", "x.png", "--sampler", sampler]
    for steps in (4, None):
        calls.clear()
        assert main(words + (["--steps", str(steps)] if steps else [])) == 0
        assert len(calls) == (steps or default)


# --- longer runs ---


def test_a_finished_run_says_so_and_goes_on_for_longer(capsys):
    assert main(QUICK) == 0
    sheet = Path("run/samples.png").read_bytes()
    told = ok("resume", "--out", "run", capsys=capsys)
    assert "the run in run is finished: 2 of 2 iterations; to train longer: ddpm-nb resume --out run --iterations 4" in told
    assert "trained" not in told and Path("run/samples.png").read_bytes() == sheet
    assert ok(*QUICK, "--resume", capsys=capsys).count("is finished") == 1
    words = re.search(r"to train longer: ddpm-nb (.*)", told)[1].split()
    assert "trained 4 iterations" in ok(*words, capsys=capsys) and read_settings("run")[0].n_iterations == 4
    assert Path("run/samples.png").read_bytes() != sheet
    assert "trained 6 iterations" in ok(*QUICK, "--iterations", "6", "--resume", capsys=capsys)
    assert "--iterations must be at least 6, those already made; got 5" in refused("resume", "--out", "run", "--iterations", "5", capsys=capsys)
    assert "4 of 6" not in ok("info", "--run", "run", capsys=capsys)
    assert re.search("iterations +6 of 6", ok("info", "--run", "run", capsys=capsys))


def test_a_restart_keeps_what_was_chosen_at_the_start(capsys):
    """One line serves a job for the first start and for every restart, whatever the machine would choose now."""
    draw_pictures("pics", 20, (8, 8))
    words = ["train", "--dataset", "folder", "--root", "pics", "--out", "run", "--resume", "--iterations", "2", "--n-steps", "10", "--device", "cpu"]
    assert main([*words, "--lr", "0.002"]) == 0
    told = ok(*words, "--iterations", "3", capsys=capsys)  # without --lr: the run's own
    assert "resuming run" in told and "chosen" not in told and read_settings("run")[0].lr == 0.002
    assert "--lr was 0.002 and is 0.1" in refused(*words, "--lr", "0.1", capsys=capsys)


# --- options from a file ---


def test_a_file_of_options_takes_the_names_of_the_shell(capsys):
    options = {"dataset": "digits", "iterations": 2, "--batch-size": 8, "n-steps": 20, "log_every": 1, "held-out": 0.1, "out": "run"}
    Path("o.json").write_text(json.dumps(options))
    assert main(["train", "--config", "o.json", "--device", "cpu"]) == 0
    config, kept = read_settings("run")
    assert (config.n_iterations, config.batch_size, config.log_every) == (2, 8, 1)
    assert kept["n_steps"] == 20 and kept["held_out"] == 0.1
    assert main(["train", "--config", "run/train.json", "--out", "again"]) == 0
    assert read_settings("again")[0] == config


def test_an_unlimited_gradient_survives_its_file():
    assert main([*QUICK, "--grad-clip", "inf"]) == 0
    assert main(["train", "--config", "run/train.json", "--out", "again"]) == 0
    assert read_settings("again")[0].grad_clip == math.inf


# --- own pictures ---

FOLDER = ["train", "--dataset", "folder", "--root", "my pictures", "--out", "run", "--device", "cpu"]


def test_a_folder_trains_with_what_suits_it(monkeypatch, capsys):
    draw_pictures("my pictures")
    monkeypatch.setattr("ddpm_nb.runs.train", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("enough")))
    assert main(FOLDER) == 1
    (line,) = capsys.readouterr().out.splitlines()
    begin, chosen = line.split(", chosen (pass others to change them): ")
    assert re.fullmatch(r"40 images, 0\.\d\dM parameters, about .+ (s|minutes|hours), at most \d+ MB on the disk", begin)
    words = chosen.split()
    said = dict(zip(words[::2], words[1::2], strict=True))
    every = int(said.pop("--sample-every"))
    assert said == {"--image-size": "32", "--network": "small", "--lr": "0.002", "--iterations": "2500", "--batch-size": "8"}
    assert 1 <= every <= 1500


def test_what_is_said_is_not_chosen(capsys):
    draw_pictures("my pictures")
    given = "--image-size 8 --network digits --lr 0.01 --iterations 2 --batch-size 4 --sample-every 1 --n-steps 10"
    told = ok(*FOLDER, *given.split(), capsys=capsys)
    assert "chosen" not in told.splitlines()[0]
    config, kept = read_settings("run")
    assert (config.lr, config.batch_size, config.n_iterations) == (0.01, 4, 2)
    assert (kept["image_size"], kept["network"]) == (8, "digits")
    assert sorted(path.name for path in Path("run/samples").iterdir()) == ["step-00000001.png", "step-00000002.png"]


def test_the_first_pictures_come_by_themselves_and_the_disk_holds_what_was_said(capsys):
    draw_pictures("my pictures", 12, (8, 8))
    line = ok(*FOLDER, "--iterations", "3", "--n-steps", "10", "--checkpoint-every", "1", capsys=capsys).splitlines()[0]
    assert "--sample-every 3" in line and "--batch-size 12" in line and "--network digits" in line
    assert Path("run/samples/step-00000003.png").exists()
    stated = int(re.search(r"at most (\d+) MB", line)[1]) * 1e6
    held = sum(path.stat().st_size for path in Path("run").rglob("*.safetensors"))
    assert 0.5 * stated < held < 1.1 * stated


@pytest.mark.parametrize(
    ("size", "mode", "device", "expected"),
    [
        ((32, 32), "RGB", "cpu", (32, False)),
        ((28, 28), "L", "cpu", (28, True)),
        ((300, 200), "RGB", "cpu", (32, False)),
        ((300, 200), "RGB", "cuda", (64, False)),
        ((21, 50), "L", "cpu", (20, True)),
        ((5, 5), "RGB", "cpu", (8, False)),
    ],
)
def test_the_size_comes_from_the_pictures(size, mode, device, expected):
    draw_pictures("pics", 3, size, mode)
    found = cli._look_at_pictures("pics", 64 if device == "cuda" else 32)
    assert (found["image_size"], found["grey"]) == expected


@pytest.mark.parametrize("n", [1, 5000])
@pytest.mark.parametrize("size", [8, 20, 32, 36, 64])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_what_suits_can_be_built_and_is_no_larger_than_the_folder(n, size, device):
    chosen = suit(n, size, device)
    with torch.device("meta"):
        network = ddpm_nb.make_unet(chosen["network"], image_size=size, in_channels=3)
    million = sum(p.numel() for p in network.parameters()) / 1e6
    assert chosen["batch_size"] <= n and (million < 3 or (device == "cuda" and n >= 5000 and chosen["lr"] == 2e-4))


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.3, 1.5, 26])
@pytest.mark.parametrize("n_iterations", [10, 1500, 10_000])
def test_first_pictures_come_within_four_minutes(seconds, n_iterations):
    every = cli._how_often(seconds, n_iterations)
    assert 1 <= every <= n_iterations and (every == 1 or every * seconds <= 240)


@pytest.mark.parametrize(("seconds", "first"), [(0.1, 600), (0.5, 100), (7.0, 8), (0.04, 0)])
def test_a_run_of_minutes_shows_what_it_draws_after_one(seconds, first, monkeypatch, capsys):
    """With or without pictures later on; not if the user wants none, and not in a run of two minutes."""
    told, chosen = [], {"sample_every": 100}
    monkeypatch.setattr(cli, "_seconds_per_iteration", lambda *args: seconds)
    monkeypatch.setattr(cli, "_say", lambda text, processes: told.append(text))
    data, schedule = ddpm_nb.load_dataset("digits"), ddpm_nb.make_schedule("cosine", 20)
    network = ddpm_nb.make_unet("digits")
    for early, every in ((True, True), (True, False), (False, False)):
        options = cli.default_options() | {"dataset": "digits", "early": early, "n_iterations": 2000}
        cli._tell_plan(options, chosen if every else {}, data, network, schedule, OneProcess())
        assert options.get("first_sample", 0) == (first if early else 0)
        assert bool(options["sample_every"]) == every
    assert f"about {cli._spell(2000 * seconds)}" in told[-1]  # no sheets, no time for them


def test_the_first_samples_are_told_once_with_their_place(monkeypatch, capsys):
    draw_pictures("my pictures", 12, (8, 8))
    monkeypatch.setattr(cli, "_seconds_per_iteration", lambda *args: 40.0)  # a minute is one iteration
    told = ok(*FOLDER, "--iterations", "4", "--n-steps", "10", capsys=capsys)
    assert told.count("samples after") == 1 and "samples after 1 of 4 iterations: run/samples/step-00000001.png" in told.splitlines()
    assert Path("run/samples/step-00000001.png").exists()
    assert "samples after" not in ok(*FOLDER[:-4], "--out", "other", "--sample-every", "0", "--iterations", "2", "--n-steps", "10", capsys=capsys)
    assert not Path("other/samples").exists()


def test_a_run_that_goes_on_goes_on_drawing(capsys):
    draw_pictures("my pictures", 12, (8, 8))
    words = [*FOLDER, "--n-steps", "10", "--sample-every", "2"]
    assert main([*words, "--iterations", "2"]) == 0 and main(["resume", "--out", "run", "--iterations", "5"]) == 0
    assert [path.name for path in sorted(Path("run/samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    assert main(["resume", "--out", "run", "--iterations", "6", "--sample-every", "0"]) == 0
    assert len([*Path("run/samples").iterdir()]) == 2


def test_the_time_that_is_told_is_the_time_it_takes():
    """The estimate of an iteration and of a sheet, against the work itself, as this machine is busy now."""
    import time

    from ddpm_nb.training import TrainConfig, Trainer

    data, schedule, config = ddpm_nb.load_dataset("digits"), ddpm_nb.make_schedule("cosine", 20), TrainConfig(batch_size=32)
    network = ddpm_nb.make_unet("digits")
    ratios = []
    for _ in range(5):  # a busy machine is never twice alike
        said = cli._seconds_per_iteration(network, schedule, config, data), cli._seconds_per_sheet(network, 20)
        trainer, x = Trainer(network, schedule, config), data.images()[:32]
        started = time.perf_counter()
        for _ in range(10):
            trainer.step(x)
        middle = time.perf_counter()
        cli._draw_sheet(network, schedule, "eps", 20, Path("x.png"))
        took = (middle - started) / 10, time.perf_counter() - middle
        ratios.append([a / b for a, b in zip(said, took, strict=True)])
    for found in zip(*ratios, strict=True):
        assert 0.3 < sorted(found)[2] < 3


def test_timing_the_steps_changes_no_weight():
    draw_pictures("my pictures", 12, (8, 8))
    quick = ["--iterations", "2", "--n-steps", "10", "--precision", "float32"]
    assert main([*FOLDER, *quick]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_seconds_per_iteration", lambda *args: 1.0)
        assert main([*FOLDER[:-3], "other", "--device", "cpu", *quick]) == 0
    one, other = (Path(name, "model.safetensors").read_bytes() for name in ("run", "other"))
    assert one == other


# --- held-out pictures of a flat folder ---


def flat_run(held_out=None, n=20):
    """Train shortly on a flat folder of grey pictures."""
    if not Path("pics").exists():
        draw_pictures("pics", n, (8, 8), "L")
    words = ["train", "--dataset", "folder", "--root", "pics", "--out", "run", "--device", "cpu", "--iterations", "2", "--n-steps", "10"]
    assert main(words + (["--held-out", held_out] if held_out else [])) == 0


@pytest.mark.parametrize(("held_out", "n_held"), [("0.25", 5), ("4", 4), ("0.01", 1)])
def test_a_flat_folder_is_divided_and_measured_on_what_was_held_out(held_out, n_held, monkeypatch, capsys):
    trained, measured = [], []
    import ddpm_nb.evaluation
    import ddpm_nb.runs

    train = ddpm_nb.runs.train
    monkeypatch.setattr(ddpm_nb.runs, "train", lambda m, s, data, *a, **o: trained.append((data, o["held_out"])) or train(m, s, data, *a, **o))
    flat_run(held_out)
    data, held = trained[0]
    assert len(data) == 20 - n_held and len(held) == n_held
    whole = FolderDataset("pics", 8, grey=True).images()
    parts = torch.cat([data.images(), held]).flatten(1)
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole.flatten(1).tolist()))  # each once, none twice
    if n_held < 2:
        return
    monkeypatch.setattr(ddpm_nb.evaluation, "bits_per_dim", lambda m, s, images, **o: measured.append(images) or bits_per_dim(m, s, images, **o))
    told = ok("evaluate", "--run", "run", "--n", "64", capsys=capsys)
    assert f"bits/dim on {n_held} test images of folder" in told and measured[0].equal(held)
    assert main(["resume", "--out", "run", "--iterations", "3"]) == 0  # the same part again
    assert trained[1][1].equal(held)


@pytest.mark.parametrize("verb", ["train", "resume", "evaluate", "parts", "train-text"])
def test_the_shell_walks_through_a_folder_once_and_decodes_each_picture_once(verb, monkeypatch, capsys):
    if verb == "parts":
        for part, n in (("train", 6), ("test", 4)):
            draw_pictures(f"pics/{part}", n, (8, 8), "L")
    else:
        flat_run("0.2", n=10)
    for file in Path("pics").glob("*.png"):
        file.with_suffix(".txt").write_text("a red cat")
    n, walk, load = Counter(), os.walk, ImageFile.ImageFile.load
    monkeypatch.setattr(os, "walk", lambda top, *args, **options: n.update([Path(top).name]) or walk(top, *args, **options))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda file: n.update(["decoded"] * bool(file.tile)) or load(file))
    monkeypatch.setattr(cli, "_train", lambda options, data, held, **_: (data[0], held.images()))
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda data, *_, **__: data.loaded())
    begun = ["train", "--dataset", "folder", "--root", "pics", "--out", "new", "--device", "cpu", "--held-out"]
    words = {"train": [*begun, "0.2"], "parts": [*begun, "2"], "resume": ["resume", "--out", "run"], "evaluate": ["evaluate", "--run", "run"]}
    words["train-text"] = ["train-text", "--root", "pics", "--out", "new"]
    assert main(words[verb]) == 0
    assert n["decoded"] == 10 and n["pics"] == 1


def test_pictures_that_were_trained_on_are_not_measured(capsys):
    flat_run()
    told = refused("evaluate", "--run", "run", capsys=capsys)
    assert "was trained on all pictures in pics: pass --root with other pictures, or train with --held-out 0.1" in told
    assert "was trained on all" in refused("evaluate", "--run", "run", "--held-out", "0.5", capsys=capsys)
    assert "was trained on all" in refused("evaluate", "--run", "run", "--root", "pics", capsys=capsys)
    draw_pictures("others", 6, (8, 8), "L")
    assert "on 6 test images" in ok("evaluate", "--run", "run", "--root", "others", capsys=capsys)
    assert "on 3 test images" in ok("evaluate", "--run", "run", "--root", "others", "--held-out", "0.5", capsys=capsys)


def test_pictures_that_were_trained_on_are_never_called_held_out(capsys):
    flat_run("0.25")
    assert "--held-out must be above 0" in refused("evaluate", "--run", "run", "--held-out", "0", capsys=capsys)
    draw_pictures("others", 1, (8, 8), "L")
    next(Path("others").iterdir()).rename("pics/more.png")  # one more picture divides them all anew
    told = refused("evaluate", "--run", "run", capsys=capsys)
    assert "are not those that the run divided: what was held out cannot be found again; pass --root" in told
    Path("pics/more.png").unlink()
    assert "on 5 test images" in ok("evaluate", "--run", "run", capsys=capsys)


def test_no_more_is_measured_than_was_held_out(capsys):
    flat_run("0.25")
    assert "--held-out must be at most 0.25, what the run held out; got 0.5" in refused("evaluate", "--run", "run", "--held-out", "0.5", capsys=capsys)
    assert "on 2 test images" in ok("evaluate", "--run", "run", "--held-out", "0.1", capsys=capsys)
    Path("pics").rename("moved")
    assert "on 5 test images" in ok("evaluate", "--run", "run", "--root", "moved", capsys=capsys)


def test_something_must_be_left_to_train_on(capsys):
    draw_pictures("pics", 5, (8, 8))
    told = refused("train", "--dataset", "folder", "--root", "pics", "--out", "run", "--held-out", "5", capsys=capsys)
    assert "--held-out must be less than all 5 pictures; got 5" in told and not Path("run").exists()


def test_a_shipped_model_is_measured_on_a_flat_folder(capsys):
    draw_pictures("pics", 4, (8, 8), "L")
    assert "on 2 test images of folder" in ok("evaluate", "--run", "digits", "--dataset", "folder", "--root", "pics", "--n", "2", capsys=capsys)


# --- a learned variance ---


def test_a_learned_variance_from_training_to_the_bound(capsys):
    assert main([*QUICK, "--variance", "learned", "--precision", "float32"]) == 0
    assert main(["sample", "--run", "run", "--sampler", "ddpm", "--n", "2", "--out", "x.png"]) == 0
    told = ok("evaluate", "--run", "run", "--n", "4", "--device", "cpu", "--out", "figures.json", capsys=capsys)
    assert "with the learned variance" in told
    figures = json.loads(Path("figures.json").read_text())
    model, schedule = load_pretrained("run")
    images = ddpm_nb.load_images("digits", split="test")[:4]
    bits = {
        name: bits_per_dim(network, schedule, images, n_levels=17, variance=name, generator=seeded(0)).mean
        for name, network in (("learned", model.network), ("posterior", model))
    }
    assert figures["variance"] == "learned" and figures["bits_per_dim"] == bits["learned"] != bits["posterior"]
    assert "variance" in ok("info", "--run", "run", capsys=capsys)


def test_a_fixed_variance_is_not_called_learned(capsys):
    assert main(QUICK) == 0
    assert "learned" not in ok("evaluate", "--run", "run", "--n", "2", "--out", "f.json", capsys=capsys)
    assert json.loads(Path("f.json").read_text())["variance"] == "posterior"


# --- what is known ---


def test_info_shows_parameters_data_and_settings(capsys):
    draw_pictures("my pictures", 12, (8, 8))
    assert main([*FOLDER, "--iterations", "2", "--n-steps", "10"]) == 0
    told = ok("info", "--run", "run", capsys=capsys)
    facts = {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in told.splitlines()}
    n = sum(p.numel() for p in load_pretrained("run")[0].parameters())
    assert facts["parameters"] == f"{n:,}" and facts["root"] == "my pictures" and facts["n_images"] == "12"
    assert facts["lr"] == "0.001" and facts["iterations"] == "2 of 2" and facts["checkpoints"] == "0, 2"
    Path("my pictures").rename("moved")
    assert main(["info", "--run", "run"]) == 0
    assert "parameters" in ok("info", "--run", "digits", capsys=capsys)


def test_one_picture_is_one(capsys):
    assert "wrote 1 image to x.png" in ok(*["sample", "--run", "digits", "--n", "1", "--steps", "1", "--out", "x.png"], capsys=capsys)
    assert "wrote 1 picture to x.png" in ok(*["generate", "--n", "1", "--steps", "1", "--out", "x.png"], capsys=capsys)


def test_the_wheel_is_small_enough_to_download():
    """A wheel is a zip file; what is in it is the package."""
    package, size = Path(ddpm_nb.__file__).parent, 0
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            size += len(zlib.compress(path.read_bytes(), 6))
    assert 1e6 < size < 25e6
