"""Models on disk: what gives the weights their meaning is kept with them, and the noise is what comes out."""

import copy
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import SMALL, contents, randomize, read, same_weights, seal
from safetensors.torch import load, load_file, save

import ddpm_nb.hub as hub
from conftest import refuses
from ddpm_nb.conditioning import ClassUNet
from ddpm_nb.elbo import OBJECTIVES, objective_target, output_to_eps
from ddpm_nb.files import CARD_FILE, WEIGHTS_FILE, load_parts, model_card, save_parts
from ddpm_nb.forward import q_sample
from ddpm_nb.hub import (
    MODELS,
    SHIPPED,
    NoisePredictor,
    PeerUNet,
    describe_model,
    load_pretrained,
    save_pretrained,
)
from ddpm_nb.runs import schedule_name
from ddpm_nb.sampling import sample_ddim
from ddpm_nb.schedules import make_schedule
from ddpm_nb.unet import ResNetBaseline, UNet, make_unet


@pytest.fixture(scope="module")
def network():
    return randomize(UNet(**SMALL))


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("cosine", 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory, network, schedule):
    path = tmp_path_factory.mktemp("models") / "original"
    save_pretrained(path, network, schedule, card={"name": "small", "steps": 3})
    return path


@pytest.fixture
def saved(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "saved"))


NETWORKS = {
    "digits": lambda: make_unet("digits"),
    "mnist": lambda: make_unet("mnist"),
    "options": lambda: UNet(**SMALL | {"n_heads": 2, "time_layout": "interleaved", "upsampling": "transposed", "cumulative": True}),
    "two outputs": lambda: UNet(**SMALL | {"out_channels": 2, "mid_attention": False, "norm_eps": 1e-5, "freq_shift": 0.5}),
    "baseline": lambda: ResNetBaseline(1, channels=8, n_blocks=2),
    "double": lambda: UNet(**SMALL).double(),
    "bfloat16": lambda: UNet(**SMALL).bfloat16(),
    "channels last": lambda: UNet(**SMALL).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_comes_back_to_the_last_bit(name, tmp_path):
    model, schedule = randomize(NETWORKS[name]()).train(), make_schedule("sigmoid", 30)
    card = {"data": "none", "loss": 0.25, "ema": True, "note": None}
    save_pretrained(tmp_path / "m", model, schedule, n_levels=17, card=card)
    state = torch.get_rng_state()
    loaded, loaded_schedule = load_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert type(loaded) is type(model), "a network that predicts the noise comes back as itself"
    assert same_weights(model, loaded) and torch.equal(loaded_schedule.exact_betas, schedule.exact_betas)
    assert not loaded.training and all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    side = 28 if name == "mnist" else 8
    x, t = torch.randn(2, 1, side, side, dtype=next(model.parameters()).dtype), torch.tensor([0, 29])
    with torch.no_grad():
        expected = model.eval()(x, t)
        exact = name != "channels last"  # contiguous after loading: the same products, added in another order
        torch.testing.assert_close(loaded(x, t), expected, **({"atol": 0, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 1e-5}))
    described = describe_model(tmp_path / "m")
    assert described["card"] == card and described["facts"] == {"objective": "eps", "schedule": "sigmoid", "n_levels": 17}


def test_saving_twice_gives_the_same_bytes(original, saved, network, schedule):
    assert set(contents(saved)) == {"README.md", "config.json", "model.safetensors"}
    save_pretrained(saved, network, schedule, card={"name": "small", "steps": 3}, overwrite=True)
    assert contents(saved) == contents(original)
    refuses(lambda: save_pretrained(saved, network, schedule), "already holds a model", error=FileExistsError)


def test_a_model_can_be_trained_on_after_loading(saved):
    model, _ = load_pretrained(saved)
    model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).square().mean().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert not same_weights(model, load_pretrained(saved)[0])


def test_the_name_of_a_schedule_is_found_from_its_variances(network, schedule, tmp_path):
    odd = schedule.exact_betas.clone()
    odd *= 1 + 1e-14 * torch.arange(len(odd))  # another processor's last bits
    assert schedule_name(type(schedule)(odd)) == "cosine"
    odd[5] *= 1.001
    assert schedule_name(type(schedule)(odd)) is None
    for path in SHIPPED.iterdir():
        assert schedule_name(load_pretrained(path)[1]) == describe_model(path)["facts"]["schedule"] == "cosine"


# the objective


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_loaded_model_predicts_the_noise_whatever_it_was_trained_to_predict(objective, name, network, tmp_path):
    schedule = make_schedule(name, 40)
    save_pretrained(tmp_path / "m", network, schedule, objective=objective)
    model, own = load_pretrained(tmp_path / "m")
    x, t = torch.randn(5, 1, 8, 8), torch.tensor([0, 3, 11, 30, 39])
    with torch.no_grad():
        assert torch.equal(model(x, t), output_to_eps(own, objective, x, t, network(x, t)))
        one = sample_ddim(model, own, (2, 1, 8, 8), n_steps=5, generator=torch.Generator().manual_seed(0))
        wrapped = lambda x_t, t: output_to_eps(schedule, objective, x_t, t, network(x_t, t))
        two = sample_ddim(wrapped, schedule, (2, 1, 8, 8), n_steps=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one, two)
    assert isinstance(model, NoisePredictor) == (objective != "eps") and not model.training
    if objective != "eps":
        assert same_weights(model.network, network) and model.objective == objective and model.config == network.config


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_network_of_any_kind_gives_the_noise(objective):
    """The oracle answers what its kind is asked for; the wrapper must recover the noise that was put in."""
    schedule, eps = make_schedule("cosine", 40), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    x_0, t = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([1, 10, 20, 39])
    schedule = type(schedule)(schedule.exact_betas, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, t, eps)

    class Oracle(torch.nn.Module):
        config = None

        def forward(self, x_t, t):
            return objective_target(schedule, objective, x_0, x_t, t, eps)

    torch.testing.assert_close(NoisePredictor(Oracle(), schedule, objective)(x_t, t), eps, atol=1e-9, rtol=0)


def test_what_was_loaded_can_be_saved_again_and_keeps_its_objective(network, schedule, tmp_path):
    save_pretrained(tmp_path / "a", network, schedule, objective="v", n_levels=17, card={"name": "v"})
    model, own = load_pretrained(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, own, n_levels=17, card={"name": "v"})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x := torch.randn(1, 1, 8, 8), torch.tensor([3])), model(x, torch.tensor([3])))
    other = make_schedule("linear", 20)
    refuses(lambda: save_pretrained(tmp_path / "c", model, other), "schedule must be the one with which the model predicts")
    refuses(lambda: save_pretrained(tmp_path / "c", model, own, objective="mu"), "objective must be 'v', as trained; got 'mu'")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("objective", ["x", None, 3, ["eps"], "EPS"])
def test_an_unknown_objective_is_refused_on_both_ways(objective, network, schedule, saved, tmp_path):
    words = ("objective must be one of 'eps', 'x_0', 'v', 'mu', 'velocity'",)
    refuses(lambda: save_pretrained(tmp_path / "m", network, schedule, objective=objective), *words)
    seal(saved, read(saved) | {"facts": {"objective": objective}})
    for call in (lambda: load_pretrained(saved), lambda: describe_model(saved)):
        refuses(call, *words)
    seal(saved, read(saved) | {"facts": {}})
    refuses(lambda: load_pretrained(saved), *words)


# folders of the first edition


def first_edition(path, network, schedule, card):
    """Write a folder as the first edition did."""
    tensors = {f"model.{k}": v for k, v in network.state_dict().items()} | {"schedule.betas": schedule.exact_betas}
    config = {"format": "ddpm_nb model", "version": 1, "class": type(network).__name__, "config": network.config, "card": card}
    path.mkdir()
    seal(path, json.loads(json.dumps(config)), save(tensors))


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_old_folders_load_with_the_objective_of_their_card(objective, network, schedule, tmp_path):
    card = {"name": "old", "steps": 3} | ({} if objective is None else {"objective": objective})
    first_edition(tmp_path / "old", network, schedule, card)
    model, own = load_pretrained(tmp_path / "old")
    assert torch.equal(own.exact_betas, schedule.exact_betas) and not model.training
    if objective in (None, "eps"):
        assert same_weights(model, network)
    else:
        assert same_weights(model.network, network) and model.objective == objective
    described = describe_model(tmp_path / "old")
    assert described["card"] == card and described["facts"]["objective"] == (objective or "eps")
    assert described["parts"]["model"]["class"] == "UNet"


def test_old_folders_are_believed_no_more_than_new_ones(network, schedule, tmp_path):
    first_edition(tmp_path / "old", network, schedule, {"objective": "noise"})
    refuses(lambda: load_pretrained(tmp_path / "old"), "objective must be one of")
    config = read(tmp_path / "old") | {"card": {}}
    cases = [({"class": "os.system"}, "must name a class among"), ({"more": 1}, "unknown are ['more']"), ({"version": 2}, "version")]
    for changes, words in cases:
        seal(tmp_path / "old", config | changes)
        refuses(lambda: load_pretrained(tmp_path / "old"), words)
    seal(tmp_path / "old", config)
    data = bytearray((tmp_path / "old" / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "old" / WEIGHTS_FILE).write_bytes(data)
    refuses(lambda: load_pretrained(tmp_path / "old"), "the checksum does not fit")


# refusals


class Impostor(torch.nn.Module):
    """Have another class's name."""


Impostor.__name__ = "UNet"


def test_save_refuses_wrong_arguments_before_it_writes(network, schedule, tmp_path):
    cases = [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be one of UNet, ResNetBaseline, PeerUNet, ClassUNet; got Linear"),
        ({"model": Impostor()}, TypeError, "model must be one of"),
        ({"schedule": torch.ones(3) / 2}, TypeError, "schedule must be a NoiseSchedule; got Tensor"),
        ({"card": {"loss": float("nan")}}, ValueError, "card must map names to"),
        ({"n_levels": 1}, ValueError, "n_levels must be at least 2"),
        ({"n_levels": 2.5}, TypeError, "n_levels must be a whole number"),
    ]
    for change, error, words in cases:
        arguments = {"model": network, "schedule": schedule} | change
        refuses(lambda arguments=arguments: save_pretrained(tmp_path / "m", **arguments), words, error=error)
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_folder_is_refused(tmp_path, network, schedule):
    save_parts(tmp_path / "pair", {"model": network, "second": UNet(**SMALL)}, tensors={"schedule.betas": schedule.exact_betas})
    refuses(lambda: load_pretrained(tmp_path / "pair"), "does not describe a model of this kind", "its parts are ['model', 'second']")
    refuses(lambda: load_pretrained(hub.PACKAGE / "pipelines" / "digits"), "must name a class among UNet, ResNetBaseline")
    refuses(lambda: load_pretrained("nobody"), "no model at nobody", "a shipped name: digits, mnist", error=FileNotFoundError)


SCHEDULES = {
    "none": (lambda t: {k: v for k, v in t.items() if not k.startswith("schedule")}, "schedule.betas"),
    "impossible": (lambda t: t | {"schedule.betas": torch.full((3,), 2.0)}, "betas must be in (0, 1)"),
    "empty": (lambda t: t | {"schedule.betas": torch.zeros(0)}, "betas must have shape"),
    "integers": (lambda t: t | {"schedule.betas": torch.ones(3, dtype=torch.int64)}, "floating-point dtype"),
    "NaN": (lambda t: t | {"schedule.betas": torch.full((3,), float("nan"))}, "betas must be finite"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_sealed_schedule_that_is_none_is_refused(name, saved):
    change, words = SCHEDULES[name]
    weights = save(change(load_file(saved / WEIGHTS_FILE)))
    seal(saved, weights=weights)
    try:
        load(weights)
    except ValueError:  # old safetensors read no empty tensor
        refuses(lambda: load_pretrained(saved), "its tensors cannot be read")
        return
    refuses(lambda: load_pretrained(saved), "does not hold a complete model", words)


@settings(deadline=None, max_examples=30)
@given(facts=st.dictionaries(st.sampled_from(["objective", "schedule", "n_levels", "x"]), st.none() | st.integers() | st.text(max_size=3)))
def test_any_facts_load_or_are_refused(original, tmp_path_factory, facts):
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("facts") / "m"))
    seal(folder, read(folder) | {"facts": facts})
    if facts.get("objective") in OBJECTIVES:
        load_pretrained(folder)
    else:
        refuses(lambda: load_pretrained(folder), "objective must be one of")


# shipped models


def test_every_shipped_model_loads_and_its_card_is_current():
    paths = [path for path in SHIPPED.iterdir() if path.is_dir()]
    assert SHIPPED / "digits" in paths
    for path in paths:
        config = describe_model(path.name)
        load_pretrained(path.name)
        assert config["format"] == read(path)["format"] == "ddpm_nb parts", "in today's format"
        assert (path / CARD_FILE).read_text() == model_card(config["card"]["name"], config["card"], config["parts"])
        assert config["facts"]["n_levels"] == config["card"]["grey levels"]
        facts = {"data", "iterations", "seed", "hardware", "training minutes", "test loss", "test bits/dim", "samples judged"}
        assert facts <= config["card"].keys(), "a card says on what, for how long, how good"
        assert sum(p.stat().st_size for p in path.iterdir()) < (4_000_000 if path.name == "digits" else 12_000_000)


CHOSEN = {  # no value that a class has by itself, no two alike
    UNet: {
        "image_size": 8, "in_channels": 3, "base_channels": 24, "channel_mults": [1, 1], "n_res_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.25, "norm_groups": 6, "norm_eps": 1e-3, "n_heads": 12, "mid_attention": False, "upsampling": "transposed",
        "cumulative": True, "out_channels": 5, "time_layout": "cos_first", "freq_shift": 0.5, "checkpointing": True,
    },
    PeerUNet: {
        "image_size": 8, "in_channels": 3, "out_channels": 5, "widths": [24, 12], "time_dim": 16, "down_attention": [True, False],
        "up_attention": [False, True], "n_res_blocks": 1, "dropout": 0.25, "norm_groups": 6, "norm_eps": 1e-3, "head_dim": 4,
        "mid_attention": False, "mid_norm_groups": 3, "time_layout": "interleaved", "freq_shift": 0.5, "padding": "after",
        "scale_shift": True, "n_classes": 7, "checkpointing": True,
    },
}  # fmt: skip
CHOSEN[ClassUNet] = {"n_classes": 7} | CHOSEN[UNet]


@pytest.mark.parametrize("kind", CHOSEN, ids=lambda kind: kind.__name__)
def test_the_config_has_every_argument_under_its_name(kind):
    wanted = CHOSEN[kind]
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    assert list(defaults) == list(wanted) and not any(defaults[name] == value for name, value in wanted.items())
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in wanted.items()}
    config = kind(**given).config
    assert config == wanted and list(config) == list(wanted)


def test_every_model_folder_is_one_format_and_opens_without_its_own_loader():
    parts, tensors, config = load_parts(SHIPPED / "digits", MODELS, extra=["schedule.betas"])
    assert list(parts) == ["model"] and len(tensors["schedule.betas"]) == 1000 and config["facts"]["objective"] == "eps"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_loads_on_a_gpu_and_saves_from_there(tmp_path, network, schedule):
    save_pretrained(tmp_path / "a", network, schedule, objective="v")
    model, own = load_pretrained(tmp_path / "a", device="cuda")
    assert all(p.is_cuda for p in (*model.parameters(), *model.buffers(), own.betas))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 19])
    with torch.no_grad():
        torch.testing.assert_close(model(x.cuda(), t.cuda()).cpu(), load_pretrained(tmp_path / "a")[0](x, t), atol=1e-3, rtol=1e-3)
    save_pretrained(tmp_path / "b", model, own)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
