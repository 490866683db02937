"""Models on disk: nothing half-written, nothing believed, nothing lost on the way to diffusers and back."""

import inspect
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import ddpm_nb.hub as hub
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.sampling import sample_ddpm
from ddpm_nb.schedules import cosine_betas, linear_betas, make_schedule
from ddpm_nb.unet import ResNetBaseline, UNet, make_unet

SMALL = {"image_size": 8, "in_channels": 1, "base_channels": 8, "channel_mults": (1, 2), "n_res_blocks": 1, "attn_resolutions": (4,)}
SMALL["norm_groups"] = 4


def randomize(network, seed=0):
    """Give every weight a random value, the ones that begin at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            scale, centre = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5, float("norm" in name)
            tensor.copy_(centre + scale * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def same_weights(a, b):
    """Tell whether two networks have the same tensors, to the last bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def contents(folder):
    """Read all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def seal(path, config=None, weights=None):
    """Write a model with a correct checksum, as somebody would who changes both files on purpose."""
    config = json.loads((path / "config.json").read_text()) if config is None else config
    weights = (path / "model.safetensors").read_bytes() if weights is None else weights
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text(json.dumps(config | {"sha256": hub.checksum(config, weights)}))


@contextmanager
def as_nobody():
    """Run without the rights of root, for whom no folder is unwritable."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def full_disk(n_bytes):
    """Let every write beyond the first `n_bytes` of a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def public():
    """Make a temporary folder that others may enter and not write to."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def network():
    return randomize(UNet(**SMALL))


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("cosine", 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory, network, schedule):
    path = tmp_path_factory.mktemp("models") / "original"
    hub.save_pretrained(path, network, schedule, card={"name": "small", "steps": 3})
    return path


@pytest.fixture
def saved(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "saved"))


# replaced_file


def test_replaced_file_replaces_and_leaves_nothing_else(tmp_path):
    for text in ("first", "second"):
        with hub.replaced_file(tmp_path / "a.txt") as file:
            assert file.suffix == ".txt" and file.parent == tmp_path
            file.write_text(text)
    assert contents(tmp_path) == {"a.txt": b"second"}


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_replaced_file_keeps_the_previous_file_after_a_failure(tmp_path, error):
    def fail():
        with hub.replaced_file(tmp_path / "a.txt") as file:
            file.write_text("sec")
            raise error

    (tmp_path / "a.txt").write_text("first")
    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == {"a.txt": b"first"}


def test_replaced_file_survives_a_full_disk_and_open_does_not(tmp_path):
    for name in ("ours", "plain"):
        (tmp_path / name).write_bytes(b"first")
    with full_disk(1000), pytest.raises(OSError, match="File too large"), hub.replaced_file(tmp_path / "ours") as file:
        file.write_bytes(bytes(5000))
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        (tmp_path / "plain").write_bytes(bytes(5000))
    assert (tmp_path / "ours").read_bytes() == b"first"
    assert (tmp_path / "plain").read_bytes() != b"first"
    assert len(contents(tmp_path)) == 2


def test_replaced_file_survives_a_killed_process_and_open_does_not(tmp_path):
    for name in ("ours", "plain"):
        (tmp_path / name).write_bytes(b"first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks
        child = os.fork()
    if child == 0:
        with hub.replaced_file(tmp_path / "ours") as file, open(tmp_path / "plain", "wb") as plain:
            file.write_bytes(b"sec")
            plain.write(b"sec")
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "ours").read_bytes() == b"first"
    assert (tmp_path / "plain").read_bytes() != b"first"


def test_replaced_file_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watch_fsync(handle):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def watch_replace(source, target):
        events.append(("replace", Path(source).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    with hub.replaced_file(tmp_path / "a") as file:
        file.write_text("x")
    assert events == [("fsync", file.name), ("replace", file.name), ("fsync", tmp_path.name)]


def test_replaced_file_keeps_permissions_and_follows_links(tmp_path):
    (tmp_path / "private").write_text("first")
    (tmp_path / "private").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    with hub.replaced_file(tmp_path / "link") as file:
        file.write_text("second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "private").read_text() == "second"
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    with hub.replaced_file(tmp_path / "new") as file:
        file.write_text("x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_replaced_file_refuses_at_once_what_cannot_be_written(public):
    (public / "folder").mkdir(mode=0o555)
    (public / "file").write_text("x")
    cases = {"folder": IsADirectoryError, "missing/a": FileNotFoundError, "file/a": NotADirectoryError, "folder/a": PermissionError}
    for name, error in cases.items():
        with as_nobody(), pytest.raises(error, match=re.escape(name)), hub.replaced_file(public / name):
            os._exit(1)
    assert contents(public) == {"file": b"x"}


# save_pretrained

MODELS = {
    "digits": lambda: make_unet("digits"),
    "mnist": lambda: make_unet("mnist"),
    "options": lambda: UNet(**SMALL | {"n_heads": 2, "time_layout": "interleaved", "upsampling": "transposed", "cumulative": True}),
    "two outputs": lambda: UNet(**SMALL | {"out_channels": 2, "mid_attention": False, "norm_eps": 1e-5, "freq_shift": 0.5}),
    "baseline": lambda: ResNetBaseline(1, channels=8, n_blocks=2),
    "double": lambda: UNet(**SMALL).double(),
    "bfloat16": lambda: UNet(**SMALL).bfloat16(),
    "channels last": lambda: UNet(**SMALL).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_to_the_last_bit(name, tmp_path):
    model, schedule = randomize(MODELS[name]()).train(), make_schedule("sigmoid", 30)
    hub.save_pretrained(tmp_path / "m", model, schedule, card={"data": "none", "loss": 0.25, "ema": True, "note": None})
    state = torch.get_rng_state()
    loaded, loaded_schedule = hub.load_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert same_weights(model, loaded) and torch.equal(loaded_schedule.exact_betas, schedule.exact_betas)
    assert not loaded.training and all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    side = 28 if name == "mnist" else 8
    x, t = torch.randn(2, 1, side, side, dtype=next(model.parameters()).dtype), torch.tensor([0, 29])
    with torch.no_grad():
        expected = model.eval()(x, t)
        exact = name != "channels last"  # contiguous after loading: the same products, added in another order
        torch.testing.assert_close(loaded(x, t), expected, **({"atol": 0, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 1e-5}))
    assert hub.read_config(tmp_path / "m")["card"] == {"data": "none", "loss": 0.25, "ema": True, "note": None}


def test_saving_twice_gives_the_same_bytes(original, saved, network, schedule):
    assert set(contents(saved)) == {"README.md", "config.json", "model.safetensors"}
    hub.save_pretrained(saved, network, schedule, card={"steps": 3, "name": "small"}, overwrite=True)
    assert json.loads(contents(saved)["config.json"]) == json.loads(contents(original)["config.json"])
    assert contents(saved)["model.safetensors"] == contents(original)["model.safetensors"]


def test_a_model_can_be_trained_on_after_loading(saved):
    model, _ = hub.load_pretrained(saved)
    model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).square().mean().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert not same_weights(model, hub.load_pretrained(saved)[0])


class Impostor(torch.nn.Module):
    """Have another class's name."""


Impostor.__name__ = "UNet"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be one of UNet, ResNetBaseline; got Linear"),
        ({"model": Impostor()}, TypeError, "model must be one of"),
        ({"schedule": torch.ones(3) / 2}, TypeError, "schedule must be a NoiseSchedule; got Tensor"),
        ({"card": {"loss": float("nan")}}, ValueError, "card must map names to .*'loss': nan"),
        ({"card": {"loss": float("-inf")}}, ValueError, "card must map"),
        ({"card": {"loss": torch.tensor(1.0)}}, ValueError, "card must map"),
        ({"card": {"nested": {"a": 1}}}, ValueError, "card must map"),
        ({"card": {3: "x"}}, ValueError, "card must map"),
    ],
)
def test_save_refuses_wrong_arguments_before_it_writes(network, schedule, tmp_path, change, error, match):
    arguments = {"model": network, "schedule": schedule} | change
    with pytest.raises(error, match=match):
        hub.save_pretrained(tmp_path / "m", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_paths_that_cannot_take_a_model(network, schedule, original, public):
    saved = Path(shutil.copytree(original, public / "saved"))
    (public / "closed").mkdir(mode=0o555)
    before = contents(public)
    cases = [
        (saved, FileExistsError, "already holds a model; pass overwrite=True"),
        (saved / "config.json", NotADirectoryError, "must be a folder; it is a file"),
        (saved / "config.json" / "m", NotADirectoryError, "must be a folder"),
        (public / "closed", PermissionError, "cannot write here"),
        (public / "closed" / "m", PermissionError, "cannot be created"),
    ]
    for path, error, match in cases:
        with as_nobody(), pytest.raises(error, match=match):
            hub.save_pretrained(path, network, schedule)
    assert contents(public) == before


def test_a_full_disk_keeps_the_old_model(network, schedule, saved):
    before = contents(saved)
    with full_disk(10_000), pytest.raises(OSError, match="File too large"):
        hub.save_pretrained(saved, randomize(UNet(**SMALL), seed=1), schedule, overwrite=True)
    assert contents(saved) == before
    assert same_weights(hub.load_pretrained(saved)[0], network)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_between_the_renames_is_never_a_mixture(network, schedule, saved, monkeypatch, at):
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(Path(target).name)
        if len(calls) >= at:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="power cut"):
        hub.save_pretrained(saved, randomize(UNet(**SMALL), seed=1), schedule, overwrite=True)
    assert calls[0] == "model.safetensors"
    if at == 1:
        assert same_weights(hub.load_pretrained(saved)[0], network)
    else:
        with pytest.raises(ValueError, match="the checksum does not fit"):
            hub.load_pretrained(saved)
    assert len(contents(saved)) == 3


def test_the_card_stays_a_table_whatever_the_facts_say():
    config = {"class": "UNet", "config": {"a": 1}, "card": {"name": "a\n# b", "x|y": "c|d\n| e", "n": 3}}
    lines = hub.model_card(config).split("\n")
    assert lines[0] == "# a # b" and sum(line.startswith("#") for line in lines) == 1
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 3 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


# read_config, find_model, load_pretrained


def test_names_are_shipped_models_and_everything_else_is_a_path(tmp_path, monkeypatch, original):
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    shutil.copytree(original, tmp_path / "weights" / "small-1")
    shutil.copytree(original, tmp_path / "outside")
    monkeypatch.chdir(tmp_path)
    assert hub.find_model("small-1") == tmp_path / "weights" / "small-1"
    for path in ("../outside", "weights/../outside", "./small-1", "", ".", "/etc", "other", Path("small-1")):
        assert hub.find_model(path) == Path(path)
    assert hub.load_pretrained("small-1") and hub.load_pretrained("outside") and hub.load_pretrained("weights/../outside")
    for missing in ("../outside", "./small-1", Path("small-1"), "nobody", "", "a\0b", "x" * 300):
        with pytest.raises((FileNotFoundError, OSError), match=r"no model at|File name too long"):
            hub.load_pretrained(missing)
    with pytest.raises(FileNotFoundError, match="a shipped name: small-1"):
        hub.load_pretrained("nobody")
    with pytest.raises(TypeError):
        hub.load_pretrained(3)


def test_every_shipped_model_loads_and_its_card_is_current():
    paths = [path for path in hub.SHIPPED.iterdir() if path.is_dir()]
    assert hub.SHIPPED / "digits" in paths
    for path in paths:
        config = hub.read_config(path)
        hub.load_pretrained(path.name)
        assert (path / "README.md").read_text() == hub.model_card(config)
        facts = {"data", "iterations", "seed", "hardware", "training minutes", "test loss", "test bits/dim", "samples judged"}
        assert facts <= config["card"].keys(), "a card says on what, for how long, how good"
        assert sum(p.stat().st_size for p in path.iterdir()) < (4_000_000 if path.name == "digits" else 12_000_000)


def test_a_file_is_no_model(saved):
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"it must be a folder with config\.json"):
            hub.load_pretrained(saved / name)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no model\.safetensors"):
        hub.load_pretrained(saved)


def edited(**changes):
    """Change entries of a configuration; None removes one."""
    return lambda config: {k: v for k, v in (config | changes).items() if v is not None}


CONFIGS = {
    "empty": ("", "is not valid JSON"),
    "half": ('{"format": "ddpm_nb', "is not valid JSON"),
    "not UTF-8": (b'{"format": "\xff"}', "is not valid JSON in UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "is not valid JSON in UTF-8"),
    "nested too deeply": ("[" * 100_000, "is not valid JSON"),
    "too large": (" " * 2**20 + "{}", "more than 1048576 bytes"),
    "NaN": ('{"format": NaN}', "NaN is no number"),
    "a list": ("[]", "no entry \"format\""),
    "of another program": ('{"_class_name": "UNet2DModel"}', "no entry \"format\""),
    "newer version": (edited(version=2), "version must be 1; got 2"),
    "version true": (edited(version=True), "version must be of type int"),
    "no version": (edited(version=None), "version must be 1; got None"),
    "no card": (edited(card=None), r"missing are \['card'\]"),
    "no checksum": (edited(sha256=None), r"missing are \['sha256'\]"),
    "unknown entry": (edited(code="import os"), r"unknown are \['code'\]"),
    "class is a list": (edited(**{"class": ["UNet"]}), "class must be of type str"),
    "unknown class": (edited(**{"class": "os.system"}), "class must be one of UNet, ResNetBaseline"),
    "config is a list": (edited(config=[8, 1]), "config must be of type dict"),
    "card is text": (edited(card="good"), "card must be of type dict"),
    "checksum is a number": (edited(sha256=1), "sha256 must be of type str"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_is_refused(name, saved):
    content, match = CONFIGS[name]
    if callable(content):
        content = json.dumps(content(json.loads((saved / "config.json").read_text())))
    (saved / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match):
        hub.read_config(saved)
    with pytest.raises(ValueError, match=match):
        hub.load_pretrained(saved)


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_every_changed_byte_of_the_weights_is_found(original, tmp_path_factory, place, flip):
    data = bytearray((original / "model.safetensors").read_bytes())
    data[int(place * len(data))] ^= flip
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("flip") / "m"))
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="the checksum does not fit"):
        hub.load_pretrained(copy)
    (copy / "model.safetensors").write_bytes(data[: int(place * len(data))])
    with pytest.raises(ValueError, match="the checksum does not fit"):
        hub.load_pretrained(copy)


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_of_the_configuration_is_found_or_means_nothing(original, tmp_path_factory, place, flip):
    data = bytearray((original / "config.json").read_bytes())
    before = json.loads(data)
    data[int(place * len(data))] ^= flip
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("flip") / "m"))
    (copy / "config.json").write_bytes(data)
    try:
        hub.load_pretrained(copy)
    except ValueError:
        return
    assert json.loads(data) == before  # white space


EDITS = [("config", "n_heads", 2), ("config", "norm_eps", 1e-5), ("config", "dropout", 0.1), ("config", "checkpointing", True)]


@pytest.mark.parametrize(("part", "name", "value"), [*EDITS, ("card", "steps", 4), ("card", "fid", 1.0)])
def test_an_edited_entry_of_the_configuration_is_found(saved, part, name, value):
    config = json.loads((saved / "config.json").read_text())
    config[part][name] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the checksum does not fit"):
        hub.load_pretrained(saved)
    seal(saved, config)
    assert hub.load_pretrained(saved), "every shape fits: without the checksum nobody would notice"


LARGE = st.sampled_from([2**31, 2**63, 10**30, -(10**9)])
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | LARGE | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2), max_leaves=4)


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from([*UNet(**SMALL).config, "n_blocks", "device", "self"]), value=JSON)
def test_a_sealed_configuration_of_any_values_builds_the_file_or_is_refused(original, tmp_path_factory, name, value):
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("any") / "m"))
    config = json.loads((copy / "config.json").read_text())
    config["config"][name] = value
    seal(copy, config)
    try:
        model, _ = hub.load_pretrained(copy)
    except ValueError:
        return
    if model.image_size <= 64:
        with torch.no_grad():  # what loads also runs
            model(torch.zeros(1, 1, model.image_size, model.image_size), torch.tensor([1]))


GIANTS = {
    "wide": {"base_channels": 2048},
    "wide waves": {"base_channels": 2**28},
    "absurdly wide": {"base_channels": 10**18},
    "many blocks": {"n_res_blocks": 10**9},
    "many levels": {"channel_mults": [1] * 10**5},
    "many of both": {"n_res_blocks": 60, "channel_mults": [1] * 60, "image_size": 2**59},
    "growing": {"channel_mults": [10**6] * 9, "cumulative": True, "image_size": 256},
}


@pytest.mark.parametrize("name", GIANTS)
def test_a_sealed_giant_is_refused_before_it_is_built(name, saved):
    config = json.loads((saved / "config.json").read_text())
    config["config"] |= GIANTS[name]
    seal(saved, config)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match="does not hold a complete model"):
        hub.load_pretrained(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert time.process_time() - started < 5


def renamed(old, new):
    return lambda tensors: {new if k == old else k: v for k, v in tensors.items()}


TENSORS = {
    "extra": (lambda t: t | {"model.spy": torch.zeros(1)}, "spy: the architecture has no such tensor"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "model.conv_in.bias"}, r"conv_in\.bias: .* the file no such tensor"),
    "renamed": (renamed("model.conv_in.bias", "model.conv_in.b"), "conv_in.b: the architecture has no such tensor"),
    "wrong shape": (lambda t: t | {"model.conv_in.bias": torch.zeros(9)}, r"the architecture has \(8,\), the file \(9,\)"),
    "integers": (lambda t: t | {"model.conv_in.bias": torch.zeros(8, dtype=torch.int32)}, "floating-point type"),
    "no schedule": (lambda t: {k: v for k, v in t.items() if not k.startswith("schedule")}, "schedule.betas"),
    "impossible schedule": (lambda t: t | {"schedule.betas": torch.full((3,), 2.0)}, r"betas must be in \(0, 1\)"),
    "empty schedule": (lambda t: t | {"schedule.betas": torch.zeros(0)}, "betas must have shape"),
    "schedule of integers": (lambda t: t | {"schedule.betas": torch.ones(3, dtype=torch.int64)}, "floating-point dtype"),
    "schedule of NaN": (lambda t: t | {"schedule.betas": torch.full((3,), float("nan"))}, "betas must be finite"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_sealed_tensors_that_do_not_fit_are_refused(name, saved):
    change, match = TENSORS[name]
    seal(saved, weights=save(change(load_file(saved / "model.safetensors"))))
    with pytest.raises(ValueError, match=match):
        hub.load_pretrained(saved)


@settings(deadline=None, max_examples=50)
@given(place=st.integers(0, 2000), flip=st.integers(1, 255))
def test_a_sealed_file_with_a_changed_header_is_refused_or_loads(original, tmp_path_factory, place, flip):
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("header") / "m"))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[place] ^= flip
    seal(copy, weights=bytes(data))
    with suppress(ValueError):
        hub.load_pretrained(copy)


class Bomb:
    """Leave a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_never_run(saved, tmp_path):
    trace, unpickled = tmp_path / "trace", tmp_path / "unpickled"
    seal(saved, weights=pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="does not hold a complete model"):
        hub.load_pretrained(saved)
    torch.save(Bomb(trace), saved / "model.safetensors")
    seal(saved)
    with pytest.raises(ValueError, match="does not hold a complete model"):
        hub.load_pretrained(saved)
    (saved / "config.json").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="is not valid JSON"):
        hub.load_pretrained(saved)
    assert not trace.exists()
    torch.save(Bomb(unpickled), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert unpickled.is_dir(), "the wrong form runs it"


def test_the_package_does_not_import_pickle_or_diffusers_at_its_top():
    source = Path(hub.__file__).read_text()
    assert not re.search(r"^(import|from) (pickle|diffusers|huggingface_hub)", source, re.M)
    assert "torch.load(" not in source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_loads_on_a_gpu_and_saves_from_there(saved, tmp_path, network):
    model, schedule = hub.load_pretrained(saved, device="cuda")
    assert next(model.parameters()).is_cuda and schedule.betas.is_cuda
    hub.save_pretrained(tmp_path / "m", model, schedule)
    assert same_weights(hub.load_pretrained(tmp_path / "m")[0], network)


# diffusers

diffusers = pytest.importorskip("diffusers")

BASE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CIFAR = {  # as published in google/ddpm-cifar10-32
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
} | {k: BASE[k] for k in ("attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps")}
THREE = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 24),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
}
PARITY = {
    "base": {},
    "cosines first": {"flip_sin_to_cos": True, "freq_shift": 0},
    "cosines first, shifted": {"flip_sin_to_cos": True, "freq_shift": 1},
    "sines first, not shifted": {"freq_shift": 0},
    "two heads": {"attention_head_dim": 8},
    "head of all channels": {"attention_head_dim": 16},
    "no attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False},
    "attention in the middle only": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention everywhere": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    "no attention in the middle": {"add_attention": False},
    "three levels": THREE,
    "one level": {"block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)},
    "three blocks": {"layers_per_block": 3},
    "grey, with variance": {"in_channels": 1, "out_channels": 2},
    "other epsilon, dropout, groups": {"norm_eps": 1e-3, "dropout": 0.2, "norm_num_groups": 2},
    "explicit defaults": {"time_embedding_dim": 32, "attn_norm_num_groups": 4, "sample_size": (8, 8), "act_fn": "swish"},
    "google/ddpm-cifar10-32": CIFAR,
}


def random_peer(**options):
    """Build a UNet2DModel with random weights everywhere."""
    return randomize(diffusers.UNet2DModel(**BASE | options))


def inputs(options, n=3):
    options = BASE | {"in_channels": 3} | options
    size = options["sample_size"] if isinstance(options["sample_size"], int) else options["sample_size"][0]
    x = torch.randn(n, options["in_channels"], size, size, generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([0, 40, 999])[:n]


def largest_difference(peer, ours, options):
    x, t = inputs(options)
    with torch.no_grad():
        expected = peer(x, t).sample
        assert expected.std() > 0.1, "a comparison with zero shows nothing"
        return (ours(x, t) - expected).abs().max().item()


@pytest.mark.parametrize("name", PARITY)
def test_a_converted_network_is_the_same_function_and_comes_back_bit_for_bit(name):
    peer = random_peer(**PARITY[name])
    ours, schedule = hub.unet_from_diffusers(peer)
    assert largest_difference(peer, ours, PARITY[name]) < 1e-5
    assert not ours.training and torch.equal(schedule.exact_betas, linear_betas(1000))
    back, scheduler = hub.unet_to_diffusers(ours, schedule)
    assert same_weights(back, peer) and not back.training
    assert scheduler.config.beta_schedule == "linear" and scheduler.config.num_train_timesteps == 1000
    again, _ = hub.unet_from_diffusers(back)
    assert again.config == ours.config and same_weights(again, ours)
    parameters = {p.data_ptr() for n in (peer, ours, back) for p in n.parameters()}
    assert len(parameters) == sum(len(list(n.parameters())) for n in (peer, ours, back)), "no memory is shared"


OURS = {
    "small": {},
    "cumulative": {"channel_mults": (1, 2, 2), "cumulative": True, "image_size": 16},
    "heads": {"n_heads": 4},
    "shift": {"freq_shift": 0.5},
    "cosines first": {"time_layout": "cos_first"},
    "cosines first, shifted": {"time_layout": "cos_first", "freq_shift": 1},
    "wide": {"in_channels": 3, "out_channels": 6, "norm_eps": 1e-5, "dropout": 0.3, "mid_attention": False},
    "no attention": {"attn_resolutions": (), "mid_attention": False, "n_heads": 2},
    "transposed, but one level": {"channel_mults": (1,), "upsampling": "transposed"},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("name", OURS)
def test_our_network_survives_the_way_there_and_back(name):
    ours = randomize(UNet(**SMALL | OURS[name]))
    peer, scheduler = hub.unet_to_diffusers(ours, make_schedule("cosine", 50))
    options = {"sample_size": ours.image_size, "in_channels": ours.in_channels}
    assert largest_difference(peer, ours, options) < 1e-5
    back, schedule = hub.unet_from_diffusers(peer, scheduler=scheduler)
    assert same_weights(back, ours) and torch.equal(schedule.exact_betas, cosine_betas(50))
    x, t = inputs(options)
    with torch.no_grad():
        assert torch.equal(back(x, t), ours(x, t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_keeps_types_modes_and_any_memory_format(dtype):
    ours = randomize(UNet(**SMALL)).to(dtype).to(memory_format=torch.channels_last).train()
    peer, _ = hub.unet_to_diffusers(ours, make_schedule("linear", 10))
    assert peer.training and peer.dtype == dtype and all(v.is_contiguous() for v in peer.state_dict().values())
    assert same_weights(hub.unet_from_diffusers(peer)[0], ours)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_dim": 64}, "time_embedding_dim=64 .* None or 32"),
        ({"downsample_padding": 1}, "downsample_padding=1"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"mid_block_scale_factor": 1.5}, r"mid_block_scale_factor=1\.5"),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups=2 .* None or 4"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"block_out_channels": (8, 12)}, r"block_out_channels=\(8, 12\) .* multiples of the first"),
        ({"sample_size": None}, "sample_size=None"),
        ({"sample_size": (8, 16)}, r"sample_size=\(8, 16\)"),
        ({"sample_size": 9}, "image_size must be divisible by 2"),
        ({"down_block_types": ("DownBlock2D",) * 2}, "up_block_types=.* attention on the levels of down_block_types"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "down_block_types=.* DownBlock2D and AttnDownBlock2D"),
        ({"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")}, "up_block_types="),
        ({"attention_head_dim": 4, **PARITY["attention everywhere"]}, "attention_head_dim=4"),
        ({"attention_head_dim": 3}, "attention_head_dim=3"),
    ],
)
def test_what_the_unet_cannot_express_is_refused_by_name(options, match):
    with torch.device("meta"):
        peer = diffusers.UNet2DModel(**BASE | options)
    with pytest.raises(ValueError, match=match):
        hub.unet_from_diffusers(peer)


def test_no_option_of_diffusers_is_forgotten():
    known = set(hub._ONLY) | set(BASE) | {"in_channels", "out_channels", "dropout", "add_attention"}
    known |= {"time_embedding_dim", "attn_norm_num_groups", "num_train_timesteps"}  # the last for time_embedding_type="learned" only
    assert set(inspect.signature(diffusers.UNet2DModel).parameters) == known


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"upsampling": "transposed"}, "upsampling='transposed'"),
        ({"time_layout": "interleaved"}, "time_layout='interleaved'"),
        ({"channel_mults": (2, 2)}, r"channel_mults=\[2, 2\]"),
        ({"n_heads": 2, "attn_resolutions": (8, 4)}, "n_heads=2"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        hub.unet_to_diffusers(UNet(**SMALL | options), make_schedule("linear", 10))


def test_conversion_refuses_other_objects(network, schedule):
    with pytest.raises(TypeError, match="unet must be a UNet; got ResNetBaseline"):
        hub.unet_to_diffusers(ResNetBaseline(1), schedule)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule; got Tensor"):
        hub.unet_to_diffusers(network, schedule.betas)
    with pytest.raises(TypeError, match=r"model_or_path must be a UNet2DModel, .* got UNet"):
        hub.unet_from_diffusers(network)
    with pytest.raises(TypeError, match="scheduler must be a scheduler of diffusers"):
        hub.unet_from_diffusers(random_peer(), scheduler=schedule)


def test_without_diffusers_the_error_says_what_to_install(network, schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for call in (lambda: hub.unet_to_diffusers(network, schedule), lambda: hub.unet_from_diffusers("x")):
        with pytest.raises(ImportError, match="pip install diffusers"):
            call()


# schedules


@pytest.mark.parametrize(
    ("betas", "rule"),
    [
        (linear_betas(1000), "linear"),
        (linear_betas(37, 0.002, 0.3), "linear"),
        (linear_betas(200, rescale=True), "linear"),
        (linear_betas(1), "linear"),
        (cosine_betas(1000), "squaredcos_cap_v2"),
        (cosine_betas(7), "squaredcos_cap_v2"),
        (cosine_betas(100, s=0.01), None),
        (make_schedule("sigmoid", 100).exact_betas, None),
        (linear_betas(50).float().double(), None),
        (torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64), None),
    ],
)
def test_schedules_survive_the_way_there_and_back(betas, rule, network, tmp_path):
    peer, scheduler = hub.unet_to_diffusers(network, NoiseSchedule(betas))
    assert scheduler.config.num_train_timesteps == len(betas) == len(scheduler.betas)
    assert (scheduler.config.trained_betas is None) == (rule is not None)
    assert rule in (None, scheduler.config.beta_schedule)
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-5, atol=1e-8)
    assert torch.equal(hub.unet_from_diffusers(peer, scheduler=scheduler)[1].exact_betas, betas)
    scheduler.save_pretrained(tmp_path)
    again = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(hub.unet_from_diffusers(peer, scheduler=again)[1].exact_betas, betas)


RULES = [("DDPMScheduler", rule) for rule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")]
RULES += [("DDIMScheduler", rule) for rule in ("linear", "scaled_linear", "squaredcos_cap_v2")]


@pytest.mark.parametrize(("kind", "rule"), RULES)
def test_schedulers_of_diffusers_keep_their_variances(kind, rule):
    scheduler = getattr(diffusers, kind)(100, beta_schedule=rule)
    schedule = hub.unet_from_diffusers(random_peer(), scheduler=scheduler)[1]
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-9)


OTHER = [("prediction_type", "v_prediction"), ("prediction_type", "sample"), ("variance_type", "learned_range")]


@pytest.mark.parametrize(("name", "value"), [*OTHER, ("rescale_betas_zero_snr", True)])
def test_schedulers_of_other_models_are_refused(name, value):
    with pytest.raises(ValueError, match=f"the scheduler's {name}={value!r}"):
        hub.unet_from_diffusers(random_peer(), scheduler=diffusers.DDPMScheduler(**{name: value}))


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_a_saved_and_converted_model_gives_the_same_pictures_in_a_pipeline(name, tmp_path):
    schedule = make_schedule(name, 20)
    ours, _ = hub.unet_from_diffusers(random_peer())
    hub.save_pretrained(tmp_path / "m", ours, schedule)
    pipeline = diffusers.DDPMPipeline(*hub.unet_to_diffusers(*hub.load_pretrained(tmp_path / "m")))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    x = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    expected = x.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-4, rtol=0)
    other = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    assert (other - x).abs().max() > 0.1
    fewer = pipeline(1, torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np").images
    assert fewer.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("separately", [False, True])
def test_a_converted_model_saved_by_diffusers_runs_in_its_pipeline(separately, tmp_path):
    ours, schedule = randomize(UNet(**SMALL | {"in_channels": 3})), make_schedule("cosine", 20)
    model, scheduler = hub.unet_to_diffusers(ours, schedule)
    if separately:
        model.save_pretrained(tmp_path / "unet")
        scheduler.save_pretrained(tmp_path / "scheduler")
        parts = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"), diffusers.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
        pipeline = diffusers.DDPMPipeline(*parts)
    else:
        diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path)
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    x = sample_ddpm(ours, schedule, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.from_numpy(images), x.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1), atol=1e-4, rtol=0)


# folders of diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def peer():
    return random_peer()


@pytest.fixture
def pipeline_folder(peer, tmp_path):
    scheduler = diffusers.DDPMScheduler(40, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(peer, scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pipelines_and_folders_of_every_layout_load(peer, pipeline_folder, tmp_path):
    flat = tmp_path / "flat"  # as the models of the paper are published
    shutil.copytree(pipeline_folder / "unet", flat)
    shutil.copy(pipeline_folder / "scheduler" / "scheduler_config.json", flat)
    pipeline = diffusers.DDPMPipeline.from_pretrained(pipeline_folder, use_safetensors=True)
    for source in (pipeline, pipeline_folder, str(pipeline_folder), flat):
        ours, schedule = hub.unet_from_diffusers(source)
        assert same_weights(hub.unet_to_diffusers(ours, schedule)[0], peer)
        assert torch.equal(schedule.exact_betas, cosine_betas(40))
    for source in (pipeline_folder / "unet", peer):
        assert torch.equal(hub.unet_from_diffusers(source)[1].exact_betas, linear_betas(1000))
    given = diffusers.DDPMScheduler(10)
    assert torch.equal(hub.unet_from_diffusers(pipeline_folder, scheduler=given)[1].exact_betas, linear_betas(10))


def test_old_names_of_the_attention_layers_load(peer, pipeline_folder):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(pipeline_folder / "unet" / WEIGHTS)
    for theirs, old in new.items():
        tensors = {k.replace(f".{theirs}.", f".{old}."): v for k, v in tensors.items()}
    assert any("proj_attn" in k for k in tensors)
    save_file(tensors, pipeline_folder / "unet" / WEIGHTS, {"format": "pt"})
    assert same_weights(hub.unet_to_diffusers(*hub.unet_from_diffusers(pipeline_folder))[0], peer)


def change_tensors(change):
    return lambda root: save_file(change(load_file(root / WEIGHTS)), root / WEIGHTS, {"format": "pt"})


def change_config(**changes):
    return lambda root: (root / "config.json").write_text(json.dumps(json.loads((root / "config.json").read_text()) | changes))


def to_bin(root):
    torch.save(Bomb(root / "trace"), root / "diffusion_pytorch_model.bin")
    (root / WEIGHTS).unlink()


FOLDERS = {
    "only a pickle": (to_bin, r"no \.safetensors file; \.bin files are pickles"),
    "truncated": (lambda root: (root / WEIGHTS).write_bytes((root / WEIGHTS).read_bytes()[:5000]), "does not hold a UNet2DModel"),
    "a pickle in disguise": (lambda root: (root / WEIGHTS).write_bytes(pickle.dumps(Bomb(root / "trace"))), "does not hold a UNet2DModel"),
    "missing tensor": (change_tensors(lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}), "missing_keys.*conv_in.bias"),
    "extra tensor": (change_tensors(lambda t: t | {"spy": torch.zeros(1)}), "unexpected_keys.*spy"),
    "wrong shape": (change_tensors(lambda t: t | {"conv_in.bias": torch.zeros(9)}), "conv_in.bias"),
    "no config": (lambda root: (root / "config.json").unlink(), "config.json"),
    "broken config": (lambda root: (root / "config.json").write_text("{"), "does not hold a UNet2DModel"),
    "other class": (change_config(_class_name="UNet2DConditionModel"), "holds a UNet2DConditionModel; it must be a UNet2DModel"),
    "giant": (change_config(block_out_channels=[8 * 10**4, 16 * 10**4]), "the configuration asks for .* numbers from .* bytes"),
    "endless": (change_config(layers_per_block=10**9), "need more than .* tensors"),
    "text for channels": (change_config(block_out_channels="many"), "does not hold a UNet2DModel"),
    "no channels": (change_config(block_out_channels=[]), "does not hold a UNet2DModel"),
    "zero channels": (change_config(block_out_channels=[0, 0]), "does not hold a UNet2DModel"),
    "refused option": (change_config(downsample_padding=1), "downsample_padding=1 cannot be expressed"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_folders_of_diffusers_are_refused(name, pipeline_folder):
    damage, match = FOLDERS[name]
    damage(pipeline_folder / "unet")
    with pytest.raises(ValueError, match=match):
        hub.unet_from_diffusers(pipeline_folder)
    assert not (pipeline_folder / "unet" / "trace").exists()


def test_a_pickle_beside_the_safetensors_is_not_read(pipeline_folder, peer):
    torch.save(Bomb(pipeline_folder / "trace"), pipeline_folder / "unet" / "diffusion_pytorch_model.bin")
    assert same_weights(hub.unet_to_diffusers(*hub.unet_from_diffusers(pipeline_folder))[0], peer)
    assert not (pipeline_folder / "trace").exists()


@pytest.mark.parametrize("name", ["nowhere", "../nowhere", "a/b/c", "", "-/x", Path("owner/name")])
def test_names_that_are_neither_folders_nor_of_the_hub_are_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    if str(name) in ("", "."):
        with pytest.raises(ValueError, match="does not hold a UNet2DModel"):
            hub.unet_from_diffusers(name)
    else:
        with pytest.raises(FileNotFoundError, match=r"no folder .* owner/name"):
            hub.unet_from_diffusers(name)


def test_a_file_is_no_folder_of_diffusers(pipeline_folder):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        hub.unet_from_diffusers(pipeline_folder / "unet" / WEIGHTS)


def test_a_name_of_the_hub_is_fetched_without_pickles(pipeline_folder, peer, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(pipeline_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    ours, _ = hub.unet_from_diffusers("google/ddpm-cifar10-32")
    assert asked == [("google/ddpm-cifar10-32", ["*.json", "*.safetensors"])]
    assert same_weights(hub.unet_to_diffusers(ours, make_schedule("linear", 5))[0], peer)


def test_without_a_network_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="no folder owner/name here, and the Hugging Face Hub, which needs a network"):
        hub.unet_from_diffusers("owner/name")


# save_parts, load_parts


@pytest.fixture
def pair(tmp_path):
    """Save two networks and a fact in one folder."""
    g, parts = torch.Generator().manual_seed(0), {"small": make_unet("digits"), "plain": ResNetBaseline(1, 8, 2)}
    for part in parts.values():
        for tensor in part.parameters():
            torch.nn.init.normal_(tensor, generator=g)
    hub.save_parts(tmp_path / "pair", parts, make_schedule("cosine", 50), facts={"words": ["a"]}, card={"name": "pair"})
    return tmp_path / "pair", parts


def test_several_parts_come_back_bit_for_bit(pair):
    path, parts = pair
    again, schedule, config = hub.load_parts(path, [UNet, ResNetBaseline])
    assert list(again) == list(parts) and config["facts"] == {"words": ["a"]} and not again["small"].training
    for name, part in parts.items():
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, again[name].state_dict()[key])
    assert torch.equal(schedule.exact_betas, make_schedule("cosine", 50).exact_betas)
    assert "small: `UNet(" in (path / hub.CARD_FILE).read_text()


def test_parts_are_sealed_together(pair):
    path, _ = pair
    config, weights = json.loads((path / hub.CONFIG_FILE).read_text()), (path / hub.WEIGHTS_FILE).read_bytes()

    def refuse(message, seal=True, **changes):
        changed = config | changes
        if seal:
            changed["sha256"] = hub.checksum(changed, weights)
        (path / hub.CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            hub.load_parts(path, [UNet, ResNetBaseline])

    parts = config["parts"]
    refuse("checksum does not fit", seal=False, facts={"words": ["b"]})
    for plain in ({"class": "eval", "config": {}}, {"class": [], "config": {}}, {"class": "UNet", "config": []}):
        refuse("part 'plain' must name a class among UNet, ResNetBaseline", parts=parts | {"plain": plain})
    refuse("part 'plain' must name a class", parts=parts | {"plain": ["UNet", {}]})
    refuse("does not hold a complete model", parts={"small": parts["small"]})
    refuse("does not hold a complete model", parts=parts | {"more": parts["plain"]})
    refuse("does not hold a complete model", parts=parts | {"plain": {"class": "ResNetBaseline", "config": {"n_blocks": 10**9}}})
    refuse('has no entry "format"', format="ddpm_nb model")
    refuse("version must be 1; got 2", version=2)
    refuse("facts must be of type dict", facts=[])


def test_a_class_that_was_not_expected_is_not_built(pair):
    with pytest.raises(ValueError, match="part 'plain' must name a class among UNet, and its config"):
        hub.load_parts(pair[0], [UNet])
    with pytest.raises(ValueError, match="does not describe a model of this package"):
        hub.load_pretrained(pair[0])


@pytest.mark.parametrize("parts", [{}, {"a.b": ResNetBaseline(1, 8, 2)}, {"a": torch.nn.Linear(2, 2)}])
def test_parts_that_cannot_be_described_are_refused(tmp_path, parts):
    with pytest.raises(TypeError, match=r"parts must map names without dots to modules that have a \.config"):
        hub.save_parts(tmp_path / "x", parts, make_schedule("cosine", 50))
    assert not (tmp_path / "x").exists()


def test_facts_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        hub.save_parts(tmp_path / "x", {"a": ResNetBaseline(1, 8, 2)}, make_schedule("cosine", 50), facts={"a": float("nan")})
    assert not (tmp_path / "x").exists()


def test_a_missing_name_tells_what_is_shipped(tmp_path):
    (tmp_path / "shipped" / "one").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="or a shipped name: one"):
        hub.load_parts("two", [UNet], shipped=tmp_path / "shipped")


LOADING = {
    "a model": "from ddpm_nb.hub import load_pretrained; load_pretrained('digits')",
    "a pipeline": "from ddpm_nb.pipeline import TextToImage; TextToImage.from_pretrained('digits')",
}


@pytest.mark.parametrize("code", LOADING.values(), ids=LOADING)
def test_loading_leaves_the_compiler_of_pytorch_alone(code):
    """Its import takes seconds; some operations on tensors without memory would cause it."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*{{'torch', 'torch._dynamo', 'sympy'}} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["torch"]
