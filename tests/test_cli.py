"""The command line, as a user meets it: real processes, exit codes, words on the screen, files on disk."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_disk import as_nobody
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb import cli
from ddpm_nb.cli import default_options, main, make_parser, read_options
from ddpm_nb.data import load_dataset, mix_seeds
from ddpm_nb.evaluation import bits_per_dim
from ddpm_nb.files import write_json
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import SHIPPED, describe_model, load_pretrained, save_pretrained
from ddpm_nb.pipeline import TextToImage
from ddpm_nb.plots import tile
from ddpm_nb.runs import read_settings
from ddpm_nb.runs import train as run_training
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.texts import TextConfig, draw_shapes
from ddpm_nb.training import TrainConfig
from ddpm_nb.unet import ResNetBaseline, make_unet

ROOT = Path(__file__).parent.parent


def own_noise(seed, n):
    """Return a generator for each image, as the command draws them."""
    return [seeded(mix_seeds(seed, i)) for i in range(n)]


QUICK = ["train", "--dataset", "digits", "--iterations", "2", "--batch-size", "8", "--n-steps", "20"]
FOLDER = ["train", "--config", "o.json", "--iterations", "1", "--batch-size", "8"]
COMMAND = str(Path(sys.executable).with_name("ddpm-nb"))
ENVIRONMENT = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def shell(*words, cwd):
    return subprocess.run([COMMAND, *words], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_train_then_sample_from_a_shell(tmp_path):
    trained = shell(*QUICK, "--out", "runs/digits", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "ddpm-nb sample --run runs/digits --out samples.png" in trained.stdout
    drawn = shell("sample", "--run", "runs/digits", "--n", "6", "--steps", "3", "--out", "samples.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    from PIL import Image

    with Image.open(tmp_path / "samples.png") as picture:
        # two columns, three rows, a gap of one, 19 times as large: the first size of at least 512
        assert picture.size == (19 * (2 * 9 + 1), 19 * (3 * 9 + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "samples.png"]


def test_help_needs_no_explanation(tmp_path):
    text = shell("train", "--help", cwd=tmp_path).stdout
    assert "--dataset" in text and "needs no download" in text and "(default: cosine)" in text
    assert re.search(r"--seed N\s+of the order of the data, the steps and the noise\s+\(default:\s+0\)", text)
    assert all("--" + name.replace("_", "-") in text for name in default_options())
    assert shell("--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        "",
        "paint",
        "train --dataset cats --out x",
        "train --out x",
        "train --dataset digits",
        "train --dataset digits --out x --lr fast",
        "resume",
        "train --dataset digits --out x --objective velvet",
        "train --dataset digits --out x --weighting heavy",
        "train --dataset digits --out x --precision float1",
        "train --dataset digits --out x --lr-decay fast",
        "train --dataset digits --out x --variance wide",
        "train --dataset digits --out x --unreadable eat",
        "train --dataset digits --out x --schedule tight",
        "train --dataset digits --out x --network net",
        "train --dataset digits --out x --device abacus",
        "train --dataset digits --out x --held-out some",
        "train --dataset digits --out x --held-out 1.5",
        "train --dataset digits --out x --held-out nan",
        "sample --run digits --out x.png --sampler walker",
        "sample --run digits --out x.png --n so",
        "evaluate",
    ],
)
def test_options_that_cannot_be_understood(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --run nowhere --out x.png", "no model at nowhere"),
        ("sample --run digits --out x.jpg", "--out must name a .png file; got x.jpg"),
        ("sample --run digits --out no/x.png", "the folder no does not exist"),
        ("sample --run digits --out x.png --n 0", "--n must be at least 1; got 0"),
        ("sample --run digits --out x.png --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("sample --run digits --out x.png --scale 101", "--scale must be in 1..100; got 101"),
        ("generate --out x.png --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("sample --run digits --out x.png --precision float16 --device cpu", "--precision float16 needs a CUDA device; got cpu"),
        ("sample --run digits --out x.png --steps 5000", "--steps must be in 1..1000; got 5000"),
        ("sample --run digits --out x.png --seed -1", "--seed must be in 0..18446744073709551615; got -1"),
        ("info --run nowhere", "no model at nowhere"),
        ("train --dataset digits --out run --iterations 0", "--iterations must be at least 1; got 0"),
        ("train --dataset digits --out run --lr -1", "--lr must be finite"),
        ("train --dataset digits --out run --grad-clip -1", "--grad-clip must be above 0, or inf; got -1"),
        ("train --dataset digits --out run --n-steps 0", "--n-steps must be at least 1; got 0"),
        ("train --dataset digits --out run --sample-every -1", "--sample-every must be at least 0; got -1"),
        ("train --dataset digits --out run --workers -1", "--workers must be at least 0; got -1"),
        ("train --dataset digits --out run --precision float16 --device cpu", "--precision float16 needs a CUDA device; got cpu"),
        ("train --dataset folder --out run --root nowhere --image-size 8", "--root must be an existing folder of pictures; got 'nowhere'"),
        ("train --dataset digits --out run --held-out -1", "--held-out must be at least 0; got -1"),
        ("evaluate --run digits --held-out 0.1", "--held-out is for a folder without parts"),
        ("generate --out x.png --steps 9999", "--steps must be in 1..980; got 9999"),
        ("train --config nowhere.json", "nowhere.json"),
        ("resume --out nowhere", "'nowhere' holds no training run"),
        ("evaluate --run digits --n 1", "--n must be at least 2; got 1"),
        ("evaluate --run digits --out no/x.json", "the folder no does not exist"),
        ("train --dataset digits --out run --batch-size 9999", "--batch-size must be at most the number of images, 1500; got 9999"),
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


@pytest.mark.parametrize("objective", ["v", "velocity"])
def test_a_network_that_predicts_something_else_is_sampled_and_measured_as_such(objective, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--objective", objective, "--precision", "float32", "--sample-every", "2", "--device", "cpu"]
    assert main([*QUICK, *options, "--out", "run"]) == 0
    assert main(["sample", "--run", "run", "--n", "16", "--seed", "0", "--device", "cpu", "--out", "drawn.png"]) == 0
    assert main(["evaluate", "--run", "run", "--n", "4", "--device", "cpu", "--out", "figures.json"]) == 0
    model, schedule = load_pretrained("run")
    draw = lambda model: sample_ddim(model, schedule, (16, 1, 8, 8), n_steps=20, generator=own_noise(0, 16))
    for name, model_ in (("right", model), ("wrong", model.network)):
        cli._save_picture(draw(model_), Path(f"{name}.png"))
    pictures = {path.name: path.read_bytes() for path in (*Path().glob("*.png"), Path("run/samples/step-00000002.png"))}
    assert pictures["drawn.png"] == pictures["step-00000002.png"] == pictures["right.png"] != pictures["wrong.png"]
    images = load_dataset("digits", split="test").images()[:4]
    bits = bits_per_dim(model, schedule, images, n_levels=17, generator=torch.Generator().manual_seed(0))
    assert json.loads(Path("figures.json").read_text())["bits_per_dim"] == bits.mean
    capsys.readouterr()
    assert main(["info", "--run", "run"]) == 0 and re.search(rf"objective +{objective}\n", capsys.readouterr().out)
    assert main(["resume", "--out", "run", "--iterations", "4", "--device", "cpu"]) == 0
    described, resumed = describe_model("./run"), load_pretrained("./run")[0]
    assert (described["facts"]["objective"], described["card"]["iterations"]) == (objective, 4)
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 15])
    assert resumed.objective == objective and not torch.equal(resumed(x, t), model(x, t))


def test_a_run_with_the_name_of_a_shipped_model_is_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "digits"]) == 0
    words = re.search("next: ddpm-nb (.*)", capsys.readouterr().out)[1].split()
    assert words[:3] == ["sample", "--run", "./digits"]
    assert main([*words, "--n", "4"]) == 0  # by default as many steps as the chain has, here 20
    model, schedule = load_pretrained("./digits")
    x = sample_ddim(model, schedule, (4, 1, 8, 8), n_steps=20, generator=own_noise(0, 4))
    cli._save_picture(x, Path("own.png"))
    assert Path("samples.png").read_bytes() == Path("own.png").read_bytes()


def test_resume_keeps_the_held_out_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--held-out", "5", "--out", "run"]) == 0
    given = []

    def enough(*args, held_out, **options):
        given.append(held_out)
        raise RuntimeError("enough")

    monkeypatch.setattr("ddpm_nb.runs.train", enough)
    assert main(["resume", "--out", "run"]) == 1
    assert given[0].shape == (5, 1, 8, 8)
    assert main([*QUICK, "--held-out", "6", "--resume", "--out", "run"]) == 1
    assert "--held-out was 5 and is 6" in capsys.readouterr().err
    settings = json.loads(Path("run/train.json").read_text())
    del settings["data"]["held_out"]  # as an older version wrote it
    Path("run/train.json").write_text(json.dumps(settings))
    assert main(["resume", "--out", "run"]) == 1
    assert given[1] is None


def test_info_names_the_facts(capsys):
    assert main(["info", "--run", "digits"]) == 0
    text = capsys.readouterr().out
    assert "image_size" in text and "iterations" in text and "digits" in text


def test_three_sources_of_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("options.json").write_text(json.dumps({"dataset": "digits", "n_iterations": 3, "batch_size": 8, "n_steps": 20, "out": "file"}))
    assert main(["train", "--config", "options.json", "--iterations", "1", "--out", "run"]) == 0
    config, data = read_settings("run")
    assert (config.n_iterations, config.batch_size, config.lr) == (1, 8, TrainConfig().lr)  # command, file, default
    assert data["n_steps"] == 20 and data["dataset"] == "digits" and not Path("file").exists()
    assert read_options("run/train.json")["n_iterations"] == 1


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"learning_rate": 1}, "unknown 'learning_rate'; allowed are dataset, root, image-size"),
        ({"config": 1, "data": 2}, "unknown 'config'; allowed are dataset, root"),
        ({"dataset": "cats"}, "'dataset' must be one of"),
        ({"lr": "1"}, "'lr' must be of type float; got '1'"),
        ({"seed": True}, "'seed' must be of type int; got True"),
        ({"resume": 1}, "'resume' must be of type bool; got 1"),
        ({"root": None}, "'root' must be of type str; got None"),
        ({"n_iterations": 1.5}, "'n_iterations' must be of type int; got 1.5"),
        ({"iterations": 3, "n-iterations": 3}, "'n-iterations' is there twice"),
        ({"--held-out": "0.1"}, "'--held-out' must be of type float; got '0.1'"),
        ([], "must hold an object of options; got list"),
        ("{", "must hold an object"),
    ],
)
def test_files_of_options_are_checked(contents, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("o.json").write_text(json.dumps(contents))
    assert main(["train", "--config", "o.json", "--dataset", "digits", "--out", "run"]) == 1
    assert message in capsys.readouterr().err and not Path("run").exists()


def weights(run):
    return json.loads(Path(run, "config.json").read_text())["sha256"], Path(run, "model.safetensors").read_bytes()


@pytest.fixture
def one_thread():
    """Compute as another process with one thread does; then as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_ends_where_an_undisturbed_run_does(number, code, tmp_path, monkeypatch, capsys, one_thread):
    words = ["train", "--dataset", "digits", "--iterations", "40", "--batch-size", "16", "--n-steps", "20", "--log-every", "1"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--out", "whole"]) == 0
    log = tmp_path / "cut" / "log.jsonl"
    with subprocess.Popen([COMMAND, *words, "--out", "cut"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while not (log.exists() and log.read_text().count("\n") >= 3) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        told = process.communicate(timeout=120)[1]
    assert process.returncode == code, told
    assert f"{number.name} after iteration" in told and "go on with: ddpm-nb resume --out cut" in told
    assert main(["resume", "--out", "cut"]) == 0 and "resuming cut" in capsys.readouterr().out
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_resume_says_when_the_newest_checkpoint_is_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--checkpoint-every", "1", "--out", "run"]) == 0
    before = weights("run")
    Path("run/checkpoints/step-00000002.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert main(["train", *QUICK[1:], "--checkpoint-every", "1", "--out", "run", "--resume"]) == 0
    assert "ddpm-nb train: checkpoint step-00000002 is damaged" in capsys.readouterr().err
    assert weights("run") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "0.1"], "the run in run cannot go on: --lr was 0.003 and is 0.1; leave it out to go on with the run's own"),
        (["--n-steps", "30"], "--n-steps was 20 and is 30"),
        (["--image-size", "16"], "--image-size was None and is 16"),
    ],
)
def test_resume_refuses_another_run(change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "run"]) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert main([*QUICK, "--out", "run", "--resume", *change]) == 1
    assert message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_resume_refuses_when_the_folder_of_pictures_has_grown(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(9):
        Image.new("RGB", (12, 8), (i * 20, 0, 0)).save(f"pictures/{i}.png")
        if i == 7:
            Path("o.json").write_text(json.dumps({"dataset": "folder", "root": "pictures", "image_size": 8, "grey": True, "workers": 1}))
            assert main([*FOLDER, "--network", "digits", "--n-steps", "20", "--out", "run"]) == 0
    assert main(["resume", "--out", "run"]) == 1
    assert "n_images was 8 and is 9" in capsys.readouterr().err


def test_evaluate_prints_and_writes_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "run"]) == 0
    assert main(["evaluate", "--run", "run", "--n", "4", "--out", "figures.json"]) == 0
    figures, told = json.loads(Path("figures.json").read_text()), capsys.readouterr().out
    assert f"{figures['bits_per_dim']:.3f} +- {figures['stderr']:.3f} bits/dim on 4 test images of digits" in told
    from ddpm_nb.data import load_images
    from ddpm_nb.evaluation import bits_per_dim
    from ddpm_nb.hub import load_pretrained

    images, seeded = load_images("digits", split="test")[:4], torch.Generator().manual_seed(0)
    bits = bits_per_dim(*load_pretrained("run"), images, n_levels=17, generator=seeded)
    assert bits.mean == pytest.approx(figures["bits_per_dim"])


def test_generate_draws_what_the_pipeline_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a bold seven leaning right", "--n", "4", "--steps", "3", "--guidance", "2", "--seed", "5", "--scale", "2"]
    assert main([*words, "--out", "seven.png"]) == 0 and "wrote 4 pictures to seven.png" in capsys.readouterr().out
    x = TextToImage.from_pretrained("mnist").generate("a bold seven leaning right", 4, 2.0, n_steps=3, generator=own_noise(5, 4))
    with Image.open("seven.png") as picture:
        assert np.array_equal(np.asarray(picture), tile(x, 2).squeeze().repeat(2, 0).repeat(2, 1))


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where nobody can write")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["a bold sevn"], "'sevn' (nearest: seven"),
        ([""], "at least one word"),
        (["a seven", "--guidance", "99"], "guidance must be"),
        (["a seven", "--model", "nobody"], "or a shipped name: digits"),
        (["a seven", "--steps", "0"], "--steps must be at least 1"),
        (["a seven", "--out", "seven.jpg"], "--out must name a .png file"),
        (["a seven", "--out", "none/seven.png"], "the folder none does not exist"),
        pytest.param(["a seven", "--out", "/proc/seven.png"], "--out /proc/seven.png: cannot write here", marks=needs_proc),
        (["a seven", "--negative", "a bald one"], "'bald' (nearest: bold"),
        (["a seven", "--negative", "a bald one"], "--negative holds unknown words: 'bald'"),
        (["a seven", "--negative", "."], "--negative must be texts with at least one word"),
        (["a seven", "--image", "none.png"], "--image must be a picture; none.png cannot be opened (No such file"),
        (["a seven", "--image", str(ROOT)], "--image must be a picture; "),
        (["a seven", "--image", str(ROOT / "book/_static/landing-still.png"), "--mask", "none.png"], "--mask must be a picture; none.png cannot be opened (No such file"),
        (["a seven", "--out", ""], "--out must be a path that is not empty"),
        (["a seven", "--model", ""], "--model must be a path that is not empty"),
        (["a seven", "--image", str(ROOT / "README.md")], "--image must be a picture"),
        (["a seven", "--image", str(ROOT / "book/_static/samples.png")], "--image must be a square picture"),
        (["a seven", "--mask", str(ROOT / "book/_static/landing-still.png")], "--mask must come with an image"),
        (["a seven", "--strength", "2"], "--strength must be"),
    ],
)
def test_generate_refuses_in_a_line_and_writes_nothing(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--out", "seven.png", *wrong]) == 1
    told = capsys.readouterr().err
    assert message in told and told.startswith("ddpm-nb generate: ") and list(tmp_path.iterdir()) == []


def test_nothing_but_lines_where_there_is_no_terminal(tmp_path):
    done = shell(*QUICK, "--out", "run", cwd=tmp_path)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 5 and "\r" not in done.stdout


def examples():
    """Return the commands in the shell blocks of the chapter, continued lines joined."""
    cells = json.loads((ROOT / "nbs/30_command_line.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    blocks = re.findall(r"```shell\n(.*?)```", text, re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_example_of_the_chapter_runs(tmp_path, monkeypatch):
    small = {
        "train": ["--iterations", "2", "--batch-size", "8", "--n-steps", "60", "--checkpoint-every", "1", "--precision", "float32"],
        "sample": ["--steps", "2", "--n", "4"],
        "evaluate": ["--n", "2"],
        "resume": ["--iterations", "3"],
        "generate": ["--steps", "2", "--n", "4"],
    }
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps({"dataset": "digits"}))
    seen = set()
    for words in examples():
        verb = next(word for word in words if word in ("train", "resume", "sample", "evaluate", "generate", "info", "train-text"))
        seen.add((words[0], verb))
        words += small.get(verb, [])
        if words[0] == "ddpm-nb":
            assert main(words[1:]) == 0, words
            continue
        file = words.index("--config_file") + 1  # two processes on the processor stand for the machine with eight GPUs
        assert (ROOT / words[file]).is_file()
        words[file] = str(ROOT / "examples/accelerate/cpu_2_processes.yaml")
        words = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words[2:]]
        done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved in runs/large") == 1  # one of the two speaks
    assert len(seen) == 7 and Path("samples.png").exists() and Path("seven.png").exists()
    before = load_file("runs/large/model.safetensors")
    for path in Path("runs/large/checkpoints").glob("step-00000002.*"):
        path.unlink()
    assert main(["resume", "--out", "runs/large"]) == 0  # what two processes began, one can end
    after = load_file("runs/large/model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_no_batch_size_and_no_number_changes_a_picture(sampler, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(cli, "_save_picture", lambda x, *args: drawn.append(x))
    words = f"sample --run digits --sampler {sampler} --steps 4 --device cpu --out {tmp_path / 'x.png'}"
    for n, size in ((5, 5), (5, 2), (3, 1)):
        assert main([*words.split(), "--n", str(n), "--batch-size", str(size)]) == 0
    for x in drawn[1:]:  # rounding is enlarged 20,000 times by the first step of a cosine schedule
        torch.testing.assert_close(x, drawn[0][: len(x)], rtol=0, atol=0.02)


@pytest.mark.parametrize("more", [["a thin seven"], [], ["a thin seven", "--negative", "a bold seven", "--guidance", "3"]])
def test_no_batch_size_and_no_number_changes_a_picture_of_a_sentence(more, tmp_path, monkeypatch):
    drawn, asked, generate = [], [], TextToImage.generate
    monkeypatch.setattr(cli, "_save_picture", lambda x, *args: drawn.append(x))
    monkeypatch.setattr(TextToImage, "generate", lambda self, **o: asked.append(len(o["generator"])) or generate(self, **o))
    words = ["generate", *more, "--model", "digits", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    for n, size in ((5, 5), (5, 2), (3, 1)):
        assert main([*words, "--n", str(n), "--batch-size", str(size)]) == 0
    assert asked == [5, 2, 2, 1, 1, 1, 1]  # never more at once
    for x in drawn[1:]:
        torch.testing.assert_close(x, drawn[0][: len(x)], rtol=0, atol=0.02)
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 0.1


def test_pictures_of_a_sentence_are_the_same_alone_and_among_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn, save = {}, cli._save_picture
    monkeypatch.setattr(cli, "_save_picture", lambda x, out, *rest: (drawn.update({out.name: x}), save(x, out, *rest)))
    sentences = ["a thin seven", "a bold two", "a thin seven"]
    words = ["--model", "digits", "--steps", "4", "--device", "cpu", "--scale", "2", "--seed", "3"]
    assert main(["generate", *sentences, *words, "--n", "3", "--out", "all.png"]) == 0
    assert capsys.readouterr().out == "wrote 9 pictures to all.png, a row for each of 3 sentences\n"
    for size in (1, 4):  # a batch may end within a sentence
        assert main(["generate", *sentences, *words, "--n", "3", "--batch-size", str(size), "--out", f"{size}.png"]) == 0
        torch.testing.assert_close(drawn[f"{size}.png"], drawn["all.png"], rtol=0, atol=0.02)
    for place, sentence in enumerate(sentences):
        assert main(["generate", sentence, *words, "--n", "3", "--out", "one.png"]) == 0
        torch.testing.assert_close(drawn["one.png"], drawn["all.png"][3 * place : 3 * place + 3], rtol=0, atol=0.02)
    assert (drawn["all.png"][0] - drawn["all.png"][3]).abs().max() > 0.1  # the sentences are heard
    with Image.open("all.png") as sheet:  # three rows of three, with a gap of one
        assert sheet.size == (2 * (3 * 9 + 1), 2 * (3 * 9 + 1))
        assert np.array_equal(np.asarray(sheet), tile(drawn["all.png"], 3).squeeze().repeat(2, 0).repeat(2, 1))
    assert main(["generate", *sentences[:2], *words, "--n", "1", "--out", "two.png"]) == 0
    with Image.open("two.png") as sheet:
        assert sheet.size == (2 * 10, 2 * 19)


@pytest.mark.parametrize(("second", "message"), [("a bald two", "'bald' (nearest: bold"), (" ", "at least one word"), ("a two that is a three", "")])
def test_the_wrong_one_of_several_sentences_is_named_before_any_is_drawn(second, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToImage, "generate", lambda self, *_, **__: pytest.fail("a sentence was drawn"))
    assert main(["generate", "a thin seven", second, "--batch-size", "1", "--out", "x.png"]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_samples_drawn_in_batches_are_the_samples_of_the_library(tmp_path, monkeypatch):
    pictures, save = [], cli._save_picture
    monkeypatch.setattr(cli, "_save_picture", lambda x, *args: pictures.append(x) or save(x, *args))
    monkeypatch.chdir(tmp_path)
    words = "sample --run digits --n 5 --steps 3 --seed 7 --device cpu --out"
    assert main([*words.split(), "x.png", "--batch-size", "2"]) == 0
    model, schedule = load_pretrained("digits")
    wanted = sample_ddim(model, schedule, (5, 1, 8, 8), n_steps=3, generator=own_noise(7, 5))
    torch.testing.assert_close(pictures[0], wanted, rtol=0, atol=0.02)
    assert main([*words.split(), "y.png", "--batch-size", "2", "--precision", "bfloat16"]) == 0
    assert 0 < (pictures[1] - pictures[0]).abs().mean() < 0.1


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="a setting of glibc")
def test_keeping_freed_memory_is_asked_for_unless_the_user_set_malloc():
    code = "from ddpm_nb.fast import keep_freed_memory\nprint(keep_freed_memory())"
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("MALLOC_")}
    for environment, expected in ((clean, "True"), (clean | {"MALLOC_ARENA_MAX": "2"}, "False")):
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert told.stdout.strip() == expected


@pytest.mark.parametrize(("options", "compared"), [([], True), (["--objective", "v"], False)])
def test_train_ends_with_what_to_expect_and_where_to_look(options, compared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *options, "--out", "run"]) == 0
    told = capsys.readouterr().out
    card = describe_model(SHIPPED / "digits")["card"]
    assert "a sheet of 16 samples is in run/samples.png" in told
    with Image.open("run/samples.png") as sheet:
        assert max(sheet.size) >= 512
    assert f"after {card['iterations']} iterations of {card['batch size']}" in told
    assert (f"a loss of {card['test loss']} on test images" in told) == compared
    expected = re.search(r"ddpm-nb (sample --run digits --out expected\.png)", told)[1]
    assert main([*expected.split(), "--n", "1", "--steps", "1"]) == 0 and Path("expected.png").exists()


def test_train_on_data_without_a_shipped_model_says_what_to_look_at():
    assert "stopped falling" in cli._expected(default_options() | {"dataset": "folder"})


@pytest.mark.parametrize("scale", [None, 2])
def test_generate_draws_with_mnist_and_large(scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a two", "--n", "1", "--steps", "1", "--out", "two.png"]
    assert main(words + (["--scale", str(scale)] if scale else [])) == 0
    with Image.open("two.png") as picture:
        assert picture.size == ((scale or 19) * 28,) * 2 and (scale or max(picture.size) >= 512)


def test_a_run_is_measured_and_resumed_from_elsewhere(tmp_path, monkeypatch, capsys):
    """The pictures are found beside the run when both have moved, and where they were when only the shell has."""
    for part, n in (("train", 20), ("test", 6)):
        (tmp_path / "here/pics" / part / "a").mkdir(parents=True)
        (tmp_path / "here/pics" / part / "a" / "bad.png").write_text("no picture")
        for i in range(n):
            levels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=seeded(i)).numpy()
            Image.fromarray(levels).save(tmp_path / "here/pics" / part / "a" / f"{i}.png")
    monkeypatch.chdir(tmp_path / "here")
    words = "train --dataset folder --root pics --image-size 8 --grey --unreadable skip --network digits --n-steps 10"
    words += " --batch-size 16 --iterations 2 --warmup 0 --device cpu --out run"
    assert main(words.split()) == 0
    measure = ["evaluate", "--device", "cpu", "--n", "4", "--run"]
    assert main([*measure, "run"]) == 0  # the run knows its folder, and what to do with the damaged file
    monkeypatch.chdir(tmp_path)
    assert main([*measure, "here/run"]) == 0
    assert main(["resume", "--device", "cpu", "--out", "here/run"]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert main([*measure, "there/run"]) == 0
    (tmp_path / "there/pics").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([*measure, "there/run"]) == 1
    assert "the run's pictures are in none of there/run/../pics" in capsys.readouterr().err
    assert main([*measure, "there/run", "--root", "elsewhere"]) == 0
    assert main([*measure, "there/run", "--root", "elsewhere", "--unreadable", "refuse"]) == 1


def test_generate_begins_with_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = torch.randint(256, (1, 28, 28), generator=seeded(0), dtype=torch.uint8)
    Image.fromarray(image[0].numpy()).save("image.png")
    mask = torch.zeros(1, 28, 28, dtype=torch.uint8)
    mask[:, :14] = 255
    Image.fromarray(mask[0].numpy()).save("mask.png")
    words = ["generate", "a seven", "--n", "1", "--steps", "3", "--seed", "5", "--scale", "1", "--out", "seven.png"]
    x = image[None] / 127.5 - 1
    pipeline = TextToImage.from_pretrained("mnist")
    cases = {("--strength", "0.5"): {"strength": 0.5}, ("--mask", "mask.png"): {"mask": mask[None] > 0}}
    cases[("--negative", "a bold seven")] = {"negative": "a bold seven"}
    for more, options in cases.items():
        assert main([*words, "--image", "image.png", *more]) == 0, capsys.readouterr().err
        drawn = pipeline.generate("a seven", 1, image=x, n_steps=3, generator=own_noise(5, 1), **options)
        with Image.open("seven.png") as picture:
            apart = np.asarray(picture).astype(int) - tile(drawn, 1, 0).squeeze()
            assert np.abs(apart).max() <= 1  # the command's network adds in another order


def test_captions_train_a_pipeline_that_generate_draws_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shapes, folder = draw_shapes(16, image_size=16, generator=seeded(1)), Path("my pictures")
    folder.mkdir()
    for i, (x, caption) in enumerate(zip(shapes.images, shapes.captions, strict=True)):
        levels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0)
        Image.fromarray(levels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    quick = TrainConfig(2, batch_size=4, lr=1e-3, checkpoint_every=1, precision="float32")
    small = {"dim": 16, "unet_channels": 8, "autoencoder_channels": 4, "clip": quick, "autoencoder": quick, "unet": quick}
    Path("o.json").write_text(json.dumps({"config": TextConfig(**small).to_dict()}))
    words = ["train-text", "--root", "my pictures", "--out", "run", "--image-size", "16"]
    assert main([*words, "--config", "o.json", "--iterations", "3"]) == 0, capsys.readouterr().err
    assert "16 pictures with captions, read in colour at 16 x 16" in capsys.readouterr().out
    assert json.loads(Path("run/text.json").read_text())["config"]["unet"]["n_iterations"] == 3
    assert main([*words, "--resume"]) == 0, capsys.readouterr().err  # finished: nothing is left to do
    draw = ["generate", shapes.captions[0], "--model", "./run", "--n", "1", "--steps", "2", "--out", "x.png"]
    assert main(draw) == 0, capsys.readouterr().err
    assert Path("x.png").is_file()
    (folder / "0.txt").unlink()
    assert main([*words[:3], "--out", "other"]) == 1
    assert "0.png" in capsys.readouterr().err and not Path("other").exists()
    Path("bad.json").write_text("[]")
    assert main([*words[:3], "--problems", "skip", "--out", "other", "--config", "bad.json"]) == 1
    assert "--config bad.json must hold an object of options; got list" in capsys.readouterr().err


def captioned(folder, n=8, size=8):
    """Fill a folder with grey pictures, each with a caption."""
    Path(folder).mkdir()
    for i in range(n):
        Image.new("L", (size, size), 30 * i).save(f"{folder}/{i}.png")
        Path(f"{folder}/{i}.txt").write_text("a dark one" if i < n / 2 else "a light one")


def test_a_file_of_options_for_captions_takes_the_names_of_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    captioned("pics")
    asked = []
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda data, out, config, **options: asked.append((data, out, config, options)))
    options = {"root": "pics", "out": "run", "image-size": 4, "--iterations": 7, "too_long": "cut", "prompt": ["a dark one"], "column": None}
    write_json("o.json", options)
    told = succeeded("train-text --config o.json --device cpu", capsys)
    assert "at 4 x 4 pixels" in told and "batches of 8, 8, 8, 7 iterations" in told
    data, out, config, others = asked[0]
    assert (len(data), out, config.unet.n_iterations, config.too_long) == (8, "run", 7, "cut")
    assert others == {"resume": False, "prompts": ["a dark one"], "device": torch.device("cpu")}
    settings = TextConfig(dim=16, unet=TrainConfig(3, batch_size=4)).to_dict()
    write_json("o.json", options | {"config": settings})
    assert "chosen" not in succeeded("train-text --config o.json --iterations 9 --out other", capsys)  # what is said wins over the file
    _, out, config, _ = asked[1]
    assert (out, config.dim, config.unet.n_iterations, config.unet.batch_size) == ("other", 16, 9, 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"iteratons": 3}, "--config o.json: unknown 'iteratons'; allowed are root, out, image-size"),
        ({"iterations": "3"}, "--config o.json: 'iterations' must be of type int; got '3'"),
        ({"too-long": "eat"}, "--config o.json: 'too-long' must be one of 'refuse', 'cut'; got 'eat'"),
        ({"image-size": 4, "image_size": 8}, "'image_size' is there twice"),
        ({"prompt": "a dark one"}, "--config o.json: 'prompt' must be of type list; got 'a dark one'"),
        ({"out": ""}, "--out must be a path that is not empty"),
        ({}, "train-text needs --out, as an option or in --config"),
    ],
)
def test_a_file_of_options_for_captions_is_checked(options, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    captioned("pics")
    write_json("o.json", {"root": "pics"} | options)
    if options:
        assert told in failed("train-text --config o.json", capsys)
        return
    with pytest.raises(SystemExit) as stopped:
        main(["train-text", "--config", "o.json"])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_a_file_of_options_serves_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    captioned("pics")
    asked = []
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda data, out, config, **options: asked.append(config))
    Path("run").mkdir()
    write_json("run/text.json", {"config": TextConfig(dim=16).to_dict()})
    write_json("o.json", {"root": "pics", "out": "run", "resume": True})
    assert "chosen" not in succeeded("train-text --config o.json --iterations 10001", capsys)
    assert (asked[0].dim, asked[0].unet.n_iterations) == (16, 10001)  # the run's own, for longer
    write_json("run/text.json", {})
    assert "run/text.json does not hold the settings of all stages: 'clip' is missing" in failed("train-text --config o.json", capsys)


def test_the_level_of_white_reaches_pictures_with_captions(tmp_path, monkeypatch, capsys):
    """The warning about dark pictures named an option that `train-text` did not have."""
    monkeypatch.chdir(tmp_path)
    captioned("pics", 2)
    for i in range(2):
        Image.fromarray(np.full((8, 8), 4095 * i, np.uint16)).save(f"pics/{i}.png")
    asked = []
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda data, *_, **__: asked.append(data))
    assert main(["train-text", "--root", "pics", "--out", "run"]) == 0
    (flag,) = re.findall(r"if 4095 is white, pass (--white-level 4095)", capsys.readouterr().err)
    assert main(["train-text", "--root", "pics", "--out", "run", *flag.split()]) == 0
    assert capsys.readouterr().err == "" and [float(data.images().max()) for data in asked] == [pytest.approx(-0.875, abs=0.01), 1]


@pytest.mark.parametrize(("side", "mode", "expected"), [(28, "L", (28, True)), (50, "RGB", (32, False)), (24, "P", (24, False))])
def test_text_to_image_takes_size_greys_and_batches_from_the_pictures(side, mode, expected, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda data, out, config, **options: asked.append((data, config)))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.new("L", (side, side), 10 * i).convert(mode).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a grey one")
    assert main(["train-text", "--root", str(pictures), "--out", str(tmp_path / "run")]) == 0
    data, config = asked[0]
    assert (data[0][0].shape[-1], data[0][0].shape[0] == 1) == expected
    assert [stage.batch_size for stage in (config.clip, config.autoencoder, config.unet)] == [20, 20, 20]
    told = capsys.readouterr().out
    assert f"at {expected[0]} x {expected[0]} pixels" in told and "batches of 20, 20, 20" in told
    assert main(["train-text", "--root", str(pictures), "--out", str(tmp_path / "run"), "--image-size", "16"]) == 0
    assert asked[1][0][0][0].shape[-1] == 16


def test_what_only_a_folder_takes_is_refused_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in ("--flip", "--grey", "--unreadable skip", "--white-level 4095"):
        assert main(["train", "--dataset", "digits", "--out", "run", *option.split()]) == 1
        told = capsys.readouterr().err
        assert option.split()[0] in told and "only a folder takes " in told and not Path("run").exists()
    assert main(["generate", "a seven", "--strength", "0.5", "--out", "x.png"]) == 1
    assert "strength needs an image to begin with" in capsys.readouterr().err and not Path("x.png").exists()


def test_the_level_of_white_reaches_the_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("deep").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), 4095 * (i % 2), np.uint16)).save(f"deep/{i}.png")
    options = ["--image-size", "8", "--batch-size", "2", "--iterations", "1", "--network", "digits", "--device", "cpu"]
    assert main(["train", "--dataset", "folder", "--root", "deep", "--out", "run", "--white-level", "4095", *options]) == 0, capsys.readouterr().err
    _, data = read_settings("run")
    assert data["white_level"] == 4095
    assert float(load_dataset("folder", **cli._where(data))[1][0].max()) == 1
    older = {name: value for name, value in data.items() if name != "white_level"}
    assert cli._where(older)["white_level"] is None
    highest = []

    def measured(model, schedule, images, **_):
        highest.append(float(images.max()))
        return SimpleNamespace(mean=1.0, stderr=0.1, n_images=len(images))

    monkeypatch.setattr("ddpm_nb.evaluation.bits_per_dim", measured)
    others = [*MEASURE.split(), "digits", "--n", "2", "--dataset", "folder", "--root", "deep"]
    assert main(others) == 0 and "if 4095 is white, pass --white-level 4095" in capsys.readouterr().err
    assert main([*others, "--white-level", "4095"]) == 0 and "4095" not in capsys.readouterr().err
    assert highest[0] < -0.8 and highest[1] == 1
    assert "only a folder takes --white-level" in failed(f"{MEASURE} digits --n 2 --white-level 4095", capsys)


def test_pictures_to_begin_with_are_read_as_those_to_train_on(tmp_path):
    grey, colour = {"in_channels": 1, "image_size": 4}, {"in_channels": 3, "image_size": 4}
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert float(cli._read_square("--image", tmp_path / "deep.png", grey).abs().max()) < 0.01  # not clipped to white
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")  # black above, and below nothing, which lies on white
    assert cli._read_square("--image", tmp_path / "clear.png", colour)[0, 0, :, 0].tolist() == [-1, -1, 1, 1]
    turned = Image.Exif()
    turned[274] = 3  # upside down
    Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 32).reshape(8, 8)).save(tmp_path / "turned.png", exif=turned)
    assert cli._read_square("--image", tmp_path / "turned.png", grey)[0, 0, :, 0].tolist() == [1, 1, -1, -1]


def test_a_huge_picture_does_not_end_the_look_at_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name, size in (("a", 64), ("b", 8), ("c", 8)):
        Image.new("L", (size, size)).save(tmp_path / f"{name}.png")
    assert cli._look_at_pictures(tmp_path, 32) == {"image_size": 8, "grey": True}
    Image.new("I;16B", (8, 8)).save(tmp_path / "d.tiff")
    assert cli._look_at_pictures(tmp_path, 32)["grey"]


def test_words_of_the_shell_after_training_on_captions_and_resuming(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pics").mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(f"pics/{i}.png")
        Path(f"pics/{i}.txt").write_text("a dark one" if i < 4 else "a light one")
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda *args, **options: None)
    assert main(["train-text", "--root", "pics", "--out", "shapes"]) == 0
    assert "--model ./shapes --out" in capsys.readouterr().out
    Path("run").mkdir()
    write_json(Path("run") / "text.json", {"config": TextConfig().to_dict()})
    assert main(["train-text", "--root", "pics", "--out", "run", "--resume", "--iterations", "7"]) == 1
    assert "--iterations was 10000 and is 7; leave it out" in capsys.readouterr().err
    assert main(["train-text", "--root", "pics", "--out", "run", "--resume", "--too-long", "cut"]) == 1
    assert "--too-long was refuse and is cut; leave it out" in capsys.readouterr().err
    assert main(["train-text", "--root", "pics", "--out", "run", "--resume", "--iterations", "10001"]) == 0
    assert main(["train-text", "--root", "pics", "--out", "run", "--resume"]) == 0


def test_a_run_of_train_text_is_told_from_one_of_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    write_json("run/text.json", {"config": TextConfig().to_dict()})
    assert "go on with: ddpm-nb train-text --root FOLDER --out run --resume" in failed("resume --out run", capsys)
    assert "run is a run of train-text; read run/text.json" in failed("info --run run", capsys)
    for verb in ("sample --out x.png", "evaluate"):
        assert 'draw with: ddpm-nb generate "a sentence" --model run' in failed(f"{verb} --run run", capsys)


def test_one_picture_and_long_captions_are_told_in_the_words_of_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(2))
    rows = [{"file_name": f"{i:02d}.png", "words": "a dark one " * 60} for i in range(2)]
    Path("pics/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = failed("train-text --root pics --out run --column words", capsys)
    assert "let them be cut (--too-long cut), or raise the length in the config" in told and len(told) < 300
    assert "lines without texts for 'file_name' and 'text'" in failed("train-text --root pics --out run", capsys)
    Path("pics/metadata.jsonl").write_text(json.dumps(rows[0]))
    Path("pics/01.png").unlink()
    assert "--root must hold at least two pictures with captions; got 1" in failed("train-text --root pics --out run --column words", capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --dataset folder --out run", "train needs --root, as an option or in --config"),
        ("train --dataset folder --root pics --out notes.txt", "--out notes.txt must be a folder; notes.txt is a file"),
        ("train --dataset folder --root pics --out notes.txt/run", "--out notes.txt/run must be a folder; "),
        ("train-text --root pics --out notes.txt", "--out notes.txt must be a folder"),
        ("train --config missing.json --out run", "--config missing.json cannot be read: No such file or directory"),
        ("train --dataset digits --root pics --out run", "--dataset digits reads no --root; --dataset folder reads pictures"),
    ],
)
def test_places_are_looked_at_before_anything_is_timed(words, told, tmp_path, monkeypatch, capsys):
    """Steps were timed, for a minute on a slow machine, before a file as --out was refused; and --root was ignored with the digits."""
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(2))
    Path("notes.txt").write_text("a file")
    try:
        assert told in failed(words, capsys)
    except SystemExit:  # as the parser ends
        assert told in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_column_of_captions_that_have_none(tmp_path, monkeypatch, capsys):
    """Before, the option was ignored, and a folder with a misspelt metadata file trained on other captions."""
    monkeypatch.chdir(tmp_path)
    Path("pics").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), "red").save(f"pics/{i}.png")
        Path(f"pics/{i}.txt").write_text("a red square")
    told = failed("train-text --root pics --out run --column caption", capsys)
    assert "--column caption needs metadata.jsonl or metadata.csv: pics has none, and captions in .txt have no columns" in told
    assert not Path("run").exists()


@pytest.mark.parametrize("verb", ["train --dataset digits --out=", "train --config o.json", "train-text --out run --root=", "info --run=", "evaluate --run="])
def test_an_empty_path_is_not_the_folder_where_one_is(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json("o.json", {"dataset": "digits", "out": ""})
    assert "must be a path that is not empty; got ''" in failed(verb, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


def test_a_mask_is_black_and_white(tmp_path):
    config = {"in_channels": 3, "image_size": 4}
    read = lambda: cli._read_mask("--mask", tmp_path / "m.png", config)
    half = np.zeros((8, 8, 4), np.uint8)
    half[..., 3] = 255
    half[:4, :, :3] = 255
    Image.fromarray(half).save(tmp_path / "m.png")
    assert read()[0, 0, :, 0].tolist() == [True, True, False, False]
    wrong = {"blue": (slice(2), 0), "grey": (slice(3), 100), "clear": (3, 0)}
    for name, (channels, level) in wrong.items():
        pixels = half.copy()
        pixels[:4, :, channels] = level
        Image.fromarray(pixels).save(tmp_path / "m.png")
        with pytest.raises(ValueError, match=r"^--mask must be black and white, without greys, colours .*m\.png has") as refused:
            read()
        assert ("transparent places" in str(refused.value).split(";")[1]) == (name == "clear")
    half[:] = 255
    Image.fromarray(half).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"^--mask must have a black place, which is drawn; .*m\.png has none"):
        read()
    half[..., :3] = 0
    Image.fromarray(half).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"^--mask must have a white place, which stays; .*m\.png has none"):
        read()


def failed(words, capsys):
    """Run the command, which must fail in a line; return what it says."""
    capsys.readouterr()
    assert main(words.split()) == 1
    return capsys.readouterr().err


def succeeded(words, capsys):
    """Run the command, which must succeed; return what it prints."""
    capsys.readouterr()
    assert main(words.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def save_noise(folder, numbers, size=8):
    """Fill a folder with grey pictures of noise."""
    Path(folder).mkdir(exist_ok=True)
    for i in numbers:
        levels = torch.randint(256, (size, size), dtype=torch.uint8, generator=seeded(i)).numpy()
        Image.fromarray(levels).save(f"{folder}/{i:02d}.png")


SHORT = "train --dataset folder --root pics --out run --device cpu --iterations 2 --n-steps 10"
MEASURE = "evaluate --device cpu --run"


def test_a_grey_model_is_measured_on_any_bundled_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "on 2 test images of digits" in succeeded(f"{MEASURE} digits --n 2", capsys)
    fashion = load_dataset("digits", split="test").resized(28)
    monkeypatch.setattr("ddpm_nb.data.load_dataset", lambda name, **_: fashion)
    monkeypatch.setattr("ddpm_nb.evaluation.bits_per_dim", lambda *_, **__: SimpleNamespace(mean=1.0, stderr=0.1, n_images=2))
    assert "on 2 test images of fashion-mnist" in succeeded(f"{MEASURE} mnist --dataset fashion-mnist --n 2", capsys)


def test_pictures_of_a_run_are_known_wherever_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(20))
    save_noise("others", range(50, 90))
    save_noise("few", range(50, 54))
    assert main([*SHORT.split(), "--held-out", "0.25"]) == 0
    shutil.copytree("pics", "copy")
    assert "--held-out must be at most 0.25" in failed(f"{MEASURE} run --root copy --held-out 0.9", capsys)
    assert "on 5 test images" in succeeded(f"{MEASURE} run --root copy", capsys)
    assert "on 40 test images" in succeeded(f"{MEASURE} run --root others", capsys)
    assert main([*SHORT.split(), "--held-out", "6", "--out", "more"]) == 0
    assert "on 4 test images" in succeeded(f"{MEASURE} more --root few", capsys)  # fewer than were held out
    assert main([*SHORT.split(), "--out", "whole"]) == 0
    Path("pics").rename("moved")
    assert "was trained on all pictures in moved" in failed(f"{MEASURE} whole --root moved", capsys)
    for path in Path("whole/checkpoints").glob("step-*.json"):  # as an older version wrote it
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "data"}))
    assert "on 4 test images" in succeeded(f"{MEASURE} whole --root few", capsys)


def test_a_run_that_python_began_is_left_to_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = TrainConfig(2, batch_size=8, precision="float32")
    data = load_dataset("digits")
    run_training(make_unet("digits"), make_schedule("cosine", 20), data, config, out="run", progress=False)
    for words in ("resume --out run", "resume --out run --root .", "train --dataset digits --out run --resume"):
        assert "the run in run was begun from Python and does not say where its data are" in failed(words, capsys)
    assert "on 2 test images of digits" in succeeded(f"{MEASURE} run --dataset digits --n 2", capsys)
    assert "pass --dataset" in failed(f"{MEASURE} run", capsys)


def test_pictures_that_are_not_measured_need_not_be_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    assert main([*SHORT.split(), "--batch-size", "4"]) == 0
    Path("pics").rename("moved")
    assert "on 2 test images of digits" in succeeded(f"{MEASURE} run --dataset digits --n 2", capsys)


@pytest.mark.parametrize("verb", ["sample --out x.png", "evaluate"])
def test_a_model_without_a_size_is_refused_in_words(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pretrained("r", ResNetBaseline(1, 8, 1), make_schedule("cosine", 20))
    assert "./r does not say how large its images are" in failed(f"{verb} --run ./r", capsys)


def test_null_in_a_file_of_options_says_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "old"]) == 0
    assert json.loads(Path("old/train.json").read_text())["data"]["network"] is None
    save_noise("pics", range(8), size=12)
    built = []
    monkeypatch.setattr(cli, "_train", lambda options, *_, **__: built.append(options))
    succeeded("train --config old/train.json --dataset folder --root pics --out run", capsys)
    assert (built[0]["network"], built[0]["image_size"], built[0]["batch_size"]) == ("digits", 12, 8)


def test_label_dropout_is_asked_of_the_run_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"{' '.join(QUICK)} --out run --label-dropout 0.1"
    assert "--label-dropout is for runs that are told classes" in failed(words, capsys)
    assert main([*words.split(), "--conditional", "class"]) == 0
    assert "is finished" in succeeded("train --dataset digits --out run --label-dropout 0.1 --resume", capsys)


@pytest.mark.parametrize("fault", ["torn", "broken", "huge"])
def test_a_picture_that_cannot_be_read_is_named(fault, tmp_path, monkeypatch):
    path, size = tmp_path / "x.png", 64
    save_noise(tmp_path, [0], size)
    whole = (tmp_path / "00.png").read_bytes()
    broken = whole.replace(b"IDAT", b"I\0AT")
    path.write_bytes({"torn": whole[: len(whole) // 2], "broken": broken, "huge": whole}[fault])
    if fault == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"^--mask must be a picture; .*x\.png is none that can be read"):
        cli._read_square("--mask", path, {"in_channels": 1, "image_size": 4})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--image-size 0", "--image-size must be"),
        ("--iterations 0", "--iterations must be at least 1; got 0"),
        ("--device cuda", "--device cuda is not available on this machine"),
        ("--config nowhere.json", "--config nowhere.json cannot be read"),
        ("--out old", "holds a run"),
    ],
)
def test_train_text_refuses_in_the_words_of_the_shell(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    for i in range(8):
        Path(f"pics/{i:02d}.txt").write_text("a dark one")
    Path("old/clip").mkdir(parents=True)
    (Path("old/clip") / "train.json").write_text("{}")
    if words != "--image-size 0":
        monkeypatch.setattr("ddpm_nb.texts.CaptionedFolder", lambda *_, **__: pytest.fail("pictures were read"))
    if "cuda" in words:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told in failed(f"train-text --root pics --out run {words}", capsys)


def test_defaults_in_the_help_are_those_that_hold(capsys):
    with pytest.raises(SystemExit):
        main(["resume", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("(default: the run's own)") == 2 and "(default: data)" not in told
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "chosen for a folder or cifar10)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", ["", *cli._VERBS])
def test_help_speaks_the_language_of_the_shell(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"] if verb else ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"\b(?:math|torch|np|os|sys)\.\w+|\b(?:None|True|False|SUPPRESS|nan)\b|%s|==|<\w+|N_[A-Z]+", told) == []
    if verb == "train":
        assert "largest norm of the gradient; inf: no limit (default: 1.0)" in told
        assert make_parser().parse_args(["train", "--grad-clip", "inf"]).grad_clip == float("inf")


# odd places


def test_a_copy_beside_the_checkpoints_is_in_nobodys_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    assert main([*SHORT.split(), "--batch-size", "4", "--held-out", "0.25"]) == 0
    for name in ("step-best", "step-00000002 (1)"):
        Path(f"run/checkpoints/{name}.json").write_text("{}")
    assert re.search(r"checkpoints +0, 2\n", succeeded("info --run run", capsys))
    Path("pics").rename("moved")
    assert "on 2 test images" in succeeded(f"{MEASURE} run --root moved", capsys)


def test_info_tells_the_schedule_of_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_training(make_unet("digits"), make_schedule("sigmoid", 20), load_dataset("digits"), TrainConfig(1, batch_size=8), out="run", progress=False)
    assert re.search(r"schedule +sigmoid\n", succeeded("info --run run", capsys))


def test_odd_names_of_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a place").mkdir()
    Path("link").symlink_to("a place")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out, place in (("a place/my run", "a place/my run"), ("link/../link/r2", "a place/r2"), ("~/r3", "home/r3")):
        assert main([*QUICK, f"--out={out}"]) == 0, capsys.readouterr().err
        told = capsys.readouterr().out
        assert (tmp_path / place / "train.json").exists()
        words = shlex.split(re.search("next: ddpm-nb (.*)", told)[1])
        assert main([*words, "--n", "1"]) == 0
    assert not Path("~").exists()
    assert "is finished" in succeeded("resume --out ~/r3", capsys)
    assert main(["info", "--run", "link/my run"]) == 0


def test_a_place_that_cannot_take_a_run_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm_nb.training.Trainer.step", lambda *_: pytest.fail("a step was taken"))
    monkeypatch.setattr(cli, "_seconds_per_iteration", lambda *_: 1.0)
    Path("file").write_text("mine")
    Path("one").mkdir()
    Path("one/samples").write_text("mine")
    Path("two/samples.png").mkdir(parents=True)
    Path("three").mkdir()
    Path("three/checkpoints").write_text("mine")
    words = " ".join(QUICK)
    for place in ("file", "file/run"):
        told = failed(f"{words} --out {place}", capsys)
        assert f"--out {place} must be a folder; " in told and told.endswith("file is a file\n")
    assert "--out one holds samples, which is no folder" in failed(f"{words} --out one", capsys)
    assert "--out two holds a folder samples.png" in failed(f"{words} --out two", capsys)
    assert "cannot be written" in failed(f"{words} --out three", capsys)
    assert Path("file").read_text() == Path("one/samples").read_text() == Path("three/checkpoints").read_text() == "mine"
    Path("locked").mkdir()
    Path("locked").chmod(0o555)
    tmp_path.chmod(0o755)
    with as_nobody():
        assert "--out locked/run cannot be written: Permission denied" in failed(f"{words} --out locked/run", capsys)
        assert "cannot write here (Permission denied)" in failed("sample --run digits --n 1 --out locked/x.png", capsys)


@pytest.mark.parametrize("out", ["pics", "pics/run", "link/run", "pics/../pics/deep/run"])
def test_a_run_does_not_lie_among_the_pictures_that_it_reads(out, tmp_path, monkeypatch, capsys):
    """Its sheets of samples would be pictures of the next loading."""
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    Path("link").symlink_to("pics")
    for i in range(8):
        Path(f"pics/{i:02d}.txt").write_text("a dark one")
    before = sorted(Path("pics").rglob("*"))
    for words in (f"{SHORT} --batch-size 4 --out {out}", f"train-text --root pics --out {out}"):
        assert "lies among the pictures that are read" in failed(words, capsys)
    assert sorted(Path("pics").rglob("*")) == before
    monkeypatch.setattr(cli, "_train", lambda *_, **__: None)
    assert main([*SHORT.split(), "--batch-size", "4", "--out", "pics2"]) == 0  # beside it, by whatever name
    monkeypatch.setattr("ddpm_nb.texts.train_text", lambda *_, **__: None)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out, "text.json"), {"config": TextConfig().to_dict()})
    assert main(["train-text", "--root", "pics", "--out", out, "--resume"]) == 0  # one of before goes on


def test_a_run_whose_pictures_have_moved_remembers_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    assert main([*SHORT.split(), "--batch-size", "4", "--held-out", "0.25"]) == 0
    before = read_settings("run")[1]
    succeeded("resume --out run --iterations 3 --device cpu", capsys)
    assert read_settings("run")[1] == before
    Path("pics").rename("moved")
    succeeded("resume --out run --root moved --device cpu", capsys)
    assert "on 2 test images" in succeeded(f"{MEASURE} run", capsys)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"config": {}}, "--config o.json does not hold the settings of all stages: 'clip' is missing"),
        ({"config": 3}, "--config o.json does not hold the settings of all stages"),
        ({"config": TextConfig().to_dict() | {"drop": 2}}, "drop must be finite and in [0, 1)"),
        ({"config": TextConfig().to_dict() | {"n_steps": 1}}, ": n_steps must be at least 2"),
        ({"config": TextConfig().to_dict() | {"channel_mults": None}}, "channel_mults must be a list of whole numbers"),
        ({"config": TextConfig().to_dict() | {"clip": 5}}, "clip must be a dict; got int"),
        ({"config": TextConfig().to_dict() | {"clip": TextConfig().to_dict()["clip"] | {"n_iterations": 0}}}, "clip.n_iterations must be at least 1"),
        ({"config": TextConfig().to_dict() | {"unet": TextConfig().to_dict()["unet"] | {"colour": 0}}}, "unet has no setting 'colour'"),
        ({"config": TextConfig().to_dict() | {"colour": 2}}, "unexpected keyword argument 'colour'"),
    ],
)
def test_settings_of_stages_that_are_none_are_said_in_a_line(contents, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_noise("pics", range(8))
    for i in range(8):
        Path(f"pics/{i:02d}.txt").write_text("a dark one")
    write_json("o.json", contents)
    assert message in failed("train-text --root pics --out run --config o.json", capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize(("error", "message"), [(MemoryError(), "there is not enough memory"), (OverflowError("too large"), "too large")])
def test_too_much_is_said_in_a_line(error, message, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(cli._VERBS, "info", fail)
    assert message in failed("info --run digits", capsys)
