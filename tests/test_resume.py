"""A run that is killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from safetensors.torch import load_file
from small_runs import CASES, EPOCHS, STEPS, Counting, run_case

from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory
from robustlens.train.checkpoint import load_state
from robustlens.train.optimizer import make_optimizer

TOTAL = STEPS * EPOCHS
MOMENTS = ["step:1", "step:3", "step:5", "epoch:1", "best:1", "last:2", "step:8,step:9,step:14", "last:3", "epoch:3"]
CHAINS = [f"{case}={moment}" for case in CASES for moment in MOMENTS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case, uninterrupted."""
    places = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, place in places.items():
        run_case(case, place)
    return places


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each chain, killed with SIGKILL in a process of its own."""
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, small_runs.__file__, str(root), *CHAINS],
        capture_output=True,
        text=True,
        cwd=Path(small_runs.__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


def timeless(place: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(one: Path, other: Path) -> None:
    for file in ("last.safetensors", "best.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert timeless(one) == timeless(other)


def state_steps(place: Path) -> int:
    """Steps that the checkpoint in ``place`` has done, read without the library's loop."""
    if not (place / "state.safetensors").is_file():
        return 0
    model = small_runs.fresh()
    case = place.name.partition("=")[0]
    average = small_runs.fresh() if CASES[case][1].averaging else None
    facts, _ = load_state(
        place / "state.safetensors", model=model, optimizer=make_optimizer(model, CASES[case][1]), average=average
    )
    return int(facts["epoch"] * STEPS + facts["step"])


#: Steps that were safe when the last moment of a chain came (a step is safe once its checkpoint is written).
SAFE = {"step:1": 0, "step:3": 2, "step:5": 4, "epoch:1": 5, "best:1": 4, "last:2": 9, "last:3": 14, "epoch:3": 15}


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_and_resumed_is_uninterrupted(chain: str, whole: dict[str, Path], killed: Path, tmp_path: Path) -> None:
    case, _, moment = chain.partition("=")
    place = tmp_path / chain
    shutil.copytree(killed / chain, place)
    safe = SAFE.get(moment, 13)
    if case == "rmsprop" and moment == "best:1":
        safe = 9  # it validates every second epoch
    assert state_steps(place) == safe
    watch = Counting()
    records = run_case(case, place, watch)
    assert watch.steps == list(range(safe + 1, TOTAL + 1)), "it did not go on from the last checkpoint"
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in records] == timeless(place)
    same(place, whole[case])
    assert not list(place.glob(".tmp-*"))


@pytest.mark.parametrize("stop", range(1, TOTAL + 1))
def test_an_exception_at_any_step(stop: int, whole: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(what: str, number: int) -> None:
        if (what, number) == ("step", stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_case("sgd", tmp_path, Counting(interrupt))
    run_case("sgd", tmp_path)
    same(tmp_path, whole["sgd"])


def test_the_cases_are_not_trivial(whole: dict[str, Path]) -> None:
    """Best differs from last somewhere, every case changes its weights, and cases differ from each other."""
    last = {case: (place / "last.safetensors").read_bytes() for case, place in whole.items()}
    best = {case: (place / "best.safetensors").read_bytes() for case, place in whole.items()}
    assert len(set(last.values())) == len(CASES)
    assert any(last[case] != best[case] for case in CASES)
    start = small_runs.fresh().state_dict()
    for case, place in whole.items():
        weights = load_file(place / "last.safetensors")
        assert not any(weights[name].equal(start[name]) for name in ("conv.weight", "fc.weight", "norm.running_mean"))
        assert all(record["loss"] > 0 for record in timeless(place)), case


def test_a_finished_run_is_left_alone(whole: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "again"
    shutil.copytree(whole["adam"], place)
    before = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    watch = Counting()
    assert len(run_case("adam", place, watch)) == EPOCHS
    assert watch.steps == []
    assert {file.name: file.stat().st_mtime_ns for file in place.iterdir()} == before


@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(damage: str, whole: dict[str, Path], tmp_path: Path) -> None:
    state = (whole["sgd"] / "state.safetensors").read_bytes()
    other = (whole["adam"] / "last.safetensors").read_bytes()
    bad = {"half": state[: len(state) // 2], "empty": b"", "other": other}[damage]
    (tmp_path / "state.safetensors").write_bytes(bad)
    with pytest.raises(InputError, match="Delete the run directory") as caught:
        run_case("sgd", tmp_path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in RunDirectory(tmp_path).path.iterdir()] == ["state.safetensors"]
