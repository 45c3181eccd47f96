"""Where the numbers come from: what all runs share, what differs, and each run's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustlens.report import numbers
from robustlens.results.runs import Run

NAMES = {"version": "robustlens", "seconds": "training time"}


@dataclass(frozen=True)
class Origins:
    """``shared``: (name, value) equal in all runs; ``rows``: a run's values under ``header``; ``configs``: JSON."""

    shared: tuple[tuple[str, str], ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[str, ...]], ...]
    configs: tuple[tuple[str, int, str], ...]


def origins(runs: Sequence[Run]) -> Origins:
    """Sort the provenance of the runs into what they share and what differs."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for own in facts for name in own))
    own_columns = [n for n in names if n in ("training time", "hash") or len({own.get(n) for own in facts}) > 1]
    shared = tuple((name, facts[0][name]) for name in names if name not in own_columns)
    rows = tuple(
        (run.method, run.seed, tuple(own.get(name, "—") for name in own_columns))
        for run, own in zip(runs, facts, strict=True)
    )
    configs = tuple((run.method, run.seed, json.dumps(run.config, indent=2, ensure_ascii=False)) for run in runs)
    return Origins(shared, tuple(own_columns), rows, configs)


def _facts(run: Run) -> dict[str, str]:
    facts = _flat({NAMES.get(name, name.replace("_", " ")): value for name, value in run.provenance.items()})
    if isinstance(duration := run.provenance.get("seconds"), int | float):
        facts["training time"] = numbers.seconds(float(duration))
    if run.hash:
        facts["hash"] = run.hash
    return facts


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name} ")
        elif value is not None:
            found[f"{before}{name}"] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
