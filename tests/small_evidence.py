"""Runs made by hand, for tests of claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run


def config(objective: Any = "standard", **parts: Any) -> dict[str, Any]:
    """A configuration as a run directory holds it; "pgd l2:0.5" is adversarial training."""
    if isinstance(objective, str) and " " in objective:
        name, threat = objective.split()
        attack = {"name": name, "threat": threat, "steps": 10, "step_size": None}
        objective = (
            {"name": "noise", "threat": threat} if name == "noise" else {"name": "adversarial", "attack": attack}
        )
    elif isinstance(objective, str):
        objective = {"name": objective}
    usual = {
        "data": {"source": "mnist", "classes": None, "train": None},
        "model": {"name": "mlp"},
        "objective": objective,
        "regularizers": [],
        "update": {"name": "descend"},
        "constraints": [],
        "training": {"epochs": 5},
    }
    return {**usual, **parts}


def reading(
    lens: str,
    quantities: Mapping[str, float | tuple[float, float]],
    *,
    n: int | None = 100,
    settings: Mapping[str, Any] | None = None,
    outcome: Outcome | None = None,
) -> Reading:
    """Quantities as values, or as (value, half width of the interval)."""
    made = []
    for name, given in quantities.items():
        value, half = given if isinstance(given, tuple) else (given, None)
        low, high = (None, None) if half is None else (value - half, value + half)
        made.append(Quantity(name, value, low=low, high=high, n=n))
    return Reading(lens, "", outcome or Outcome(), tuple(made), settings=settings or {})


def run(label: str, readings: Sequence[Reading], *, seed: int = 0, **parts: Any) -> Run:
    settings = config(**parts)
    address = f"{label}-{seed}-{sorted(map(str, settings.items()))}"
    return Run(label, seed, "study", address, {**settings, "seed": seed}, {"seconds": 10.0}, [], readings)
