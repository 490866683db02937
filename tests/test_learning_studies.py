"""Studies whose figures the chapters of learning quote: they measure what they say, go on where they stopped, and are stored whole."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded
from ddpm_nb.results import read_results
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
flows, recipes, objectives = (pytest.importorskip(name) for name in ("flows", "recipes", "objectives"))
variances = pytest.importorskip("variances")
ddim, pipelines, common = (pytest.importorskip(name) for name in ("ddim_digits", "train_pipeline", "common"))


# chapter 15: networks side by side


def test_networks_side_by_side_do_not_hear_each_other():
    torch.manual_seed(0)
    networks, x, t = flows.Networks(2), torch.randn(4 * flows.SEEDS, 2), torch.rand(4 * flows.SEEDS)
    before, changed = networks(x, t), x.clone()
    changed[4:8] += 1  # the second network's part
    moved = (networks(changed, t) - before).abs().amax(1) > 0
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 4 * (flows.SEEDS - 2)


def test_straightness_is_zero_on_chords_and_known_on_a_turn():
    noise = torch.randn(flows.SEEDS * 30, 2, generator=seeded(0))
    still = lambda x, t: torch.ones_like(x)
    assert max(flows.straightness(still, noise)) < 1e-9
    # dx/dt = (t, 0), t from 1 to 0: the end is noise - 1/2, so S is the mean of (1/2 - t)^2, 1/12 in the limit
    bent = lambda x, t: torch.stack([t / 1000, 0 * t], 1)
    assert flows.straightness(bent, noise, n_steps=400) == pytest.approx([1 / 12] * flows.SEEDS, abs=1e-3)


def test_the_energy_distance_is_that_of_points_that_one_can_count():
    x, y = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert flows.energy_distance(x, y) == pytest.approx(1 + 5**0.5 - 2)
    g = seeded(1)
    same = [flows.energy_distance(*torch.randn(2, 300, 2, generator=g)) for _ in range(20)]
    assert abs(statistics.mean(same)) < 4 * statistics.stdev(same) / 20**0.5  # no bias


def test_every_sampler_takes_the_calls_that_its_row_names():
    calls = []

    def network(x, t):
        calls.append(len(x))
        return 0.1 * x

    table = flows.samplers(network, make_schedule("cosine", 1000), network, network)
    for name, (counts, sample) in table.items():
        for n in counts:
            calls.clear()
            sample(torch.randn(3, 1, 8, 8, generator=seeded(0)), n)
            odd = n - 1 if "Heun" in name and n % 2 == 0 else n  # two calls a step, one in the last
            assert len(calls) == odd, (name, n, len(calls))


def test_costs_are_shares_of_a_step_of_ddpm(monkeypatch):
    for name, value in {"ROUNDS": 2, "BATCH": 2, "TIMED": 3}.items():
        monkeypatch.setattr(flows, name, value)
    found = flows.costs()
    assert found["rounds"]["DDPM"] == [1, 1] and found["seconds of a call, DDPM"] > 0
    stored = read_results("flows")["costs"]
    assert stored["processor"] and set(stored["rounds"]) == set(found["rounds"]) == set(flows_of_equal_calls())
    assert all(len(shares) >= 10 and min(shares) > 0 for shares in stored["rounds"].values())


def flows_of_equal_calls():
    """Name the samplers that are compared at the same numbers of calls."""
    return [name for name, row in read_results("flows")["distance"].items() if "50" in row]


# chapter 13: steps drawn by their losses


def test_the_bound_has_one_mean_however_its_steps_are_drawn():
    schedule, n = make_schedule("cosine", 5), 40_000
    x_0 = torch.randint(17, (n, 1, 1, 2), generator=seeded(0)) / 8 - 1
    pairs = {"t": torch.arange(n) % 5, "eps": torch.randn(x_0.shape, generator=seeded(1)), "reduction": "none"}
    model = lambda x, t: torch.cat([0.7 * x, 0 * x], 1)
    history = variances.LossHistory(5)
    evenly = variances.bound_loss(0)(model, schedule, x_0, **pairs)
    history.update(pairs["t"][:500], evenly[:500])
    by_loss = variances.bound_loss(0, history)(model, schedule, x_0, **pairs)
    terms = variances.vlb_terms(model, schedule, x_0, n_levels=17, clip_x_0=False, variance="learned", generator=seeded(2))
    expected = float((terms.kl.sum(1) + terms.decoder).mean())
    for losses in (evenly, by_loss):
        assert abs(float(losses.mean()) - expected) < 5 * float(losses.std()) / n**0.5 + 0.01 * expected
    assert by_loss.var() < evenly.var() and history.counts.sum() == n + 500


def test_the_stored_draws_are_whole():
    found = read_results("variances")["draws"]
    for name in ("bound", "loss variance"):
        assert set(found[name]) == set(variances.DRAWS)
        assert all(len(values) == len(variances.DRAWS_SEEDS) for values in found[name].values())


# what is stored is whole, and a stopped run goes on


def test_recipes_go_on_and_train_as_they_say(tmp_path, monkeypatch):
    path = tmp_path / "recipes.json"
    monkeypatch.setattr(recipes, "PATH", path)
    monkeypatch.setattr(recipes, "SEEDS", 1)
    monkeypatch.setattr(recipes, "LENGTHS", (3,))
    recipes.main()
    first = read_json(path)["scores"]["3"]
    assert all(len(rows) == 1 and len(rows[0]) == 2 for rows in first.values()) and set(first) == set(recipes.RECIPES)
    assert len({json.dumps(rows) for rows in first.values()}) > 1  # the recipes differ
    monkeypatch.setattr(recipes, "SEEDS", 2)
    recipes.main()
    second = read_json(path)["scores"]["3"]
    assert all(rows[:1] == first[name] and len(rows) == 2 and rows[1] != rows[0] for name, rows in second.items())


def test_objectives_go_on_with_what_is_missing(tmp_path, monkeypatch):
    path, asked = tmp_path / "objectives.json", []
    found = {"bound": {"bits/dim": 1.0}, "samples": {"frechet": 2.0}, "training seconds": 3.0}

    def row(name, seed, images, digits):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((name, seed))
        return found | {"seed": seed}

    monkeypatch.setattr(objectives, "PATH", path)
    monkeypatch.setattr(objectives, "row", row)
    with pytest.raises(KeyboardInterrupt):
        objectives.main()
    asked.append("stopped")
    objectives.main()
    wanted = [(name, seed) for seed in range(objectives.SEEDS) for name in objectives.VARIANTS]
    assert asked[:7] + asked[8:] == wanted
    stored = read_json(path)["rows"]
    assert all([each["seed"] for each in rows] == [0, 1, 2] for rows in stored.values())


def test_stored_figures_agree_with_each_other():
    stored = read_results("objectives")["rows"]
    assert set(stored) == set(objectives.VARIANTS)
    for rows in stored.values():
        assert len(rows) == objectives.SEEDS
        for row in rows:
            bits = row["bits of each image"]
            assert len(bits) == objectives.N_BOUND
            assert statistics.mean(bits) == pytest.approx(row["bound"]["bits/dim"], abs=2e-3)
    scores = read_results("recipes")["scores"]
    assert {(length, name, len(rows)) for length, each in scores.items() for name, rows in each.items()} == {
        (str(length), name, recipes.SEEDS) for length in recipes.LENGTHS for name in recipes.RECIPES
    }
    found = read_results("ddim_digits")
    value = {(row["eta"], row["steps"]): row["frechet"] for row in found["rows"]}
    assert found["n"] == 2000 and [gap["claim"] for gap in found["gaps"]] == list(ddim.CLAIMS)
    for gap in found["gaps"]:
        worse, better = ddim.CLAIMS[gap["claim"]]
        assert gap["gap"] == pytest.approx(value[worse] - value[better], abs=3 * gap["error"])
        assert gap["error"] > 0
    distances = read_results("flows")["distance"]
    assert all(len(values) == flows.SEEDS for row in distances.values() for values in row.values())


# chapter 22: the pipelines that ship


def test_a_pipeline_is_trained_measured_and_shipped_whole(tmp_path, monkeypatch, capsys):
    stage = TrainConfig(4, batch_size=32, checkpoint_every=4)
    monkeypatch.setitem(pipelines.RECIPES, "digits", replace(pipelines.RECIPES["digits"], clip=stage, unet=stage))
    monkeypatch.setattr(pipelines, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(pipelines, "PIPELINES", tmp_path / "shipped")
    monkeypatch.setattr(pipelines, "relative_spread", lambda *a: (1.0, 0.1))
    monkeypatch.setattr("ddpm_nb.texts.SampleSheets.step", lambda *a: None)
    arguments = ["x", "digits", "--hardware", "a machine", "--work", str(tmp_path / "runs"), "--prompts", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    pipelines.main()
    shipped = pipelines.TextToImage.from_pretrained(tmp_path / "shipped" / "digits")
    first = shipped.generate("a seven", 2, n_steps=2, generator=seeded(0))
    assert first.shape == (2, 1, 8, 8) and shipped.rule is not None and shipped.tokenizer.unknown_words("a bold seven") == []
    names = ("digit right", "weight right", "slant right", "sure")
    assert {f"{name}, share of 8 prompts" for name in names} <= set(shipped.card)
    assert {f"guidance 1: {name}, share of 8 prompts" for name in names} <= set(shipped.card)
    assert shipped.card["hardware"] == "a machine" and shipped.card["CPU minutes of training, unet"] >= 0
    checkpoint = next((tmp_path / "runs" / "digits" / "unet" / "checkpoints").glob("step-*.safetensors"))
    before = checkpoint.stat().st_mtime_ns
    pipelines.main()  # a finished run is only measured again
    assert checkpoint.stat().st_mtime_ns == before
    again = pipelines.TextToImage.from_pretrained(tmp_path / "shipped" / "digits")
    assert torch.equal(again.generate("a seven", 2, n_steps=2, generator=seeded(0)), first)
    monkeypatch.setattr(sys, "argv", ["x", "digits", "--measure-again", "--prompts", "4"])
    pipelines.main()
    measured = pipelines.TextToImage.from_pretrained(tmp_path / "shipped" / "digits")
    assert torch.equal(measured.generate("a seven", 2, n_steps=2, generator=seeded(0)), first)
    assert {f"{name}, share of 4 prompts" for name in names} <= set(measured.card) and not any("of 8 prompts" in key for key in measured.card)
    kept = ("hardware", "iterations", "CPU minutes of training, unet", "CLIP zero-shot digit accuracy, test")
    assert all(measured.card[key] == again.card[key] for key in kept) and measured.card["guidance"] == pipelines.USUAL


def test_spread_is_one_for_real_pictures_and_less_for_one_alone(monkeypatch):
    classifier = pipelines.load_classifier("digits")
    images = pipelines.load_dataset("digits").images()
    rows = torch.zeros(len(images), 3, dtype=torch.long)
    rows[:, 0] = torch.arange(len(images)) % 2
    draws = {
        "real": lambda p, prompts, *a: images[torch.randperm(len(images), generator=seeded(1))[: len(prompts)]],
        "one": lambda p, prompts, *a: images[:1].expand(len(prompts), -1, -1, -1),
    }
    found = {}
    for name, draw in draws.items():
        monkeypatch.setattr(pipelines, "draw", draw)
        found[name] = pipelines.relative_spread(None, rows, images, classifier, 1.0, n_captions=2, n=400)[0]
    assert found["real"] == pytest.approx(1, abs=0.05) and found["one"] == 0


def test_the_clock_goes_on_adding(tmp_path):
    path = tmp_path / "minutes.json"
    path.write_text(json.dumps({"clip": 5.0}))
    clock = common.Clock(path)
    clock.last -= 60  # a minute of work
    clock("clip", SimpleNamespace(n_steps=50, history=[1.0], config=SimpleNamespace(n_iterations=90)))
    assert read_json(path)["clip"] == pytest.approx(6, abs=0.1)
