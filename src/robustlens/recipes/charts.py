"""Figures that a paper draws over many networks: a quantity against the radius of training, or of the attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robustlens.claims.evidence import Ask, Part, families, radius, strength
from robustlens.claims.statistics import Found, linear, over_seeds
from robustlens.results.panels import Curve, Series
from robustlens.results.runs import Run, methods

#: Colour and stroke (or facet, where there are many) of a line → x → what was found there, one a seed.
Lines = Mapping[tuple[str, str], Mapping[float, Sequence[Found]]]

RADIUS = "ε of training"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure: what it is called, its axes, and where its lines come from."""

    title: str
    x_label: str
    y_label: str
    lines: Callable[[Sequence[Run]], Lines]

    def draw(self, runs: Sequence[Run]) -> dict[str, Curve]:
        """A curve for each colour, of lines of two points and more: means over the seeds, with their intervals."""
        drawn: dict[str, list[Series]] = {}
        for (colour, stroke), line in self.lines(runs).items():
            points = {x: over_seeds([linear([1.0], [each]) for each in found]) for x, found in sorted(line.items())}
            if len(points) > 1:
                x, y = np.array(list(points)), np.array([point.value for point in points.values()])
                low, high = np.array([[each.low, each.high] for each in points.values()], dtype=float).T
                known = not np.isnan(low).any()  # NaN where nothing says how far a number can be trusted
                series = Series(stroke, x, y, low if known else None, high if known else None)
                drawn.setdefault(colour, []).append(series)
        return {colour: Curve(self.title, self.x_label, self.y_label, tuple(lines)) for colour, lines in drawn.items()}


def over_strength(asks: Mapping[str, Ask], member: Part = lambda run: bool(strength(run))) -> Callable[..., Lines]:
    """Over the radius of training: a line for each of ``asks`` and each family of runs (attack, network, clipping).

    Families have colours where there are several, else ``asks`` have them.
    """

    def lines(runs: Sequence[Run]) -> Lines:
        found = families(runs, member)
        words = [family.where.split(", ") for family in found]
        shared = set.intersection(*map(set, words)) if len(words) > 1 else {word for each in words for word in each}
        drawn: dict[tuple[str, str], dict[float, list[Found]]] = {}
        for family, own in zip(found, words, strict=True):
            colour = ", ".join(word for word in own if word not in shared)
            for name, ask in asks.items():
                for eps, seeds in family.by_strength.items():
                    there = [each for run in seeds.values() if (each := ask.of(run)) is not None]
                    if there:
                        drawn.setdefault((colour, name) if colour else (name, ""), {})[eps] = there
        return drawn

    return lines


def over_attack(lens: str, quantity: str, norm: str) -> Callable[..., Lines]:
    """Over the radius of the attack that the lens looked with: a line for each method."""

    def lines(runs: Sequence[Run]) -> Lines:
        drawn: dict[tuple[str, str], dict[float, list[Found]]] = {}
        for name, group in methods(runs).items():
            for reading in (each for run in group for each in run.readings if each.lens == lens):
                eps, threat = radius(reading), str((reading.settings.get("attack used") or {}).get("threat", ""))
                for each in reading.quantities:
                    if each.name == quantity and eps is not None and threat.startswith(f"{norm}:"):
                        drawn.setdefault((name, ""), {}).setdefault(eps, []).append((each, reading))
        return drawn

    return lines


def over(x: Callable[[Run], float | None], asks: Mapping[str, Ask]) -> Callable[..., Lines]:
    """Over a number of each network's own: a line for each of ``asks``."""

    def lines(runs: Sequence[Run]) -> Lines:
        drawn: dict[tuple[str, str], dict[float, list[Found]]] = {}
        for run in runs:
            place = x(run)
            for name, ask in asks.items():
                found = ask.of(run)
                if place is not None and found is not None:
                    drawn.setdefault((name, ""), {}).setdefault(place, []).append(found)
        return drawn

    return lines


def all_named(
    lens: str, before: str, draw: Callable[[Mapping[str, Ask]], Callable[..., Lines]]
) -> Callable[..., Lines]:
    """``draw`` for every quantity of the lens whose name begins with ``before``: one a layer, say."""

    def lines(runs: Sequence[Run]) -> Lines:
        names = [q.name for run in runs for each in run.readings if each.lens == lens for q in each.quantities]
        asks = {name.removeprefix(before): Ask(lens, name) for name in dict.fromkeys(names) if name.startswith(before)}
        return draw(asks)(runs)

    return lines
