"""The run directory: readings survive, files are whole or absent, one process at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robustlens.results import store
from robustlens.results.errors import InputError, RunInUse
from robustlens.results.panels import PANELS, Curve, Gallery, Heatmap, Histogram, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading, spelled
from robustlens.results.store import RunDirectory, digest, find_runs, read_reading, write_atomically

PICTURES = np.random.default_rng(0).integers(0, 256, size=(2, 3, 4, 5, 3), dtype=np.uint8)
GRID = np.array([[1 / 3, -2.5e-300, 7.0], [0.0, np.inf, -0.0]])


def panels() -> tuple[Panel, ...]:
    x = np.array([0.0, 0.1, 1 / 3])
    return (
        Curve(
            "robust accuracy",
            "ε",
            "share",
            (Series("test", x, 1 - x, x / 2, x / 3), Series("train, “all”", x[:2], x[:2])),
            (0.0, 1.0),
            True,
        ),
        Histogram("margins", "M", np.array([-1.0, 0.5, 2.0]), {"train": np.array([3.0, 4.0]), "test": np.zeros(2)}),
        Heatmap("plane", "a", "b", np.array([0.0, 1.0, 2.0]), np.array([5.0, 6.0]), GRID),
        Table("per class", ("class", "n", "note"), (("a", 3.0, None), ("b", 0.1 + 0.2, "ℓ∞ <b>"))),
        Gallery("pictures", ("clean", "adversarial", "difference"), ("3 → 5", "4 → 9"), PICTURES),
    )


def full_reading() -> Reading:
    return Reading(
        lens="made-up",
        says="Everything „is“ here.",
        outcome=Outcome.unreliable("A sentence."),
        quantities=(
            Quantity("a", 1 / 3, "%", 0.1, 0.5, 100, 1e-9, "upper bound"),
            Quantity("b", float("inf")),
        ),
        headline=("a",),
        panels=panels(),
        settings={"threat": "l2:1.5", "radii": [0.0, 0.1], "deep": {"x": None}},
    )


def test_every_kind_of_panel_survives(tmp_path: Path) -> None:
    run, reading = RunDirectory(tmp_path / "run"), full_reading()
    assert {type(p) for p in reading.panels} == set(PANELS.values())
    path = run.reading_path(reading.lens, reading.settings)
    run.write_reading(path, reading)
    (back,) = run.readings()
    for name in ("lens", "says", "outcome", "quantities", "headline", "settings"):
        assert getattr(back, name) == getattr(reading, name), name
    for old, new in zip(reading.panels, back.panels, strict=True):
        assert type(new) is type(old) and new.title == old.title
        assert new.facts() == old.facts()
        assert dict(new.columns()) == dict(old.columns())
    curve, histogram, heatmap, table, gallery = back.panels
    assert isinstance(curve, Curve) and isinstance(histogram, Histogram) and isinstance(heatmap, Heatmap)
    assert isinstance(table, Table) and isinstance(gallery, Gallery)
    assert curve.series[1].low is None and curve.series[0].low is not None
    assert curve.series[0].y.tobytes() == (1 - curve.series[0].x).tobytes()
    assert histogram.counts["train"].tolist() == [3, 4]
    assert heatmap.z.tobytes() == GRID.tobytes()
    assert table.rows[1] == ("b", 0.30000000000000004, "ℓ∞ <b>")
    assert np.array_equal(gallery.images, PICTURES)


def test_a_reading_is_replaced_whole(tmp_path: Path) -> None:
    run, reading = RunDirectory(tmp_path), full_reading()
    path = run.reading_path("made-up", {})
    run.write_reading(path, reading)
    run.write_reading(path, Reading("made-up", "Less."))
    assert read_reading(path) == Reading("made-up", "Less.")
    assert [file.name for file in path.iterdir()] == ["reading.json"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_reading_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    path = run.reading_path("made-up", {})
    run.write_reading(path, Reading("made-up", "Old."))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.pq, "write_table", full)
    with pytest.raises(InputError, match="No space left"):
        run.write_reading(path, full_reading())
    assert read_reading(path).says == "Old."
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_error_in_the_middle_of_a_write_keeps_the_old_file(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_atomically(file, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(InputError, match=r"free space.*No space left"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_an_interrupt_in_the_middle_of_a_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_atomically(file, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"] and file.read_bytes() == b"old"


HOLD = """
import sys
from robustlens.results.store import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"one held by process {holder.pid}") as caught, run.lock():
            pass
        assert caught.value.exit_code == 2
        holder.kill()  # not even a killed process leaves the directory locked
        holder.wait()
    with run.lock():
        assert (run.path / "lock").read_text() == f"process {os.getpid()}"
        with pytest.raises(RunInUse, match=f"process {os.getpid()}"), RunDirectory(run.path).lock():
            pass
    with run.lock():
        pass


@pytest.mark.parametrize("place", ["file/below", "/proc/robustlens"])
def test_places_that_cannot_be_written_to(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / place)
    writes = (
        lambda: run.write_json("run.json", {}),
        lambda: run.write_reading(run.reading_path("a", {}), Reading("a", "")),
        lambda: run.lock().__enter__(),
    )
    for write in writes:
        with pytest.raises(InputError, match="can be written to") as caught:
            write()
        assert caught.value.exit_code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def panel_missing(path: Path) -> None:
    (path / "panel-0.parquet").unlink()


def parquet_cut(path: Path) -> None:
    file = path / "panel-2.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def other_grid(path: Path) -> None:
    (path / "panel-0.parquet").replace(path / "panel-2.parquet")


def rewritten(change: object) -> object:
    return lambda path: (path / "reading.json").write_text(change if isinstance(change, str) else json.dumps(change))


DAMAGES = {
    "gone": lambda path: (path / "reading.json").unlink(),
    "not json": rewritten('{"lens": '),
    "not text": lambda path: (path / "reading.json").write_bytes(b"\xff\xfe{"),
    "a list": rewritten([1, 2]),
    "a number": rewritten(3),
    "nothing in it": rewritten({}),
    "panels of text": rewritten({"lens": "a", "panels": ["x"]}),
    "unknown panel": rewritten({"lens": "a", "panels": [{"kind": "pie", "title": ""}]}),
    "panel file missing": panel_missing,
    "panel file cut": parquet_cut,
    "panel file of another panel": other_grid,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_readings_are_input_errors_of_one_line(damage: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = run.reading_path("made-up", {})
    run.write_reading(path, full_reading())
    DAMAGES[damage](path)
    with pytest.raises(InputError, match=r"expected a reading\.json and its parquet files") as caught:
        read_reading(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_damaged_run_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.metrics() == [] and not run.exists
    run.write_metrics([{"epoch": 1, "loss": 0.1 + 0.2}])
    assert run.metrics() == [{"epoch": 1, "loss": 0.1 + 0.2}]
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        run.metrics()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"readable run\.json"):
        run.read_json("run.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        run.write_json("run.json", {"x": float("nan")})


def test_find_runs(tmp_path: Path) -> None:
    for name in ("study/a", "study/b", "other/c"):
        RunDirectory(tmp_path / name).write_json("run.json", {})
    found = find_runs([tmp_path / "study", tmp_path / "other" / "c"])
    assert [run.path.name for run in found] == ["a", "b", "c"]
    twice = find_runs([tmp_path, tmp_path / "study" / "a", tmp_path / "other" / ".." / "study"])
    assert [run.path.name for run in twice] == ["c", "a", "b"], "a run named twice is one run"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"got none\."):
        find_runs([tmp_path / "study", tmp_path / "empty"])
    with pytest.raises(InputError, match="no such directory"):
        find_runs([tmp_path / "nowhere"])


def test_digest() -> None:
    one = digest({"a": 1, "b": {"c": [1.5, None], "d": "ℓ"}})
    assert one == digest({"b": {"d": "ℓ", "c": [1.5, None]}, "a": 1})
    text = '{"a":1,"b":{"c":[1.5,null],"d":"\\u2113"}}'
    assert one == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert len({one, digest({"a": 2, "b": {"c": [1.5, None], "d": "ℓ"}}), digest({"a": 1}), digest({"a": "1"})}) == 4


@pytest.mark.parametrize(
    ("threat", "words"),
    [
        (f"linf:{8 / 255!r}", "linf:8/255"),
        (f"linf:{0.5 / 255!r}", "linf:0.5/255"),
        (f"linf:{25.5 / 255!r}", "linf:0.1"),
        (f"linf:{51 / 255!r}", "linf:0.2"),
        ("linf:0.0125", "linf:0.0125"),
        ("linf:0.012345678", "linf:0.01235"),
        (f"l2:{128 / 255!r}", "l2:0.502"),
        ("l2:1.0", "l2:1"),
        ("l1:12.0", "l1:12"),
        ("rotations up to 5°", "rotations up to 5°"),
    ],
)
def test_threats_are_spelled_as_people_write_them(threat: str, words: str) -> None:
    assert spelled(threat) == words


def test_examples_of_splits_of_different_size_come_back(tmp_path: Path) -> None:
    kept = {"index, test": np.arange(3), "d, test": np.array([0.5, np.nan, 1]), "index, train": np.arange(2)}
    bits = {"robust": np.array([True]), "index": np.array([7])}
    RunDirectory(tmp_path).write_reading(tmp_path / "r", Reading("lens", "", examples={**kept, **bits}))
    found = read_reading(tmp_path / "r").examples
    for name, values in {**kept, **bits}.items():
        assert found[name].dtype == values.dtype and np.array_equal(
            found[name], values, equal_nan=values.dtype == float
        )
