"""Which runs are the methods of Roth et al. 2020, and statistics over several readings of one network: quotients of two
quantities, one lens at several threats, and networks that differ in the step size of their attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot

from robustlens.claims.evidence import (
    Ask,
    Part,
    adversary,
    describe,
    is_plain,
    is_regularized,
    is_trained_against,
    norm,
    radius,
    strength,
)
from robustlens.claims.statistics import Found, Judge, Z, by_configuration, error_of, line
from robustlens.results.reading import Quantity, Reading
from robustlens.results.runs import Run, seedless
from robustlens.results.verdict import Region, Verdict


def is_adversarial(run: Run) -> bool:
    """PGD training with a step size as in Table 2: from the radius over the number of steps to five times that."""
    if not (is_trained_against("pgd")(run) and is_plain(run)):
        return False
    attack, step = adversary(run) or {}, step_size(run)
    travels = None if step is None else step * attack["steps"] / (strength(run) or 1.0)
    return travels is None or 0.99 < travels < 5.01


is_data_dependent = is_regularized("data-spectral-norm")


def is_global(iterations: int) -> Part:
    """Global SNR with this many steps of the power method."""
    found = is_regularized("global-spectral-norm")
    return lambda run: found(run) and run.config["regularizers"][0]["iterations"] == iterations


def step_size(run: Run) -> float | None:
    return (adversary(run) or {}).get("step_size")


def radius_of(run: Run) -> float | None:
    """The radius of adversarial training or of data-dependent SNR; None for methods that have none."""
    if is_data_dependent(run):
        return float(run.config["regularizers"][0]["eps"])
    return strength(run) or None


def in_its_ball(run: Run, reading: Reading) -> bool:
    """A reading under the norm and at the radius that the network was made robust at."""
    alike = norm(run) in ("", str(reading.settings.get("threat")).partition(":")[0])
    return alike and radius(reading) == radius_of(run)


@dataclass(frozen=True)
class Quotient(Ask):
    """A quantity over another one of the same network, which may be of another lens; none unless both are positive."""

    by: Ask | None = None

    def of(self, run: Run) -> Found | None:
        above, below = super().of(run), None if self.by is None else self.by.of(run)
        if above is None or below is None:
            return None
        (a, reading), (b, other) = above, below
        if a.value <= 0 or b.value <= 0:
            return None
        ratio, errors = a.value / b.value, (error_of(a), error_of(b))
        half = Z * ratio * hypot((errors[0] or 0) / a.value, (errors[1] or 0) / b.value)
        low, high = (None, None) if None in errors else (ratio - half, ratio + half)
        n = min((each.n for each in (a, b) if each.n is not None), default=None)
        worse = reading if reading.outcome.status == "unreliable" else other
        return Quantity(f"{a.name} / {b.name}", ratio, "", low, high, n), worse


def at_each_radius(judge: Judge) -> Judge:
    """``judge`` among the runs of each radius of training, and those that have none."""

    def judged(runs: Sequence[Run]) -> list[Verdict]:
        radii = {radius for run in runs if (radius := radius_of(run)) is not None}
        return [v for r in sorted(radii) for v in judge([run for run in runs if radius_of(run) in (r, None)])]

    return judged


def over_threats(lens: str, quantity: str, region: Region, *, member: Part) -> Judge:
    """How a quantity of a network changes with the radius of the threat that the lens was used with, norm by norm."""

    def judged(runs: Mapping[int, Run]) -> list[Verdict]:
        by: dict[str, dict[float, dict[int, Found]]] = {}
        for seed, run in runs.items():
            for threat in {str(r.settings.get("threat")) for r in run.readings if r.lens == lens}:
                if (found := Ask(lens, quantity, {"threat": threat}).of(run)) is not None:
                    norm, _, eps = threat.partition(":")
                    by.setdefault(norm, {}).setdefault(float(eps), {})[seed] = found
        one = next(iter(runs.values()))
        lines = [
            line(found, region, f"{describe(one)}: {one.method}, measured in {norm}", "ε")
            for norm, found in sorted(by.items())
        ]
        return [verdict for verdict in lines if verdict is not None]

    return lambda runs: [v for group in by_configuration(filter(member, runs)).values() for v in judged(group)]


def over_steps(ask: Ask, region: Region, *, huge: bool) -> Judge:
    """How a quantity of networks that were trained alike but for the step size α changes with log α.

    ``huge``: over all α from the radius on. Else from the smallest α to the smallest of those.
    """

    def judged(runs: Sequence[Run]) -> Verdict | None:
        by: dict[float, dict[int, Found]] = {}
        eps = strength(runs[0]) or 0.0
        for run in runs:
            if (found := ask.of(run)) is not None:
                by.setdefault(step_size(run) or 0.0, {})[run.seed] = found
        large = sorted(step for step in by if step >= eps)
        small = sorted(step for step in by if step < eps)
        wanted = large if huge else small[:1] + large[:1]
        where = f"{describe(runs[0])}, pgd at radius {eps:g}"
        return line({step: by[step] for step in wanted}, region, where, "α", log=True)

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        alike: dict[str, list[Run]] = {}
        for run in runs:
            if is_trained_against("pgd")(run) and is_plain(run) and step_size(run) is not None:
                alike.setdefault(seedless(_but_step(run)), []).append(run)
        return [v for group in alike.values() if (v := judged(group)) is not None]

    return judge


def _but_step(run: Run) -> Mapping[str, object]:
    against = {key: part for key, part in (adversary(run) or {}).items() if key != "step_size"}
    rest = {key: part for key, part in run.config["objective"].items() if key != "attack"}
    return {**run.config, "objective": rest, "attack": against}
