"""The studies of MNIST go on where they were stopped, and store what chapter 12 reads; on few pictures and steps."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddpm_nb.evaluation import classifier_features, load_classifier
from ddpm_nb.files import read_json
from ddpm_nb.results import Yardstick, read_results
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
epochs, notes = pytest.importorskip("mnist_epochs"), pytest.importorskip("mnist_notes")
tables = pytest.importorskip("mnist_tables")
EPOCH = 4


@pytest.fixture(scope="module")
def few():
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifier = load_classifier("mnist")
    return x, Yardstick(x, 256, classifier, classifier_features(classifier, x))


def test_tables_of_the_shipped_network_are_of_the_one_that_ships(monkeypatch, tmp_path):
    stored = read_results("mnist")
    assert stored["sha256 of the shipped weights"] == tables.shipped(), "measure its rows again: see studies/mnist_tables.py --renew"
    rows = tables.rows_to_measure(None, SimpleNamespace(held_out=None), tmp_path)
    assert tables.stored_rows().keys() == rows.keys()
    monkeypatch.setattr(tables, "OUT", tmp_path / "again.json")
    monkeypatch.setattr(tables, "shipped", lambda: "another")
    (tmp_path / "again.json").write_text(json.dumps(stored))
    kept = tables.stored_rows()
    assert kept.keys() == {name for name in rows if not name.startswith(("ddim", "curve"))}
    tables.collect(tmp_path, tables.stored_rows() | dict.fromkeys(rows.keys() - kept.keys(), stored["curve"]), "a machine")
    again = read_json(tmp_path / "again.json")
    assert again["objectives"] == stored["objectives"] and again["training steps"] == stored["training steps"]
    assert again["sha256 of the shipped weights"] == "another" and again["hardware"] == "a machine"


def test_the_notes_experiment_is_stored_and_goes_on(few, tmp_path):
    x, yardstick = few
    facts = notes.study(x, yardstick, 2, 16, tmp_path / "runs", tmp_path, n_steps=31)
    assert {"plain", "unet", "floor", "epochs", "T"} <= set(facts) and facts["T"] == 31
    assert all(len(facts[name]["curve"]) == 1 for name in notes.MAKERS)
    with Image.open(tmp_path / "notes-walk.png") as walk:
        assert walk.size == (16 * 29 + 1, 16 * 29 + 1)
    before = (tmp_path / "runs" / "unet" / "log.jsonl").read_bytes()
    again = notes.study(x, yardstick, 2, 16, tmp_path / "runs", tmp_path, n_steps=31)
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


def test_stored_results_name_epochs_that_were_measured():
    rows = read_results("mnist_epochs")["rows"]
    assert rows and all(epochs.nearest_epoch(row["iteration"], 937) for row in rows)
    stored = read_results("mnist_notes")
    assert (
        stored["T"] == 500
        and stored["training"]["lr"] == 5e-4
        and stored["training"]["batch_size"] == 64
    )
