"""Statistics of Wu and Yu 2019: over epochs, by an attack that stalls, and of training's cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustlens.claims.evidence import Ask, AtEpoch, Part, describe, epochs, is_standard, name_of, radius, setting
from robustlens.claims.statistics import Judge, Sample, over_seeds, value, within
from robustlens.results.intervals import wilson
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run, methods
from robustlens.results.verdict import Region, Statistic, Verdict, decide

#: The floor under gradients with which the paper's attack stalls.
FLOOR = 1e-6


@dataclass(frozen=True)
class Reported(Ask):
    """A quantity as an attack with the paper's floor under its gradients reports it, alarms of the reading or not.

    ``at`` picks the largest or the smallest radius it was run at.
    """

    at: Literal["largest", "smallest"] = "largest"

    def of(self, run: Run) -> tuple[Quantity, Reading] | None:
        stalls = [
            replace(reading, outcome=Outcome())
            for reading in run.readings
            if reading.lens == self.lens and reading.outcome.status != "failed"
            if (reading.settings.get("attack used") or {}).get("grad_floor", 0.0) >= FLOOR
        ]
        if not stalls:
            return None
        chosen = (max if self.at == "largest" else min)(radius(reading) or 0.0 for reading in stalls)
        return super().of(replace(run, readings=[each for each in stalls if radius(each) == chosen]))


@dataclass(frozen=True)
class Lost(Ask):
    """The share of images that an attack with the paper's floor left standing and the checks of `health` broke.

    It is counted on the same images, so its interval is Wilson's.
    """

    def of(self, run: Run) -> tuple[Quantity, Reading] | None:
        before, after = (Reported(self.lens, f"robust accuracy{end}").of(run) for end in ("", " after all checks"))
        if before is None or after is None:
            return None
        (left, reading), (stands, _) = before, after
        n = left.n or 0
        lost = round((left.value - stands.value) * n)
        name = f"reported {left.value:.4g}, after all checks {stands.value:.4g}, lost"
        return Quantity(name, lost / n, "fraction", *wilson(lost, n), n), reading


def several(lens: str, quantity: str, member: Part, since: int = 1) -> Part:
    """Runs that a lens looked at after at least two epochs from ``since`` on."""
    return lambda run: member(run) and sum(epoch >= since for epoch, _, _ in epochs(run, lens, quantity)) > 1


def change(lens: str, quantity: str, region: Region, *, member: Part = is_standard, since: int = 1) -> Judge:
    """A quantity after the last epoch looked at, minus what it was after the first one from ``since`` on."""
    last, first = AtEpoch(lens, quantity, pick="last"), AtEpoch(lens, quantity, since=since)
    return within(last, first, region, member=several(lens, quantity, member, since))


def towards(lens: str, quantity: str, region: Region) -> Judge:
    """A quantity after the last epoch looked at, of which the paper says that it gets into ``region`` in the end.

    What still grows from the last epoch but one on is undecided: a limit is not refuted before it is reached.
    """
    judged = value(AtEpoch(lens, quantity, pick="last"), region, member=is_standard)

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        found = []
        for alike in _alike(runs, is_standard):
            ways = [[q.value for _, q, _ in epochs(run, lens, quantity)] for run in alike]
            grows = any(len(way) > 1 and way[-1] > way[-2] for way in ways)
            for verdict in judged(alike):
                if grows and verdict.judgement == "contradicted":
                    says = f"{verdict.says} It still grows: more epochs decide."
                    verdict = replace(verdict, judgement="undecided", says=says)
                found.append(verdict)
        return found

    return judge


def costs(region: Region, *, first: Part, second: Part) -> Judge:
    """Training seconds per epoch of one method over those of another; intervals over epochs, or over seeds."""

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        found = []
        for a in _alike(runs, first):
            for b in _alike(runs, second):
                if setting(a[0]) != setting(b[0]):
                    continue
                pairs = [(one, two) for one in a for two in b if one.seed == two.seed and timed_alike(one, two)]
                if not pairs:
                    continue
                statistic = over_seeds([_slower(*pair) for pair in pairs])
                ends = [None if end is None else exp(end) for end in (statistic.low, statistic.high)]
                statistic = Statistic(exp(statistic.value), ends[0], ends[1], statistic.seeds)
                seconds = [float(np.mean([_seconds(pair[k]).mean() for pair in pairs])) for k in (0, 1)]
                says = f"{seconds[0]:.3g} s and {seconds[1]:.3g} s an epoch; ratio {statistic.value:.4g}"
                if ends[0] is not None and ends[1] is not None:
                    says += f" [{ends[0]:.4g}, {ends[1]:.4g}]"
                where = f"{describe(a[0])}: {a[0].method} and {b[0].method}"
                found.append(Verdict(decide(statistic, region), where, f"{says}.", statistic))
        return found

    return judge


def timed_alike(one: Run, two: Run) -> bool:
    """Whether two runs were timed, on the same kind of device."""
    known = all(run.metrics or run.provenance.get("seconds") for run in (one, two))
    return bool(known) and one.provenance.get("device") == two.provenance.get("device")


def _seconds(run: Run) -> NDArray[np.float64]:
    """Seconds an epoch between one record of training and the next; their mean alone where no record was kept."""
    if run.metrics:
        gaps = np.diff([0, *(int(record["epoch"]) for record in run.metrics)])
        seconds: NDArray[np.float64] = np.array([float(record["seconds"]) for record in run.metrics]) / gaps
        return seconds
    return np.array([run.provenance["seconds"] / run.config["training"]["epochs"]])


def _slower(one: Run, two: Run) -> Sample:
    """log of the ratio of the mean seconds per epoch, with the standard error over epochs."""
    a, b = _seconds(one), _seconds(two)
    known = len(a) > 1 and len(b) > 1
    relative = [float(s.std(ddof=1) / sqrt(len(s)) / s.mean()) if known else 0.0 for s in (a, b)]
    return Sample(log(a.mean() / b.mean()), sqrt(relative[0] ** 2 + relative[1] ** 2) if known else None, None)


def _alike(runs: Sequence[Run], member: Part) -> list[list[Run]]:
    """Runs of one method on one setting."""
    found: dict[tuple[str, str], list[Run]] = {}
    for group in methods([run for run in runs if member(run)]).values():
        for run in group:
            found.setdefault((run.method, setting(run)), []).append(run)
    return list(found.values())


def network(*names: str) -> Part:
    return lambda run: name_of(run.config["model"]) in names


def both(*parts: Part) -> Part:
    return lambda run: all(part(run) for part in parts)
