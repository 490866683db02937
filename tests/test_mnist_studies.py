"""The studies of MNIST go on where they were stopped, and store what chapter 12 reads; on few pictures and steps."""

import sys
import time
from types import SimpleNamespace

import mnist_epochs as epochs
import mnist_latent as latent
import mnist_notes as notes
import mnist_tables as tables
import peak
import pytest
import torch
import train_mnist
from common import checksums, write
from PIL import Image

from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.files import read_json
from ddpm_nb.hub import describe_model
from ddpm_nb.results import Yardstick, measure_samples, read_results
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig

EPOCH = 4


@pytest.fixture(scope="module")
def few():
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifier = load_classifier("mnist")
    return x, Yardstick(x, 256, classifier, classifier_features(classifier, x))


@pytest.fixture
def table(monkeypatch, tmp_path, few):
    """Return how to call the study of the tables, whose rows are only named; what was asked for; and its folder."""
    asked, stored = [], read_results("mnist")
    some = {row["variant"]: row for row in stored["objectives"]} | {f"ddim {row['steps']} {row['eta']}": row for row in stored["ddim"]}
    some |= {"floor": stored["floor"], "curve": stored["curve"]}
    some["eps, L_simple"] = some["eps, L_simple"] | {"training steps": stored["training steps"]}

    def call(*words):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["x", "--hardware", "a machine", "--work", str(tmp_path / "work"), *words])
        tables.main()
        return list(asked)

    for name, value in {"load_dataset": lambda *a, **b: None, "make_classifier": lambda *a: None, "make_yardstick": lambda *a: None}.items():
        monkeypatch.setattr(tables, name, value)
    monkeypatch.setattr(tables, "rows_to_measure", lambda *a: {name: lambda name=name: asked.append(name) or dict(some[name]) for name in some})
    monkeypatch.setattr(tables, "join_pictures", lambda work: None)
    monkeypatch.setattr(tables, "OUT", tmp_path / "mnist.json")
    write(tables.OUT, stored)
    return call, tmp_path / "work", list(some)


def another(monkeypatch, weights):
    """Pretend that other weights ship."""
    now = {"weights/mnist": weights, "classifiers/mnist": checksums("classifiers/mnist")["classifiers/mnist"]}
    monkeypatch.setattr(tables, "checksums", lambda *folders: now)


def test_tables_rest_on_what_ships():
    stored = read_results("mnist")
    rows = tables.rows_to_measure(None, SimpleNamespace(held_out=None), None)
    assert tables.stored_rows().keys() == rows.keys(), "measure again: python studies/mnist_tables.py --renew"
    assert stored["study"]["sha256"] == checksums("weights/mnist", "classifiers/mnist")
    assert not any("seconds per image" in row for row in stored["ddim"])  # in which judging was counted


def test_after_another_network_its_rows_are_measured_and_no_other(table, monkeypatch):
    call, _, names = table
    of_network = [name for name in names if name.startswith(("ddim", "curve"))]
    assert call("--renew") == []  # all hold
    another(monkeypatch, "second")
    assert call("--renew", "--rows", "curve") == ["curve"]
    assert sorted(call("--renew")) == sorted(set(of_network) - {"curve"})  # goes on, and trains nothing
    again = read_json(tables.OUT)
    assert again["study"]["sha256"]["weights/mnist"] == "second" and again["objectives"] == read_results("mnist")["objectives"]
    another(monkeypatch, "third")
    assert sorted(call("--renew")) == sorted(of_network)  # what lies in the folder is of the second network
    assert read_json(tables.OUT)["study"]["sha256"]["weights/mnist"] == "third"


def test_rows_of_other_settings_are_not_taken(table, monkeypatch):
    call, work, names = table
    assert sorted(call()) == sorted(names) and call() == []
    monkeypatch.setattr(tables, "CONFIG", TrainConfig(n_iterations=7))
    variants = [name for name in names if name in tables.VARIANTS]
    assert call() == variants and read_json(tables.OUT)["study"]["training"]["n_iterations"] == 7
    assert {path.stem for path in work.glob("*.json")} == set(names)
    with pytest.raises(SystemExit):
        call("--rows", "curve", "ddim 11 0.0")


def test_seconds_are_those_of_drawing(few, monkeypatch):
    _, yardstick = few
    judge = tables.measure_images

    def slowly(*args):
        time.sleep(0.5)
        return judge(*args)

    network = lambda x, t: torch.zeros_like(x)
    monkeypatch.setattr(tables, "load_pretrained", lambda name: (network, make_schedule("cosine", 1000)))
    monkeypatch.setattr(tables, "measure_images", slowly)
    row = tables.grid_row(2, 1.0, yardstick, n=20)
    assert 0 < row.pop("seconds of drawing an image") < 0.5 / 20
    monkeypatch.setattr(tables, "measure_images", judge)
    assert row == measure_samples(network, make_schedule("cosine", 1000), yardstick, 20, 2)[0]


def test_the_notes_experiment_is_stored_and_goes_on(few, tmp_path, monkeypatch):
    x, yardstick = few
    monkeypatch.setattr(notes, "SMOOTH", 2)
    facts = notes.study(x, yardstick, 3, 16, tmp_path / "runs", tmp_path, n_steps=31)
    assert {"plain", "unet", "floor", "epochs", "T"} <= set(facts) and facts["T"] == 31
    assert all(len(facts[name]["curve"]) == 1 for name in notes.MAKERS)  # three iterations make one whole point
    with Image.open(tmp_path / "notes-walk.png") as walk:
        assert walk.size == (16 * 29 + 1, 16 * 29 + 1)
    before = (tmp_path / "runs" / "unet" / "log.jsonl").read_bytes()
    again = notes.study(x, yardstick, 3, 16, tmp_path / "runs", tmp_path, n_steps=31)
    assert again == facts and (tmp_path / "runs" / "unet" / "log.jsonl").read_bytes() == before


def test_networks_of_the_notes_cost_alike():
    costs = [notes.cost(make())["million operations"] for make in notes.MAKERS.values()]
    assert max(costs) < 1.25 * min(costs)


@pytest.mark.parametrize(
    ("iteration", "wanted"),
    [(937, 1), (900, None), (9200, 10), (9600, 10), (9800, None), (18740, 20), (0, None)],
)
def test_a_checkpoint_stands_for_an_epoch_only_nearby(iteration, wanted):
    assert epochs.nearest_epoch(iteration, 937) == wanted


def test_epochs_are_kept_measured_and_tabled_once(few, tmp_path):
    x, yardstick = few
    run, work = tmp_path / "run", tmp_path / "work"
    work.mkdir()
    config = TrainConfig(
        n_iterations=8, batch_size=4, objective="v", log_every=4, checkpoint_every=4
    )
    epochs.train(epochs.new_network(), make_schedule("cosine", 1000), x, config, out=run)
    (run / "checkpoints" / "step-best.json").write_text("{}")  # what somebody put beside them
    epochs.keep_checkpoints(run, work, EPOCH)
    epochs.keep_checkpoints(run, work, EPOCH)  # nothing is kept twice
    kept = sorted(work.glob("epoch-*.safetensors"))
    assert [path.stem for path in kept] == ["epoch-01-00000004", "epoch-02-00000008"]
    for path in kept:
        epochs.measure(path, [1.0] * 4 + [0.5] * 4, EPOCH, yardstick, 16, 1)
    epochs.collect(work, {"frechet": 0.0}, tmp_path / "out.json", tmp_path / "epochs.png")
    rows = read_json(tmp_path / "out.json")["rows"]
    assert [(row["epochs"], row["loss"]) for row in rows] == [(1.0, 1.0), (2.0, 0.5)]
    with Image.open(tmp_path / "epochs.png") as picture:
        assert picture.size == (2 * (16 * 29 + 1), 2 * (2 * 29 + 1))


def test_rows_of_epochs_are_of_one_run(few, tmp_path):
    x, _ = few
    for name, lr in (("one", 1e-3), ("other", 1e-4)):
        config = TrainConfig(n_iterations=1, batch_size=4, lr=lr)
        epochs.train(epochs.new_network(), make_schedule("cosine", 1000), x, config, out=tmp_path / name)
    for _ in range(2):
        epochs.check_run(tmp_path / "one", tmp_path)
    with pytest.raises(SystemExit, match="holds rows of another run"):
        epochs.check_run(tmp_path / "other", tmp_path)


def test_the_model_of_mnist_is_trained_and_goes_on(few, tmp_path, monkeypatch):
    x, _ = few
    config = TrainConfig(n_iterations=1, batch_size=4, objective="v", checkpoint_every=1)
    for name, value in {"load_dataset": lambda *a, **b: x, "settings": lambda n: config}.items():
        monkeypatch.setattr(train_mnist, name, value)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "run")])
    for _ in range(2):
        train_mnist.main()
        assert describe_model(tmp_path / "run")["card"]["iterations"] == 1


def test_latents_are_trained_and_measured(few, tmp_path, monkeypatch):
    x, _ = few
    monkeypatch.setattr(latent, "load_images", lambda *a, **b: x)
    monkeypatch.setattr(latent, "FITTING", latent.FITTING | {"n_iterations": 1, "batch_size": 4})
    monkeypatch.setattr(latent, "CONFIG", latent.replace(latent.CONFIG, n_iterations=2, batch_size=4))
    monkeypatch.setattr(latent, "PIXELS", latent.replace(latent.PIXELS, batch_size=4))
    few_of = {"SNAPSHOTS": (1, 2), "N_SAMPLES": 64, "SAMPLE_STEPS": 1, "N_TIMED": 1, "N_REFERENCE": 64, "OUT": tmp_path / "latent.json"}
    for name, value in few_of.items():
        monkeypatch.setattr(latent, name, value)
    monkeypatch.setattr(sys, "argv", ["x", "--hardware", "a machine", "--work", str(tmp_path)])
    latent.main()
    found = read_json(tmp_path / "latent.json")
    assert [row["iteration"] for row in found["training steps"]] == [1, 2] and found["cost"]["pixels"]["seconds of a training step"] > 0
    kept = (tmp_path / "autoencoder.pt").stat().st_mtime_ns
    latent.fitted_autoencoder(x, tmp_path)
    assert (tmp_path / "autoencoder.pt").stat().st_mtime_ns == kept
    monkeypatch.setitem(latent.FITTING, "n_iterations", 2)  # that of other settings is not taken
    latent.fitted_autoencoder(x, tmp_path)
    assert (tmp_path / "autoencoder.pt").stat().st_mtime_ns > kept


def test_the_fastest_convolution_is_found(monkeypatch, capsys):
    monkeypatch.setattr(peak, "SHAPES", ((2, 4, 4, 8), (2, 8, 8, 8)))
    monkeypatch.setattr(sys, "argv", ["x", "cpu", "float32", "1"])
    peak.main()
    assert '"gflops": ' in capsys.readouterr().out and peak.rate((1, 2, 3, 4), torch.float32, torch.device("cpu"), n=1) > 0


def test_stored_results_name_epochs_that_were_measured():
    rows = read_results("mnist_epochs")["rows"]
    assert rows and all(epochs.nearest_epoch(row["iteration"], 937) for row in rows)
    stored = read_results("mnist_notes")
    assert (
        stored["T"] == 500
        and stored["training"]["lr"] == 5e-4
        and stored["training"]["batch_size"] == 64
    )
