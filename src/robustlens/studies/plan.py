"""From a study to its runs: every name looked up and every default written out before any work starts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlens.attacks.pgd import PGD
from robustlens.core import discovery
from robustlens.core.types import Architecture, Attack
from robustlens.methods.preset import find_preset
from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory, digest
from robustlens.studies.config import MethodConfig, StudyConfig, merged, validated
from robustlens.studies.epochs import Scheduled, schedule
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.recipe import Recipe

#: Runs of the largest study: planning them takes seconds.
MOST_RUNS = 5000


@dataclass(frozen=True)
class PlannedRun:
    """One network to train: a method and a seed, resolved to objects and to plain settings.

    ``settings`` is what decides the trained weights, with all defaults; its hash is the run's address. The label
    and the lenses are not part of it: renaming a method or adding a lens trains nothing again. ``threat`` is what it is
    examined under; ``start`` is the run, or the file, whose weights training starts from.
    """

    label: str
    seed: int
    model: Architecture
    recipe: Recipe
    training: TrainingConfig
    validation: Attack
    threat: Lp
    settings: dict[str, Any]
    start: PlannedRun | Path | None = None

    @property
    def hash(self) -> str:
        return digest(self.settings)


@dataclass(frozen=True)
class Plan:
    """A study's runs and what to measure on each of them."""

    study: StudyConfig
    runs: tuple[PlannedRun, ...]
    lenses: tuple[Scheduled, ...]

    @property
    def kept_epochs(self) -> frozenset[int]:
        """The epochs whose weights a lens will look at."""
        return frozenset(epoch for scheduled in self.lenses for epoch in scheduled.epochs)


def make_plan(study: StudyConfig) -> Plan:
    """Resolve every name in ``study``.

    Raises:
        InputError: an unknown plug-in or field, or a value that does not fit, before anything is written.
    """
    lenses = tuple(schedule(lens) for lens in study.lenses)
    if (count := len(study.methods) * len(study.seeds)) > MOST_RUNS:
        raise InputError(
            "study",
            expected=f"at most {MOST_RUNS:,} runs",
            got=f"{len(study.methods):,} methods × {len(study.seeds):,} seeds = {count:,}",
            fix="Write several studies.",
        )
    runs: list[PlannedRun] = []
    for method in study.methods:
        runs += [_planned(study, method.resolved(), seed, runs) for seed in study.seeds]
    _all_different(runs)
    longest = max(run.training.epochs for run in runs)
    for scheduled in lenses:
        if scheduled.epochs and scheduled.epochs[-1] > longest:
            raise InputError(
                f"when of lens {scheduled.lens.name!r}",
                expected=f"epochs that a run has, at most {longest}",
                got=str(scheduled.epochs[-1]),
                fix="Leave it out, or train for more epochs.",
            )
    return Plan(study, tuple(runs), lenses)


def _all_different(runs: Sequence[PlannedRun]) -> None:
    """Two methods (or seeds) that are one and the same would share a run directory, and one label would vanish."""
    first: dict[str, PlannedRun] = {}
    for run in runs:
        twin = first.setdefault(run.hash, run)
        if twin is not run:
            raise InputError(
                "study methods",
                expected="methods that differ in more than their label, and seeds that differ",
                got=f"{twin.label!r} and {run.label!r} with the same settings and seed {run.seed}",
                fix="Remove one of them.",
            )


def make_recipe(method: MethodConfig) -> Recipe:
    """The parts of a method, built.

    Raises:
        InputError: an unknown part, a field that does not fit, or one regularizer or constraint twice.
    """
    for kind, parts in (("regularizer", method.regularizers), ("constraint", method.constraints)):
        names = [part if isinstance(part, str) else part.get("name") for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"method {method.label!r}",
                    expected=f"each {kind} once",
                    got=f"{name!r} {names.count(name)} times",
                    fix="Put its weight into one entry.",
                )
    return Recipe(
        objective=discovery.build("objective", method.objective),
        regularizers=tuple(discovery.build("regularizer", r) for r in method.regularizers),
        update=discovery.build("update", method.update),
        constraints=tuple(discovery.build("constraint", c) for c in method.constraints),
    )


def preset_recipe(name: str) -> Recipe:
    """The parts of the preset ``name``, "trades/cifar10" or "trades/cifar10@paper", built."""
    preset, protocol = find_preset(name)
    return make_recipe(MethodConfig.model_validate({"label": name, **preset.settings(protocol)}))


def _start(method: MethodConfig, seed: int, earlier: Sequence[PlannedRun]) -> PlannedRun | Path | None:
    """The run, or the file, that ``method`` starts from."""
    if method.start is None:
        return None
    for run in earlier:
        if (run.label, run.seed) == (method.start, seed):
            return run
    if os.path.isfile(method.start):
        return Path(method.start)
    raise InputError(
        f"start of method {method.label!r}",
        expected="the label of a method further up in the study, or a file of weights",
        got=repr(method.start),
        fix=f"Methods further up: {', '.join(dict.fromkeys(repr(run.label) for run in earlier)) or 'none'}.",
    )


def _planned(study: StudyConfig, method: MethodConfig, seed: int, earlier: Sequence[PlannedRun]) -> PlannedRun:
    threat = Lp.parse(method.threat or study.threat)
    chosen = {"name": PGD.name, "threat": str(threat), **(study.validation or {})}
    if chosen["name"] == PGD.name:
        chosen = {"early_stop": True, **chosen}
    validation: Attack = discovery.build("attack", chosen)
    model: Architecture = discovery.build("model", study.model)
    recipe, start = make_recipe(method), _start(method, seed, earlier)
    training = study.training
    if method.training:
        settings = merged(study.training.model_dump(), method.training)
        training = validated(TrainingConfig, settings, f"training of method {method.label!r}")
    for augmentation in training.augment:
        discovery.build("augmentation", augmentation)
    settings = {
        "data": study.data.model_dump(mode="json"),
        "model": discovery.describe(model),
        "objective": discovery.describe(recipe.objective),
        "regularizers": [discovery.describe(r) for r in recipe.regularizers],
        "update": discovery.describe(recipe.update),
        "constraints": [discovery.describe(c) for c in recipe.constraints],
        "training": training.model_dump(mode="json", exclude=_indifferent(training)),
        "validation": discovery.describe(validation),
        "seed": seed,
    }
    weights = getattr(model, "weights", None)
    if weights is not None and os.path.isfile(weights):  # a path alone does not say which weights training starts from
        settings["weights"] = _sha(Path(weights))
    if start is not None:
        settings["start"] = _seedless_hash(start) if isinstance(start, PlannedRun) else _sha(start)
    return PlannedRun(method.label, seed, model, recipe, training, validation, threat, settings, start)


def _indifferent(training: TrainingConfig) -> set[str]:
    """Settings that one process does not ask about."""
    return {"checkpoint_seconds"} | ({"batch_norm"} if training.batch_norm == "local" else set())


def _seedless_hash(run: PlannedRun) -> str:
    """The same for all seeds: it is of the seed of the run that starts from it."""
    return digest({key: part for key, part in run.settings.items() if key != "seed"})


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def run_directory(out: Path, label: str, seed: int, address: str) -> RunDirectory:
    """The directory of the run with hash ``address`` under ``out``: the one there is, or where it will be."""
    for found in sorted(out.glob(f"*-{address}")):
        return RunDirectory(found)
    return RunDirectory(out / f"{slug(label)[:40]}-seed{seed}-{address}")


def slug(name: str) -> str:
    """``name`` as a safe part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"
