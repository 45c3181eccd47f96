"""The run directory: one trained network and its readings, every file written whole or not at all.

Layout of a run directory::

    run.json                     what was run (resolved configuration, hash) and where (provenance)
    metrics.jsonl                one line per epoch
    last.safetensors best.safetensors state.safetensors state.previous.safetensors
    readings/<lens>-<hash>/      reading.json, one parquet file per panel, and examples.parquet where they were kept
    lock                         held while a process works here
    .tmp-*                       what a killed process left half written; the next one to hold the lock removes it

``run.json`` and ``reading.json`` hold the SHA-256 of themselves and of the files that belong to them.
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
from numpy.typing import NDArray
from pydantic import BaseModel

from robustlens.results.errors import InputError, RunInUse, shortened
from robustlens.results.files import parse_json, read_table, read_text
from robustlens.results.panels import restore
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.seal import SEAL, UNSEALED, is_damaged, sealed

#: The file of a reading that holds what was kept of every example.
EXAMPLES = "examples.parquet"


def digest(settings: Mapping[str, Any], *, length: int = 12) -> str:
    """Hash of plain settings: the address of whatever they define (key order does not matter)."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def write_atomically(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash, sees the old file or the new one.

    With ``previous`` the old file is kept there; a crash can then leave that one alone.
    """
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
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: OSError) -> InputError:
    if isinstance(error, IsADirectoryError):
        return InputError(f"output {path}", expected="a file", got="a directory", fix="Name a file in it.")
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
        """Hold the directory for this process, without what a killed one left half written.

        Raises:
            RunInUse: another process has it, which is named.
            InputError: it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("ab+", buffering=0)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().decode().strip() or "another process"
                raise RunInUse(
                    f"run directory {self.path}",
                    expected="a directory that no other process works in",
                    got=f"one held by {holder}",
                    fix="Wait for it to end, or choose another directory with --out.",
                ) from error
            try:
                for left in [*self.path.rglob(".tmp-*")]:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                file.seek(0)
                file.truncate()
                file.write(f"process {os.getpid()}".encode())
            except OSError as error:
                raise _unwritable(self.path, error) from error
            yield

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self.path / name, sealed(_json(value, allow_nan=False)))

    def read_json(self, name: str) -> Any:
        """The JSON file ``name``; raises InputError if it is missing or damaged."""
        try:
            return _read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"run directory {self.path}",
                expected=f"a readable {name}",
                got=str(error),
                fix="Give the directory of a run that robustlens made, or delete it and run it again.",
            ) from error

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self, *, sha256: str | None = None) -> list[dict[str, Any]]:
        """The per-epoch records, oldest first; raises InputError where they are damaged, or not those of ``sha256``."""
        file = self.metrics_file
        try:
            text = read_text(file) if file.is_file() else ""
            if sha256 is not None and sha256 != _sha256(text.encode()):
                raise ValueError("other content than was written")
            return [_epoch(parse_json(line)) for line in text.split("\n") if line]
        except (OSError, ValueError) as error:
            raise InputError(
                f"run directory {self.path}",
                expected="a metrics.jsonl with one JSON object per line",
                got=str(error),
                fix="Delete the run directory and run the study again.",
            ) from error

    def metrics_sha256(self) -> str:
        """What ``run.json`` keeps of the records, to tell damaged ones by."""
        return _sha256(self.metrics_file.read_bytes())

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.metrics_file, text.encode())

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
        aside = path.parent / f".tmp-{uuid.uuid4().hex}"
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
            for i, panel in enumerate(reading.panels):
                columns = panel.columns()
                if columns:
                    pq.write_table(pa.table(dict(columns)), scratch / f"panel-{i}.parquet", compression="zstd")
            if reading.examples:
                pq.write_table(_columns(reading.examples), scratch / EXAMPLES, compression="zstd")
            record["files"] = {file.name: _sha256(file.read_bytes()) for file in sorted(scratch.iterdir())}
            (scratch / "reading.json").write_bytes(sealed(_json(record)))
            if path.exists():
                os.replace(path, aside)
            os.replace(scratch, path)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)

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
    files: dict[str, str] = {}


def _epoch(record: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    if not isinstance(record, dict) or not isinstance(record.get("epoch", 0), int | float):
        raise ValueError(f"no record of an epoch: {shortened(str(record), 80)}")
    return record


def read_reading(path: Path) -> Reading:
    """The reading stored in the directory ``path``; raises InputError if it is damaged."""
    try:
        record = _Record.model_validate(_read_json(path / "reading.json"))
        for name, sha256 in record.files.items():
            if _sha256((path / Path(name).name).read_bytes()) != sha256:
                raise ValueError(f"{name} is damaged")
        panels = []
        for i, facts in enumerate(record.panels):
            file = path / f"panel-{i}.parquet"
            columns = read_table(file).to_pydict() if file.is_file() else {}
            panels.append(restore(facts, columns))
        kept = path / EXAMPLES
        table = read_table(kept) if kept.is_file() else pa.table({})
        return Reading(
            lens=record.lens,
            says=record.says,
            outcome=record.outcome,
            quantities=record.quantities,
            headline=record.headline,
            panels=tuple(panels),
            settings=record.settings,
            examples={name: table[name].drop_null().to_numpy() for name in table.column_names},
        )
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise InputError(
            f"reading {path}",
            expected="a reading.json and its parquet files",
            got=shortened(f"{type(error).__name__}: {error}", 200),
            fix="Delete that directory; the study makes it again.",
        ) from error


def _columns(examples: Mapping[str, NDArray[Any]]) -> pa.Table:
    """One column each; shorter ones, of a smaller split, end in nulls."""
    longest = max(map(len, examples.values()))
    made = {name: pa.array(values) for name, values in examples.items()}
    return pa.table(
        {name: pa.concat_arrays([each, pa.nulls(longest - len(each), each.type)]) for name, each in made.items()}
    )


def _json(value: Mapping[str, Any], *, allow_nan: bool = True) -> bytes:
    return json.dumps({**UNSEALED, **value}, indent=2, allow_nan=allow_nan, ensure_ascii=False).encode()


def _read_json(path: Path) -> Any:
    """What ``_json`` wrote, or somebody else; raises OSError or ValueError."""
    text = read_text(path)
    if is_damaged(text.encode()):
        raise ValueError(f"{path.name} with other content than was written (its {SEAL} does not fit)")
    value = parse_json(text)
    if isinstance(value, dict):
        value.pop(SEAL, None)
    return value


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
