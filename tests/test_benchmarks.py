"""Every benchmark runs and says what it measured; no time is tested."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, NETWORKS, needs

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import bf16, crafting, harness, memory, methods, peers, published, step, variants
from benchmarks.workload import WORKLOADS, Plan
from robustlens.core.passes import Passes

TINY = Plan(rounds=2, steps=2, epochs=1, seeds=1, examples=60, tiny=True)


def check(rows: list[harness.Row], name: str, *, ratios: int) -> None:
    assert all(row.benchmark == name for row in rows)
    timed = [row for row in rows if row.ratio is not None]
    assert len(timed) == ratios
    for row in timed:
        assert row.low is not None and row.high is not None
        assert 0 < row.low <= row.ratio <= row.high
        assert row.n >= 1 and row.model and row.case and row.measured
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False))


@pytest.mark.parametrize(("benchmark_", "bar"), [(crafting, 1.05), (step, 1.10)])
def test_times_against_a_floor(benchmark_, bar):
    rows = benchmark_.run(TINY)
    check(rows, benchmark_.__name__.rpartition(".")[2], ratios=4)
    assert {row.bar for row in rows} == {bar}
    assert {"seconds", "floor_seconds", "ratios", "batch", "steps", "shape"} <= rows[0].measured.keys()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp calls it
def test_methods_against_the_passes_they_count():
    rows = methods.run(dataclasses.replace(TINY, models=("mnist-cnn",)))
    check(rows, "methods", ratios=len(methods.METHODS))
    assert {(row.model, row.bar) for row in rows} == {("mnist-cnn", 1.15), ("lenet-small", 1.15), ("logistic", 1.15)}
    passes = {row.case: row.note for row in rows}
    assert passes["PGD-10"] == "10 input + 1 weight" and passes["AWP + PGD-10"] == "10 input + 2 weight"


def test_a_double_pass_is_not_counted_twice():
    seconds = {"weights": [1.0, 2.0], "double": [3.0, 5.0], "optimizer": [0.1, 0.2], "inputs": [0.5, 0.5]}
    found = methods.floor(Passes(weights=2, double=1, inputs=1), 1, seconds)
    assert found == pytest.approx([1 + 3 + 0.5 + 0.1, 2 + 5 + 0.5 + 0.2])


def test_bf16_says_what_it_costs_in_robustness():
    *timed, accuracy = bf16.run(dataclasses.replace(TINY, models=("mnist-cnn",)))
    check(timed, "bf16", ratios=2)
    bar = 0.65 if harness.native_bf16(TINY.device) else None
    assert all(row.bar == bar and (bar is not None or "emulated" in row.note) for row in timed)
    assert accuracy.measured["wilson"].keys() == {"float32", "bf16-craft"}
    assert accuracy.measured["examples"] == 60
    assert {"difference", "difference_interval", "within_noise", "per_seed"} <= accuracy.measured.keys()


@pytest.mark.parametrize(
    ("float32", "half", "within"), [(0.9, 0.9, True), (0.9, 0.5, False), (0.1, 0.1, None), (0.0, 0.0, None)]
)
def test_two_networks_that_learned_nothing_are_not_alike(monkeypatch, float32, half, within):
    share = {"float32": float32, "bf16-craft": half}
    monkeypatch.setattr(
        bf16, "robust_examples", lambda plan, splits, precision, seed: np.arange(100) < 100 * share[precision]
    )
    assert bf16.accuracies(TINY).measured["within_noise"] is within


def test_memory_of_a_step():
    rows = memory.run(TINY)
    check(rows, "memory", ratios=4)
    assert all(row.measured["bytes"] > 10_000 and row.bar == 1.2 for row in rows)


def test_memory_does_not_remember_earlier_recordings():
    work = TINY.workloads()[0]
    assert memory.traced(work, TINY, None) == memory.traced(work, TINY, None)
    assert memory.peak_alive([(3, 2, 50), (1, 1, 100), (2, 1, -100), (4, 9, -7), (5, 1, 60)]) == 110


def test_memory_seen_from_outside_holds_the_tensors():
    work = WORKLOADS["mnist-cnn"]
    ballast = torch.ones(2**27)  # 512 MiB here must not hide the growth of the process that is measured
    assert memory.resident(work, TINY, None) > memory.traced(work, TINY, None) > 32 * 26 * 26 * 4 * work.batch
    del ballast


def test_peers_are_optional(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", ("a_package_that_nobody_has",))
    (row,) = peers.run(TINY)
    assert "not installed" in row.note and row.ratio is None


def test_what_an_attack_leaves_beside_one_that_does_nothing(monkeypatch):
    monkeypatch.setattr(peers, "MAKERS", {"idle": lambda bench, threat: lambda: bench.batch.x})
    monkeypatch.setattr(peers, "RADII", ("linf:0.5", "l2:9"))
    rows = list(peers.strength(TINY, ["idle"]))
    cases = [row.case.partition(",")[0] for row in rows]
    assert cases == ["PGD-2 ℓ∞ 0.5", "PGD-10 ℓ∞ 0.5", "PGD-2 ℓ2 9", "PGD-10 ℓ2 9"]
    assert json.dumps([dataclasses.asdict(row) | {"met": row.met} for row in rows]), "plain values, to be kept"
    assert all(row.low <= row.ratio <= row.high and row.ratio <= 1 and row.n == 8 for row in rows)


def test_variants():
    rows = variants.run(dataclasses.replace(TINY, models=("resnet18",)))
    check(rows, "variants", ratios=len(variants.CPU))
    assert all(row.measured["tflops"] > 0 for row in rows)


def test_the_command_keeps_the_numbers_with_their_machine(tmp_path, monkeypatch, capsys):
    rows = [
        harness.Row(benchmark="step", model="m", case="c", ratio=2.0, low=1.0, high=3.0, n=3, bar=1.1),
        harness.Row(benchmark="step", model="m", case="d", note="not installed"),
    ]
    monkeypatch.setattr(step, "run", lambda plan: rows)
    (tmp_path / "scaling.json").write_text("{}")  # another command's
    assert command.main(["step", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    assert "MISSED" in capsys.readouterr().out
    record = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["met"] for row in record["rows"]] == [False, None]
    assert {"cpu", "cpu_flags", "threads", "torch", "native_bf16", "commit"} <= record["facts"].keys()
    assert "| m | c | 2.000 | 1.000 to 3.000 | ≤ 1.10 | MISSED |" in (tmp_path / "table.md").read_text()


def test_rounds_are_interleaved_and_ratios_taken_inside_them():
    calls: list[str] = []
    cases = [harness.Case(name, lambda name=name: calls.append(name)) for name in "ab"]
    seconds = harness.interleave(cases, rounds=2, device=TINY.device)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert [len(values) for values in seconds.values()] == [2, 2]
    found = harness.compare([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (found["ratio"], found["low"], found["high"]) == (3.0, 2.0, 4.0)


@needs(DATA / "mnist", NETWORKS)
def test_published_networks_are_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "OUT", tmp_path / "published.json")
    monkeypatch.setattr(published, "NETWORKS", ("lcr",))
    monkeypatch.setattr(published, "IMAGES", 6)
    monkeypatch.setattr(published, "ATTACK", dataclasses.replace(published.ATTACK, steps=2))
    assert published.main([str(NETWORKS)]) == 0
    record = json.loads(published.OUT.read_text())["lcr"]
    assert record["quantities"]["robust accuracy"][3] == 6 and record["status"] in ("ok", "unreliable")
    monkeypatch.setattr(published, "judge", None)
    assert published.main([str(NETWORKS)]) == 0
