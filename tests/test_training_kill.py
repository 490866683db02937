"""Training in real processes: killed at any moment, asked to stop, or out of disk space, no run is lost."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

N_ITERATIONS, EVERY = 8, 4


def work(out, mode="", number=0, after=0, pause=0.0):
    """Train, or go on with, the run in a folder; runs in the processes that are killed."""
    import torch

    from ddpm_nb.data import ImageDataset
    from ddpm_nb.runs import Interrupted, train
    from ddpm_nb.schedules import make_schedule
    from ddpm_nb.training import TrainConfig
    from ddpm_nb.unet import make_unet

    settings = {"n_iterations": N_ITERATIONS, "batch_size": 8, "n_accumulate": 2, "warmup": 2, "ema_decay": 0.9, "precision": "float32"}
    config = TrainConfig(**settings, log_every=2, checkpoint_every=EVERY, keep=1, seed=5)
    levels = torch.randint(0, 17, (37, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageDataset(levels, torch.zeros(37), n_levels=17, classes="0", flip=True)
    torch.manual_seed(1)
    model = make_unet("digits", base_channels=8, channel_mults=(1, 1), attn_resolutions=(), dropout=0.1)

    now = [0]

    def callback(trainer):
        now[0] = trainer.n_steps
        (Path(out).parent / "progress").write_text(str(trainer.n_steps))
        if mode == "limit" and trainer.n_steps == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
        if mode == "twice" and trainer.n_steps == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        time.sleep(pause)

    if mode == "die at file":
        die_at_file_operation(number, lambda: now[0] >= after)
    if mode == "slow":
        slow_writes(number / 1000)
    try:
        train(model, make_schedule("cosine", 20), data, config, out=out, resume=True, callback=callback, progress=False)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal_number)


def die_at_file_operation(number, begun):
    """Kill this process at its n-th change of a file, once it has begun to count; in the middle, if that is a write."""
    count, write, real = [], Path.write_bytes, {name: getattr(os, name) for name in ("replace", "unlink")}

    def due(path):
        if begun() and os.path.basename(path) != "progress" and os.path.exists(path):
            count.append(path)
        return len(count) == number

    def write_bytes(self, content):
        if due(self):
            write(self, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, content)

    def guarded(name):
        def call(path, *args, **kwargs):
            if due(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](path, *args, **kwargs)

        return call

    Path.write_bytes, Path.write_text = write_bytes, lambda self, text, *_: write_bytes(self, text.encode())
    os.replace, os.unlink = guarded("replace"), guarded("unlink")


def slow_writes(seconds):
    """Write every file in two halves with a pause between them."""

    def write_bytes(self, content):
        with open(self, "wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(seconds)
            file.write(content[len(content) // 2 :])

    Path.write_bytes = write_bytes


def serve():
    """Read jobs from standard input, a line of JSON each; run each in a process forked from this one, which has torch loaded."""
    import torch

    import ddpm_nb.runs
    import ddpm_nb.unet  # noqa: F401

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads the rest of torch
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if not (pid := os.fork()):
            error = os.open(job.pop("stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(error, 2)
            os.dup2(error, 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 1
            try:
                work(**job)
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException as error:
                import traceback

                traceback.print_exc()
                code = 130 if type(error) is KeyboardInterrupt else 1
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        work(sys.argv[1])
        sys.exit(0)


def environment():
    import ddpm_nb

    root = str(Path(ddpm_nb.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1"}


class Server:
    """A process that starts training processes."""

    def __init__(self):
        command = [sys.executable, __file__, "serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
        assert self.process.stdout.readline() == "ready\n"

    def start(self, out, **job):
        job |= {"out": str(out), "stderr": str(out.parent / "stderr")}
        (out.parent / "progress").write_text("0")
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def finish(self):
        return int(self.process.stdout.readline())

    def run(self, out, **job):
        self.start(out, **job)
        return self.finish()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert server.run(out) == 0, (out.parent / "stderr").read_text()
    return out


def progress(out):
    return int((out.parent / "progress").read_text() or 0)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def state_of(out):
    from ddpm_nb.hub import load_pretrained
    from ddpm_nb.runs import load_checkpoint, read_log

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, facts = load_checkpoint(out / "checkpoints")
        load_pretrained(out)
    losses = [loss for line in read_log(out / "log.jsonl") for loss in line["losses"]]
    counts = [facts[name] for name in ("step", "skipped", "ema_updates")]
    return tensors, counts, losses, (out / "model.safetensors").read_bytes()


def assert_finished_like(out, other):
    (tensors, counts, losses, weights), (others, other_counts, other_losses, other_weights) = state_of(out), state_of(other)
    assert counts == other_counts == [N_ITERATIONS, 0, N_ITERATIONS]
    assert [name for name, value in others.items() if not value.equal(tensors[name])] == [] and tensors.keys() == others.keys()
    assert losses == other_losses and len(losses) == N_ITERATIONS
    assert weights == other_weights
    assert [p.name for p in out.rglob(".*")] == []
    files = sorted(p.name for p in (out / "checkpoints").iterdir())
    stems = {name.split(".")[0] for name in files}
    assert files == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "safetensors"))
    assert len(stems) <= 2  # the newest and the best


def finish(server, out):
    assert server.run(out) == 0, (out.parent / "stderr").read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(server, undisturbed, tmp_path, seed):
    draw, out, codes = random.Random(seed), tmp_path / "run", []
    for _ in range(4):
        pid = server.start(out, pause=0.02)
        after = progress(out)
        wait_for(lambda after=after: progress(out) != after or (out / "train.json").exists())
        time.sleep(draw.uniform(0, 0.4))
        with suppress(ProcessLookupError):  # it may have come to its end
            os.kill(pid, signal.SIGKILL)
        codes.append(server.finish())
    assert set(codes) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
    finish(server, out)
    assert_finished_like(out, undisturbed)


@pytest.mark.parametrize("which", [1, 2])
def test_killed_while_it_writes_a_checkpoint(server, undisturbed, tmp_path, which):
    """The killer waits for the temporary file of a checkpoint, which is written in two halves."""
    out, before = tmp_path / "run", EVERY * (which - 1)
    folder = out / "checkpoints"
    pid = server.start(out, mode="slow", number=150)

    def half_written():
        names = [p for p in folder.glob(".step-*.safetensors") if f"step-{EVERY * which:08d}" in p.name]
        try:
            return any(p.stat().st_size > 0 for p in names)
        except FileNotFoundError:
            return False

    wait_for(half_written)
    os.kill(pid, signal.SIGKILL)
    assert server.finish() == -signal.SIGKILL
    assert list(folder.glob(".step-*"))  # it was killed in the middle
    assert max(p.stem for p in folder.glob("step-*.json")) == f"step-{before:08d}"
    finish(server, out)
    assert_finished_like(out, undisturbed)


@pytest.mark.parametrize(("after", "numbers"), [(0, range(1, 15, 3)), (EVERY - 1, range(1, 13)), (N_ITERATIONS - 1, range(2, 13, 3))])
def test_killed_at_changes_of_files(server, undisturbed, tmp_path, after, numbers):
    """The writes (after half of them), moves and removals of files at the start, of a checkpoint, and at the end."""
    from ddpm_nb.runs import load_checkpoint

    for number in numbers:
        out = tmp_path / str(number) / "run"
        out.parent.mkdir()
        assert server.run(out, mode="die at file", number=number, after=after) == -signal.SIGKILL
        if (out / "train.json").exists():
            load_checkpoint(out / "checkpoints")  # what can be resumed has an intact checkpoint
        finish(server, out)
        assert_finished_like(out, undisturbed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop(server, undisturbed, tmp_path, name):
    out, number = tmp_path / "run", getattr(signal, name)
    pid = server.start(out, pause=0.1)
    wait_for(lambda: progress(out) >= 1)
    os.kill(pid, number)
    assert server.finish() == 128 + number
    step = progress(out)
    message = (tmp_path / "stderr").read_text()
    assert f"{name} after iteration {step} of {N_ITERATIONS}: saved" in message and f"out={str(out)!r}, resume=True" in message
    assert "Traceback" not in message and step < N_ITERATIONS
    assert max(p.stem for p in (out / "checkpoints").glob("*.json")) == f"step-{step:08d}"
    assert [p.name for p in out.rglob(".*")] == []
    finish(server, out)
    assert_finished_like(out, undisturbed)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", 130)])
def test_a_second_signal_has_its_usual_effect(server, undisturbed, tmp_path, name, code):
    out = tmp_path / "run"
    assert server.run(out, mode="twice", number=getattr(signal, name)) == code
    assert "saved" not in (tmp_path / "stderr").read_text() and progress(out) == 3
    finish(server, out)
    assert_finished_like(out, undisturbed)


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(server, undisturbed, tmp_path):
    """A limit of 150 kB on the size of files stands for the full disk; a checkpoint has 340 kB."""
    from ddpm_nb.runs import load_checkpoint

    out = tmp_path / "run"
    assert server.run(out, mode="limit", number=EVERY + 1) == 1
    message = (tmp_path / "stderr").read_text().strip().splitlines()[-1]
    assert message.startswith("OSError") and "File too large" in message and str(out) in message
    assert [p.name for p in out.rglob(".*")] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(out / "checkpoints")[1]["step"] == EVERY
    finish(server, out)
    assert_finished_like(out, undisturbed)


def test_a_fresh_interpreter_goes_on_as_well(server, undisturbed, tmp_path):
    """The other processes here are forked from one that has loaded torch; this one starts from nothing."""
    out = tmp_path / "run"
    pid = server.start(out, pause=0.1)
    wait_for(lambda: progress(out) >= EVERY + 1)
    os.kill(pid, signal.SIGKILL)
    assert server.finish() == -signal.SIGKILL
    done = subprocess.run([sys.executable, __file__, str(out)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert_finished_like(out, undisturbed)
