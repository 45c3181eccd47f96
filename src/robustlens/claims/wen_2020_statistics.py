"""Statistics of Wen, Li and Jia 2020: over radii, layers, and networks that are clipped and not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import exp, hypot, log

import numpy as np

from robustlens.claims.evidence import (
    Ask,
    Family,
    Part,
    constraints,
    families,
    is_plain,
    is_trained_against,
    name_of,
    regularizers,
)
from robustlens.claims.statistics import Judge, Sample, Z, at_each_threat, over_seeds, trend
from robustlens.results.intervals import wilson
from robustlens.results.reading import Reading
from robustlens.results.runs import Run, seedless
from robustlens.results.verdict import FALLS, RISES, Judgement, Region, Statistic, Verdict, decide

#: The least radius of a trend that leaves out standard training.
TRAINED = 1e-9
#: Share of the layers, where most of them are more than half.
MOST: Region = (0.5, float("inf"))
#: What the names of a layer's quantity in "layer-spectra" begin with, and end with where BatchNorm is in it.
LAYER = "spread of singular values, "
FOLDED = "BatchNorm folded in"


def is_deep(run: Run) -> bool:
    """Any network of more than one layer."""
    return name_of(run.config["model"]) not in ("logistic", "softmax-regression")


def is_stuck(run: Run) -> bool:
    """It is no better than one answer for all images.

    No change, however large, makes a right answer wrong; or it is right about as often as its probabilities of the
    right class are large, exp(−loss), where one answer stands: at 1/K and ln K of K classes alike. What learned
    something is right more often.
    """
    return any(_is_right_at_any_distance(reading) or _is_at_chance(reading) for reading in run.readings)


def _is_right_at_any_distance(reading: Reading) -> bool:
    found = {quantity.name: quantity.value for quantity in reading.quantities}
    return reading.lens == "accuracy" and found.get("accuracy without limit", 0.0) >= 0.99 * found.get(
        "clean accuracy", 1.0
    )


def _is_at_chance(reading: Reading) -> bool:
    found = {quantity.name: quantity for quantity in reading.quantities}
    if reading.lens != "generalisation-gap" or not {"loss, test", "error, test"} <= found.keys():
        return False
    loss, error = found["loss, test"].value, found["error, test"]
    least = 1 - (error.value if error.high is None else error.high)
    return loss >= 0.99 * log(2) and least <= exp(-loss)


def trained(attack: str) -> Part:
    """A deep network trained against ``attack`` and nothing else, which learned something."""
    against = is_trained_against(attack)
    return lambda run: is_deep(run) and is_plain(run) and against(run) and not is_stuck(run)


def on(*data: str) -> Part:
    """Trained against PGD on one of these sets, wherever they are read from."""
    plain = trained("pgd")
    return lambda run: plain(run) and str(run.config["data"]["source"]).rpartition("/")[2] in data


def clipped(norm: float | None = None) -> Part:
    """Trained against PGD with every layer's operator norm clipped, to ``norm`` where one is given."""
    against = is_trained_against("pgd")
    return lambda run: (
        against(run)
        and constraints(run) == {"spectral-clip"}
        and not regularizers(run)
        and norm in (None, run.config["constraints"][0]["norm"])
        and not is_stuck(run)
    )


PGD, FGSM = trained("pgd"), trained("fgsm")


def at_one_radius(quantity: str, region: Region, member: Part) -> Judge:
    """The trend of an accuracy on test images, for each threat that several strengths were examined under."""

    return at_each_threat(
        "accuracy",
        lambda at: trend(Ask("accuracy", quantity, {"split": "test", **at}), region, member=member, least=TRAINED),
    )


def at_each_radius(measure: str, region: Region, member: Part) -> Judge:
    """The trend of the loss variation, for each radius that it was measured at."""

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        quantities = [q for run in runs for r in run.readings if r.lens == "confidence" for q in r.quantities]
        names = sorted({q.name for q in quantities if q.name.startswith(f"{measure} at ")})
        return [
            replace(verdict, where=f"{verdict.where}, changes of {name.rpartition(' at ')[2]}")
            for name in names
            for verdict in at_each_threat("confidence", partial(fitted, name))(runs)
        ]

    def fitted(name: str, at: Mapping[str, str]) -> Judge:
        return trend(Ask("confidence", name, at), region, member=member, least=TRAINED)

    return judge


def share_of_layers(member: Part) -> Judge:
    """The share of layers whose singular values spread less at the largest radius than at the smallest one.

    Its error is over seeds alone: the layers are all there are.
    """

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        return [v for family in families(runs, member) if (v := _layers(family)) is not None]

    return judge


def _layers(family: Family) -> Verdict | None:
    strengths = [eps for eps in family.by_strength if eps >= TRAINED]
    if len(strengths) < 2:
        return None
    weak, strong = ({seed: _spreads(run) for seed, run in family.by_strength[strengths[k]].items()} for k in (0, -1))
    samples, moves = [], []
    several = len(set(weak) & set(strong)) > 1
    for seed in sorted(set(weak) & set(strong)):
        layers = sorted(set(weak[seed]) & set(strong[seed]))
        if layers:
            change = np.array([strong[seed][layer] - weak[seed][layer] for layer in layers])
            fewer = int((change < 0).sum())
            low, high = wilson(fewer, len(layers))  # seeds that agree do not make a share of few layers certain
            samples.append(Sample(fewer / len(layers), (high - low) / (2 * Z) if several else None, len(layers)))
            moves.append((-change[change < 0].sum(), change[change > 0].sum()))
    if not samples:
        return None
    found = over_seeds(samples, "of the layers")
    says = f"{found.value:.4g} of {found.n} layers spread less at ε = {strengths[-1]:.4g} than at {strengths[0]:.4g}"
    says += "; one seed: more decide." if found.low is None else f" [{found.low:.4g}, {found.high:.4g}]."
    says += " Those shrink by {:.3g} together, the others grow by {:.3g} (B.2).".format(*np.mean(moves, axis=0))
    return Verdict(decide(found, MOST), family.where, says, found)


def _spreads(run: Run) -> dict[str, float]:
    """Layer → standard deviation of its singular values, without BatchNorm."""
    return {
        quantity.name.removeprefix(LAYER): quantity.value
        for reading in run.readings
        if reading.lens == "layer-spectra" and reading.outcome.status == "ok"
        for quantity in reading.quantities
        if quantity.name.startswith(LAYER) and not quantity.name.endswith(FOLDED)
    }


def _with_and_without(ask: Ask, runs: Sequence[Run]) -> Iterator[tuple[Verdict, Verdict]]:
    """The trends of families that differ in the clipping to 1 alone: whether it rises without, and falls with it."""
    for free in families(runs, PGD):
        for held in families(runs, clipped(1.0)):
            if _unclipped(free) == _unclipped(held):
                rises, falls = (
                    trend(ask, region, member=member, least=TRAINED)(_members(family))
                    for family, region, member in ((free, RISES, PGD), (held, FALLS, clipped(1.0)))
                )
                yield from zip(rises, falls, strict=False)


def _members(family: Family) -> list[Run]:
    return [run for seeds in family.by_strength.values() for run in seeds.values()]


def _unclipped(family: Family) -> str:
    """What its strongest training was, but for the clipping."""
    return seedless({key: part for key, part in _members(family)[-1].config.items() if key != "constraints"})


def flips(ask: Ask) -> Judge:
    """The lesser of the rise without clipping and the fall with it: positive where both are there."""

    def judged(free: Verdict, held: Verdict) -> Verdict:
        both = (free.judgement, held.judgement)
        judgement: Judgement = "supported" if both == ("supported", "supported") else "undecided"
        if "contradicted" in both:
            judgement = "contradicted"
        return Verdict(judgement, held.where, _says(free, held), _lesser(free.statistic, held.statistic))

    return lambda runs: [judged(*pair) for pair in _with_and_without(ask, runs)]


def _says(free: Verdict, held: Verdict) -> str:
    return f"Unclipped: {free.says} Clipped to 1: {held.says}"


def _lesser(rise: Statistic | None, change: Statistic | None) -> Statistic | None:
    if rise is None or change is None:
        return None
    low = None if rise.low is None or change.high is None else min(rise.low, -change.high)
    high = None if rise.high is None or change.low is None else min(rise.high, -change.low)
    return replace(rise, value=min(rise.value, -change.value), low=low, high=high)


def turns_down(ask: Ask) -> Judge:
    """The trend without clipping minus the trend with it; the two are taken to err independently."""

    def judged(free: Verdict, held: Verdict) -> Verdict | None:
        a, b = free.statistic, held.statistic
        if a is None or b is None:
            return None
        value = a.value - b.value
        found = replace(a, value=value, low=None, high=None)
        if None not in (a.high, b.high):
            half = hypot((a.high or 0.0) - a.value, (b.high or 0.0) - b.value)
            found = replace(a, value=value, low=value - half, high=value + half)
        trouble = free.trouble or held.trouble
        judgement = "undecided" if trouble else decide(found, RISES)
        return Verdict(judgement, held.where, _says(free, held), found, trouble)

    return lambda runs: [v for pair in _with_and_without(ask, runs) if (v := judged(*pair)) is not None]
