"""Run directories read into memory: what the report shows and what claims are judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustlens.results.errors import InputError
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory


@dataclass(frozen=True)
class Run:
    """One run, read into memory. ``method`` is its label, made distinct where two configurations share one."""

    method: str
    seed: int
    study: str
    hash: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    readings: Sequence[Reading]


def read_runs(directories: Sequence[RunDirectory]) -> list[Run]:
    """The runs, each once: the readings of a run that stands in several directories are put together.

    Raises:
        InputError: a directory is not a run's or is damaged.
    """
    found: dict[Any, Run] = {}
    for directory in directories:
        run = _read(directory)
        key = run.hash or directory.path.resolve()
        if key in found:
            there = found[key]
            new = [reading for reading in run.readings if not any(_same(reading, old) for old in there.readings)]
            run = replace(there, readings=[*there.readings, *new])
        found[key] = run
    return list(found.values())


def load(directories: Sequence[RunDirectory], only: Callable[[Reading], bool] | None = None) -> list[Run]:
    """Read the runs, each once, with labels that tell them apart, and of their readings those that ``only`` takes.

    Runs of one label are seeds of one method only if their configurations agree in everything but the seed. Where
    they don't, each configuration becomes a method of its own, its label ended by the start of a hash.

    Raises:
        InputError: there is no run, or a directory is not a run's or is damaged.
    """
    if not directories:
        raise InputError("report", expected="at least one run directory", got="none", fix="Name the runs to report on.")
    found = read_runs(directories)
    configurations: dict[str, list[str]] = {}
    for run in found:
        known = configurations.setdefault(run.method, [])
        if (configuration := seedless(run.config)) not in known:
            known.append(configuration)
    runs = []
    for run in found:
        if len(configurations[run.method]) > 1:
            address = hashlib.sha256(seedless(run.config).encode()).hexdigest()[:6]
            run = replace(run, method=f"{run.method} · {address}")
        runs.append(run if only is None else replace(run, readings=[r for r in run.readings if only(r)]))
    return runs


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, seeds in ascending order; methods as they first appear."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(run)
    return {method: sorted(group, key=lambda run: run.seed) for method, group in grouped.items()}


def _read(directory: RunDirectory) -> Run:
    record = directory.read_json("run.json")
    try:
        config, provenance = ({**(record.get(part) or {})} for part in ("config", "provenance"))
        label = str(record["label"]).strip() or "(no name)"
        seed, study, address = int(record["seed"]), str(record.get("study") or ""), str(record.get("hash") or "")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"run directory {directory.path}",
            expected="a run.json with a label and a seed",
            got=f"{type(error).__name__} ({error})",
            fix="Give the directory of a run that robustlens made, or run it again.",
        ) from error
    metrics = directory.metrics(sha256=record.get("metrics_sha256"))
    return Run(label, seed, study, address, config, provenance, metrics, directory.readings())


def _same(reading: Reading, other: Reading) -> bool:
    return (reading.lens, seedless(reading.settings)) == (other.lens, seedless(other.settings))


def seedless(value: Any) -> str:
    """Plain settings as text, without what a seed is."""

    def strip(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(k): strip(v) for k, v in part.items() if k != "seed"}
        return [strip(v) for v in part] if isinstance(part, list | tuple) else part

    return json.dumps(strip(value), sort_keys=True, default=str)
