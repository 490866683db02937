"""Runs: exact resume, checkpoints that survive damage, honest logs, signals, and the refusals that keep a run from being lost."""

import copy
import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from training_helpers import (
    N_STEPS,
    QUICK,
    TINY,
    Affine,
    Stop,
    Streamed,
    all_equal,
    at,
    die,
    held_out_draw,
    levels,
    make_data,
    make_trainer,
    run,
    tiny_unet,
)

from conftest import refuses
from ddpm_nb import runs
from ddpm_nb.conditioning import ClassUNet
from ddpm_nb.data import ImageDataset
from ddpm_nb.elbo import simple_loss
from ddpm_nb.files import checksum
from ddpm_nb.forward import NoiseSchedule
from ddpm_nb.gaussian import seeded_init
from ddpm_nb.hub import describe_model, load_pretrained, save_pretrained
from ddpm_nb.pictures import FolderDataset
from ddpm_nb.runs import (
    CHECKPOINTS,
    LOG_FILE,
    SETTINGS_FILE,
    Interrupted,
    StopSignals,
    TrainLog,
    describe_data,
    held_out_loss,
    load_checkpoint,
    load_trainer_state,
    prepare_run,
    read_checkpoint,
    read_log,
    read_settings,
    refuse_difference,
    save_checkpoint,
    train,
    trainer_state,
)
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import OneProcess, lr_factor
from ddpm_nb.training import _read_losses as read_losses
from ddpm_nb.unet import PRESETS, UNet

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def stop_at(step, out, config=QUICK, **options):
    with pytest.raises(Stop):
        run(config, out=out, callback=at(step, act=die), **options)


def terminate(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def state_of(out):
    """Return all that a run left: tensors of the newest checkpoint, counts, losses by step, the model's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, facts = load_checkpoint(out / CHECKPOINTS)
    lines = read_log(out / LOG_FILE)
    facts = {name: facts[name] for name in ("step", "skipped", "ema_updates", "device", "scaler")}
    return tensors, facts, [loss for line in lines for loss in line["losses"]], (out / "model.safetensors").read_bytes()


def assert_same_run(out, other):
    (tensors, facts, losses, weights), (others, other_facts, other_losses, other_weights) = state_of(out), state_of(other)
    assert tensors.keys() == others.keys() and facts == other_facts
    assert [name for name, value in tensors.items() if not value.equal(others[name])] == []
    assert losses == other_losses
    assert weights == other_weights


def fingerprint(folder):
    """Return the bytes and the time of change of everything below a folder."""
    return {str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in sorted(folder.rglob("*"))}


def steps_kept(out):
    assert {p.stem for p in (out / CHECKPOINTS).glob("*.json")} == {p.stem for p in (out / CHECKPOINTS).glob("*.safetensors")}
    return sorted(int(p.stem.removeprefix("step-")) for p in (out / CHECKPOINTS).glob("*.json"))


def leftovers(out):
    return [p.name for p in out.rglob(".*")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of a run that was never stopped, and its result."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, run(out=out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of a run that died after step 7, with checkpoints 4 and 6, and perhaps an earlier best one."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stop_at(7, out)
    return out


@pytest.fixture
def dead(stopped, tmp_path):
    """Return a copy of the run that died."""
    return shutil.copytree(stopped, tmp_path / "dead")


# --- resume is exact ---


@pytest.mark.parametrize("kind", ["tensor", "memory", "workers"])
def test_a_resumed_run_equals_one_never_stopped(tmp_path, kind):
    config = replace(QUICK, n_accumulate=2)
    whole = run(config, out=tmp_path / "whole", kind=kind)
    stop_at(3, tmp_path / "parts", config, kind=kind)  # inside the first epoch, one step after a checkpoint
    stop_at(6, tmp_path / "parts", config, kind=kind, resume=True)  # in the second epoch, at a checkpoint
    model = tiny_unet(seed=1)  # its weights must come from the checkpoint
    result = run(None, model=model, out=tmp_path / "parts", kind=kind, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert result.losses.equal(whole.losses) and len(result.losses) == config.n_iterations
    assert all(a.equal(b) for a, b in zip(result.ema.state_dict().values(), whole.ema.state_dict().values(), strict=True))
    assert all(a.equal(b) for a, b in zip(model.parameters(), result_network(tmp_path / "whole"), strict=True))


def result_network(out):
    tensors, _ = load_checkpoint(out / CHECKPOINTS)
    return [tensors[f"model.{name}"] for name, _ in tiny_unet().named_parameters()]


def test_the_optimiser_matters_for_exactness(undisturbed):
    """The tests of resuming could not see a lost moment or count if the checkpoint did not hold them."""
    tensors, facts = load_checkpoint(undisturbed[0] / CHECKPOINTS)
    model = tiny_unet()
    for index, (_, parameter) in enumerate(model.named_parameters()):
        assert tensors[f"optimizer.{index}.step"] == QUICK.n_iterations
        assert tensors[f"optimizer.{index}.exp_avg"].shape == parameter.shape and tensors[f"optimizer.{index}.exp_avg_sq"].any()
    assert {"random.noise", "random.0.cpu"} < tensors.keys()
    assert facts["step"] == facts["ema_updates"] == QUICK.n_iterations and facts["skipped"] == 0
    differs = [not tensors[f"ema.{name}"].equal(tensors[f"model.{name}"]) for name, _ in model.named_parameters()]
    assert all(differs)


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    result = run(out=out, resume=True)
    assert_same_run(out, undisturbed[0])
    assert result.losses.equal(undisturbed[1].losses) and steps_kept(out) == steps_kept(undisturbed[0])


def test_resume_in_an_empty_folder_starts_a_run(tmp_path, undisturbed):
    run(out=tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "new", undisturbed[0])


def test_a_run_on_disk_equals_one_in_memory(undisturbed):
    in_memory = run()
    assert in_memory.losses.equal(undisturbed[1].losses)
    for a, b in zip(in_memory.ema.state_dict().values(), undisturbed[1].ema.state_dict().values(), strict=True):
        assert a.equal(b)


def test_another_device_or_more_processes_start_new_noise():
    trainer = make_trainer()
    trainer.step(make_data("tensor")[:8])
    tensors, facts = copy.deepcopy(trainer_state(trainer))
    other = make_trainer()
    with pytest.warns(UserWarning, match="was on cuda and goes on on cpu"):
        load_trainer_state(other, tensors, facts | {"device": "cuda"})
    assert not other.noise.get_state().equal(tensors["random.noise"])
    assert not other.noise.get_state().equal(torch.Generator().manual_seed(QUICK.seed).get_state())  # nor from the beginning
    del tensors["random.0.cpu"]
    load_trainer_state(other, tensors, facts)
    assert other.noise.get_state().equal(tensors["random.noise"])


def test_resume_clears_what_a_killed_process_left(dead):
    for name in (f"{CHECKPOINTS}/.step-00000008.01234567.safetensors", ".model.01234567.safetensors", ".log.01234567.jsonl"):
        (dead / name).write_bytes(b"half")
    run(out=dead, resume=True)
    assert leftovers(dead) == []


# --- a run is never lost by starting again ---


def test_a_run_is_never_overwritten(dead):
    before = fingerprint(dead)
    with pytest.raises(FileExistsError, match="already holds a run; resume it"):
        run(out=dead)
    assert fingerprint(dead) == before


def test_a_model_that_is_no_run_is_never_overwritten(tmp_path):
    save_pretrained(tmp_path, tiny_unet(), make_schedule("cosine", N_STEPS))
    before = fingerprint(tmp_path)
    for resume in (False, True):
        with pytest.raises((FileExistsError, FileNotFoundError)):
            run(out=tmp_path, resume=resume)
        assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_whose_settings_are_lost_is_not_started_again(dead, resume):
    (dead / SETTINGS_FILE).unlink()
    before = fingerprint(dead)
    with pytest.raises((FileExistsError, FileNotFoundError)):
        run(out=dead, resume=resume)
    assert fingerprint(dead) == before


def test_a_refused_restart_leaves_model_and_folder_alone(dead):
    """The caller's model keeps its own forward, and TensorBoard's folder is not there."""
    pytest.importorskip("tensorboard")
    before, model = fingerprint(dead), tiny_unet()
    with pytest.raises(FileExistsError):
        run(replace(QUICK, precision="bfloat16"), model=model, out=dead, tensorboard=True)
    assert fingerprint(dead) == before and "forward" not in vars(model)


def test_resume_with_other_settings_is_refused_naming_them(dead):
    before = fingerprint(dead)
    with pytest.raises(ValueError, match=r"differs from the run in .* in batch_size, lr; leave it out"):
        run(replace(QUICK, lr=0.1, batch_size=4), out=dead, resume=True)
    assert fingerprint(dead) == before


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs out="):
        run(resume=True)


def test_settings_are_read_back(tmp_path):
    run(out=tmp_path / "run", origin={"name": "digits", "root": None}, callback=None)
    assert read_settings(tmp_path / "run") == (QUICK, {"name": "digits", "root": None})
    assert json.loads((tmp_path / "run" / SETTINGS_FILE).read_text())["config"] == asdict(QUICK)
    with pytest.raises(FileNotFoundError, match=r"holds no training run: there is no train\.json"):
        read_settings(tmp_path)


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny_unet()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OSError, match=r"out='.*run' cannot be written"):
        run(model=model, out=tmp_path / "file" / "run")
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    (tmp_path / CHECKPOINTS).write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        prepare_run(tmp_path)


def test_a_finished_run_holds_the_averaged_model_and_nothing_half_written(tmp_path):
    result = run(out=tmp_path / "run", card={"data": "digits"})
    model, schedule = load_pretrained(tmp_path / "run")
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), result.ema.state_dict().values(), strict=True))
    assert schedule.n_steps == N_STEPS and not model.training and not result.ema.training
    expected = ["README.md", CHECKPOINTS, "config.json", LOG_FILE, "model.safetensors", SETTINGS_FILE]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(expected)
    assert leftovers(tmp_path / "run") == []
    card = json.loads((tmp_path / "run" / "config.json").read_text())["card"]
    assert card["data"] == "digits" and card["iterations"] == QUICK.n_iterations and card["seed"] == QUICK.seed


# --- checkpoints: kept, best, damaged ---


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, monkeypatch):
    scores, asked = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 9: 4.0}, []

    def score(trainer, images):
        asked.append(trainer.n_steps)
        return scores[trainer.n_steps]

    monkeypatch.setattr(runs, "held_out_loss", score)
    run(out=tmp_path, held_out=make_data("tensor")[:4])
    assert asked == list(scores) and steps_kept(tmp_path) == [4, 8, 9]
    kept = {step: read_checkpoint(tmp_path / CHECKPOINTS / f"step-{step:08d}.json")[1]["score"] for step in (4, 8, 9)}
    assert kept == {4: 1.0, 8: 2.0, 9: 4.0}


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ([None, 3.0, 2.0, 1.0], 1, [3]),
        ([None, 1.0, 2.0, 3.0], 1, [1, 3]),
        ([None, 1.0, 1.0, 3.0], 1, [1, 3]),
        ([math.nan, 1.0, 2.0, 3.0], 1, [1, 3]),
        ([1.0, math.nan, 2.0, 3.0], 2, [0, 2, 3]),
        ([None, 3.0, 2.0, 1.0], 4, [0, 1, 2, 3]),
    ],
)
def test_best_is_the_lowest_score(tmp_path, scores, keep, kept):
    for step, score in enumerate(scores):
        save_checkpoint(tmp_path, {"x": torch.tensor([step])}, {"step": step, "score": score}, keep)
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.json")) == kept
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.safetensors")) == kept
    assert load_checkpoint(tmp_path)[0]["x"] == 3


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"x": torch.tensor([step])}, {"step": step, "score": None}, 2)

    def read(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs, "read_checkpoint", read)
    with pytest.raises(PermissionError):  # an older one would be gone on with, and the newer removed
        load_checkpoint(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x40
    path.write_bytes(bytes(content))


def edit(path):
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"ema_updates": facts["ema_updates"] + 1}))


def other_version(path):
    facts = json.loads(path.read_text()) | {"version": 99}
    path.write_text(json.dumps(facts | {"sha256": checksum(facts, path.with_suffix(".safetensors").read_bytes())}))


DAMAGE = {
    "tensors truncated": (".safetensors", truncate),
    "tensors flipped": (".safetensors", flip_byte),
    "tensors empty": (".safetensors", lambda path: path.write_bytes(b"")),
    "tensors missing": (".safetensors", lambda path: path.unlink()),
    "facts truncated": (".json", truncate),
    "facts empty": (".json", lambda path: path.write_bytes(b"")),
    "facts edited": (".json", edit),
    "facts not a dict": (".json", lambda path: path.write_text("[1]")),
    "facts not text": (".json", lambda path: path.write_bytes(b"\xff\xfe{")),
    "facts of another version": (".json", other_version),
}


def damage(out, step, how):
    suffix, act = DAMAGE[how]
    act(out / CHECKPOINTS / f"step-{step:08d}{suffix}")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(dead, undisturbed, how):
    damage(dead, 6, how)
    with pytest.raises((ValueError, OSError)):
        read_checkpoint(dead / CHECKPOINTS / "step-00000006.json")
    with pytest.warns(UserWarning, match="step-00000006 is damaged") as record:
        assert load_checkpoint(dead / CHECKPOINTS)[1]["step"] == 4
    assert len(record) == 1
    if how not in ("tensors truncated", "tensors missing", "facts truncated"):
        return  # three kinds are enough for the whole way
    with pytest.warns(UserWarning, match="step-00000006"):
        run(out=dead, resume=True)
    assert_same_run(dead, undisturbed[0])


@pytest.mark.parametrize("how", ["facts truncated", "tensors flipped"])
def test_a_damaged_checkpoint_is_not_in_the_way_of_later_ones(tmp_path, undisturbed, monkeypatch, how):
    """The damaged one is of step 7; the run goes on from 4, and is stopped again at 6: that one must be there."""
    config, options = replace(QUICK, checkpoint_every=4, keep=1), {"held_out": make_data("tensor")[:4]}
    monkeypatch.setattr(runs, "held_out_loss", lambda trainer, images: abs(trainer.n_steps - 4.0))  # 4 is the best
    with pytest.raises(Interrupted):
        run(config, out=tmp_path, callback=at(6, act=terminate), **options)
    assert steps_kept(tmp_path) == [4, 7]
    damage(tmp_path, 7, how)
    with pytest.warns(UserWarning, match="step-00000007"), pytest.raises(Interrupted):
        run(config, out=tmp_path, resume=True, callback=at(5, act=terminate), **options)
    assert steps_kept(tmp_path) == [4, 6]
    run(config, out=tmp_path, resume=True, **options)
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize("how", ["facts truncated", "facts empty", "facts not a dict"])
def test_an_older_damaged_checkpoint_is_no_obstacle(dead, undisturbed, how):
    damage(dead, 4, how)
    run(out=dead, resume=True)
    assert_same_run(dead, undisturbed[0])


def test_without_an_intact_checkpoint_nothing_is_done(dead):
    for step in steps_kept(dead):
        damage(dead, step, "tensors flipped")
    before = fingerprint(dead)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(FileNotFoundError, match=r"no intact checkpoint in .*checkpoints"),
    ):
        run(out=dead, resume=True)
    assert {k: v[1] for k, v in fingerprint(dead).items()} == {k: v[1] for k, v in before.items()}


def test_every_byte_of_a_checkpoint_counts(stopped, tmp_path):
    draw = random.Random(0)
    for suffix in (".safetensors", ".json"):
        folder = shutil.copytree(stopped / CHECKPOINTS, tmp_path / suffix)
        path = folder / f"step-00000006{suffix}"
        content = path.read_bytes()
        for _ in range(12):
            wrong, place = bytearray(content), draw.randrange(len(content))
            wrong[place] ^= 0x80
            path.write_bytes(bytes(wrong))
            with pytest.raises((ValueError, OSError)):
                read_checkpoint(folder / "step-00000006.json")
        path.write_bytes(content)
        assert read_checkpoint(folder / "step-00000006.json")[1]["step"] == 6


class Bomb:
    """A pickle that leaves a trace where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dump", [pickle.dumps, None])
def test_a_pickle_is_never_read(dead, tmp_path, dump):
    trace, path = tmp_path / "trace", dead / CHECKPOINTS / "step-00000006.safetensors"
    if dump is None:
        torch.save({"x": Bomb(trace)}, path)
    else:
        path.write_bytes(dump(Bomb(trace)))
    shutil.copy(path, path.with_suffix(".pt"))
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(facts | {"sha256": checksum(facts, path.read_bytes())}))  # as a liar would
    with pytest.raises(ValueError, match=r"\w"):  # like any other damage
        read_checkpoint(path.with_suffix(".json"))
    with pytest.warns(UserWarning, match="step-00000006"):
        assert load_checkpoint(dead / CHECKPOINTS)[1]["step"] == 4
    assert not trace.exists()


def test_the_tensors_are_there_before_the_facts(tmp_path, monkeypatch):
    """A process may die between any two of these steps: what has a JSON file must be whole."""
    save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {"step": 0, "score": None}, 1)
    real, seen = os.replace, []

    def watched(source, target):
        real(source, target)
        assert load_checkpoint(tmp_path)[1]["step"] == len(seen)  # 0 after the tensors, 1 after the facts
        seen.append(os.path.basename(target))

    monkeypatch.setattr(os, "replace", watched)
    save_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": 1, "score": None}, 1)
    assert seen == ["step-00000001.safetensors", "step-00000001.json"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_failing_move_leaves_the_checkpoints_alone(tmp_path, monkeypatch, number):
    save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {"step": 0, "score": None}, 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": 1, "score": None}, 1)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.items() <= after.items() and leftovers(tmp_path) == []
    assert load_checkpoint(tmp_path)[1]["step"] == 0


# --- signals ---


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, undisturbed, name):
    number = getattr(signal, name)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    counts = []

    def callback(trainer):
        counts.append(trainer.n_steps)
        if trainer.n_steps == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=rf"{name} after iteration 5 of 9: saved; go on with: train.*{tmp_path}.*resume=True") as caught:
        run(out=tmp_path, callback=callback)
    assert caught.value.signal_number == number and counts == [1, 2, 3, 4, 5]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_checkpoint(tmp_path / CHECKPOINTS)[1]["step"] == 5
    run(out=tmp_path, resume=True)
    assert_same_run(tmp_path, undisturbed[0])


def test_a_second_sigint_has_its_usual_effect(tmp_path):
    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one did nothing")

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            run(out=tmp_path, callback=at(3, act=twice))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not isinstance(caught.value, Interrupted)
    assert load_checkpoint(tmp_path / CHECKPOINTS)[1]["step"] == 2


def test_a_signal_in_the_last_step_does_not_hide_a_finished_run(tmp_path, undisturbed):
    run(out=tmp_path, callback=at(8, act=terminate))
    assert_same_run(tmp_path, undisturbed[0])


def test_handlers_are_restored_after_success_failure_and_without_a_folder(tmp_path):
    def own(number, frame):
        raise AssertionError

    previous = [signal.signal(s, own) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        during = []
        look = at(1, act=lambda _: during.append(signal.getsignal(signal.SIGTERM) is own))
        run(out=tmp_path / "done", callback=look)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == [own, own]
        stop_at(1, tmp_path / "failed")
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == [own, own]
        run(replace(QUICK, n_iterations=1), callback=look)
        assert during == [False, True]  # with nowhere to save to, signals are the caller's
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
            signal.signal(number, handler)


# --- a full disk ---


@contextmanager
def small_disk(path, size):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, undisturbed, room):
    """With no room at all the log fails first; with some, the tensors of the checkpoint, of 340 kB, do."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        out, filler = disk / "run", disk / "filler"

        def fill(trainer):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(free - room))

        with pytest.raises(OSError, match="No space left") as caught:
            run(out=out, callback=at(5, act=fill))
        assert caught.value.errno == errno.ENOSPC and str(out) in str(caught.value)
        assert leftovers(out) == [] and steps_kept(out)[-1] == 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_checkpoint(out / CHECKPOINTS)[1]["step"] == 4
        load_pretrained(out)
        if not room:
            with pytest.raises(OSError, match=r"cannot be written|No space left"):
                run(out=out, resume=True)
            assert load_checkpoint(out / CHECKPOINTS)[1]["step"] == 4
        filler.unlink()
        run(out=out, resume=True)
        assert_same_run(out, undisturbed[0])


# --- a loss that is not finite ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(tmp_path, bad):
    def break_it(trainer):
        with torch.no_grad():
            trainer.network.conv_out.bias.fill_(bad)

    config = replace(QUICK, n_iterations=20, log_every=16, checkpoint_every=8)
    lr = config.lr * lr_factor(config, 11)
    message = rf"not finite at iteration 11 \(lr {lr:.3g}\); .*, in another folder; the last good checkpoint is .*step-00000008\b"
    with pytest.raises(FloatingPointError, match=message):
        run(config, out=tmp_path, callback=at(11, act=break_it))
    assert steps_kept(tmp_path)[-1] == 8
    tensors, _ = read_checkpoint(tmp_path / CHECKPOINTS / "step-00000008.json")
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert all(value.isfinite().all() for value in load_pretrained(tmp_path)[0].state_dict().values())
    run(config, out=tmp_path, resume=True)  # without the cause it comes to its end
    assert all(math.isfinite(loss) for line in read_log(tmp_path / LOG_FILE) for loss in line["losses"])


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    """The loss of the step is finite, its gradient is not: the weights are spoilt one step before the loss shows it."""

    def spoil(trainer):
        trainer.network.conv_out.bias.register_hook(lambda grad: grad * math.nan)

    with pytest.raises(FloatingPointError, match="step-00000002"):
        run(out=tmp_path, callback=at(3, act=spoil))
    assert steps_kept(tmp_path)[-1] == 2
    assert all(value.isfinite().all() for value in load_pretrained(tmp_path)[0].state_dict().values())


# --- the log ---


def test_the_log_holds_every_step_once(undisturbed):
    lines = read_log(undisturbed[0] / LOG_FILE)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
    assert [loss for line in lines for loss in line["losses"]] == undisturbed[1].losses.tolist() and len(undisturbed[1].losses) == 9
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["losses"]) / len(line["losses"]))
        assert line["lr"] == pytest.approx(QUICK.lr * lr_factor(QUICK, line["step"] - 1))
        assert line["skipped"] == 0 and line["seconds"] > 0 and len(line["quartiles"]) == 4


def test_the_log_is_cut_at_the_checkpoint(tmp_path, undisturbed):
    config = replace(QUICK, log_every=1, checkpoint_every=4)
    stop_at(7, tmp_path, config)
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE, 4)] == [1, 2, 3, 4]
    with open(tmp_path / LOG_FILE, "a") as file:
        file.write('{"step": 8, "lr": 0.00')
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3, 4, 5, 6, 7]
    stop_at(5, tmp_path, config, resume=True)
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3, 4, 5]
    result = run(config, out=tmp_path, resume=True)
    lines = [json.loads(text) for text in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert result.losses.equal(undisturbed[1].losses)


def test_no_log_is_an_empty_log(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []


def test_tensorboard_receives_the_loss(tmp_path):
    pytest.importorskip("tensorboard")
    run(replace(QUICK, n_iterations=2), out=tmp_path / "run", tensorboard=True)
    content = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("events.out.tfevents*"))
    assert b"loss" in content and b"lr" in content
    with pytest.raises(ValueError, match="tensorboard=True needs out="):
        run(tensorboard=True)


def test_tensorboard_changes_nothing_and_survives_resuming(tmp_path, undisturbed):
    pytest.importorskip("tensorboard")
    stop_at(5, tmp_path / "run", tensorboard=True)
    run(out=tmp_path / "run", resume=True, tensorboard=True)
    assert_same_run(tmp_path / "run", undisturbed[0])


# --- held-out loss ---


def test_held_out_loss_takes_no_more_images_at_once_than_memory_does():
    trainer, x, seen = make_trainer(), make_data("tensor")[:10].repeat(60, 1, 1, 1), []
    trainer.ema.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    whole = held_out_loss(trainer, x)
    assert seen == [256, 256, 88]
    with torch.no_grad():
        expected = simple_loss(trainer.ema.model, trainer.schedule, x, **held_out_draw(x))
    assert whole == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_loss_is_a_fixed_function_of_the_average():
    trainer, x = make_trainer(), make_data("tensor")[:10]
    trainer.step(x[:8])
    before, noise = torch.get_rng_state(), trainer.noise.get_state()
    first = held_out_loss(trainer, x)
    torch.randn(5)
    torch.randn(5, generator=trainer.noise)
    assert held_out_loss(trainer, x) == first
    assert held_out_draw(x)["t"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    expected = simple_loss(trainer.ema.model, trainer.schedule, x, **held_out_draw(x))
    assert first == pytest.approx(expected.item(), rel=1e-6)
    assert first != pytest.approx(simple_loss(trainer.network.eval(), trainer.schedule, x, **held_out_draw(x)).item(), rel=1e-6)
    torch.set_rng_state(before)
    trainer.noise.set_state(noise)
    held_out_loss(trainer, x)
    assert torch.get_rng_state().equal(before) and trainer.noise.get_state().equal(noise)


def test_held_out_loss_scores_checkpoints_and_changes_nothing(tmp_path, undisturbed):
    held = make_data("tensor")[:6]
    stop_at(5, tmp_path, held_out=held)
    result = run(out=tmp_path, held_out=held, resume=True)
    assert_same_run(tmp_path, undisturbed[0])
    score = load_checkpoint(tmp_path / CHECKPOINTS)[1]["score"]
    expected = simple_loss(result.ema, make_schedule("cosine", N_STEPS), held, **held_out_draw(held))
    assert score == pytest.approx(expected.item(), rel=1e-6)
    scores = {p: json.loads(p.read_text())["score"] for p in (tmp_path / CHECKPOINTS).glob("*.json")}
    assert len(scores) >= 2 and min(s for s in scores.values() if s is not None) == min(scores.values())



# --- what was folded together ---


def test_any_step_is_a_place_to_stop(tmp_path, undisturbed):
    for step in (1, 5, 8, 9):
        out = tmp_path / str(step)
        stop_at(step, out)
        result = run(out=out, resume=True)
        assert_same_run(out, undisturbed[0])
        assert result.losses.equal(undisturbed[1].losses)


def test_state_goes_round_in_memory():
    first, x = make_trainer(), make_data("tensor")[:8]
    for _ in range(2):
        first.step(x)
    tensors, facts = copy.deepcopy(trainer_state(first))
    facts = json.loads(json.dumps(facts))
    expected = [first.step(x) for _ in range(2)]
    other = make_trainer(model=tiny_unet(seed=5))
    load_trainer_state(other, tensors, facts)
    again = [other.step(x) for _ in range(2)]
    assert all(all_equal(pair, other_pair) for pair, other_pair in zip(expected, again, strict=True))
    assert all_equal(first.ema.model.parameters(), other.ema.model.parameters())


def test_the_model_is_whole_after_a_death_between_checkpoint_and_model(tmp_path, undisturbed, monkeypatch):
    """The last checkpoint is written, the model is not: resuming has no step left, and still must write it."""
    with monkeypatch.context() as patch:
        written = runs.save_parts

        def write_model(out, parts, *, card, **options):
            if card["iterations"] == QUICK.n_iterations:
                raise Stop
            written(out, parts, card=card, **options)

        patch.setattr(runs, "save_parts", write_model)
        with pytest.raises(Stop):
            run(out=tmp_path)
    run(out=tmp_path, resume=True)
    assert_same_run(tmp_path, undisturbed[0])
    load_pretrained(tmp_path)


CHANGES = {
    "n_heads": ({"n_heads": 2}, "n_heads was 1 and is 2"),
    "time_layout": ({"time_layout": "cos_first"}, "time_layout was 'concat' and is 'cos_first'"),
    "norm_eps": ({"norm_eps": 1e-3}, "norm_eps was 1e-06 and is 0.001"),
    "dropout": ({"dropout": 0.0}, "dropout was 0.1 and is 0.0"),
    "base_channels": ({"base_channels": 16}, "base_channels was 8 and is 16"),  # other shapes get words too
}


@pytest.mark.parametrize("form", ["today's", "the first"])
def test_resume_with_another_network_is_refused_naming_what_differs(dead, form):
    if form == "the first":  # checkpoints of version 0.1.0 do not say of what network they are, its config.json does
        for path in (dead / CHECKPOINTS).glob("*.json"):
            facts = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("network", "data")}
            facts["sha256"] = checksum(facts, path.with_suffix(".safetensors").read_bytes())
            path.write_text(json.dumps(facts))
        network = json.loads((dead / "config.json").read_text())["parts"]["model"]
        (dead / "config.json").write_text(json.dumps({"format": "ddpm_nb model", "version": 1, **network}))
    before = fingerprint(dead)
    for changes, words in CHANGES.values():
        other = UNet(**(tiny_unet().config | changes))
        refuses(lambda other=other: run(model=other, out=dead, resume=True), "the network differs", words)
    assert {k: v[1] for k, v in fingerprint(dead).items()} == {k: v[1] for k, v in before.items()}
    run(out=dead, resume=True)


def test_resume_with_other_data_or_another_schedule_is_refused(dead, undisturbed):
    before = fingerprint(dead)
    refuses(lambda: run(data=make_data(seed=1), out=dead, resume=True), "the data differs", "sha256 was")
    refuses(lambda: run(data=make_data().images()[:30], out=dead, resume=True), "the data differs", "number was 37 and is 30")
    schedule = make_schedule("linear", N_STEPS)
    refuses(lambda: train(tiny_unet(), schedule, make_data(), QUICK, out=dead, resume=True), "schedule differs")
    assert {k: v[1] for k, v in fingerprint(dead).items()} == {k: v[1] for k, v in before.items()}
    run(out=dead, resume=True)
    assert_same_run(dead, undisturbed[0])


def other_set(**changes):
    """Return the data of a run with another fact, on the same levels."""
    data = make_data()
    facts = {"n_levels": data.n_levels, "classes": data.classes, "flip": data.flip}
    return ImageDataset(data.levels, data.labels, **facts | changes)


class Drawn(Streamed):
    """Change the images by chance: from the global streams, or from one of its own."""

    def __init__(self, images, draw):
        super().__init__(images)
        self.draw = draw

    def __getitem__(self, index):
        return self.images[index] * (1 - self.draw() / 2), 0


def pictures_in(folder, seed=0, n=20):
    folder.mkdir()
    for i, level in enumerate(levels(n, seed)):
        Image.fromarray((level[0] * 15).numpy()).save(folder / f"{i}.png")
    return folder


def goes_on(tmp_path, was, now, *words):
    """Start a run with one set of data and resume it with another; words are those of the refusal."""
    out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    stop_at(3, out, data=was)
    config = replace(QUICK, n_iterations=4)
    if words:
        refuses(lambda: run(config, data=now, out=out, resume=True), "the data differs", *words)
    else:
        run(config, data=now, out=out, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_levels": 256}, "n_levels was 17 and is 256"),
        ({"flip": False}, "flip was True and is False"),
        ({"classes": ("one",)}, "classes was ['0'] and is ['one']"),
    ],
)
def test_the_same_levels_as_another_set_are_other_data(dead, changes, words):
    refuses(lambda: run(data=other_set(**changes), out=dead, resume=True), "the data differs", words)


def test_data_sets_of_other_images_are_other_data(tmp_path):
    x, y = make_data("tensor"), make_data("tensor", seed=1)
    last = torch.cat([x[:-1], y[-1:]])
    zeros = torch.zeros(len(x))
    goes_on(tmp_path, TensorDataset(x, zeros), TensorDataset(y, zeros), "sha256 was")
    one_more = x.clone()
    one_more[3] = y[3]  # not one of the eight places, but in memory
    goes_on(tmp_path, TensorDataset(x, zeros), TensorDataset(one_more, zeros), "sha256 was")
    for other in (y, last):
        goes_on(tmp_path, Streamed(x), Streamed(other), "sha256 of some was")
    goes_on(tmp_path, Streamed(x), Streamed(x.clone()))
    labels = [describe_data([(image, k % 3) for image in x], True)["labels of some"] for k in (0, 1)]
    assert labels[0] == ["0"] * 8 and labels[1] == ["1"] * 8


def test_a_folder_of_other_files_is_other_data(tmp_path):
    a, b = pictures_in(tmp_path / "a"), pictures_in(tmp_path / "b", seed=1)
    read = lambda folder, **how: FolderDataset(folder, 8, grey=True, **how)
    goes_on(tmp_path, read(a), read(b), "files was")
    goes_on(tmp_path, read(a), read(a, flip=True), "flip was False and is True")
    goes_on(tmp_path, read(a), read(a, white_level=4095), "'white_level': None", "'white_level': 4095")
    same = read(a)
    (a / "0.png").rename(a / "00.png")
    goes_on(tmp_path, read(a), read(shutil.copytree(a, tmp_path / "moved")))
    (a / "00.png").rename(a / "0.png")
    for one, other in ((same, same.loaded()), (same.loaded(), same)):  # lazily or in memory, the images are the same
        goes_on(tmp_path, one, other)
    goes_on(tmp_path, same, read(b).loaded(), "sha256 of some was")
    assert "root" not in str(describe_data(same)) and str(tmp_path) not in str(describe_data(same))


def test_images_that_chance_changes_are_not_compared_or_compared_fairly(tmp_path):
    x, own = make_data("tensor"), random.Random(0)
    for draw in (lambda: torch.rand(()), random.random, np.random.rand):
        goes_on(tmp_path, Drawn(x, draw), Drawn(x, draw))
        goes_on(tmp_path, Drawn(x, draw), Drawn(x.flip(0), draw), "sha256 of some was")
    before = torch.get_rng_state()
    assert describe_data(Drawn(x, own.random))["sha256 of some"] is None
    describe_data(Drawn(x, lambda: torch.rand(())))
    assert torch.get_rng_state().equal(before)
    goes_on(tmp_path, Drawn(x, own.random), Drawn(x, own.random))
    with pytest.warns(UserWarning, match="the images of the data change from one reading to the next: they are not compared"):
        goes_on(tmp_path, Streamed(x), Drawn(x, own.random))


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_a_run_that_says_less_of_its_data_goes_on(dead, kind, tmp_path):
    """Checkpoints of before hold number and shape, and a checksum of what was in memory."""
    if kind == "streamed":
        dead = tmp_path / "streamed"
        stop_at(5, dead, kind=kind)
    for path in (dead / CHECKPOINTS).glob("*.json"):
        facts = json.loads(path.read_text())
        facts["data"] = {k: facts["data"][k] for k in ("number", "shape", "sha256") if k in facts["data"]}
        facts["sha256"] = checksum(facts, path.with_suffix(".safetensors").read_bytes())
        path.write_text(json.dumps(facts))
    run(kind=kind, out=dead, resume=True)
    assert load_checkpoint(dead / CHECKPOINTS)[1]["data"] == describe_data(make_data(kind))


def test_a_difference_is_told_in_few_words():
    refuses(lambda: refuse_difference("the data", {"classes": ["a"] * 999}, {}), "classes was ['a', 'a'", "... and is None")
    with pytest.raises(ValueError, match=r"^.{1,500}$"):
        refuse_difference("the data", {"classes": ["a"] * 999}, {"classes": ["b"] * 999})


def test_settings_that_are_none_are_refused(dead):
    for text in (
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"config": {}}',
        b'{"config": [], "data": {}}',
        b'{"config": {"momentum": 0.9}, "data": {}}',
        b'{"config": {"lr": -1}, "data": {}}',
        b'{"config": {"lr": "x"}, "data": {}}',
        b'{"config": {}, "data": null}',
        b"\xff\xfe",
    ):
        (dead / SETTINGS_FILE).write_bytes(text)
        before = fingerprint(dead)
        refuses(lambda: run(out=dead, resume=True), "train.json does not hold the settings of a run")
        assert fingerprint(dead) == before


def test_a_gradient_without_limit_is_kept_in_the_settings(tmp_path):
    config = replace(QUICK, grad_clip=math.inf, n_iterations=2)
    run(config, out=tmp_path)
    assert read_settings(tmp_path)[0] == config and "Infinity" not in (tmp_path / SETTINGS_FILE).read_text()
    run(config, out=tmp_path, resume=True)


# --- runs that are told classes ---


def three_classes(change=0):
    data = make_data()
    return ImageDataset(data.levels, (torch.arange(37) + change) % 3, n_levels=17, classes=("a", "b", "c"), flip=True)


OF_CLASSES = replace(QUICK, conditional="class", label_dropout=0.5)


def class_run(out=None, data=None, config=OF_CLASSES, **options):
    with seeded_init(0):
        net = ClassUNet(3, **PRESETS["digits"] | TINY | {"norm_groups": 2})  # one channel a group would not hear
    return run(config, net, data=data or three_classes(), out=out, **options)


def test_a_run_of_classes_resumes_exactly_and_is_loaded(tmp_path):
    held = (three_classes().images()[:10], torch.arange(10) % 3)
    whole = class_run(tmp_path / "whole", held_out=held)
    with pytest.raises(Stop):
        class_run(tmp_path / "parts", callback=at(5, act=die), held_out=held)
    resumed = class_run(tmp_path / "parts", config=None, resume=True, held_out=held)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert resumed.losses.equal(whole.losses)
    assert not resumed.losses.equal(class_run(config=replace(QUICK, conditional="class", label_dropout=0.1)).losses)
    model, schedule = load_pretrained(tmp_path / "whole")
    x, t, labels = held[0][:3], torch.tensor([3, 17, 5]), torch.tensor([2, 0, 3])
    assert type(model) is ClassUNet
    assert model(x, t, labels).equal(whole.ema(x, t, labels))
    assert describe_model(tmp_path / "whole")["facts"]["classes"] == ["a", "b", "c"]
    _, facts = load_checkpoint(tmp_path / "whole" / CHECKPOINTS)
    told = lambda x, t: whole.ema(x, t, held[1])
    assert facts["score"] == pytest.approx(simple_loss(told, schedule, held[0], **held_out_draw(held[0])).item(), rel=1e-6)


def test_a_run_of_classes_refuses_other_labels(tmp_path):
    out, held = tmp_path / "run", three_classes().images()[:4]
    for bad in (held, (held,), [1, 2], [1, 2, 3]):
        refuses(lambda bad=bad: class_run(out, held_out=bad, callback=die), "held_out must be (images, labels)", "in 0..2")
    for bad in (torch.arange(3), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, -1]), torch.ones(4), torch.ones(4, dtype=torch.bool), [0, 1, 2, 0]):
        refuses(lambda bad=bad: class_run(out, held_out=(held, bad), callback=die), "the labels of held_out must be (4,) whole numbers in 0..2; got")
    refuses(lambda: class_run(out, held_out=(held[:0], torch.arange(0)), callback=die), "held_out must have shape")
    refuses(lambda: class_run(out, data=make_data(), callback=die), "data must have the network's 3 classes")
    assert not out.exists()
    class_run(out)
    refuses(lambda: class_run(out, data=three_classes(1), resume=True), "the data differs", "labels was")
    refuses(lambda: class_run(out, config=replace(QUICK, conditional="class"), resume=True), "config differs from the run", "label_dropout")


def test_what_cannot_be_saved_is_refused_before_the_work(tmp_path):
    refuses(lambda: run(model=Affine(), out=tmp_path / "other", callback=die), "model must be one of UNet", error=TypeError)
    refuses(lambda: run(out=tmp_path / "card", card={"score": math.inf}, callback=die), "card must map names")
    for out in ("other", "card"):
        assert not (tmp_path / out / SETTINGS_FILE).exists()


def test_nothing_is_written_for_what_is_refused(tmp_path):
    out = tmp_path / "run"
    bad = torch.full((32, 1, 8, 8), 255.0)
    refuses(lambda: run(data=bad, out=out), "must be scaled")
    refuses(lambda: run(replace(QUICK, n_accumulate=3), out=out), "batch_size must be a multiple of")
    refuses(lambda: run(replace(QUICK, precision="float16"), out=out), "needs a CUDA device")
    refuses(lambda: run(out=out, n_workers=-1), "n_workers must be at least 0; got -1")
    for held in (torch.zeros(0, 1, 8, 8), torch.zeros(4, 8, 8), torch.full((4, 1, 8, 8), 255.0), torch.zeros(4, 3, 8, 8), [1, 2]):
        refuses(lambda held=held: run(held_out=held, out=out, callback=die), "held_out", error=(ValueError, TypeError))
    assert not out.exists()


def test_the_folder_of_a_run_says_what_its_network_predicts(tmp_path):
    """A network that predicts v is loaded as one that predicts the noise."""
    result = run(replace(QUICK, objective="v", n_iterations=2), out=tmp_path)
    facts = describe_model(tmp_path)["facts"]
    assert (facts["objective"], facts["n_levels"]) == ("v", 17)
    model, schedule = load_pretrained(tmp_path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 3])
    a = schedule.alpha_bars[3]
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), (1 - a).sqrt() * x + a.sqrt() * result.ema(x, t))


def test_a_loss_that_is_not_finite_without_a_folder_says_so():
    model = tiny_unet()
    with torch.no_grad():
        model.conv_out.bias.fill_(math.nan)
    refuses(lambda: run(model=model), "not finite at iteration 0", "no checkpoint was written", error=FloatingPointError)


def test_skipped_steps_are_kept(tmp_path, monkeypatch):
    count = []

    def get_scale(self):  # asked before and after each step; smaller after the second and the fifth
        count.append(1)
        return 0.5 if len(count) in (4, 10) else 1.0

    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", get_scale)
    run(out=tmp_path)
    assert [line["skipped"] for line in read_log(tmp_path / LOG_FILE)] == [1, 1, 2, 2, 2]
    facts = load_checkpoint(tmp_path / CHECKPOINTS)[1]
    assert (facts["skipped"], facts["ema_updates"], facts["step"]) == (2, 7, 9)
    assert run(out=tmp_path, resume=True).n_skipped == 2


def test_signals_are_left_alone_in_other_threads():
    seen, handler = [], signal.getsignal(signal.SIGTERM)

    def work():
        stop = StopSignals()
        stop.start(SimpleNamespace(n_steps=0))
        seen.append((stop.previous, signal.getsignal(signal.SIGTERM)))
        stop.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [({}, handler)]


def test_losses_are_gathered_by_quarter_of_t():
    for n_steps in (4, 10, 3):
        trainer, log = make_trainer(schedule=NoiseSchedule(torch.full((n_steps,), 0.1))), TrainLog()
        log.start(trainer)
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.arange(16) % n_steps, torch.rand(16, generator=generator)) for _ in range(3)]
        for t, losses in batches:
            log.step(trainer, t, losses)
        log.line(trainer, [1.0, 2.0])
        for quarter in range(4):
            own = [
                loss.item()
                for t, losses in batches
                for step, loss in zip(t.tolist(), losses, strict=True)
                if quarter / 4 <= step / n_steps < (quarter + 1) / 4
            ]
            assert log.lines[0]["quartiles"][quarter] == (pytest.approx(sum(own) / len(own)) if own else None)
        assert log.lines[0]["loss"] == 1.5 and log.lines[0]["losses"] == [1.0, 2.0]
        log.step(trainer, torch.zeros(2, dtype=torch.long), torch.ones(2))
        log.line(trainer, [1.0])
        assert log.lines[1]["quartiles"] == [1.0, None, None, None]  # a new line starts from nothing


def test_the_quarters_of_a_step_are_those_of_its_t():
    trainer, log = make_trainer(), TrainLog()
    log.start(trainer)
    t, losses = trainer.step(make_data("tensor")[:8])
    log.step(trainer, t, losses)
    log.line(trainer, read_losses(trainer))
    line, counts = log.lines[0], torch.bincount(t * 4 // N_STEPS, minlength=4).tolist()
    total = sum(n * q for n, q in zip(counts, line["quartiles"], strict=True) if n)
    assert line["loss"] == pytest.approx(total / 8)


def test_bfloat16_resumes_exactly(tmp_path):
    config = replace(QUICK, precision="bfloat16", n_iterations=5)
    run(config, out=tmp_path / "whole")
    stop_at(3, tmp_path / "parts", config)
    run(config, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_channels_last_network_is_saved_and_resumed(tmp_path, undisturbed):
    stop_at(4, tmp_path / "run", model=tiny_unet().to(memory_format=torch.channels_last))
    again = tiny_unet().to(memory_format=torch.channels_last)
    result = run(model=again, out=tmp_path / "run", resume=True)
    torch.testing.assert_close(result.losses, undisturbed[1].losses, rtol=1e-3, atol=1e-3)
    assert again.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_hash_of_a_checkpoint_is_sha256(stopped):
    """The checksum is one that other tools can compute."""
    path = stopped / CHECKPOINTS / "step-00000006.json"
    facts, weights = json.loads(path.read_text()), path.with_suffix(".safetensors").read_bytes()
    own = json.dumps({k: v for k, v in facts.items() if k != "sha256"}, sort_keys=True).encode() + hashlib.sha256(weights).digest()
    assert facts["sha256"] == hashlib.sha256(own).hexdigest()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_gpu_run_resumes(tmp_path, precision):
    config = replace(QUICK, precision=precision)
    whole = run(config, model=tiny_unet().cuda(), out=tmp_path / "whole")
    with pytest.raises(Stop):
        run(config, model=tiny_unet().cuda(), out=tmp_path / "parts", callback=at(5, act=die))
    parts = run(config, model=tiny_unet().cuda(), out=tmp_path / "parts", resume=True)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-3, atol=1e-4)
    (a, facts), (b, other) = (load_checkpoint(tmp_path / name / CHECKPOINTS) for name in ("parts", "whole"))
    assert a["random.noise"].equal(b["random.noise"]) and a["random.0.cuda"].equal(b["random.0.cuda"])
    assert facts["scaler"] == other["scaler"] and (facts["scaler"] is not None) == (precision == "float16")
    assert facts["device"] == "cuda"
    if precision == "float32":
        shutil.rmtree(tmp_path / "parts")
        stop_at(5, tmp_path / "parts", config, model=tiny_unet().cuda())
        with pytest.warns(UserWarning, match="was on cuda and goes on on cpu"):
            run(config, out=tmp_path / "parts", resume=True)


@pytest.mark.gpu
@needs_gpu
def test_float16_overflow_is_skipped_and_counted():
    before, counts = [], []

    def callback(trainer):
        if trainer.n_steps == 3:
            trainer.precision.scaler.update(2.0**60)
            before.extend(p.clone() for p in trainer.network.parameters())
        if trainer.n_steps == 4:
            assert all_equal(before, trainer.network.parameters())
        counts.append((trainer.n_skipped, trainer.ema.n_updates))

    result = run(replace(QUICK, precision="float16"), model=tiny_unet().cuda(), callback=callback)
    assert counts[2] == (0, 3) and counts[3] == (1, 3) and result.n_skipped >= 1 and result.losses.isfinite().all()


def test_of_a_compiled_network_the_network_is_trained_and_kept(tmp_path):
    network, schedule = tiny_unet(), make_schedule("linear", N_STEPS)
    before = [p.clone() for p in network.parameters()]
    compiled = torch.compile(network, backend="eager")
    train(compiled, schedule, make_data(), QUICK, out=tmp_path / "run", progress=False)
    kept, _ = load_pretrained(tmp_path / "run")
    assert type(kept) is UNet and kept.config == network.config
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


# what lies beside a run, and what its data say


def test_a_copy_beside_the_checkpoints_is_no_checkpoint(dead, undisturbed):
    folder = dead / CHECKPOINTS
    for name in ("step-best", "step-00000004 (1)"):
        for ending in (".json", ".safetensors"):
            shutil.copy(folder / f"step-00000004{ending}", folder / f"{name}{ending}")
    run(out=dead, resume=True)
    assert_same_run(dead, undisturbed[0])
    assert (folder / "step-best.json").exists() and (folder / "step-00000004 (1).safetensors").exists()
    _, facts = load_checkpoint(folder)
    assert facts["step"] == QUICK.n_iterations


class Unlabelled(Streamed):
    """Pairs without a tensor of labels, whose images torch's own stream changes."""

    flip = False

    def __getitem__(self, index):
        return self.images[index] * torch.rand(()), index % 3


def test_a_resume_of_classes_does_not_move_the_streams(tmp_path):
    data = Unlabelled(make_data().images())
    whole = class_run(tmp_path / "whole", data)
    with pytest.raises(Stop):
        class_run(tmp_path / "parts", data, callback=at(6, act=die))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # images that change are not compared
        again = class_run(tmp_path / "parts", data, resume=True)
    assert torch.equal(again.losses, whole.losses)


@pytest.mark.parametrize("kind", ["float64", "labels"])
def test_held_out_images_and_labels_of_other_types_are_scored(tmp_path, kind):
    images = three_classes().images()[:6]
    if kind == "labels":
        class_run(tmp_path, held_out=(images, torch.arange(6, dtype=torch.uint8) % 3))
    else:
        run(out=tmp_path, held_out=images.double())
    _, facts = load_checkpoint(tmp_path / CHECKPOINTS)
    assert 0 < facts["score"] < 10


@pytest.mark.parametrize("kind", ["card", "origin"])
def test_what_json_cannot_hold_is_refused_before_the_folder(tmp_path, kind):
    wrong = {"card": {"card": {"x": torch.zeros(1)}}, "origin": {"origin": {"root": tmp_path}}}[kind]
    refuses(lambda: run(out=tmp_path / "run", **wrong), kind, error=(TypeError, ValueError))
    assert not (tmp_path / "run" / CHECKPOINTS).exists()
    run(out=tmp_path / "run")  # the corrected call is not in its own way


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = replace(QUICK, seed=np.int64(3), batch_size=np.int64(8), n_iterations=np.int32(3), lr=np.float64(1e-3))
    assert all(type(getattr(config, name)) is int for name in ("seed", "batch_size", "n_iterations"))
    data = ImageDataset(levels(), np.zeros(37, int), n_levels=np.int64(17), classes=np.arange(1))
    run(config, data=data, out=tmp_path)
    assert read_settings(tmp_path)[0] == config


@pytest.mark.parametrize("origin", [None, {"dataset": "digits", "root": "data"}])
def test_the_way_to_go_on_is_one_that_works(tmp_path, origin):
    with pytest.raises(Interrupted) as caught:
        run(out=tmp_path, callback=at(4, act=terminate), origin=origin)
    told = str(caught.value)
    assert ("ddpm-nb resume" in told) == (origin is not None) and ("resume=True" in told) == (origin is None)


def test_the_best_checkpoint_is_not_chosen_by_one_batch(tmp_path):
    config = replace(QUICK, checkpoint_every=3, keep=9)  # a line holds two losses, or one before a checkpoint
    losses = run(config, out=tmp_path).losses.tolist()
    for step in (3, 6, 9):
        _, facts = read_checkpoint(tmp_path / CHECKPOINTS / f"step-{step:08d}.json")
        assert facts["score"] == pytest.approx(sum(losses[step - 2 : step]) / 2), step


def test_a_log_that_lost_lines_is_told_of(dead):
    lines = (dead / LOG_FILE).read_text().splitlines(keepends=True)
    (dead / LOG_FILE).write_text("".join(lines[:1]))
    with pytest.warns(UserWarning, match=r"log\.jsonl holds 2 of the 6 losses"):
        run(out=dead, resume=True)


def test_another_precision_is_told_of(tmp_path):
    trainer = make_trainer()
    tensors, facts = trainer_state(trainer)
    with pytest.warns(UserWarning, match=r"the run was in torch\.bfloat16 and goes on in torch\.float32"):
        load_trainer_state(make_trainer(), tensors, facts | {"precision": "torch.bfloat16"})


def test_going_back_forgets_what_was_undone():
    trainer = make_trainer()
    state = trainer_state(trainer)
    for x in make_data().images()[:16].split(8):
        trainer.step(x)
    load_trainer_state(trainer, *state)
    assert trainer.optimizer.state_dict()["state"] == {} and trainer.unread == [] and trainer.history == []


def test_a_part_of_a_data_set_knows_what_the_set_knows(tmp_path):
    data = torch.utils.data.Subset(make_data(), range(30))
    stop_at(2, tmp_path, data=data)
    assert describe_model(tmp_path)["facts"]["n_levels"] == 17
    assert runs.describe_data(data)["flip"] is True


def test_tensorboard_takes_back_what_was_undone(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(QUICK, log_every=1, checkpoint_every=4)
    stop_at(7, tmp_path, config, tensorboard=True)  # steps 5 and 6 are undone
    run(config, out=tmp_path, resume=True, tensorboard=True)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    steps = [event.step for event in found.Scalars("loss")]
    assert steps == sorted(set(steps))


# what is told again, or not, when a run goes on


def card_of(out):
    return describe_model(out)["card"]


def test_going_on_keeps_the_card_or_takes_the_given_one(tmp_path):
    stop_at(3, tmp_path, card={"name": "mine", "licence": "MIT"})
    run(out=tmp_path, resume=True)
    assert card_of(tmp_path) | {"name": "mine", "licence": "MIT", "iterations": QUICK.n_iterations} == card_of(tmp_path)
    assert "# mine" in (tmp_path / "README.md").read_text()
    run(out=tmp_path, resume=True, card={"name": "ours"})
    assert card_of(tmp_path)["name"] == "ours" and "licence" not in card_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"card": 3}))
    with pytest.warns(UserWarning, match="the card of the run is lost"):
        run(out=tmp_path, resume=True)
    load_pretrained(tmp_path)


def test_a_data_set_that_has_moved_is_found_from_then_on(tmp_path):
    stop_at(3, tmp_path, origin={"dataset": "folder", "root": "here"})
    run(replace(QUICK, n_iterations=4), out=tmp_path, resume=True)
    assert read_settings(tmp_path)[1]["root"] == "here"
    run(replace(QUICK, n_iterations=4), out=tmp_path, resume=True, origin={"dataset": "folder", "root": "there"})
    assert read_settings(tmp_path)[1]["root"] == "there"


def test_other_held_out_images_are_named_and_nothing_is_lost(tmp_path):
    x = make_data("tensor")[:6]
    stop_at(5, tmp_path, held_out=x)
    before = fingerprint(tmp_path)
    for other, words in ((None, "number was 6 and is 0"), (x[:4], "number was 6 and is 4"), (x.flip(0), "sha256 was")):
        refuses(lambda other=other: run(out=tmp_path, held_out=other, resume=True), "held_out differs from the one", words)
    assert {k: v[1] for k, v in fingerprint(tmp_path).items()} == {k: v[1] for k, v in before.items()}
    run(out=tmp_path, held_out=x.double(), resume=True)  # the same images
    stop_at(5, tmp_path / "none")
    refuses(lambda: run(out=tmp_path / "none", held_out=x, resume=True), "held_out differs", "number was 0 and is 6")
    class_run(tmp_path / "classes", held_out=(x, torch.arange(6) % 3))
    other = (x, (torch.arange(6) + 1) % 3)
    refuses(lambda: class_run(tmp_path / "classes", held_out=other, resume=True), "held_out differs", "labels was")


def test_a_run_of_before_does_not_say_what_was_held_out(dead):
    for path in (dead / CHECKPOINTS).glob("*.json"):
        facts = {k: v for k, v in json.loads(path.read_text()).items() if k != "held_out"}
        facts["sha256"] = checksum(facts, path.with_suffix(".safetensors").read_bytes())
        path.write_text(json.dumps(facts))
    run(out=dead, held_out=make_data("tensor")[:4], resume=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "sigmoid", None])
def test_a_run_knows_its_schedule_by_name(name, tmp_path):
    schedule = NoiseSchedule(torch.full((N_STEPS,), 0.1)) if name is None else make_schedule(name, N_STEPS)
    config = replace(QUICK, n_iterations=1)
    train(tiny_unet(), schedule, make_data(), config, out=tmp_path / "run", progress=False)
    facts = describe_model(tmp_path / "run")["facts"]
    save_pretrained(tmp_path / "model", tiny_unet(), schedule, n_levels=17)
    assert facts["schedule"] == name and facts == describe_model(tmp_path / "model")["facts"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["facts"]["schedule"]  # as a run of before
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"sha256": checksum(config, (tmp_path / "run" / "model.safetensors").read_bytes())}))
    assert load_pretrained(tmp_path / "run")[1].n_steps == N_STEPS


def test_another_processor_s_last_bits_are_the_same_schedule(dead, undisturbed):
    exact = make_schedule("cosine", N_STEPS).exact_betas
    other = NoiseSchedule(exact * (1 + 1e-15 * torch.arange(N_STEPS, dtype=torch.float64)))
    assert not other.exact_betas.equal(exact)
    train(tiny_unet(), other, make_data(), QUICK, out=dead, resume=True, progress=False)
    schedule = make_schedule("cosine", N_STEPS + 1)
    refuses(lambda: train(tiny_unet(), schedule, make_data(), QUICK, out=dead, resume=True), "schedule differs")


TAKES = """
import os, sys, time
sys.path[:0] = sys.argv[2:]
from training_helpers import run, at

def wait(trainer):
    print("trains", flush=True)
    time.sleep(60)

run(out=sys.argv[1], callback=at(3, act=wait))
"""


@pytest.mark.skipif(os.name != "posix", reason="locks of a folder")
def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch, undisturbed):
    out, here = tmp_path / "run", os.path.dirname(__file__)
    words = [sys.executable, "-c", TAKES, str(out), here]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "trains\n"
            before = fingerprint(out)
            with monkeypatch.context() as patch:
                patch.setattr(runs, "_hold", partial(runs._hold, waits=(0,)))
                refuses(lambda: run(out=out, resume=True), "is in use: another process trains in it", error=FileExistsError)
            assert fingerprint(out) == before
        finally:
            process.kill()
    run(out=out, resume=True)  # a killed process holds nothing
    assert_same_run(out, undisturbed[0])


def test_a_folder_is_free_after_a_run_however_it_ended(tmp_path):
    stop_at(3, tmp_path)
    run(out=tmp_path, resume=True)
    runs._release(runs._hold(tmp_path, waits=(0,)))
    assert leftovers(tmp_path) == []


def test_a_network_of_another_precision_is_another_network():
    """Weights that are kept in float32 would be cast without a word."""
    tensors, facts = trainer_state(make_trainer())
    words = "dtype was 'torch.float32' and is 'torch.float64'"
    refuses(lambda: load_trainer_state(make_trainer(model=tiny_unet().double()), tensors, facts), "the network differs", words)
    facts["network"].pop("dtype")  # of before
    load_trainer_state(make_trainer(), tensors, facts)


@pytest.mark.parametrize("line", ["3", "[]", '{"loss": 1}', "null", '{"step": "x"}'])
def test_lines_that_are_none_end_a_log(line, tmp_path):
    (tmp_path / LOG_FILE).write_bytes(b'{"step": 1, "losses": [1.0]}\n' + line.encode() + b"\n\xff\xfe\n")
    assert read_log(tmp_path / LOG_FILE, 5) == [{"step": 1, "losses": [1.0]}]


# signals in several processes


class Two(OneProcess):
    """Be one of two processes, which were sent different signals or none."""

    def __init__(self, other=0):
        self.n, self.other, self.asked = 2, other, 0

    def gather(self, value):
        self.asked += 1
        return [value, self.other]


@pytest.mark.parametrize(("own", "other"), [(0, 0), (signal.SIGTERM, 0), (0, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_processes_stop_at_the_same_line_of_the_log(own, other):
    """Neither stops alone, where the others would wait for it: all ask all, at the lines only, and the answer is one."""
    for received, told in ((own, other), (other, own)):  # as either of both sees it
        stop, processes = StopSignals(), Two(told)
        stop.received = [received] if received else []
        stopped = []
        for step in range(1, 9):
            trainer = SimpleNamespace(processes=processes, config=SimpleNamespace(log_every=4), n_steps=step, stop=None)
            stop.step(trainer, None, None)
            stopped.append(trainer.stop)
        wanted = max(own, other) or None
        assert stopped == [None, None, None, wanted, None, None, None, wanted] and processes.asked == 2
        assert stop.n_steps == 8


def test_a_checkpoint_whose_score_is_no_number_is_not_the_best(tmp_path):
    """A comparison with NaN is always false, so that its checkpoint would stay for ever."""
    first = save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {"step": 1, "score": 0.1}, keep=1)
    first.write_text(first.read_text().replace("0.1", "NaN"))
    for step, score in ((2, 0.5), (3, 0.6), (4, 0.7)):
        save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {"step": step, "score": score}, keep=1)
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.json")) == ["2", "4"]
