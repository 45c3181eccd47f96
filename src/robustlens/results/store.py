"""The run directory: one trained network and its readings, every file written whole or not at all.

Layout of a run directory::

    run.json                     what was run (resolved configuration, hash) and where (provenance)
    metrics.jsonl                one line per epoch
    last.safetensors best.safetensors state.safetensors
    readings/<lens>-<hash>/      reading.json, one parquet file per panel, and examples.parquet where they were kept
    lock                         held while a process works here
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from robustlens.results.errors import InputError, RunInUse, shortened
from robustlens.results.files import parse_json, read_json, read_table, read_text
from robustlens.results.panels import restore
from robustlens.results.reading import Outcome, Quantity, Reading


def digest(settings: Mapping[str, Any], *, length: int = 12) -> str:
    """Hash of plain settings: the address of whatever they define (key order does not matter)."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash, sees the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = str(path.parent / f".tmp-{uuid.uuid4().hex}")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"output {path}",
        expected="a directory that can be written to, with free space",
        got=error.strerror or str(error),
        fix="Choose another directory with --out, or free space; what was finished is kept.",
    )


class RunDirectory:
    """A run's files. Creating the object touches nothing; writing makes the directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; raises RunInUse, naming the holder, if another has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunInUse(
                    f"run directory {self.path}",
                    expected="a directory that no other process works in",
                    got=f"one held by {holder}",
                    fix="Wait for it to end, or choose another directory with --out.",
                ) from error
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
        write_atomically(self.path / name, text.encode())

    def read_json(self, name: str) -> Any:
        """The JSON file ``name``; raises InputError if it is missing or damaged."""
        try:
            return read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"run directory {self.path}",
                expected=f"a readable {name}",
                got=str(error),
                fix="Give the directory of a run that robustlens made, or run it again.",
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The per-epoch records, oldest first."""
        file = self.path / "metrics.jsonl"
        try:
            return [_epoch(parse_json(line)) for line in read_text(file).split("\n") if line] if file.is_file() else []
        except (OSError, ValueError) as error:
            raise InputError(
                f"run directory {self.path}",
                expected="a metrics.jsonl with one JSON object per line",
                got=str(error),
                fix="Delete the run directory and run the study again.",
            ) from error

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.path / "metrics.jsonl", text.encode())

    def reading_path(self, lens: str, settings: Mapping[str, Any]) -> Path:
        return self.path / "readings" / f"{lens}-{digest(settings)}"

    def write_reading(self, path: Path, reading: Reading) -> None:
        """Store ``reading`` as the directory ``path``, which appears complete or not at all."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.parent / f".tmp-{uuid.uuid4().hex}"
            scratch.mkdir()
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            record = {
                "lens": reading.lens,
                "says": reading.says,
                "outcome": asdict(reading.outcome),
                "quantities": [asdict(q) for q in reading.quantities],
                "headline": list(reading.headline),
                "settings": dict(reading.settings),
                "panels": [{"kind": p.kind, "title": p.title, **p.facts()} for p in reading.panels],
            }
            (scratch / "reading.json").write_text(json.dumps(record, indent=2, ensure_ascii=False))
            for i, panel in enumerate(reading.panels):
                columns = panel.columns()
                if columns:
                    pq.write_table(pa.table(dict(columns)), scratch / f"panel-{i}.parquet", compression="zstd")
            if reading.examples:
                pq.write_table(pa.table(dict(reading.examples)), scratch / "examples.parquet", compression="zstd")
            if path.exists():
                shutil.rmtree(path)
            os.replace(scratch, path)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def readings(self) -> list[Reading]:
        """All finished readings, in the order of their names."""
        found = sorted((self.path / "readings").glob("[!.]*/reading.json"))
        return [read_reading(file.parent) for file in found]


class _Record(BaseModel):
    """A reading.json."""

    lens: str
    says: str
    outcome: Outcome
    quantities: tuple[Quantity, ...]
    headline: tuple[str, ...]
    settings: dict[str, Any]
    panels: list[dict[str, Any]]


def _epoch(record: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    if not isinstance(record, dict) or not isinstance(record.get("epoch", 0), int | float):
        raise ValueError(f"no record of an epoch: {shortened(str(record), 80)}")
    return record


def read_reading(path: Path) -> Reading:
    """The reading stored in the directory ``path``; raises InputError if it is damaged."""
    try:
        record = _Record.model_validate(read_json(path / "reading.json"))
        panels = []
        for i, facts in enumerate(record.panels):
            file = path / f"panel-{i}.parquet"
            columns = read_table(file).to_pydict() if file.is_file() else {}
            panels.append(restore(facts, columns))
        kept = path / "examples.parquet"
        table = read_table(kept) if kept.is_file() else pa.table({})
        return Reading(
            lens=record.lens,
            says=record.says,
            outcome=record.outcome,
            quantities=record.quantities,
            headline=record.headline,
            panels=tuple(panels),
            settings=record.settings,
            examples={name: table[name].to_numpy() for name in table.column_names},
        )
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise InputError(
            f"reading {path}",
            expected="a reading.json and its parquet files",
            got=shortened(f"{type(error).__name__}: {error}", 200),
            fix="Delete that directory; the study makes it again.",
        ) from error


def find_runs(places: Sequence[str | Path]) -> list[RunDirectory]:
    """The runs at or below ``places``, each once; raises InputError where there are none."""
    found: list[RunDirectory] = []
    for place in map(Path, places):
        there = os.path.isdir(place)  # unlike pathlib's, false for what no path can be
        here = [place / "run.json"] if there and (place / "run.json").is_file() else []
        files = here or (sorted(place.glob("**/run.json")) if there else [])
        if not files:
            raise InputError(
                f"runs in {place}",
                expected="a run directory, or a directory that holds some",
                got="none" if there else "no such directory",
                fix="Run `robustlens study FILE` or `robustlens demo` first.",
            )
        found += [RunDirectory(file.parent) for file in files]
    return list({run.path.resolve(): run for run in found}.values())
