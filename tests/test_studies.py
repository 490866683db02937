"""The benchmark: variants do the same work, workers answer as they should, and the stored results are complete."""

import argparse
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import bench
import gpu
import peers
import pytest
import torch

from ddpm_nb.results import read_results

CPU = torch.device("cpu")
STUDIES = Path(bench.__file__).parent


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
        needed = bench.PACKAGES[:1] if name in bench.ALONE else bench.PACKAGES
        assert set(needed) <= set(facts["versions"]) <= set(bench.PACKAGES), name
        assert part["rows"] and all(math.isfinite(x) and x >= 0 for x in numbers(part["rows"])), name
    for name in ("train", "sample", "growth"):
        assert {row["library"] for row in measured[name]["rows"]} == set(bench.LIBRARIES)
        for row in measured[name]["rows"]:
            rounds = row["wall"]["rounds"]
            assert len(rounds) >= 5 and min(rounds) <= row["wall"]["median"] <= max(rounds)
            assert row["parameters"] > 1e5 and row["flops"] > 1e6


def test_a_processor_without_bfloat16_has_the_steps_of_the_small_network():
    other = read_results("performance-cpu-float32")
    assert set(other) == {"peak", "sample", "train"} and len({json.dumps(part["facts"]["machine"]) for part in other.values()}) == 1
    assert other["train"]["facts"]["machine"]["bfloat16 arithmetic"] is False
    for name in ("train", "sample"):
        rows = other[name]["rows"]
        assert {row["library"] for row in rows} == set(bench.LIBRARIES) and {row["precision"] for row in rows} == {"float32"}
        assert all(len(row["wall"]["rounds"]) >= 5 and row["flops"] > 1e6 for row in rows)


def test_stored_rows_are_of_one_machine(measured):
    """Shares of the peak and ratios would be of two machines otherwise."""
    facts = [part["facts"] for part in measured.values()]
    assert len({json.dumps([f["device"], f["threads"], f["machine"]["processor"], f["machine"]["cores"]]) for f in facts}) == 1


def test_the_chains_that_the_page_reads_are_measured_without_an_option(measured, monkeypatch):
    asked = []

    def measure(args, variants, order, **options):
        asked.extend((v["library"], v["precision"], bool(v.get("compiled")), order["n_steps"], order["batch"]) for v in variants)
        return []

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", "x.json"])
    bench.measure_chain(bench.parse()[1])
    rows = measured["chain"]["rows"]
    assert asked == [(r["library"], r["precision"], bool(r.get("compiled")), r["n_steps"], r["batch"]) for r in rows]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Pretend that no peer is installed, and that rows are measured at once; return how to call the benchmark and its file."""
    out = tmp_path / "out.json"

    def version(name):
        if name != "torch":
            raise bench.PackageNotFoundError(name)
        return "2"

    def call(*words):
        monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(out), *words])
        bench.main()
        return json.loads(out.read_text())

    monkeypatch.setattr(bench, "version", version)
    monkeypatch.setattr(bench, "ROWS", {name: lambda args: [{"x": 1}] for name in bench.ROWS})
    monkeypatch.setattr(bench, "HERE", tmp_path)
    return call, out


def test_rows_of_this_package_need_no_peer(alone):
    call, out = alone
    assert call("--rows", "peak", "data")["data"]["facts"]["versions"] == {"torch": "2"}
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        call("--rows", "data", "train")
    assert out.read_bytes() == before  # it says so before anything is measured


@pytest.mark.parametrize(
    ("rows", "changed", "words"),
    [
        (["train"], {"versions": {"torch": "2"}}, "--rows train need diffusers, denoising-diffusion-pytorch"),
        (["chain"], {"rounds": 7}, "--rounds must divide 50 and 1000; got 7"),
        (["data"], {"machine": {"processor": "B", "cores": 2}}, "rows of another machine"),
        (["data"], {"threads": 1}, "rows of another machine"),
    ],
)
def test_rows_that_would_mislead_are_refused(rows, changed, words):
    facts = {"device": "cpu", "threads": 2, "rounds": 5, "machine": {"processor": "A", "cores": 2}}
    facts["versions"] = dict.fromkeys(bench.PACKAGES, "1")
    bench.check_rows(rows, facts, {"peak": {"facts": facts}})
    with pytest.raises(ValueError, match=words):
        bench.check_rows(rows, facts | changed, {"peak": {"facts": facts}})
    bench.check_rows(["peak"], facts | {"threads": 1}, {"peak": {"facts": facts}})  # nothing of the other machine stays


# all studies


@pytest.mark.parametrize("path", [path for path in sorted(STUDIES.glob("*.py")) if "def main(" in path.read_text()], ids=lambda path: path.stem)
def test_a_study_is_told_about_and_does_nothing_by_that(path, monkeypatch, capsys):
    """`--help` of a script that does not know it would begin to measure, and write over what is stored."""
    study = importlib.import_module(path.stem) if path.stem != "worker" else None  # the worker speaks with the benchmark alone
    if study is None or "ArgumentParser" not in path.read_text():
        assert path.stem in ("peak", "quality", "worker")  # called by the benchmark, with all arguments or none
        return
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 0 and path.name in capsys.readouterr().out


# the script for a GPU


def gpu_call(monkeypatch, out, *parts):
    """Run the script with small numbers; return its exit code and its file."""
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--tiny", "--out", str(out), "--parts", *parts])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(ended.value.code), json.loads(out.read_text())


def test_parts_of_the_gpu_keep_each_other_and_the_code_is_that_of_the_call(tmp_path, monkeypatch):
    fail = {"rows": [{"failed": ["x"], "why": "y"}], "peaks": {}}
    measures = {"speed": fail, "network": {"rows": [], "peaks": {}}, "tests": {"code": 5, "tail": []}}
    monkeypatch.setattr(gpu, "MEASURES", {name: lambda args, left, save, found=found: save(found) for name, found in measures.items()})
    out = tmp_path / "gpu.json"
    assert gpu_call(monkeypatch, out, "speed")[0] == 1
    code, found = gpu_call(monkeypatch, out, "network")  # what failed in another call does not count again
    assert code == 0 and found["speed"] == fail and found["network"] == measures["network"]
    assert gpu_call(monkeypatch, out, "tests")[0] == 1  # no test was found
    out.write_text(json.dumps(found | {"machine": {"device": "another"}}))
    assert "speed" not in gpu_call(monkeypatch, out, "network")[1]


@pytest.mark.parametrize(
    ("results", "wrong"),
    [
        ({"tests": {"code": 0}}, False),
        ({"tests": {"code": None}}, True),
        ({"speed": {"rows": [{"cut": []}, {"train seconds": 1}], "peaks": {"float32": {"gflops": 1}}}}, False),
        ({"speed": {"rows": [], "peaks": {"float32": {"failed": ["no memory"]}}}}, True),
        ({"network": {"rows": [{"failed": []}], "peaks": {}}}, True),
        ({"notebooks": {"a": {"failed": []}, "b": "not reached", "c": {"cut": []}}}, False),
        ({"notebooks": {"a": {"died": ["No module"]}}}, True),
    ],
)
def test_what_failed_is_told_by_the_exit_code(results, wrong):
    assert gpu.went_wrong(results) == wrong


def test_a_command_that_is_cut_takes_its_children_along(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    code, told = gpu.run([gpu.sys.executable, "-c", parent], 1)
    assert code is None and told == ["begun"]
    gpu.time.sleep(2)
    assert not mark.exists()
    assert gpu.run([gpu.sys.executable, "-c", "print(1); exit(3)"], 20) == (3, ["1"])


def test_each_row_of_a_gpu_has_its_own_peak_of_memory(monkeypatch):
    """The peak is reset before a network is built; a pretended device notes the order."""
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name: calls.append(name))

    def make(*a, **options):
        calls.append("network")
        raise InterruptedError

    monkeypatch.setattr("ddpm_nb.unet.make_unet", make)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            gpu.steps_of("tiny", "float32", False, 4, SimpleNamespace(type="cuda"), 1)
    assert calls == ["empty_cache", "reset_peak_memory_stats", "network"] * 2


def test_stored_rows_compare_equal_networks(measured):
    for row in measured["train"]["rows"]:
        ours = next(r for r in measured["train"]["rows"] if r["library"] == "ddpm_nb" and r["network"] == row["network"])
        if row["library"] == "diffusers":
            assert row["parameters"] == ours["parameters"]
        assert 0.75 < row["flops"] / ours["flops"] < 1.25


def test_stored_results_name_no_path(measured):
    text = json.dumps(measured)
    assert "/home" not in text and "/tmp" not in text and "/root" not in text and "/work" not in text
