"""Two runs compared example by example: which of them is right where the other is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustlens.results.errors import InputError
from robustlens.results.paired import Paired
from robustlens.results.reading import BITS, Reading
from robustlens.results.store import RunDirectory, find_runs


@dataclass(frozen=True)
class Compared:
    """One accuracy of two runs on the same examples. ``doubt`` says why it cannot be believed, if it cannot."""

    lens: str
    threat: str
    quantity: str
    labels: tuple[str, str]
    paired: Paired
    doubt: str = ""


def compare(first: str | Path, second: str | Path) -> list[Compared]:
    """Clean and robust accuracy of two runs, paired by example, for every lens that measured both in the same way.

    Raises:
        InputError: a place that does not hold one run, different images, or no reading with the same threat, attack
            and examples in both.
    """
    runs = [_one(place) for place in (first, second)]
    _same_images(runs)
    labels = tuple(str(run.read_json("run.json")["label"]) for run in runs)
    wanted = {"index", *BITS.values()}
    kept = [[reading for reading in run.readings() if reading.examples.keys() >= wanted] for run in runs]
    if labels[0] == labels[1]:
        labels = (f"{labels[0]} (A)", f"{labels[1]} (B)")
    found = []
    for one in kept[0]:
        for other in kept[1]:
            if _settings(one) == _settings(other) and np.array_equal(one.examples["index"], other.examples["index"]):
                found += _compared(one, other, (labels[0], labels[1]))
    if not found:
        raise _nothing_alike(kept[0], kept[1])
    return found


def _one(place: str | Path) -> RunDirectory:
    runs = find_runs([place])
    if len(runs) > 1:
        raise InputError(
            f"runs in {place}",
            expected="one run",
            got=f"{len(runs)}, such as {runs[0].path.name}",
            fix="Name the directory of one of them.",
        )
    return runs[0]


def _same_images(runs: list[RunDirectory]) -> None:
    tests = [run.read_json("run.json").get("provenance", {}).get("data", {}) for run in runs]
    if tests[0].get("test") != tests[1].get("test"):
        names = [f"{data.get('name')} ({(data.get('examples') or ['?'])[-1]} test images)" for data in tests]
        raise InputError(
            "compare",
            expected="two runs on the same test images",
            got=f"{names[0]} and {names[1]} with other pixels or labels",
            fix="Look at both networks with the same --data and --examples.",
        )


def _settings(reading: Reading) -> tuple[str, Mapping[str, Any]]:
    return reading.lens, {key: value for key, value in reading.settings.items() if key != "seed"}


def _compared(one: Reading, other: Reading, labels: tuple[str, str]) -> list[Compared]:
    doubts = [
        f"{label}: {reading.outcome.why}"
        for label, reading in zip(labels, (one, other), strict=True)
        if reading.outcome.status != "ok"
    ]
    threat = str(one.settings.get("threat", ""))
    return [
        Compared(one.lens, threat, name, labels, Paired.of(one.examples[key], other.examples[key]), " ".join(doubts))
        for name, key in BITS.items()
    ]


def _nothing_alike(first: list[Reading], second: list[Reading]) -> InputError:
    """Says in what the two differ: the lenses, or the first setting of a lens that both have."""
    expected, fix = "a reading of every example with the same settings in both", "Look at both with the same settings."
    for one in first:
        for other in second:
            if one.lens != other.lens:
                continue
            for key in dict.fromkeys(["threat", *one.settings, *other.settings]):
                a, b = one.settings.get(key), other.settings.get(key)
                if a != b and key != "seed":
                    return InputError(
                        f"compare, {key} of {one.lens}", expected="the same in both", got=f"{a} and {b}", fix=fix
                    )
            return InputError(
                f"compare, {one.lens}", expected="the same examples in both", got="other examples", fix=fix
            )
    got = " and ".join(", ".join(reading.lens for reading in each) or "none" for each in (first, second))
    return InputError("compare", expected=expected, got=got, fix="Run the accuracy lens on both, with this version.")
