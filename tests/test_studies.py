"""The benchmark: variants do the same work, workers answer as they should, and the stored results are complete."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from ddpm_nb.results import read_results

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "studies"))
bench, peers = pytest.importorskip("bench"), pytest.importorskip("peers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    return read_results("performance-cpu")


def case(precision="float32"):
    return peers.Case("digits", 8, precision, CPU)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_everyone_has_a_turn_in_every_round_and_no_place_is_fixed(n):
    orders = [bench.turns(n, i) for i in range(2 * n)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert {order[0] for order in orders} == set(range(n))


def test_rounds_that_warm_up_are_left_out():
    count = iter(range(100))
    answers = bench.take_turns([lambda: next(count)] * 2, 3, warmup=1)
    assert sorted(x for part in answers for x in part) == [2, 3, 4, 5, 6, 7] and all(len(a) == 3 for a in answers)


def test_summary_is_in_milliseconds_for_one_operation():
    answers = [{"wall": s, "cpu": 2 * s, "n": 4, "peak_bytes": 10 * s} for s in (0.4, 0.8, 40.0)]
    found = bench.summary(answers)
    assert found["wall"]["median"] == 200 and found["cpu"]["median"] == 400 and found["wall"]["rounds"] == [100, 200, 10_000]
    assert found["peak_bytes"] == 400


def test_workers_train_and_sample(tmp_path):
    with open(tmp_path / "log", "w") as log:
        args = argparse.Namespace(device="cpu", threads=1, log=log, rounds=2)
        some = [{"library": name, "precision": "float32"} for name in ("ddpm_nb", "diffusers")]
        rows = bench.measure(args, some, {"do": "train", "batch": 4, "n": 1}, network="digits", size=8)
        rows += bench.measure(args, some, {"do": "chain", "batch": 4, "n_steps": 50, "piece": 25}, warmup=0, network="digits", size=8)
    assert len({row["parameters"] for row in rows}) == 1  # the same network
    for row in rows:
        assert len(row["wall"]["rounds"]) == 2 and min(row["wall"]["rounds"]) > 0
        assert row["peak_bytes"] >= row["base_bytes"] > 0


def test_a_worker_that_dies_is_told(tmp_path):
    with open(tmp_path / "log", "w") as log, pytest.raises(RuntimeError, match=r"ended with code 1; see .*bench\.log"):
        bench.Worker(argparse.Namespace(device="cpu", threads=1, log=log), library="nobody", precision="float32", network="digits")


def test_ours_and_diffusers_are_one_function():
    from ddpm_nb.convert import unet_from_diffusers

    theirs, x, t = peers.Diffusers(case()), torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    ours, _ = unet_from_diffusers(theirs.network)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs.network(x, t).sample, rtol=1e-4, atol=1e-5)
    made = peers.Ours(case()).network
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


@pytest.mark.parametrize("means", ["attention by matmul", "joined weights", "joined projections"])
def test_a_network_without_a_means_is_the_same_function(means):
    network, x, t = peers.Ours(case()).network, torch.randn(8, 1, 8, 8), torch.arange(3, 803, 100)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    with torch.no_grad():
        fast = network(x, t)
        with peers.replaced([means]):
            plain = network(x, t)
        again = network(x, t)
    assert not torch.equal(fast, plain) and torch.equal(fast, again)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_a_step_without_the_fused_optimiser_has_an_optimiser_of_its_own():
    ours, images = peers.Ours(case()), torch.rand(4, 1, 8, 8) * 2 - 1
    ours.step(images)
    ours.step(images, without=list(peers.WITHOUT))
    fused, unfused = (ours.trainers[fused].optimizer for fused in (True, False))
    groups = [optimizer.param_groups[0] for optimizer in (fused, unfused)]
    assert [group["fused"] for group in groups] == [True, False] and groups[1]["foreach"] is False


@pytest.mark.parametrize("name", ["denoising-diffusion-pytorch", "labml-nn"])
def test_other_peers_train_and_sample(name):
    pytest.importorskip({"labml-nn": "labml_nn", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}[name])
    peer, images = peers.LIBRARIES[name](case()), torch.rand(4, 1, 8, 8) * 2 - 1
    before = [p.clone() for p in peer.network.parameters()]
    peer.step(images)
    assert any(not torch.equal(a, b) for a, b in zip(before, peer.network.parameters(), strict=True))
    assert peer.draw(2, 5).shape == (2, 1, 8, 8)


def numbers(value):
    """Yield all numbers of nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_stored_results_are_complete(measured):
    assert set(measured) == set(bench.ROWS)
    for name, part in measured.items():
        facts = part["facts"]
        assert facts["rounds"] >= 5 and facts["threads"] >= 1 and facts["minutes"] >= 0 and facts["machine"]["processor"], name
        assert set(facts["versions"]) == set(bench.PACKAGES), name
        assert part["rows"] and all(math.isfinite(x) and x >= 0 for x in numbers(part["rows"])), name
    for name in ("train", "sample", "growth"):
        assert {row["library"] for row in measured[name]["rows"]} == set(bench.LIBRARIES)
        for row in measured[name]["rows"]:
            rounds = row["wall"]["rounds"]
            assert len(rounds) >= 5 and min(rounds) <= row["wall"]["median"] <= max(rounds)
            assert row["parameters"] > 1e5 and row["flops"] > 1e6


def test_stored_rows_compare_equal_networks(measured):
    for row in measured["train"]["rows"]:
        ours = next(r for r in measured["train"]["rows"] if r["library"] == "ddpm_nb" and r["network"] == row["network"])
        if row["library"] == "diffusers":
            assert row["parameters"] == ours["parameters"]
        assert 0.75 < row["flops"] / ours["flops"] < 1.25


def test_stored_results_name_no_path(measured):
    text = json.dumps(measured)
    assert "/home" not in text and "/tmp" not in text and "/root" not in text and "/work" not in text
