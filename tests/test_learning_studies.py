"""Studies whose figures the chapters of learning quote: they measure what they say, go on where they stopped, and are stored whole."""

import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import bfloat16
import classes
import common
import ddim_digits as ddim
import diffusers_solvers as solvers
import flows
import foreign_loops
import objectives
import pytest
import quality
import recipes
import relatives
import shapes
import ship
import torch
import train_pipeline as pipelines
import unguided
import variances
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb.data import ImageDataset, load_dataset
from ddpm_nb.evaluation import load_classifier
from ddpm_nb.files import read_json
from ddpm_nb.gaussian import seeded, seeded_init
from ddpm_nb.results import read_results
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import TrainConfig


@pytest.fixture
def run(monkeypatch):
    """Return how to call a study as from a shell, with some of its constants changed."""

    def call(study, *words, **changed):
        for name, value in changed.items():
            monkeypatch.setattr(study, name, value)
        monkeypatch.setattr(sys, "argv", [f"{study.__name__}.py", *words])
        study.main()

    return call


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


def test_recipes_go_on_and_train_as_they_say(tmp_path, run, capsys):
    path = tmp_path / "recipes.json"
    run(recipes, PATH=path, SEEDS=1, LENGTHS=(3,))
    first = read_json(path)["scores"]["3"]
    assert all(len(rows) == 1 and len(rows[0]) == 2 for rows in first.values()) and set(first) == set(recipes.RECIPES)
    assert len({json.dumps(rows) for rows in first.values()}) > 1  # the recipes differ
    (quarters,) = read_json(path)["quarters of t"]
    average = first["nothing"][0][1]  # the same training: its quarters, which hold equally many steps, give its mean
    assert len(quarters) == 4 and sum(quarters) / 4 == pytest.approx(average, rel=0.01) and len(set(quarters)) == 4
    run(recipes, SEEDS=2)
    second = read_json(path)["scores"]["3"]
    assert all(rows[:1] == first[name] and len(rows) == 2 and rows[1] != rows[0] for name, rows in second.items())
    run(recipes, SEEDS=1, LR=1e-4)  # rows of another learning rate do not stay
    third = read_json(path)
    assert third["lr"] == 1e-4 and all(len(rows) == 1 and rows != first[name] for name, rows in third["scores"]["3"].items())
    assert "recipes.json is measured anew: its rows have another lr" in capsys.readouterr().out


def test_what_is_stored_is_kept_only_under_its_settings(tmp_path, capsys):
    path, settings = tmp_path / "x.json", {"lr": 1.0, "seeds": (0, 1), "network": {"mults": (1, 2)}}
    assert common.kept(path, settings) == {}
    common.write(path, settings | {"rows": [3]})
    assert common.kept(path, settings)["rows"] == [3]  # a tuple is read back as a list
    assert common.kept(path, settings | {"network": {"mults": (1, 4)}}) == {}
    assert common.kept(path, settings | {"new": None}) == {}  # made when nobody thought of it
    assert capsys.readouterr().out.splitlines()[-1] == "x.json is measured anew: its rows have another new"


@pytest.mark.parametrize(
    ("study", "settings"),
    [
        (recipes, recipes.settings()),
        (objectives, objectives.settings()),
        (variances, variances.settings()[0]),
        (relatives, relatives.settings()),
        (solvers, {k: v for k, v in solvers.settings().items() if k != "solvers of"}),  # its version is that of the day
    ],
)
def test_stored_rows_have_the_settings_of_the_study(study, settings):
    assert common.kept(study.PATH, settings), f"measure again: python studies/{study.__name__}.py"


def test_variances_go_on_and_begin_anew_under_other_settings(tmp_path, run, monkeypatch):
    path, seeds = tmp_path / "variances.json", []
    monkeypatch.setattr(variances, "trained", lambda schedule, images, seed, learns: seeds.append((seed, learns)) or seed)
    monkeypatch.setattr(variances, "bounds", lambda network, schedule, images, n: {"seed": network, "images": len(images)})
    monkeypatch.setattr(variances, "noise_error", lambda network, *a: 0.5)
    monkeypatch.setattr(variances, "trained_on_bound", lambda images, held_out, seed, draw: (1.0, 2.0))
    monkeypatch.setattr(sys, "argv", ["x"])
    run(variances, "2", PATH=path)
    found = read_json(path)
    assert found["seeds"] == [0, 1] and "draws" not in found and [row["seed"] for row in found["bound"]["50"]] == [0, 1]
    run(variances)
    found = read_json(path)
    assert found["seeds"] == [0, 1, 2, 3, 4] and len(seeds) == 10 and found["bound"]["1000"][0]["images"] == 32
    assert found["draws"]["bound"] == {name: [1.0] * 3 for name in variances.DRAWS}
    run(variances, T_DRAWS=50)  # the second part alone
    again = read_json(path)
    assert len(seeds) == 10 and again["draws"]["T"] == 50 and again["bound"] == found["bound"]
    run(variances, "1", BATCH=32)
    assert len(seeds) == 12 and read_json(path)["seeds"] == [0]


def test_objectives_go_on_with_what_is_missing(tmp_path, monkeypatch, run):
    path, asked = tmp_path / "objectives.json", []
    found = {"bound": {"bits/dim": 1.0}, "samples": {"frechet": 2.0}, "training seconds": 3.0}

    def row(name, seed, images, digits):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((name, seed))
        return found | {"seed": seed}

    monkeypatch.setattr(objectives, "row", row)
    with pytest.raises(KeyboardInterrupt):
        run(objectives, PATH=path)
    asked.append("stopped")
    run(objectives)
    wanted = [(name, seed) for seed in range(objectives.SEEDS) for name in objectives.VARIANTS]
    assert asked[:7] + asked[8:] == wanted
    stored = read_json(path)["rows"]
    assert all([each["seed"] for each in rows] == [0, 1, 2] for rows in stored.values())
    asked.clear()
    monkeypatch.setattr(objectives, "row", lambda name, seed, *a: asked.append((name, seed)) or found | {"seed": seed})
    run(objectives, CONFIG=replace(objectives.CONFIG, n_iterations=7))
    assert asked == wanted and read_json(path)["training"]["n_iterations"] == 7


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
        assert gap["gap"] == pytest.approx(value[worse] - value[better], rel=1e-6)
        assert gap["error"] > 0
    distances = read_results("flows")["distance"]
    assert all(len(values) == flows.SEEDS for row in distances.values() for values in row.values())


@pytest.mark.parametrize("path", sorted(common.MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_stored_figures_are_of_the_models_that_ship(path):
    facts = read_json(path)
    shipped = facts.get("sha256") or (path.stem == "mnist" and facts["study"]["sha256"])
    if path.stem == "classes":
        shipped = facts["digits"]["sha256"] | facts["mnist"]["sha256"]
    timed = ("performance-cpu", "performance-cpu-float32", "performance-cuda", "gpu")
    without = ("recipes", "variances", "reading", *timed)  # nothing that ships
    assert bool(shipped) != (path.stem in without)
    assert not shipped or shipped == common.checksums(*shipped), f"a model was renewed: measure {path.name} again"


# studies of the digits, with few images and steps


def test_settings_of_ddim_are_compared_by_the_same_places(tmp_path, run, monkeypatch):
    starts = {}

    def sample(model, schedule, shape, *, n_steps, eta, generator):
        x = torch.randn(shape, generator=generator)
        starts.setdefault((eta, n_steps), []).append(x)
        for _ in range(n_steps if eta else 0):
            torch.randn(shape, generator=generator)
        return x.clamp(-1, 1)

    monkeypatch.setattr(ddim, "sample_ddim", sample)
    run(ddim, N=60, PART=30, PATH=tmp_path / "x.json")
    found = read_json(tmp_path / "x.json")
    assert [gap["claim"] for gap in found["gaps"]] == list(ddim.CLAIMS) and found["sha256"] == common.checksums(*ddim.SHIPPED)
    few, many, noisy = starts[0.0, 10], starts[0.0, 50], starts[1.0, 10]
    assert all(a.equal(b) for a, b in zip(few, many, strict=True))  # as the script says
    assert noisy[0].equal(few[0]) and not noisy[1].equal(few[1])


def test_relatives_measure_parts_and_keep_the_others(tmp_path, run, monkeypatch):
    path = tmp_path / "relatives.json"
    few = {"PATH": path, "N": 20, "PART": 10, "CALLS": (2,), "SEEDS": (0,), "ROUNDS": 2, "ITERATIONS": {"VAE": 2, "DDPM": 2}}
    terms = relatives.vlb_terms
    monkeypatch.setattr(relatives, "held_out", relatives.held_out[:12])
    monkeypatch.setattr(relatives, "vlb_terms", lambda model, schedule, x, **options: terms(model, schedule, x[:12], **options))
    run(relatives, "shipped", "balance", **few)
    first = read_json(path)
    assert [row["steps"] for row in first["shipped"]] == [2] and set(first["balance"]) == set(relatives.GAMES) and "bounds" not in first
    run(relatives, "bounds")
    second = read_json(path)
    assert second["balance"] == first["balance"] and set(second["bounds"][0]) == {"VAE", "DDPM", "DDPM, stopped"}
    monkeypatch.setattr(relatives, "checksums", lambda *folders: dict.fromkeys(folders, "another"))
    run(relatives, "shipped")
    assert "balance" not in read_json(path)
    with pytest.raises(SystemExit):
        run(relatives, "nothing")


def test_solvers_go_on_and_are_those_of_the_model_that_ships(tmp_path, run, monkeypatch):
    path, few = tmp_path / "solvers.json", {"SEEDS": (0,), "N": 12, "CALLS": 4}
    names = (solvers.BASE, "ours, second order", "DDIM", "EulerDiscrete, cut, Karras", "k-diffusion, get_sigmas", "k-diffusion, Karras up to 80")
    few["SAMPLERS"] = {name: solvers.SAMPLERS[name] for name in names}
    run(solvers, "1", PATH=path, **few)
    first = read_json(path)["samplers"]
    assert list(first) == list(solvers.SAMPLERS)[:2] and first[solvers.BASE]["gap"] == 0
    run(solvers)
    found = read_json(path)
    assert set(found["samplers"]) == set(solvers.SAMPLERS) and found["samplers"]["ours, second order"] == first["ours, second order"]
    monkeypatch.setattr(solvers, "checksums", lambda *folders: dict.fromkeys(folders, "another"))
    run(solvers, "1")
    assert list(read_json(path)["samplers"]) == list(first)


def test_precisions_are_compared_from_one_start(tmp_path, run, monkeypatch):
    digits = bfloat16.load_images
    monkeypatch.setattr(bfloat16, "load_images", lambda name, split="train": digits(name, split=split)[:40])
    few = {"CONFIG": TrainConfig(n_iterations=2, batch_size=8), "SEEDS": (0,), "T": 4, "N_SAMPLES": 20}
    monkeypatch.setattr(bfloat16, "sample_ddim", lambda *a, **options: bfloat16_samples(*a, **options | {"n_steps": 2}))
    run(bfloat16, "--hardware", "a machine", OUT=tmp_path / "x.json", **few)
    (row,) = read_json(tmp_path / "x.json")["rows"]
    gap = row["bfloat16"]["bits/dim"] - row["float32"]["bits/dim"]
    assert row["difference"][0] == pytest.approx(gap, abs=1e-4) and len(row["float32"]["frechet"]) == 2


bfloat16_samples = bfloat16.sample_ddim


def test_a_run_is_measured_and_shipped(tmp_path, run, monkeypatch):
    from ddpm_nb.hub import load_pretrained
    from ddpm_nb.runs import train
    from ddpm_nb.unet import make_unet

    config = TrainConfig(n_iterations=2, batch_size=8, checkpoint_every=2)
    data, schedule = ship.load_dataset("digits"), make_schedule("cosine", 60)
    card = {"name": "tiny", "grey levels": 17}
    train(make_unet("digits", base_channels=8, norm_groups=4), schedule, data, config, out=tmp_path / "run", card=card, origin={"dataset": "digits"})
    monkeypatch.setattr(ship, "train_classifier", lambda *a: load_classifier("digits"))
    words = [str(tmp_path / "run"), "tiny", "--hardware", "a machine", "--images", "2", "--samples", "20"]
    run(ship, *words, WEIGHTS=tmp_path / "weights")
    model, _ = load_pretrained(tmp_path / "weights" / "tiny")
    card = ship.describe_model(tmp_path / "weights" / "tiny")["card"]
    assert next(model.parameters()).dtype == torch.float32 and card["hardware"] == "a machine" and card["iterations"] == 2
    with pytest.raises(SystemExit):
        run(ship, *words)  # or the model before it would be itself
    before, _ = load_pretrained(tmp_path / "run")
    kept = next(model.parameters())
    assert kept.equal(next(before.parameters()).half().float()) and kept.equal(next(ship.rounded(before).parameters()))
    assert card["test images"] == 2 and card["samples judged"] == 20 and "samples of the model before: Frechet distance" not in card


def test_time_to_quality_is_measured(run, capsys):
    few = {"LIMIT": 3.0, "EVERY": 1.0, "N_SAMPLES": 20, "SAMPLE_STEPS": 2, "START": time.perf_counter()}
    run(quality, "ddpm_nb", "own", "cpu", "1", **few)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["library"] == "ddpm_nb" and found["curve"] and found["floor"] > 0
    assert all(a["iterations"] < b["iterations"] for a, b in zip(found["curve"], found["curve"][1:], strict=False))


def test_loops_of_packages_that_are_not_there_are_told(run, monkeypatch, capsys):
    monkeypatch.setattr(foreign_loops.importlib.util, "find_spec", lambda name: None)
    run(foreign_loops)
    assert capsys.readouterr().out.splitlines()[0] == "k_diffusion: not installed"
    network = foreign_loops.ForLucidrains(foreign_loops.new_unet())
    assert network(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)
    monkeypatch.setattr(foreign_loops, "load_images", lambda name: torch.rand(40, 1, 8, 8, generator=seeded(0)))
    assert foreign_loops.distance(foreign_loops.load_images("digits")) == pytest.approx(0, abs=1)


# chapter 29: coloured shapes


def test_shapes_are_trained_measured_and_shipped(tmp_path, run, monkeypatch, capsys):
    stage = TrainConfig(2, batch_size=8, checkpoint_every=2, precision="float32")
    few = {"RECIPE": replace(shapes.RECIPE, clip=stage, autoencoder=stage, unet=stage), "N_PICTURES": 32}
    few |= {"N_TRIED": 4, "ROUNDS": 2, "N_RULE": 20, "PATH": tmp_path / "shapes.json", "PIPELINES": tmp_path / "shipped"}
    scenes = shapes.split_scenes()
    monkeypatch.setattr(shapes, "split_scenes", lambda: (scenes[0], scenes[1][:4]))
    monkeypatch.setattr("ddpm_nb.texts.SampleSheets.checkpoint", lambda *a: None)
    generate = shapes.TextToImage.generate
    monkeypatch.setattr(shapes.TextToImage, "generate", lambda *a, **options: generate(*a, **{"n_steps": 2} | options))
    out = str(tmp_path / "run")
    run(shapes, "train", "--out", out, **few)
    with pytest.raises(SystemExit):
        run(shapes, "ship", "--out", out)  # without the machine
    run(shapes, "ship", "--out", out, "--hardware", "a machine")
    found = read_json(tmp_path / "shapes.json")
    assert found["held out"]["n"] == 16 and found["held out"]["scenes"] == 4 and set(found["trials"]) == {"1.0", "2.0", "3.0", "5.0"}
    assert found["rule on 20 drawings"]["colours"] == 1 and found["hardware"] == "a machine"
    card = shapes.TextToImage.from_pretrained(tmp_path / "shipped" / "shapes").card
    assert card["all three right, 16 held-out prompts"].count("%") == 2 and not any("attention" in key for key in found)
    gain = {name: found["held out"][name] - found["held out, eta 0"][name] for name in (*shapes.NAMES, "all three")}
    assert all(found["gain of noise, held out"][name] == pytest.approx(value, abs=2e-4) for name, value in gain.items())
    assert found["held out"]["eta"] == card["eta"] == 1.0
    run(shapes, "again", "--hardware", "another machine")
    again = read_json(tmp_path / "shapes.json")
    assert again["held out"] | {"seconds": 0} == found["held out"] | {"seconds": 0} and again["CPU minutes"] == found["CPU minutes"]
    assert shapes.TextToImage.from_pretrained(tmp_path / "shipped" / "shapes").card == card


def test_words_that_are_not_mixed_are_trained_and_their_maps_measured(tmp_path, run, monkeypatch):
    """The second training has no layers between the words, and goes on; two pipelines that are one have the same facts."""
    stage = TrainConfig(2, batch_size=8, checkpoint_every=2, precision="float32")
    few = {"RECIPE": replace(shapes.RECIPE, unet=stage), "N_PICTURES": 32, "N_EDITED": 2, "N_SEEDS": 1, "N_SHOWN": 2, "SIDES": {8: 3, 4: 3}}
    few |= {"N_TRIED_SHEET": 3, "MAPS_PATH": tmp_path / "words.json", "PICTURES": tmp_path}
    scenes = shapes.split_scenes()
    monkeypatch.setattr(shapes, "split_scenes", lambda: (scenes[0], scenes[1][:3]))
    train, trained = shapes.train_unmixed, []

    def train_and_return_shipped(shipped, *told):
        trained.append(train(shipped, *told))
        return shipped

    monkeypatch.setattr(shapes, "train_unmixed", train_and_return_shipped)
    arguments = ("words", "--out", str(tmp_path / "run"), "--steps", "3", "--hardware", "a machine")
    run(shapes, *arguments, **few)
    encoder = trained[0].text_encoder
    rows = trained[0].tokenizer.encode(["a red square above a blue circle", "a red circle above a white square"])
    words = encoder(rows)
    assert len(encoder.blocks) == 0 and words[0, 2].equal(words[1, 2]) and not words[0, 1].equal(words[0, 5])
    with seeded_init(0):
        first = shapes.unmixed_encoder(encoder.config)
    assert not first.words.weight.equal(encoder.words.weight)  # the words have learnt
    found = read_json(tmp_path / "words.json")
    assert found["mixed"] == found["unmixed"] and found["steps"] == {"mixed": 2, "unmixed": 3}
    assert found["starts"] == [{"at step": 0, "steps planned": 3}]
    one = found["mixed"]["side 8"]
    assert one["prompts"] == 3 and 0 < one["scenes scored"] <= 3 and len(one["the rest"]["first colour"]["mean"]) == 3
    four = [one["the rest"][word]["mean"] for word in shapes.WORDS]
    assert torch.tensor(four).mean(0).tolist() == pytest.approx(one["the rest"]["all four"]["mean"], abs=2e-4)
    changed = found["mixed"]["edits"]["kind"]
    gap = [free - kept for free, kept in zip(changed["free"]["mean"], changed["kept"]["mean"], strict=True)]
    assert gap == pytest.approx(changed["free - kept"]["mean"], abs=2e-4)
    n = len(found["prompts shown"])
    assert shapes.Image.open(tmp_path / "words-maps.png").size == (2 * (2 * (33 * 5 + 1) + 6), 2 * (33 * n + 1))


def test_words_are_found_in_prompts_and_scores_averaged_over_scenes():
    prompts = ["a red square left of a blue circle", "a red square above a blue circle"]
    places = shapes.places_of_words(prompts)
    for i, prompt in enumerate(prompts):
        words = ["<begin>", *prompt.split()]
        assert [words[k] for k in places[:, i].tolist()] == ["red", "square", "blue", "circle"]
    values = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 0.0]])
    found = shapes.by_scenes(values, torch.tensor([0, 0, 2]), 4)  # scene 0 twice: 2, scene 2: 5
    assert found == {"mean": [3.5, 0.0], "error": [1.5, 0.0]}
    one, other = torch.zeros(2, 1, 4, 4)
    one[0, 0] = 1.0
    other[0, 0, :2] = 1.0
    assert shapes.moved_share(one, other).tolist() == [0.5]


# chapter 22: the pipelines that ship


def test_a_pipeline_is_trained_measured_and_shipped_whole(tmp_path, monkeypatch, capsys):
    stage = TrainConfig(4, batch_size=32, checkpoint_every=4)
    monkeypatch.setitem(pipelines.RECIPES, "digits", replace(pipelines.RECIPES["digits"], clip=stage, unet=stage))
    monkeypatch.setattr(pipelines, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(pipelines, "PIPELINES", tmp_path / "shipped")
    monkeypatch.setattr(pipelines, "relative_spread", lambda *a, eta: (1.0, 0.1))
    monkeypatch.setattr("ddpm_nb.texts.SampleSheets.checkpoint", lambda *a: None)
    arguments = ["x", "digits", "--hardware", "a machine", "--work", str(tmp_path / "runs"), "--prompts", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    pipelines.main()
    shipped = pipelines.TextToImage.from_pretrained(tmp_path / "shipped" / "digits")
    first = shipped.generate("a seven", 2, n_steps=2, generator=seeded(0))
    assert first.shape == (2, 1, 8, 8) and shipped.rule is not None and shipped.tokenizer.unknown_words("a bold seven") == []
    names = ("digit right", "weight right", "slant right", "sure")
    for setting in product((1, pipelines.USUAL), (0, 1)):
        setting = "guidance {:g}, eta {:g}".format(*setting)
        assert {f"{setting}: {name}, share of 8 prompts" for name in names} <= set(shipped.card)
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
    told = {f"guidance {pipelines.USUAL:g}, eta {pipelines.NOISE:g}: {name}, share of 4 prompts" for name in names}
    assert told <= set(measured.card) and not any("of 8 prompts" in key for key in measured.card)
    kept = ("hardware", "iterations", "CPU minutes of training, unet", "CLIP zero-shot digit accuracy, test")
    assert all(measured.card[key] == again.card[key] for key in kept) and measured.card["guidance"] == pipelines.USUAL


def test_a_pipeline_goes_on_with_fewer_captions_and_is_shipped_whole(tmp_path, monkeypatch, capsys):
    few, given_to = load_dataset("digits").resized(28), []
    monkeypatch.setattr(unguided, "load_dataset", lambda *_, **__: few)
    monkeypatch.setattr(unguided, "judge", lambda *_: {"no prompt, eta 1: sure, share of 4": 0.5})
    leg = TrainConfig(3, batch_size=8, checkpoint_every=3)
    monkeypatch.setattr(unguided, "LEGS", (leg, replace(leg, seed=2)))
    kind = unguided.CaptionLoss
    monkeypatch.setattr(unguided, "CaptionLoss", lambda *given: given_to.append(given[1:]) or kind(*given))
    shipped = unguided.TextToImage.from_pretrained(unguided.PIPELINES / "mnist")
    card = {key: value for key, value in shipped.card.items() if "further" not in key}
    before = replace(shipped, card=card)
    before.save_pretrained(tmp_path / "before")
    arguments = ["x", "--hardware", "a machine", "--work", str(tmp_path / "run"), "--before", str(tmp_path / "before")]
    monkeypatch.setattr(unguided, "PIPELINES", tmp_path / "shipped")
    monkeypatch.setattr(sys, "argv", arguments)
    unguided.main()
    assert [given[1:] for given in given_to] == [(0.3, 5.0), (0.5, 5.0)]
    assert given_to[0][0].std() == pytest.approx(1, abs=0.3)  # latents in their unit
    shipped = unguided.TextToImage.from_pretrained(tmp_path / "shipped" / "mnist")
    moved = {name: value for name, value in shipped.unet.state_dict().items() if not value.equal(before.unet.state_dict()[name])}
    assert moved and shipped.tokenizer == before.tokenizer
    ended, began = (load_file(tmp_path / "run" / f"leg-{i}" / "checkpoints" / f"step-{n:08d}.safetensors") for i, n in ((1, 3), (2, 0)))
    assert all(value.equal(ended[f"ema.{name[6:]}"]) for name, value in began.items() if name.startswith("model."))
    for part in ("text_encoder", "autoencoder"):
        old = getattr(before, part).state_dict()
        assert all(value.equal(old[name]) for name, value in getattr(shipped, part).state_dict().items())
    assert shipped.card["further training 2, iterations"] == 3 and shipped.card["further training 2, share of captions left out"] == 0.5
    assert shipped.card["iterations"] == before.card["iterations"] and shipped.card["no prompt, eta 1: sure, share of 4"] == 0.5
    assert "guidance 2, eta 1: sure, share of 1000 prompts" not in shipped.card  # of the network before
    told = "no prompt, eta 1: sure, share of 1000"
    assert shipped.card[f"before further training, {told}"] == before.card[told] and told not in shipped.card
    monkeypatch.setattr(unguided.Clock, "__call__", lambda *_: pytest.fail("a finished run is not trained again"))
    unguided.main()
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "shipped" / "mnist")])
    with pytest.raises(SystemExit):
        unguided.main()
    assert "went on already: begin with the pipeline before it" in capsys.readouterr().err


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


# chapter 20: networks that are told a class


def test_networks_are_told_a_class_and_judged(tmp_path, run, monkeypatch):
    few = {"PATH": tmp_path / "classes.json", "SHEET": tmp_path / "sheet.png", "N_CALLS": {"digits": 2, "mnist": 2}}
    few |= {"EACH": {"digits": 2, "mnist": 3}, "N_TRAININGS": 2, "N_DRAWS": 2}
    settings = {"DIGITS": replace(classes.DIGITS, n_iterations=2), "MNIST": replace(classes.MNIST, n_iterations=2)}
    x = torch.randint(256, (40, 1, 28, 28), generator=seeded(0), dtype=torch.uint8)
    images = ImageDataset(x, torch.arange(40) % 10, n_levels=256, classes=[str(k) for k in range(10)])
    load = classes.load_dataset
    monkeypatch.setattr(classes, "load_dataset", lambda name, **options: load(name) if name == "digits" else images)
    words = ["--hardware", "a machine", "--work", str(tmp_path / "work")]
    run(classes, "digits", *words, **few, **settings)
    run(classes, "mnist", *words)
    found = read_json(tmp_path / "classes.json")
    digits, mnist = found["digits"], found["mnist"]
    assert [len(rows) for rows in digits["scales"].values()] == [2] * 4 and digits["real"]["right"] > 0.99
    assert [len(rows) for rows in mnist["scales"].values()] == [2] * 2 and mnist["draws"] == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * (2 * 3 * 29 + 2 + 20), 2 * (10 * 29 + 1))
    monkeypatch.setattr(classes, "descend", None)  # what is trained is not trained again
    run(classes, "mnist", *words)
    assert read_json(tmp_path / "classes.json")["mnist"] == mnist


def test_classes_are_judged_by_what_was_asked_for():
    data, classifier = load_dataset("digits"), load_classifier("digits")
    x, labels = data.images()[:500], data.labels[:500]
    right, wrong = classes.judge(classifier, x, labels), classes.judge(classifier, x, (labels + 1) % 10)
    assert right["right"] > 0.99 and wrong["right"] < 0.01 and wrong["right and sure"] < 0.01
    alike = classes.judge(classifier, x[:1].expand(40, -1, -1, -1), torch.arange(40) % 10)
    assert alike["diversity"] == pytest.approx(0, abs=1e-3) and right["diversity"] > 10
