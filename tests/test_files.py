"""Files: whole or not there, and nothing believed that is read."""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import SMALL, Bomb, as_nobody, contents, full_disk, randomize, read, same_weights, seal
from safetensors.torch import load_file, save
from torch import nn

import ddpm_nb.files as files
from conftest import refuses
from ddpm_nb.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    find_model,
    load_parts,
    model_card,
    plan_module,
    read_config,
    read_json,
    read_sealed,
    replaced_file,
    save_parts,
    write_json,
    write_sealed,
)
from ddpm_nb.unet import ResNetBaseline, UNet

CLASSES = (UNet, ResNetBaseline)


@pytest.fixture
def public():
    """Make a temporary folder that others may enter and not write to."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def parts():
    return {"small": randomize(UNet(**SMALL)), "plain": randomize(ResNetBaseline(1, 8, 2), 1)}


@pytest.fixture(scope="module")
def original(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("models") / "original"
    tensors, card = {"schedule.betas": torch.tensor([0.1, 0.2])}, {"name": "pair", "steps": 3}
    save_parts(path, parts, tensors=tensors, facts={"words": ["a"]}, card=card)
    return path


@pytest.fixture
def saved(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "saved"))


def open_pair(path):
    return load_parts(path, CLASSES, extra=["schedule.betas"])


# replaced_file


def test_replaced_file_replaces_and_leaves_nothing_else(tmp_path):
    for text in ("first", "second"):
        with replaced_file(tmp_path / "a.txt") as file:
            assert file.suffix == ".txt" and file.parent == tmp_path
            file.write_text(text)
    assert contents(tmp_path) == {"a.txt": b"second"}


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_replaced_file_keeps_the_previous_file_after_a_failure(tmp_path, error):
    def fail():
        with replaced_file(tmp_path / "a.txt") as file:
            file.write_text("sec")
            raise error

    (tmp_path / "a.txt").write_text("first")
    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == {"a.txt": b"first"}


def test_replaced_file_survives_a_full_disk_and_open_does_not(tmp_path):
    for name in ("ours", "plain"):
        (tmp_path / name).write_bytes(b"first")
    with full_disk(1000), pytest.raises(OSError, match="File too large"), replaced_file(tmp_path / "ours") as file:
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
        with replaced_file(tmp_path / "ours") as file, open(tmp_path / "plain", "wb") as plain:
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
    with replaced_file(tmp_path / "a") as file:
        file.write_text("x")
    assert events == [("fsync", file.name), ("replace", file.name), ("fsync", tmp_path.name)]


def test_replaced_file_keeps_permissions_and_follows_links(tmp_path):
    (tmp_path / "private").write_text("first")
    (tmp_path / "private").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    with replaced_file(tmp_path / "link") as file:
        file.write_text("second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "private").read_text() == "second"
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    with replaced_file(tmp_path / "new") as file:
        file.write_text("x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_nobody_may_write_is_replaced_and_stays_so(tmp_path):
    path = tmp_path / "model.json"
    path.write_text("old")
    path.chmod(0o444)
    with replaced_file(path) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o644
        temporary.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("name", [CARD_FILE, WEIGHTS_FILE])
def test_files_that_are_no_models_are_not_overwritten(parts, tmp_path, name):
    (tmp_path / name).write_text("mine")
    refuses(lambda: save_parts(tmp_path, parts), f"holds a {name} that is no model's", error=FileExistsError)
    assert contents(tmp_path) == {name: b"mine"}
    save_parts(tmp_path, parts, overwrite=True)


def test_a_reader_waits_for_a_writer_at_work(tmp_path):
    """The weights are renamed first: for a moment the old JSON stands beside the new weights."""
    paths = tmp_path / "config.json", tmp_path / "model.safetensors"
    write_sealed(*paths, {"n": 1}, {"x": torch.ones(1)})
    old = paths[0].read_bytes()
    write_sealed(*paths, {"n": 2}, {"x": torch.zeros(1)})
    coming = tmp_path / ".config.1a2b3c4d.json"
    shutil.move(paths[0], coming)
    paths[0].write_bytes(old)
    threading.Timer(0.05, lambda: os.replace(coming, paths[0])).start()
    facts, tensors = read_sealed(*paths)
    assert facts["n"] == 2 and tensors["x"].item() == 0
    paths[0].write_bytes(old)
    refuses(lambda: read_sealed(*paths), "checksum does not fit")


def test_replaced_file_refuses_at_once_what_cannot_be_written(public):
    (public / "folder").mkdir(mode=0o555)
    (public / "file").write_text("x")
    cases = {"folder": IsADirectoryError, "missing/a": FileNotFoundError, "file/a": NotADirectoryError, "folder/a": PermissionError}
    for name, error in cases.items():
        with as_nobody(), pytest.raises(error, match=re.escape(name)), replaced_file(public / name):
            os._exit(1)
    assert contents(public) == {"file": b"x"}


# JSON

BAD_JSON = {
    "empty": (b"", "is not valid JSON"),
    "half": (b'{"format": "ddpm_nb', "is not valid JSON"),
    "not UTF-8": (b'{"format": "\xff"}', "is not valid JSON in UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "is not valid JSON in UTF-8"),
    "nested too deeply": (b"[" * 100_000, "is not valid JSON"),
    "too large": (b" " * 2**20 + b"{}", "more than 1048576 bytes"),
    "NaN": (b'{"format": NaN}', "NaN is no number"),
    "infinity": (b"[-Infinity]", "-Infinity is no number"),
    "a pickle": (pickle.dumps({"a": 1}), "is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_what_is_no_json_is_refused_by_the_name_of_the_file(name, tmp_path):
    content, words = BAD_JSON[name]
    (tmp_path / "facts.json").write_bytes(content)
    refuses(lambda: read_json(tmp_path / "facts.json"), "facts.json", words)


def test_json_comes_back_and_a_bad_value_leaves_the_old_file(tmp_path):
    file = tmp_path / "facts.json"
    write_json(file, {"a": [1, 2.5, None, "é"]})
    assert read_json(file) == {"a": [1, 2.5, None, "é"]} and list(tmp_path.iterdir()) == [file]
    refuses(lambda: write_json(file, {"a": float("nan")}), "JSON")
    refuses(lambda: write_json(file, {"a": {1}}), "JSON", error=TypeError)
    assert read_json(file)["a"][0] == 1
    assert read_json(file, max_bytes=100) and file.stat().st_size > 20
    refuses(lambda: read_json(file, max_bytes=20), "more than 20 bytes")


# sealed pairs


def test_the_checksum_is_one_that_other_tools_can_compute(tmp_path):
    write_sealed(tmp_path / "a.json", tmp_path / "a.bin", {"b": 1, "a": (2, 3)}, {"x": torch.arange(3.0)})
    facts = json.loads((tmp_path / "a.json").read_text())
    weights = hashlib.sha256((tmp_path / "a.bin").read_bytes()).digest()
    assert facts.pop("sha256") == hashlib.sha256(b'{"a": [2, 3], "b": 1}' + weights).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_sealed_pair_comes_back_in_every_type_and_layout(dtype, tmp_path):
    tensor = torch.arange(24).reshape(2, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last)
    tensors = {"x": tensor, "view": tensor[0], "empty": tensor[:0], "wants gradient": torch.ones(2, requires_grad=True)}
    write_sealed(tmp_path / "a.json", tmp_path / "a.st", {}, tensors, texts={"b.md": "text"})
    facts, found = read_sealed(tmp_path / "a.json", tmp_path / "a.st")
    assert list(facts) == ["sha256"] and (tmp_path / "b.md").read_text() == "text"
    assert list(found) == sorted(tensors)  # whatever the order in which safetensors gives them
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_every_changed_byte_is_found_or_means_nothing(original, tmp_path_factory, place, flip):
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("flip") / "m"))
        data = bytearray((copy / name).read_bytes())
        before = bytes(data)
        place_ = int(place * len(data))
        data[place_] ^= flip
        (copy / name).write_bytes(data)
        if name == CONFIG_FILE:
            with suppress(ValueError):
                open_pair(copy)
                assert json.loads(data) == json.loads(before)  # white space
        else:
            refuses(partial(open_pair, copy), "the checksum does not fit")
            (copy / name).write_bytes(before[:place_])
            refuses(partial(open_pair, copy), "the checksum does not fit")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_between_the_renames_is_never_a_mixture(parts, saved, monkeypatch, at):
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(Path(target).name)
        if len(calls) >= at:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="power cut"):
        save_parts(saved, {"other": parts["plain"]}, overwrite=True)
    assert calls == [WEIGHTS_FILE, CARD_FILE, CONFIG_FILE][:at]
    if at == 1:
        assert same_weights(open_pair(saved)[0]["small"], parts["small"])
    else:
        refuses(lambda: open_pair(saved), "the checksum does not fit")
    assert len(contents(saved)) == 3


def test_a_full_disk_keeps_the_old_model(parts, saved):
    before = contents(saved)
    with full_disk(5000), pytest.raises(OSError, match="File too large"):
        save_parts(saved, {"small": randomize(UNet(**SMALL), 2)}, overwrite=True)
    assert contents(saved) == before and same_weights(open_pair(saved)[0]["small"], parts["small"])


# finding and describing


def test_names_are_shipped_models_and_everything_else_is_a_path(tmp_path, monkeypatch, original):
    shipped = tmp_path / "weights"
    shutil.copytree(original, shipped / "small-1")
    shutil.copytree(original, tmp_path / "outside")
    shutil.copytree(original, tmp_path / "small-1")
    (shipped / "no-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("small-1", shipped) == find_model("small-1", str(shipped)) == shipped / "small-1"
    for path in ("outside", "weights/../outside", "./small-1", Path("small-1"), tmp_path / "outside"):
        assert find_model(path, shipped) == Path(path)
    for missing in ("../outside", "./small-2", "nobody", ".", "/etc", "a\0b", "no-model", "outside/config.json"):
        refuses(lambda name=missing: find_model(name, shipped), "no model at", "a shipped name: no-model, small-1", error=OSError)
    refuses(lambda: find_model("x" * 300, shipped), error=OSError)
    for wrong in (3, ""):
        refuses(lambda wrong=wrong: find_model(wrong, shipped), "name_or_path must be a path that is not empty", f"got {wrong!r}")


def test_the_card_stays_a_table_whatever_the_facts_say():
    parts = {"net": {"class": "UNet", "config": {"a": 1}}}
    lines = model_card("a\n# b", {"x|y": "c|d\n| e", "n": 3}, parts).split("\n")
    assert lines[0] == "# a # b" and sum(line.startswith("#") for line in lines) == 1
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert 'net: `UNet({"a": 1})`' in lines


# save_parts


def test_parts_come_back_bit_for_bit(original, parts):
    state = torch.get_rng_state()
    again, tensors, config = open_pair(original)
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert list(again) == list(parts) and all(same_weights(again[name], part) for name, part in parts.items())
    assert all(not part.training and not p.is_meta and p.requires_grad for part in again.values() for p in part.parameters())
    assert torch.equal(tensors["schedule.betas"], torch.tensor([0.1, 0.2]))
    assert config["facts"] == {"words": ["a"]} and config["card"] == {"name": "pair", "steps": 3}
    assert config["parts"]["small"] == {"class": "UNet", "config": json.loads(json.dumps(parts["small"].config))}
    assert set(contents(original)) == {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    assert (original / CARD_FILE).read_text() == model_card("pair", config["card"], config["parts"])


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, parts):
    plain, needed = parts["plain"], ("parts must map names without dots", ".config")
    for wrong in ({}, {"a.b": plain}, {"": plain}, {3: plain}, {"a": nn.Linear(2, 2)}):
        refuses(lambda parts=wrong: save_parts(tmp_path / "x", parts), *needed, error=TypeError)
    for card in ({"loss": float("nan")}, {"loss": torch.tensor(1.0)}, {"nested": {"a": 1}}, {3: "x"}, {"a": float("-inf")}):
        refuses(lambda card=card: save_parts(tmp_path / "x", {"a": plain}, card=card), "card must map names to")
    refuses(lambda: save_parts(tmp_path / "x", {"a": plain}, facts={"a": float("nan")}), "JSON")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_paths_that_cannot_take_a_model(parts, original, public):
    saved = Path(shutil.copytree(original, public / "saved"))
    (public / "closed").mkdir(mode=0o555)
    before = contents(public)
    cases = [
        (saved, FileExistsError, "already holds a model; pass overwrite=True"),
        (saved / CONFIG_FILE, NotADirectoryError, "must be a folder; it is a file"),
        (saved / CONFIG_FILE / "m", NotADirectoryError, "must be a folder"),
        (public / "closed", PermissionError, "cannot write here"),
        (public / "closed" / "m", PermissionError, "cannot be created"),
    ]
    for path, error, words in cases:
        with as_nobody():
            refuses(lambda path=path: save_parts(path, parts), words, error=error)
    assert contents(public) == before


def test_weights_in_half_the_bytes_come_back_as_float32(tmp_path):
    part, betas = randomize(UNet(**SMALL), 1), torch.tensor([0.1, 0.2], dtype=torch.float64)
    for half in (False, True):
        save_parts(tmp_path / str(half), {"small": part}, tensors={"schedule.betas": betas}, half=half)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("False", "True")]
    assert sizes[1] < 0.6 * sizes[0]
    again, tensors, _ = load_parts(tmp_path / "True", CLASSES, extra=["schedule.betas"])
    assert torch.equal(tensors["schedule.betas"], betas)
    for name, tensor in part.state_dict().items():
        found = again["small"].state_dict()[name]
        assert found.dtype == torch.float32 and torch.equal(found, tensor.half().float())
    with torch.no_grad():
        next(part.parameters()).fill_(1e5)
    refuses(lambda: save_parts(tmp_path / "x", {"small": part}, half=True), "half=True needs weights below 65504")
    assert not (tmp_path / "x").exists()


# read_config, load_parts


def edited(**changes):
    """Change entries of a configuration; None removes one."""
    return lambda config: {k: v for k, v in (config | changes).items() if v is not None}


def with_part(name, part):
    return lambda config: config | {"parts": config["parts"] | {name: part}}


NAMES_A_CLASS = "part 'plain' must name a class among UNet, ResNetBaseline, and its config"
BAD_CONFIGS = {
    "a list": (lambda config: [config], 'no entry "format"'),
    "of another program": (lambda config: {"_class_name": "UNet2DModel"}, 'no entry "format"'),
    "newer version": (edited(version=2), "version must be 1; got 2"),
    "version true": (edited(version=True), "version must be of type int"),
    "no version": (edited(version=None), "version must be 1; got None"),
    "no card": (edited(card=None), "missing are ['card']"),
    "no checksum": (edited(sha256=None), "missing are ['sha256']"),
    "unknown entry": (edited(code="import os"), "unknown are ['code']"),
    "facts are a list": (edited(facts=[]), "facts must be of type dict"),
    "card is text": (edited(card="good"), "card must be of type dict"),
    "parts are a list": (edited(parts=["UNet"]), "parts must be of type dict"),
    "checksum is a number": (edited(sha256=1), "sha256 must be of type str"),
    "a function": (with_part("plain", {"class": "eval", "config": {}}), NAMES_A_CLASS),
    "class is a list": (with_part("plain", {"class": [], "config": {}}), NAMES_A_CLASS),
    "config is a list": (with_part("plain", {"class": "UNet", "config": []}), NAMES_A_CLASS),
    "no config": (with_part("plain", {"class": "UNet"}), NAMES_A_CLASS),
    "part is a list": (with_part("plain", ["UNet", {}]), NAMES_A_CLASS),
    "first edition, no class": (edited(format="ddpm_nb model", parts=None, facts=None), "part 'model' must name a class"),
    "first edition, no card": (edited(format="ddpm_nb model", parts=None, facts=None, card=None), "missing are ['card']"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_configuration_that_we_would_not_write_is_refused(name, saved):
    change, words = BAD_CONFIGS[name]
    (saved / CONFIG_FILE).write_text(json.dumps(change(read(saved))))
    for call in (lambda: read_config(saved, CLASSES), lambda: open_pair(saved)):
        refuses(call, "does not describe a model of this kind", words)


def test_a_class_that_was_not_expected_is_not_built(original):
    refuses(lambda: load_parts(original, [UNet], extra=["schedule.betas"]), "part 'plain' must name a class among UNet, and its config")


def test_an_edited_entry_is_found_unless_it_is_sealed_anew(saved):
    config = read(saved)
    for part, name, value in (("facts", "words", ["b"]), ("card", "steps", 4), ("parts", "small", None)):
        changed = {"class": "UNet", "config": config["parts"]["small"]["config"] | {"n_heads": 2}}
        edit = config | {part: config[part] | {name: value or changed}}
        (saved / CONFIG_FILE).write_text(json.dumps(edit))
        refuses(lambda: open_pair(saved), "the checksum does not fit")
        seal(saved, edit)
        assert open_pair(saved), "every shape fits: without the checksum nobody would notice"


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


BIAS = "small.conv_in.bias"
TENSORS = {
    "extra": (lambda t: t | {"small.spy": torch.zeros(1)}, "spy: the architecture has no such tensor"),
    "missing": (without(BIAS), f"{BIAS}: the architecture has (8,), the file no such tensor"),
    "renamed": (lambda t: without(BIAS)(t) | {"small.conv_in.b": t[BIAS]}, "conv_in.b: the architecture has no such tensor"),
    "wrong shape": (lambda t: t | {BIAS: torch.zeros(9)}, "the architecture has (8,), the file (9,)"),
    "integers": (lambda t: t | {BIAS: torch.zeros(8, dtype=torch.int32)}, "floating-point type"),
    "no extra tensor": (without("schedule.betas"), "schedule.betas"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_sealed_tensors_that_do_not_fit_are_refused(name, saved):
    change, words = TENSORS[name]
    seal(saved, weights=save(change(load_file(saved / WEIGHTS_FILE))))
    refuses(lambda: open_pair(saved), "does not hold a complete model", words)


def test_parts_that_are_missing_or_too_many_are_refused(saved):
    config = read(saved)
    parts = config["parts"]
    for changed in ({"small": parts["small"]}, parts | {"more": parts["plain"]}, {}):
        seal(saved, config | {"parts": changed})
        refuses(lambda: open_pair(saved), "does not hold a complete model")
    (saved / WEIGHTS_FILE).unlink()
    refuses(lambda: open_pair(saved), "has a config.json but no model.safetensors", error=FileNotFoundError)


LARGE = st.sampled_from([2**31, 2**63, 10**30, -(10**9)])
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | LARGE | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2), max_leaves=4)


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from([*UNet(**SMALL).config, "n_blocks", "device", "self"]), value=JSON)
def test_a_sealed_configuration_of_any_values_builds_the_file_or_is_refused(original, tmp_path_factory, name, value):
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("any") / "m"))
    config = read(copy)
    config["parts"]["small"]["config"][name] = value
    seal(copy, config)
    try:
        model = open_pair(copy)[0]["small"]
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
def test_a_sealed_giant_is_refused_before_it_is_built(name, saved, monkeypatch):
    config = read(saved)
    config["parts"]["small"]["config"] |= GIANTS[name]
    seal(saved, config)
    built, init = [], nn.Module.__init__
    monkeypatch.setattr(nn.Module, "__init__", lambda self, *args, **options: built.append(type(self)) or init(self, *args, **options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(lambda: open_pair(saved), "does not hold a complete model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert len(built) < 1000, len(built)


def test_a_plan_has_shapes_and_no_memory_and_stops_early():
    class Tower(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(10**6, 10**6) for _ in range(n)))

    plan = plan_module(Tower, {"n": 2}, 4)
    assert all(p.is_meta and p.shape[0] == 10**6 for p in plan.parameters())
    refuses(lambda: plan_module(Tower, {"n": 10**9}, 4), "needs more tensors than the 4 there are")
    assert not nn.Linear(2, 2).weight.is_meta, "the plan leaves the process as it was"


@settings(deadline=None, max_examples=50)
@given(place=st.integers(0, 2000), flip=st.integers(1, 255))
def test_a_sealed_file_with_a_changed_header_is_refused_or_loads(original, tmp_path_factory, place, flip):
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("header") / "m"))
    data = bytearray((copy / WEIGHTS_FILE).read_bytes())
    data[place] ^= flip
    seal(copy, weights=bytes(data))
    with suppress(ValueError):
        open_pair(copy)


def test_a_pickle_is_never_run(saved, tmp_path):
    trace, unpickled = tmp_path / "trace", tmp_path / "unpickled"
    seal(saved, weights=pickle.dumps(Bomb(trace)))
    refuses(lambda: open_pair(saved), "its tensors cannot be read")
    torch.save(Bomb(trace), saved / WEIGHTS_FILE)
    seal(saved)
    refuses(lambda: open_pair(saved), "its tensors cannot be read")
    (saved / CONFIG_FILE).write_bytes(pickle.dumps(Bomb(trace)))
    refuses(lambda: open_pair(saved), "is not valid JSON")
    assert not trace.exists()
    torch.save(Bomb(unpickled), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert unpickled.is_dir(), "the wrong form runs it"


def test_no_module_of_the_package_reads_pickles():
    for path in files.PACKAGE.glob("*.py"):
        source = path.read_text()
        assert not re.search(r"^(import|from) (pickle|diffusers|huggingface_hub)", source, re.M), path.name
        assert "torch.load(" not in source, path.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parts_load_on_a_gpu_and_save_from_there(original, tmp_path, parts):
    again, _, _ = load_parts(original, CLASSES, extra=["schedule.betas"], device="cuda")
    assert all(p.is_cuda for part in again.values() for p in part.parameters())
    save_parts(tmp_path / "m", again)
    assert same_weights(load_parts(tmp_path / "m", CLASSES)[0]["small"], parts["small"])


LOADING = {
    "a model": "from ddpm_nb.hub import load_pretrained; load_pretrained('digits')",
    "a classifier": "from ddpm_nb.evaluation import load_classifier; load_classifier('digits')",
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


@pytest.mark.parametrize(("holds", "resume"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_foreign_folder_is_refused_for_a_run(holds, resume, tmp_path):
    """One refusal for all runs: that of a run begun anew comes first, and files of a run that goes on are its own."""
    names = ["log.jsonl", CARD_FILE]
    call = lambda: files.refuse_foreign_folder(tmp_path / "run", names, holds, resume)
    if holds and not resume:
        refuses(call, "already holds a run; resume it (resume=True)", error=FileExistsError)
    else:
        call()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CARD_FILE).write_text("mine")
    if not holds:
        refuses(call, f"out={str(tmp_path / 'run')!r} holds a {CARD_FILE} that is no run's", "choose another folder", error=FileExistsError)
    elif resume:
        call()
    assert contents(tmp_path / "run") == {CARD_FILE: b"mine"}


def test_what_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    """Many thousand names of classes are more than other JSON files may have."""
    pair = tmp_path / "a.json", tmp_path / "a.safetensors"
    facts = {"classes": [f"{i:09}" for i in range(100_000)]}
    write_sealed(*pair, facts, {"x": torch.zeros(1)})
    assert read_sealed(*pair)[0]["classes"] == facts["classes"]
    before = pair[0].read_bytes()
    monkeypatch.setattr(files, "MAX_FACTS", 2**20)
    refuses(lambda: write_sealed(*pair, facts, {"x": torch.ones(1)}), "facts must fit in 1048576 bytes of JSON")
    assert pair[0].read_bytes() == before
