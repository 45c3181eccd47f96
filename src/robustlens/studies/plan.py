"""From a study to its runs: every name looked up and every default written out before any work starts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlens.attacks.pgd import PGD
from robustlens.core import discovery
from robustlens.core.types import Architecture, Attack, Lens
from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory, digest
from robustlens.studies.config import MethodConfig, StudyConfig, validated
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import Recipe


@dataclass(frozen=True)
class PlannedRun:
    """One network to train: a method and a seed, resolved to objects and to plain settings.

    ``settings`` is what decides the trained weights, with all defaults; its hash is the run's address. The label
    and the lenses are not part of it: renaming a method or adding a lens trains nothing again.
    """

    label: str
    seed: int
    model: Architecture
    recipe: Recipe
    training: TrainingConfig
    validation: Attack
    settings: dict[str, Any]

    @property
    def hash(self) -> str:
        return digest(self.settings)


@dataclass(frozen=True)
class Plan:
    """A study's runs and what to measure on each of them."""

    study: StudyConfig
    threat: Lp
    runs: tuple[PlannedRun, ...]
    lenses: tuple[Lens, ...]


def make_plan(study: StudyConfig) -> Plan:
    """Resolve every name in ``study``.

    Raises:
        InputError: an unknown plug-in or field, or a value that does not fit, before anything is written.
    """
    threat = Lp.parse(study.threat)
    lenses = tuple(discovery.build("lens", lens) for lens in study.lenses)
    chosen = {"name": PGD.name, "threat": str(threat), **(study.validation or {})}
    if chosen["name"] == PGD.name:
        chosen = {"early_stop": True, **chosen}
    validation = discovery.build("attack", chosen)
    runs = tuple(_planned(study, method, seed, validation) for method in study.methods for seed in study.seeds)
    _all_different(runs)
    return Plan(study, threat, runs, lenses)


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


def _planned(study: StudyConfig, method: MethodConfig, seed: int, validation: Attack) -> PlannedRun:
    model: Architecture = discovery.build("model", study.model)
    recipe = Recipe(
        objective=discovery.build("objective", method.objective),
        regularizers=tuple(discovery.build("regularizer", r) for r in method.regularizers),
        update=discovery.build("update", method.update),
    )
    training = study.training
    if method.training:
        merged = _merge(study.training.model_dump(), method.training)
        training = validated(TrainingConfig, merged, f"training of method {method.label!r}")
    for augmentation in training.augment:
        discovery.build("augmentation", augmentation)
    settings = {
        "data": study.data.model_dump(mode="json"),
        "model": discovery.describe(model),
        "objective": discovery.describe(recipe.objective),
        "regularizers": [discovery.describe(r) for r in recipe.regularizers],
        "update": discovery.describe(recipe.update),
        "training": training.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "validation": discovery.describe(validation),
        "seed": seed,
    }
    weights = getattr(model, "weights", None)
    if weights is not None and Path(weights).is_file():  # a path alone does not say which weights training starts from
        settings["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]
    return PlannedRun(method.label, seed, model, recipe, training, validation, settings)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, field by field; a choice that is renamed (another optimizer) is replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, old.get("name")):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def run_directory(out: Path, label: str, seed: int, address: str) -> RunDirectory:
    """The directory of the run with hash ``address`` under ``out``: the one there is, or where it will be."""
    for found in sorted(out.glob(f"*-{address}")):
        return RunDirectory(found)
    return RunDirectory(out / f"{slug(label)[:40]}-seed{seed}-{address}")


def slug(name: str) -> str:
    """``name`` as a safe part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"
