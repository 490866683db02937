"""Runs that are told classes, from the shell: trained, drawn by name or number, guided, measured, resumed, refused."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_nb import cli
from ddpm_nb.cli import main
from ddpm_nb.conditioning import ClassUNet, of_class
from ddpm_nb.data import load_dataset, mix_seeds
from ddpm_nb.evaluation import bits_per_dim
from ddpm_nb.gaussian import seeded
from ddpm_nb.hub import PeerUNet, describe_model, load_pretrained, save_pretrained
from ddpm_nb.pictures import FolderDataset
from ddpm_nb.runs import read_settings
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule

TOLD = "--conditional class --n-steps 20 --precision float32 --device cpu --warmup 0 --lr 0.01"
DIGITS = f"train --dataset digits {TOLD} --batch-size 32 --iterations 6"
FOLDER = f"train --dataset folder --root pics {TOLD} --batch-size 4 --iterations 2 --network digits"


pytestmark = pytest.mark.usefixtures("own_folder")


def speak_up(patch):
    """Let classes be heard from the first step on: rows that begin at zero take hundreds of steps."""
    patch.setattr("ddpm_nb.conditioning.zero_init", lambda rows: torch.nn.init.normal_(rows.weight, std=2.0) is None or rows)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Train shortly on digits and their classes."""
    out = tmp_path_factory.mktemp("classes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speak_up(patch)
        assert main([*DIGITS.split(), "--held-out", "9", "--out", str(out)]) == 0
    return str(out)


def draw_classes(names, n=6, folder="pics"):
    """Fill a folder with grey pictures of noise, some of each class."""
    for c, name in enumerate(names):
        Path(folder, name).mkdir(parents=True)
        for i in range(n):
            pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=seeded(100 * c + i))
            Image.fromarray(pixels.numpy()).save(f"{folder}/{name}/{i}.png")


def ok(words, capsys):
    """Run the command, which must succeed; return what it prints."""
    capsys.readouterr()
    assert main(shlex.split(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(words, capsys):
    """Run the command, which must fail; return the line that it ends with."""
    capsys.readouterr()
    assert main(shlex.split(words)) == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def drawn(monkeypatch):
    """Collect what `sample` would write."""
    kept = []
    monkeypatch.setattr(cli, "_save_picture", lambda x, *args: kept.append(x))
    return kept


def by_hand(run, n, labels, scale=1.0, steps=3):
    """Draw with the library what the command should draw."""
    model, schedule = load_pretrained(run)
    noise = [seeded(mix_seeds(0, i)) for i in range(n)]
    told = of_class(model, labels, scale)
    return sample_ddim(told, schedule, (n, 1, 8, 8), n_steps=steps, generator=noise)


@pytest.mark.parametrize(
    ("options", "labels", "scale"),
    [
        ("--label 7", 7, 1),
        ("--label 7 --guidance 3", 7, 3),
        ("--label 3 --batch-size 2", 3, 1),
        ("--batch-size 4 --guidance 2", torch.tensor([0, 1, 2, 4, 5, 7, 8]), 2),  # all classes in turn
        ("--guidance 0", 0, 0),  # told none
    ],
)
def test_the_class_that_is_asked_for_is_drawn(options, labels, scale, digits_run, drawn):
    assert main(["sample", "--run", digits_run, "--n", "7", "--steps", "3", "--device", "cpu", "--out", "x.png", *options.split()]) == 0
    wanted = by_hand(digits_run, 7, labels, scale)
    torch.testing.assert_close(drawn[0], wanted, rtol=0, atol=0.02)
    for other in ((5, 1), (7, 2), (0, 1)):
        if other != (labels if isinstance(labels, int) else None, scale) and scale != 0:
            assert (drawn[0] - by_hand(digits_run, 7, *other)).abs().max() > 0.05  # the class and the scale are heard


def test_a_named_class_is_drawn_by_name_or_number_and_all_in_order(drawn, monkeypatch, capsys):
    speak_up(monkeypatch)
    draw_classes(["cat", "wild dog"])
    told = ok(f"{FOLDER} --out run", capsys)
    assert "class by class from 'cat' to 'wild dog'" in told and describe_model("run")["facts"]["classes"] == ["cat", "wild dog"]
    words = re.search("next: ddpm-nb (.*)", told)[1]
    assert words == "sample --run run --label 'wild dog' --out samples.png"
    drawn.clear()
    for more in ("--label 'wild dog'", "--label 1", "--label cat"):
        ok(f"sample --run run --n 2 --steps 2 --out x.png {more}", capsys)
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert "class by class" in ok("sample --run run --n 2 --steps 2 --out x.png", capsys)
    assert drawn[3][0].allclose(drawn[2][0], atol=1e-4) and drawn[3][1].allclose(drawn[0][1], atol=1e-4)
    assert "--label must be one of cat, 'wild dog'; got 'mouse'" in refused("sample --run run --label mouse --out x.png", capsys)
    assert re.search("classes +cat, wild dog", ok("info --run run", capsys))


def test_names_that_are_numbers_are_names(capsys):
    assert cli._find_class("1", ["1", "10", "2"]) == 0 and cli._find_class("2", ["1", "10", "2"]) == 2
    assert cli._find_class("1", ["a", "b"]) == 1
    for label, names in (("0", ["1", "10", "2"]), ("2", ["a", "b"]), ("-1", ["a", "b"]), ("", ["a", "b"])):
        with pytest.raises(ValueError, match=f"--label must be one of {', '.join(names)}; got '{label}'"):
            cli._find_class(label, names)
    with pytest.raises(ValueError, match=r"19, \.\.\.; got 'x'"):
        cli._find_class("x", [str(i) for i in range(30)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --run RUN --label ten --out x.png", "--label must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; got 'ten'"),
        ("sample --run RUN --label 10 --out x.png", "--label must be one of 0, 1,"),
        ("sample --run RUN --guidance -1 --out x.png", "--guidance must be finite and in [0, 20]; got -1"),
        ("sample --run RUN --guidance 21 --out x.png", "--guidance must be finite and in [0, 20]; got 21"),
        ("sample --run digits --label 7 --out x.png", "--label needs a model that is told classes, as train --conditional class makes it; digits is told none"),
        ("sample --run digits --guidance 2 --out x.png", "--guidance needs a model that is told classes"),
        ("train --dataset digits --label-dropout 0.2 --out new", "--label-dropout is for runs that are told classes: --conditional class"),
        ("train --dataset digits --conditional class --label-dropout 1 --out new", "--label-dropout must be finite and in [0, 1)"),
        ("train --dataset folder --root flat --conditional class --out new", "needs at least two classes; --root flat has one: put the pictures"),
        ("train --dataset folder --root empty --conditional class --unreadable skip --out new", "no picture of class 'b' is left to train on"),
        ("train --dataset digits --out RUN --resume --conditional none", "--conditional was class and is none"),
        ("evaluate --run RUN --dataset folder --root pair", "was told the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; these images are of a, b"),
    ],
)
def test_what_cannot_be_asked_for_is_said_in_a_line(words, message, digits_run, capsys):
    draw_classes(["a", "b"], 2, "pair")
    draw_classes([""], 3, "flat")
    draw_classes(["a"], 3, "empty")
    Path("empty/b").mkdir()
    Path("empty/b/0.png").write_text("no picture")
    told = refused(words.replace("RUN", digits_run), capsys)
    assert message in told
    assert not Path("x.png").exists() and not Path("new").exists()


def test_a_run_that_always_heard_its_classes_is_not_guided(drawn, capsys):
    draw_classes(["a", "b"], 3)
    ok(f"{FOLDER} --label-dropout 0 --out run", capsys)
    assert read_settings("run")[0].label_dropout == 0
    assert "--guidance must be 1: run was trained with --label-dropout 0" in refused("sample --run run --guidance 2 --out x.png", capsys)
    ok("sample --run run --n 2 --steps 1 --guidance 1 --out x.png", capsys)


def test_a_network_without_a_row_for_no_class_draws_its_classes(drawn, capsys):
    torch.manual_seed(0)
    peer = PeerUNet(8, 1, 1, (8, 8), 16, (False, False), (False, False), n_res_blocks=1, norm_groups=4, mid_norm_groups=4, n_classes=3)
    torch.nn.init.normal_(peer.conv_out.weight)
    save_pretrained("peer", peer, make_schedule("cosine", 20))
    ok("sample --run ./peer --n 3 --steps 2 --device cpu --out x.png", capsys)
    ok("sample --run ./peer --n 3 --steps 2 --device cpu --label 2 --out x.png", capsys)
    torch.testing.assert_close(drawn[0], by_hand("./peer", 3, torch.arange(3), steps=2), rtol=0, atol=1e-3)
    torch.testing.assert_close(drawn[1], by_hand("./peer", 3, 2, steps=2), rtol=0, atol=1e-3)
    assert "--guidance must be 1: ./peer cannot be told no class" in refused("sample --run ./peer --guidance 2 --out x.png", capsys)
    assert "--label must be one of 0, 1, 2; got '3'" in refused("sample --run ./peer --label 3 --out x.png", capsys)


def test_a_learned_variance_is_used_where_nothing_is_pushed(drawn, capsys, monkeypatch):
    ok(f"{DIGITS} --variance learned --iterations 2 --out run", capsys)
    import ddpm_nb.sampling

    told, sample = [], ddpm_nb.sampling.sample_ddpm
    monkeypatch.setattr(ddpm_nb.sampling, "sample_ddpm", lambda *a, **o: told.append(o.get("variance")) or sample(*a, **o))
    for scale in ("1", "2"):
        ok(f"sample --run run --sampler ddpm --n 2 --label 4 --guidance {scale} --out x.png", capsys)
    assert told == ["learned", None] and not drawn[-1].equal(drawn[-2])
    assert "given their classes, with the learned variance" in ok("evaluate --run run --n 3", capsys)


def test_images_are_measured_with_their_own_classes(digits_run, capsys):
    told = ok(f"evaluate --run {digits_run} --n 5 --device cpu --out figures.json", capsys)
    assert "on 5 test images of digits, given their classes" in told
    model, schedule = load_pretrained(digits_run)
    data = load_dataset("digits", split="test")
    images, found = data.images()[:5], {}
    for name, labels in (("right", data.labels[:5]), ("wrong", data.labels[:5].flip(0))):
        predict = lambda x, t, labels=labels: model(x, t, labels.repeat(len(x) // 5))
        found[name] = bits_per_dim(predict, schedule, images, n_levels=17, generator=seeded(0)).mean
    assert json.loads(Path("figures.json").read_text())["bits_per_dim"] == pytest.approx(found["right"])
    assert found["right"] != pytest.approx(found["wrong"], rel=1e-3)


def test_each_image_keeps_its_class_however_many_come_at_once():
    labels = torch.arange(400)
    predict = cli._told_each(lambda x, t, y: torch.stack([x, t, y]).T, labels)
    rows = torch.arange(1200)
    assert predict(rows, rows + 1).equal(torch.stack([rows, rows + 1, labels.repeat(3)]).T)


def test_held_out_pictures_come_with_their_classes(monkeypatch, capsys):
    import ddpm_nb.runs

    given, train = [], ddpm_nb.runs.train
    monkeypatch.setattr(ddpm_nb.runs, "train", lambda *a, **o: given.append((a[0], o["held_out"])) or train(*a, **o))
    draw_classes(["a", "b"])
    ok(f"{FOLDER} --held-out 0.25 --out run", capsys)
    network, (images, labels) = given[0]
    assert isinstance(network, ClassUNet) and network.n_classes == 2 and len(images) == len(labels) == 3
    whole = FolderDataset("pics", 8, grey=True)
    for x, y in zip(images, labels.tolist(), strict=True):
        assert any(x.equal(image) and y == label for image, label in whole)
    assert "on 3 test images of folder, given their classes" in ok("evaluate --run run", capsys)
    ok("resume --out run --iterations 3", capsys)
    assert given[1][1][0].equal(images) and given[1][1][1].equal(labels)


def test_a_run_goes_on_exactly_with_its_classes(capsys):
    ok(f"{DIGITS} --checkpoint-every 3 --out run", capsys)
    before = Path("run/model.safetensors").read_bytes()
    for path in Path("run/checkpoints").glob("step-00000006.*"):
        path.unlink()
    assert "trained 6 iterations" in ok("resume --out run", capsys)
    assert Path("run/model.safetensors").read_bytes() == before


def test_a_sheet_shows_every_class(digits_run, monkeypatch):
    asked = []
    monkeypatch.setattr(ClassUNet, "forward", lambda self, x, t, labels=None: asked.append(labels) or x)
    model, schedule = load_pretrained(digits_run)
    cli._draw_sheet(model, schedule, "eps", 1, Path("x.png"))
    assert asked[0].tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9] and np.asarray(Image.open("x.png")).size
    assert cli._in_turn(6, 3).tolist() == [0, 0, 1, 1, 2, 2] and cli._in_turn(2, 10).tolist() == [0, 5]
