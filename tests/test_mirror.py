"""Runs at an address: pushed in an order that can always be used, pulled without what is not finished, held by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from robustlens.results import lease, mirror
from robustlens.results.errors import InputError, RunInUse
from robustlens.results.lease import Lease
from robustlens.results.mirror import Mirror, Place, connect, fetched, is_remote, scratch
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory, find_runs
from robustlens.studies.config import make_study
from robustlens.studies.run import run_study
from robustlens.studies.watch import SilentStudy

SETTINGS: dict[str, Any] = {
    "name": "s",
    "data": {"source": "digits", "classes": [0, 1], "train": 60, "valid": 20, "test": 30},
    "model": "logistic",
    "threat": "linf:0.1",
    "methods": [{"label": "plain"}, {"label": "tuned", "start": "plain"}],
    "training": {"epochs": 3, "batch_size": 20},
    "validation": {"name": "fgsm"},
    "lenses": [{"name": "accuracy", "pictures": 0}],
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A store in a directory; nothing of it is known to this process before or after."""
    scratch.cache_clear()
    yield connect(f"file://{tmp_path}/store")
    scratch.cache_clear()


def there(place: Place) -> set[str]:
    found = Path(place.root).rglob("*")
    return {path.relative_to(place.root).as_posix() for path in found if path.is_file() and "lock-" not in path.name}


class Stop(SilentStudy):
    """Interrupts after an epoch, and remembers which there were."""

    def __init__(self, epoch: int = 0) -> None:
        self.stop, self.epochs = epoch, []

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.epochs.append(record["epoch"])
        if record["epoch"] == self.stop:
            raise KeyboardInterrupt


def test_addresses_are_not_paths() -> None:
    assert is_remote("s3://bucket/runs") and not is_remote("runs") and not is_remote(Path("a/b"))


def test_a_study_at_an_address_is_that_of_a_directory(place: Place, tmp_path: Path) -> None:
    study = make_study(SETTINGS)
    local = run_study(study, tmp_path / "local", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run_study(study, place.url, device="cpu", watch=Stop(2))
    assert not (Path(place.root) / "s").is_symlink() and any("state.safetensors" in name for name in there(place))
    scratch.cache_clear()
    watch = Stop()
    remote = run_study(study, place.url, device="cpu", watch=watch)
    assert watch.epochs == [3, 1, 2, 3], "what was finished was trained again"
    pulled = find_runs(fetched([place.url]))
    assert len(pulled) == len(remote) == len(local) == 2
    for mine, here, far in zip(local, remote, sorted(pulled, key=lambda run: run.path), strict=True):
        for name in ("last.safetensors", "best.safetensors"):
            bits = (mine.path / name).read_bytes()
            assert (
                (here.path / name).read_bytes() == (Path(place.root) / "s" / mine.path.name / name).read_bytes() == bits
            )
        assert [r.quantities for r in mine.readings()] == [r.quantities for r in far.readings()]
    assert {name.rpartition("/")[2] for name in there(place) if "readings" not in name} == {
        *("run.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "study.log"),
    }


def test_files_are_pushed_in_an_order_that_can_be_used(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    order: list[str] = []
    push = Place.push
    monkeypatch.setattr(
        Place, "push", lambda self, local, names: [order.append(n) or push(self, local, [n]) for n in names]
    )
    with run.lock(), Mirror(place, run.path) as held:
        for name in ("run.json", "state.safetensors", "last.safetensors", "metrics.jsonl", "state/lens/chunk"):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text(name)
        run.write_reading(run.path / "readings/a-1", Reading("a", "says", examples={"x": [1.0]}))
        (run.path / ".tmp-1").write_text("half")
        held.push()
        assert order[-3:] == ["readings/a-1/reading.json", "state.safetensors", "run.json"]
        assert set(order[:-3]) == {
            *("last.safetensors", "metrics.jsonl", "state/lens/chunk", "readings/a-1/examples.parquet")
        }
        order.clear()
        held.push()
        assert order == []
        (run.path / "state.safetensors").unlink()
        shutil.rmtree(run.path / "state")
        (run.path / "last.safetensors").unlink()
        (run.path / "run.json").write_text("finished")
    assert order == ["run.json"]
    assert there(place) == {*("run.json", "last.safetensors", "metrics.jsonl")} | {
        f"readings/a-1/{name}" for name in ("reading.json", "examples.parquet")
    }


def test_a_reading_without_its_json_does_not_exist(place: Place, tmp_path: Path) -> None:
    for name in ("run.json", "readings/a-1/panel-0.parquet", "epoch-1/readings/b-1/reading.json", "lock-3"):
        (Path(place.root) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(place.root) / name).write_text("")
    place.pull(tmp_path / "here")
    found = {path.name for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert found == {"run.json", "reading.json"}


def test_a_lease_is_one_processs_until_it_is_given_back_or_stale(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Lease(place.fs, place.root), Lease(place.fs, place.root)
    first.take()
    with pytest.raises(RunInUse, match=r"one held by process \d+ on .* which gave a sign of life 0 seconds ago"):
        second.take()
    first.confirm()
    monkeypatch.setattr(lease, "STALE", 0.0)
    second.take()
    with pytest.raises(RunInUse, match="took over"):
        first.confirm()
    monkeypatch.undo()
    first.give_back()
    with pytest.raises(RunInUse):
        Lease(place.fs, place.root).take()
    second.give_back()
    third = Lease(place.fs, place.root)
    third.take()
    third.give_back()


def test_a_lease_is_renewed_while_nothing_is_pushed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW", 0.05)
    held = Lease(place.fs, place.root)
    held.take()
    written = place.fs.modified(f"{place.root}/lock-1")
    held._ended.wait(0.5)
    assert place.fs.modified(f"{place.root}/lock-1") > written
    held.give_back()


def test_a_run_that_was_taken_over_is_not_written_to(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    other = Lease(place.fs, place.root)

    def work() -> None:
        with Mirror(place, tmp_path / "run") as held:
            monkeypatch.setattr(lease, "STALE", 0.0)
            other.take()
            (tmp_path / "run/run.json").write_text("late")
            held.push()

    with pytest.raises(RunInUse, match="took over"):
        work()
    other.give_back()
    assert there(place) == set()


def test_new_checkpoints_are_looked_for_now_and_then(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    with Mirror(place, tmp_path / "run") as held:
        for name in ("a", "b"):
            (tmp_path / "run" / name).write_text(name)
            held.push_now_and_then()
        assert there(place) == {"a"}
        monkeypatch.setattr(mirror, "LOOK", 0.0)
        held.push_now_and_then()
        assert there(place) == {"a", "b"}


def test_addresses_that_nobody_knows() -> None:
    with pytest.raises(InputError, match=r"place nonsense://x: expected one that fsspec reaches.*s3://"):
        connect("nonsense://x")


def test_commands_that_know_no_addresses_refuse_them(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["reproduce", "004-table1"], ["claims"], ["audit", "mlp", "--data", "digits", "--threat", "l2:1"]):
        code, _, err = call(*command, "--out", "s3://bucket/runs")
        assert code == 2 and err.startswith("error: --out: expected a directory, got s3:/bucket/runs."), err
    assert list(tmp_path.iterdir()) == []
