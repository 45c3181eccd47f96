"""Which runs bear on a claim, and what a reading of theirs says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from robustlens.results.reading import Quantity, Reading
from robustlens.results.runs import Run, seedless

#: Tells whether a run plays a part in a claim.
Part = Callable[[Run], bool]


@dataclass(frozen=True)
class Ask:
    """A quantity of a lens: its name, or what names it for a run (the accuracy at the radius it was trained for).

    ``settings`` are those that the reading must have, such as ``{"split": "train"}``. Among several readings that fit,
    the one over most examples counts. ``own`` asks for one under the threat that the run was trained against (radius 0
    for standard training). ``where`` says of a run and one of its readings whether the reading counts.
    """

    lens: str
    quantity: str | Callable[[Run], str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: bool = False
    where: Callable[[Run, Reading], bool] | None = None

    def of(self, run: Run) -> tuple[Quantity, Reading] | None:
        """The quantity and the reading it stands in; None where the run has none."""
        name = self.quantity if isinstance(self.quantity, str) else self.quantity(run)
        found = [
            (quantity, reading)
            for reading in run.readings
            if reading.lens == self.lens and reading.outcome.status != "failed"
            if all(reading.settings.get(key) == value for key, value in self.settings.items())
            if not self.own or radius(reading) == strength(run)
            if self.where is None or self.where(run, reading)
            for quantity in reading.quantities
            if quantity.name == name
        ]
        return max(found, key=lambda each: each[0].n or 0, default=None)


@dataclass(frozen=True)
class AtEpoch(Ask):
    """A quantity of a lens that looked after several epochs.

    ``pick`` is the first of them from ``since`` on, the last, or the one at which the quantity is the smallest.
    """

    pick: Literal["first", "last", "smallest"] = "first"
    since: int = 1

    def of(self, run: Run) -> tuple[Quantity, Reading] | None:
        assert isinstance(self.quantity, str)
        found = [each for each in epochs(run, self.lens, self.quantity) if each[0] >= self.since]
        if not found:
            return None
        by_value = min(found, key=lambda each: each[1].value)
        _, quantity, reading = {"first": found[0], "last": found[-1], "smallest": by_value}[self.pick]
        return quantity, reading


def epochs(run: Run, lens: str, quantity: str) -> list[tuple[int, Quantity, Reading]]:
    """What a lens found after each epoch, in order."""
    found = []
    for reading in run.readings:
        if reading.lens == f"{lens} over epochs" and reading.outcome.status != "failed":
            for each in reading.quantities:
                name, _, epoch = each.name.rpartition(", epoch ")
                if name == quantity:
                    found.append((int(epoch), each, reading))
    return sorted(found, key=lambda each: each[0])


def radius(reading: Reading) -> float | None:
    """The radius that a lens attacked at; None where it attacked nothing."""
    attack = reading.settings.get("attack used")
    threat = reading.settings.get("threat") or (attack["threat"] if isinstance(attack, Mapping) else None)
    return None if threat is None else float(str(threat).partition(":")[2])


def name_of(part: Any) -> str:
    """The name of a part of a configuration, which is its settings or a bare name."""
    return str(part["name"] if isinstance(part, Mapping) else part)


def regularizers(run: Run) -> set[str]:
    return {name_of(part) for part in run.config["regularizers"]}


def constraints(run: Run) -> set[str]:
    return {name_of(part) for part in run.config["constraints"]}


def is_plain(run: Run) -> bool:
    """Nothing but an objective: no regularizer, no constraint, no update but descent."""
    parts = (run.config["regularizers"], run.config["constraints"], name_of(run.config["update"]) != "descend")
    return not any(parts)


def is_standard(run: Run) -> bool:
    """Standard training and nothing else."""
    return is_plain(run) and name_of(run.config["objective"]) == "standard"


def is_regularized(*names: str) -> Part:
    """Standard training with exactly these regularizers."""
    return lambda run: (
        name_of(run.config["objective"]) == "standard" and regularizers(run) == set(names) and not constraints(run)
    )


def adversary(run: Run) -> Mapping[str, Any] | None:
    """The settings of the attack, or of the noise, that the run was trained against."""
    objective = run.config["objective"]
    if name_of(objective) == "adversarial":
        return dict(objective["attack"])
    return dict(objective) if name_of(objective) in ("noise", "logistic-adversary") else None


def norm(run: Run) -> str:
    """The norm it was trained against, "" for standard training."""
    found = adversary(run)
    return "" if found is None else str(found["threat"]).partition(":")[0]


def strength(run: Run) -> float | None:
    """The radius it was trained against, 0 for standard training; None for anything else."""
    if name_of(run.config["objective"]) == "standard":
        return 0.0
    found = adversary(run)
    return None if found is None else float(str(found["threat"]).partition(":")[2])


def is_trained_against(*attacks: str) -> Part:
    """Adversarial training against one of these attacks (or "noise")."""
    return lambda run: (found := adversary(run)) is not None and name_of(found) in attacks


def setting(run: Run) -> str:
    """What must agree between runs that are compared: the images and the network."""
    return seedless({"data": run.config["data"], "model": run.config["model"]})


def describe(run: Run) -> str:
    """Data and network, for people."""
    data, model = run.config["data"], run.config["model"]
    classes = f" {'/'.join(str(c) for c in data['classes'])}" if data.get("classes") else ""
    part = f" ({data['train']} images)" if data.get("train") else ""
    return f"{data['source']}{classes}{part}, {name_of(model)}, {run.config['training']['epochs']} epochs"


@dataclass(frozen=True)
class Family:
    """Runs that differ in the radius they were trained against, and in the seed; ``by_strength`` in ascending order."""

    where: str
    by_strength: Mapping[float, Mapping[int, Run]]


def families(runs: Sequence[Run], member: Part) -> list[Family]:
    """The runs for which ``member`` holds, by all their settings but radius and seed.

    The step size may grow with the radius. Where networks of one radius and seed differ in it, those with one step size
    are a family, and those whose step is one share of the radius another. Standard training with the same settings is
    the beginning of each family, at strength 0.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        if member(run) and strength(run) is not None:
            grouped.setdefault(_kinship(run), []).append(run)
    standard = [run for run in runs if name_of(run.config["objective"]) == "standard"]
    found = []
    for steps, kin in (each for alike in grouped.values() for each in _by_step(alike).items()):
        first = kin[0]
        by_strength: dict[float, dict[int, Run]] = {}
        for run in [*(run for run in standard if _surroundings(run) == _surroundings(first)), *kin]:
            seeds = by_strength.setdefault(strength(run) or 0.0, {})
            twin = seeds.get(run.seed)  # trained alike, and looked at in another study
            seeds[run.seed] = run if twin is None else replace(twin, readings=[*twin.readings, *run.readings])
        if len(by_strength) > 1:
            against = name_of(adversary(first) or first.config["objective"])
            also = "".join(f", {name}" for name in sorted(regularizers(first) | constraints(first)))
            where = f"{describe(first)}, {against} {norm(first)}{steps}{also}".strip()
            found.append(Family(where, dict(sorted(by_strength.items()))))
    return found


def _by_step(kin: Sequence[Run]) -> dict[str, list[Run]]:
    """What tells step sizes apart → the runs; all in one where each radius and seed has one step size."""
    steps = {run.hash: (adversary(run) or {}).get("step_size") for run in kin}
    if len({(strength(run), run.seed) for run in kin}) == len(
        {(strength(run), run.seed, steps[run.hash]) for run in kin}
    ):
        return {"": list(kin)}
    found: dict[str, list[Run]] = {}
    for run in kin:
        step = steps[run.hash]
        fixed = len({strength(other) for other in kin if steps[other.hash] == step}) > 1
        if step is None:
            name = ", usual steps"
        else:
            name = f", steps of {step:.4g}" if fixed else f", steps of {step / (strength(run) or 1.0):.4g} ε"
        found.setdefault(name, []).append(run)
    return found


def _surroundings(run: Run) -> str:
    kept = ("data", "model", "regularizers", "update", "constraints", "training", "start")
    return seedless({key: run.config.get(key) for key in kept})


def _kinship(run: Run) -> str:
    """Everything that two runs of a family share."""
    against = {key: value for key, value in (adversary(run) or {}).items() if key not in ("threat", "step_size")}
    objective = run.config["objective"]
    objective = {k: v for k, v in objective.items() if k not in ("attack", "threat")} if against else objective
    return json.dumps([_surroundings(run), against, objective, norm(run)], sort_keys=True)
