"""Run directories → what the report shows: methods, readings by lens, panels by title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustlens.report.labels import labels
from robustlens.results.panels import Curve, Panel, Series, column
from robustlens.results.reading import Reading
from robustlens.results.runs import Run, methods, seedless


@dataclass(frozen=True)
class PanelGroup:
    """Panels that are drawn over each other: same lens, same title, by method and then seed."""

    title: str
    kind: str
    by_method: Mapping[str, Sequence[tuple[int, Panel]]]


@dataclass(frozen=True)
class Section:
    """Everything that one lens, with one choice of settings, found on the runs."""

    name: str
    lens: str
    entries: Sequence[tuple[Run, Reading]]

    @property
    def alike(self) -> bool:
        """Whether all methods were examined under one threat, so that their numbers compare."""
        return len({str(reading.settings.get("threat")) for _, reading in self.entries}) == 1

    def panels(self) -> list[PanelGroup]:
        """The panels by title, in the order in which they first appear."""
        groups: dict[tuple[str, str, int], dict[str, list[tuple[int, Panel]]]] = {}
        for run, reading in self.entries:
            seen: dict[tuple[str, str], int] = {}
            for panel in reading.panels:
                name = (panel.title, panel.kind)
                seen[name] = seen.get(name, 0) + 1
                group = groups.setdefault((*name, seen[name]), {})
                group.setdefault(run.method, []).append((run.seed, panel))
        return [PanelGroup(title, kind, by_method) for (title, kind, _), by_method in groups.items()]


def sections(runs: Sequence[Run]) -> list[Section]:
    """One section a lens and choice of settings (seeds in the settings aside), in order of first appearance.

    Methods that are each examined at a radius of their own stand in one section.
    """
    together: dict[tuple[str, str], list[tuple[Run, Reading]]] = {}
    for group in methods(runs).values():
        for run in group:
            for reading in run.readings:
                together.setdefault((reading.lens, seedless(_radiusless(reading.settings))), []).append((run, reading))
    grouped: dict[tuple[str, str], list[tuple[Run, Reading]]] = {}
    for (lens, shared), entries in together.items():
        each_once = len({run.hash for run, _ in entries}) == len(entries)
        for run, reading in entries:
            place = shared if each_once else seedless(reading.settings)
            grouped.setdefault((lens, place), []).append((run, reading))
    by_lens: dict[str, list[tuple[str, str]]] = {}
    for key in grouped:
        by_lens.setdefault(key[0], []).append(key)
    found = []
    for lens, keys in by_lens.items():
        chosen = [[reading.settings for _, reading in grouped[key]] for key in keys]
        settings = [each[0] if len(set(map(seedless, each))) == 1 else _radiusless(each[0]) for each in chosen]
        for name, key in zip(labels(lens, settings), keys, strict=True):
            found.append(Section(name, lens, grouped[key]))
    return found


#: What is seen together where a run was followed: gap, margins and flatness.
FOLLOWED = {
    "generalisation-gap over epochs": ("Robust error", "Robust loss"),
    "logit-margins over epochs": ("Mean normalised margin, test",),
    "weight-landscape over epochs": ("Average robust flatness",),
}


def overfitting_view(found: Sequence[Section]) -> list[PanelGroup]:
    """The curves of robust overfitting beside each other, where more than one lens followed the epochs."""
    followed = [section for section in found if section.lens in FOLLOWED]
    groups = [g for s in followed for g in s.panels() if g.title in FOLLOWED[s.lens] and g.kind == "curve"]
    several = len({section.lens for section in followed}) > 1
    whole = several and any(group.title == "Robust error" for group in groups)
    return groups if whole else []


def _radiusless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the radius that was attacked at, and the step size that goes with it."""
    kept = {key: value for key, value in settings.items() if key != "threat"}
    attack = kept.get("attack used")
    if isinstance(attack, Mapping):
        kept["attack used"] = {key: value for key, value in attack.items() if key not in ("threat", "step_size")}
    return kept


def training_curves(runs: Sequence[Run]) -> list[PanelGroup]:
    """Loss, accuracy and whatever else the training recorded, per epoch."""
    names = dict.fromkeys(k for run in runs for record in run.metrics for k, v in record.items() if _number(v))
    names.pop("epoch", None)
    accuracies = {"accuracy": "training", "valid_accuracy": "validation", "valid_robust_accuracy": "validation, robust"}
    plans: list[tuple[str, str, dict[str, str]]] = [("Training loss", "loss", {"loss": "loss"})]
    plans.append(("Accuracy while training", "accuracy", accuracies))
    plans.append(("Learning rate", "learning rate", {"learning_rate": "learning rate"}))
    plans.append(("Time per epoch", "seconds", {"seconds": "seconds"}))
    known = {key for _, _, series in plans for key in series}
    for name in names:
        if name not in known:
            words = name.replace("_", " ")
            plans.append((words[:1].upper() + words[1:], words, {name: words}))
    groups = []
    for title, label, series in plans:
        by_method: dict[str, list[tuple[int, Panel]]] = {}
        for run in runs:
            lines = tuple(line for key, name in series.items() if len((line := _line(run, key, name)).x))
            if lines:
                limits = (0.0, 1.0) if label == "accuracy" else None
                panel = Curve(title, "epoch", label, lines, y_range=limits)
                by_method.setdefault(run.method, []).append((run.seed, panel))
        if by_method:
            groups.append(PanelGroup(title, "curve", by_method))
    return groups


def _line(run: Run, key: str, name: str) -> Series:
    points = [
        (float(record.get("epoch", i + 1)), float(record[key]))
        for i, record in enumerate(run.metrics)
        if _number(record.get(key))
    ]
    x, y = (column([point[end] for point in points]) for end in (0, 1))
    if key == "seconds":  # of all epochs since the record before
        with np.errstate(invalid="ignore"):  # of records that somebody made up; what is NaN is not drawn
            y = y / np.maximum(np.diff(x, prepend=0.0), 1.0)
    return Series(name, x, y)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
