"""The processes as the trainer sees them: shares, refusals; `test_scaling.py` starts real ones."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from training_helpers import QUICK, all_equal, make_data, make_trainer, run, tiny_unet

from conftest import refuses
from ddpm_nb import processes
from ddpm_nb.processes import Processes
from ddpm_nb.schedules import make_schedule
from ddpm_nb.training import OneProcess, Trainer


class OneOfMany(OneProcess):
    """Claim to be one of several processes."""

    def __init__(self, rank, n):
        self.rank, self.n = rank, n

    def share(self, values):
        return Processes.share(self, values)


@pytest.mark.parametrize("n", [2, 4])
def test_processes_draw_for_the_whole_batch_and_keep_their_share(n):
    x = make_data("tensor")[:8]
    t, losses = make_trainer(model=tiny_unet(dropout=0.0)).step(x)
    parts = []
    for rank, share in enumerate(x.chunk(n)):
        trainer = Trainer(tiny_unet(dropout=0.0), make_schedule("cosine", 20), QUICK, OneOfMany(rank, n))
        parts.append(trainer.step(share))
        assert trainer.noise.get_state().equal(make_trainer_noise_after(x))
    assert t.equal(torch.cat([part for part, _ in parts]))
    torch.testing.assert_close(losses, torch.cat([part for _, part in parts]))


def make_trainer_noise_after(x):
    """Return where the stream of noise is after one step of one process."""
    trainer = make_trainer()
    trainer.step(x)
    return trainer.noise.get_state()


def test_gradients_of_the_first_parts_are_held_back_from_the_forward_pass_on():
    """PyTorch decides in the forward pass whether the backward pass will average over the processes."""
    held, seen = [], []

    class Holding(OneProcess):
        @contextmanager
        def hold_back(self, model):
            held.append(model)
            yield
            held.pop()

    trainer = Trainer(tiny_unet(), make_schedule("cosine", 20), replace(QUICK, n_accumulate=4), Holding())
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append(bool(held)))
    trainer.step(make_data("tensor")[:8])
    assert seen == [True, True, True, False] and not held


def test_dropout_differs_between_processes():
    states = []
    for rank in (0, 1):
        Trainer(tiny_unet(), make_schedule("cosine", 20), QUICK, OneOfMany(rank, 2))
        states.append(torch.get_rng_state())
    assert not states[0].equal(states[1])


def test_alone_it_is_one_process_and_leaves_no_trace():
    PartialState._reset_state()
    alone = Processes("cpu")
    assert (alone.rank, alone.n, alone.is_main, alone.device.type) == (0, 1, True, "cpu")
    whole, again = run(), run(processes=alone)
    assert again.losses.equal(whole.losses) and all_equal(again.ema.parameters(), whole.ema.parameters())
    assert not PartialState._shared_state
    model = tiny_unet()
    assert alone.wrap(model) is model and alone.gather(3) == [3] and alone.mean(torch.ones(2)).tolist() == [1, 1]
    assert {name for name in dir(OneProcess) if name[0] != "_"} <= set(dir(alone)), "whatever the trainer may ask"


def test_sharded_training_is_refused(monkeypatch):
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        words = f"Accelerate is set to {kind}, which is not supported"
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{kind}", "true")
            refuses(lambda: Processes("cpu"), words)
        with monkeypatch.context() as patch:  # known only once the processes have met
            patch.setenv("WORLD_SIZE", "2")
            state = SimpleNamespace(device=torch.device("cpu"), process_index=0, distributed_type=SimpleNamespace(value=kind))
            patch.setattr(processes, "PartialState", lambda cpu, state=state: state)
            refuses(lambda: Processes("cpu"), words)


def test_a_network_that_is_elsewhere_is_refused_in_words(tmp_path, monkeypatch):
    """Alone it would train where it is, with no word of the GPU; of several, torch would speak of its own arguments."""
    words = "model must be on the processes' device, cuda; it is on cpu"
    refuses(lambda: run(processes=Processes("cuda"), out=tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()
    second = Processes("cuda")
    second.device, second.n = torch.device("cuda", 1), 2
    refuses(lambda: second.wrap(tiny_unet()), "the processes' device, cuda:1; it is on cpu")
    on_meta = tiny_unet().to("meta")
    refuses(lambda: Processes("cpu").wrap(on_meta), "the processes' device, cpu; it is on meta")
