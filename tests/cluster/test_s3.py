"""Run directories in an object store: a run goes on on another machine, to the bit, and two never work in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_cluster import by_label, same, settings

from robustlens.results import lease
from robustlens.results.errors import InputError, RunInUse
from robustlens.results.lease import Lease
from robustlens.results.mirror import connect, scratch
from robustlens.results.store import RunDirectory
from robustlens.studies.config import make_study
from robustlens.studies.run import run_study
from robustlens.studies.watch import SilentStudy

pytestmark = pytest.mark.cluster

Call = Callable[..., tuple[int, str, str]]


class Log(SilentStudy):
    """Remembers what was new, and interrupts after the epoch ``stop`` of the run ``label``."""

    def __init__(self, label: str = "", stop: int = 0) -> None:
        self.label, self.stop, self.now = label, stop, ""
        self.new: list[str] = []

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        self.now = label

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.new.append(f"{self.now} {record['epoch']}")
        if (self.now, record["epoch"]) == (self.label, self.stop):
            raise KeyboardInterrupt

    def done(self, label: str, what: str, *, already: bool) -> None:
        if not already and what != "training":
            self.new.append(f"{label} {what}")


def objects(url: str) -> set[str]:
    place = connect(url)
    return {name[len(place.root) + 1 :] for name in place.fs.find(place.root)}


def test_an_interrupted_study_goes_on_on_another_machine(
    store: str, here: dict[str, RunDirectory], call: Call, tmp_path: Path
) -> None:
    study, out = make_study(settings("plain", "fast", "tuned")), f"{store}/moves"
    for label, stop in (("plain", 2), ("fast", 1)):
        with pytest.raises(KeyboardInterrupt):
            run_study(study, out, device="cpu", watch=Log(label, stop))
        scratch.cache_clear()  # another machine has another one
    log = Log()
    runs = by_label(run_study(study, out, device="cpu", watch=log))
    assert log.new == ["fast 2", "fast 3", "fast accuracy", "tuned 1", "tuned 2", "tuned 3", "tuned accuracy"]
    for label, run in runs.items():
        same(run, here[label])
        there = {name.partition("/")[2] for name in objects(f"{out}/study") if name.startswith(run.path.name)}
        assert {"run.json", "metrics.jsonl", "last.safetensors", "best.safetensors"} < there
        assert not [name for name in there if name.startswith("state") or ".tmp-" in name or "clock" in name]
    log, text = Log(), connect(out).fs.cat(f"{connect(out).root}/study/study.log").decode()
    assert text.count("plain, seed 0: epoch 1,") == text.count("fast, seed 0: epoch 3,") == 1
    scratch.cache_clear()
    run_study(study, out, device="cpu", watch=log)
    assert log.new == []

    page = tmp_path / "page.html"
    code, said, err = call("report", out, "--out", page)
    assert (code, err) == (0, "") and page.is_file() and "page.html" in said
    paths = [f"{out}/study/{runs[label].path.name}" for label in ("plain", "fast")]
    code, said, err = call("compare", *paths)
    assert (code, err) == (0, "") and "McNemar" in said
    numbers = {path.name for path in scratch(out).rglob("*.safetensors")}
    assert numbers <= {"last.safetensors", "best.safetensors"}


def test_the_weights_of_a_run_come_before_the_run_that_starts_from_it(
    store: str, here: dict[str, RunDirectory]
) -> None:
    out = f"{store}/starts"
    run_study(make_study(settings("plain")), out, device="cpu")
    scratch.cache_clear()
    runs = by_label(run_study(make_study(settings("plain", "tuned")), out, device="cpu"))
    same(runs["tuned"], here["tuned"])


def test_a_run_in_use_names_its_holder_and_a_dead_one_is_taken_over(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = make_study(settings("plain")), f"{store}/locks"
    (run,) = run_study(study, out, device="cpu")
    place = connect(out).below("study").below(run.path.name)
    dead = Lease(place.fs, place.root)
    dead.take()
    dead._ended.set()  # nothing is heard of it any more
    with pytest.raises(RunInUse, match=r"one held by process \d+ on .*, which gave a sign of life \d+ seconds ago"):
        run_study(study, out, device="cpu")
    monkeypatch.setattr(lease, "STALE", 0.0)
    run_study(study, out, device="cpu")
    with pytest.raises(RunInUse, match="took over"):
        dead.confirm()
    dead.give_back()
    monkeypatch.undo()
    run_study(study, out, device="cpu")
    left = [name for name in objects(place.url) if "lock" in name or "clock" in name]
    assert len(left) == 1, "one lock, marked free"


def test_only_one_of_two_takes_a_lease_and_a_retry_takes_its_own(store: str) -> None:
    place = connect(f"{store}/leases/run")
    first, second = Lease(place.fs, place.root), Lease(place.fs, place.root)
    first.take()
    with pytest.raises(RunInUse, match="held by process"):
        second.take()
    second._highest = lambda: (0, {"state": "free", "owner": "", "token": "", "by": ""})  # type: ignore[method-assign]
    with pytest.raises(OSError, match="condition"):  # the store itself refuses the second
        second.take()
    first.give_back()
    first, retry, other = (Lease(place.fs, place.root, owner) for owner in ("task", "task", "other"))
    first.take()
    retry.take()
    with pytest.raises(RunInUse):
        first.confirm()
    first.give_back()
    with pytest.raises(RunInUse):
        other.take()
    retry.give_back()
    other.take()
    other.give_back()


def test_places_that_cannot_be_used(store: str, call: Call) -> None:
    for address in ("s3://no-such-bucket/runs", "nonsense://x"):
        with pytest.raises(InputError, match=f"place {address}.*Check the address and the credentials"):
            run_study(make_study(settings("plain")), address, device="cpu")
    code, _, err = call("report", f"{store}/nothing-here")
    assert code == 2 and err.count("\n") == 1
