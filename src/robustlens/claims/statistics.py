"""Statistics over runs, with intervals over the examples and over the seeds behind them.

Each returns ``judge(runs) -> [Verdict, …]``, one verdict for each setting that the runs offer.

A linear statistic v = Σ_j w_j q_j of quantities q_j has the standard error √(Σ w_j² se_j²) over examples, where se_j is
what the quantity's own interval says. Means over the very same examples, whose values b_ij were kept, are paired: the
error is that of the mean of Σ_j w_j b_ij over the examples i, because what is hard for one network is hard for another.
The error is not divided by the number of seeds, because all networks of a setting see the same examples. An exact
quantity (a margin over all training images, say) has no such error: with one seed it speaks of one network, as the
number of seeds beside it says. Over k > 1 seeds v is averaged, and t_{k−1} s / √k is its error over seeds. The half
width of the interval is the root of the sum of both squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from robustlens.claims.evidence import Ask, Family, Part, describe, families, setting
from robustlens.results.reading import Quantity, Reading, spelled
from robustlens.results.runs import Run, seedless
from robustlens.results.verdict import Region, Statistic, Verdict, decide

Judge = Callable[[Sequence[Run]], list[Verdict]]
Found = tuple[Quantity, Reading]

#: Half the width of a 95 % interval, in standard errors.
Z = 1.959964


@dataclass(frozen=True)
class Sample:
    """One seed's value of a statistic: with the error over examples (None: unknown), n, and what is wrong with it."""

    value: float
    error: float | None
    n: int | None
    trouble: str = ""


def over_seeds(samples: Sequence[Sample], unit: str = "") -> Statistic:
    """The mean over seeds and its interval."""
    values = np.array([sample.value for sample in samples])
    k = len(values)
    errors = [sample.error for sample in samples]
    by_examples = None if None in errors else Z * float(np.mean([error or 0.0 for error in errors]))
    by_seeds = None if k == 1 else float(student.ppf(0.975, k - 1) * values.std(ddof=1) / sqrt(k))
    counts = [sample.n for sample in samples if sample.n is not None]
    mean, n = float(values.mean()), min(counts, default=None)
    if by_examples is None and by_seeds is None:
        return Statistic(mean, None, None, k, n, unit)
    half = hypot(by_examples or 0.0, by_seeds or 0.0)
    return Statistic(mean, mean - half, mean + half, k, n, unit)


def linear(weights: Sequence[float], found: Sequence[Found]) -> Sample:
    """Σ w_j q_j for one seed."""
    value = sum(w * quantity.value for w, (quantity, _) in zip(weights, found, strict=True))
    errors = [error_of(quantity) for quantity, _ in found]
    error = None if None in errors else sqrt(sum((w * (e or 0.0)) ** 2 for w, e in zip(weights, errors, strict=True)))
    together = _same_examples(found)
    if together is not None:
        error = paired_error(weights, together)
    return Sample(value, error, _least(found), trouble_of(found))


def paired_error(weights: Sequence[float], values: Sequence[NDArray[Any]]) -> float:
    """Standard error of Σ_j w_j mean_i b_ij, from the ``values`` b_ij (n,) of the same n examples.

    For answers, which are bits, two examples are added that are spread evenly over all 2^m of them, so that it is not
    zero where all agree. For a difference that is Agresti and Min 2005, Statistics in Medicine 24, 729–740: half an
    example in each cell.
    """
    w = np.array(weights)
    each = w @ np.array(values, dtype=float)
    if any(value.dtype != np.bool_ for value in values):
        return float(each.std(ddof=1)) / sqrt(len(each))
    n, first, second = len(each) + 2, w.sum(), w.sum() ** 2 / 2 + (w**2).sum() / 2
    mean = (each.sum() + first) / n
    return sqrt(((each**2).sum() + second) / n - mean**2) / sqrt(n)


def _same_examples(found: Sequence[Found]) -> list[NDArray[Any]] | None:
    """The values behind two or more means, where all are of the same examples in one order."""
    kept = [there for quantity, reading in found if (there := reading.of_each(quantity.name)) is not None]
    if len(kept) < max(2, len(found)) or len(kept[0].places) < 2:
        return None
    alike = all(each.split == kept[0].split and np.array_equal(each.places, kept[0].places) for each in kept)
    return [each.values for each in kept] if alike else None


def trend(ask: Ask, region: Region, *, member: Part, least: float = 0.0) -> Judge:
    """The change of a quantity along the least-squares line over the strengths of training, from least to most.

    ``member`` says which runs are of the family; ``least`` leaves out weaker ones (standard training has strength 0).
    """

    def judged(family: Family) -> Verdict | None:
        found = {
            eps: {seed: there for seed, run in runs.items() if (there := ask.of(run)) is not None}
            for eps, runs in family.by_strength.items()
            if eps >= least
        }
        asked = {eps: seeds for eps, seeds in found.items() if seeds}
        return line(asked, region, family.where, "ε")

    return lambda runs: [v for family in families(runs, member) if (v := judged(family)) is not None]


def line(
    by: Mapping[float, Mapping[int, Found]], region: Region, where: str, over: str, *, log: bool = False
) -> Verdict | None:
    """The change along the least-squares line of what each seed found, over x or log x, from the least x to the most.

    ``by`` is x → seed → what was found; seeds that some x lacks are left out. None with fewer than two x, or no seed.
    """
    x = sorted(by)
    seeds = sorted(set.intersection(*(set(by[each]) for each in x))) if x else []
    if len(x) < 2 or not seeds:
        return None
    place = np.log(x) if log else np.array(x)
    away = place - place.mean()
    weights = away / (away @ away) * (place[-1] - place[0])
    samples = [linear(weights.tolist(), [by[each][seed] for each in x]) for seed in seeds]
    way = " → ".join(f"{np.mean([by[each][seed][0].value for seed in seeds]):.4g}" for each in x)
    first = by[x[0]][seeds[0]][0]
    text = f"{first.name} {way} at {over} = {', '.join(f'{each:.4g}' for each in x)}"
    return verdict_of(samples, region, where, text, first.unit, "change over that range")


def compare(
    ask: Ask,
    region: Region,
    *,
    first: Part,
    second: Part,
    ratio: bool = False,
    against: Ask | None = None,
    same_draws: bool = False,
) -> Judge:
    """A quantity of one method minus that of another, or over it; each setting's runs are paired by seed.

    ``against`` is what is asked of the second, where that is another quantity. Where several configurations play the
    same part, every pair is judged. Readings under different threats are not compared, unless each is ``own``.
    ``same_draws`` says that both saw the same images and directions, whose chance they share: of several seeds the
    interval is then over seeds alone, and speaks of these images.
    """

    def judged(a: Mapping[int, Run], b: Mapping[int, Run]) -> Verdict | None:
        pairs = [
            (found, other)
            for seed in sorted(set(a) & set(b))
            if (found := ask.of(a[seed])) is not None and (other := (against or ask).of(b[seed])) is not None
        ]
        if not pairs or not (ask.own or _alike(pairs)):
            return None
        one, two = (next(iter(runs.values())) for runs in (a, b))
        where = f"{describe(one)}: {one.method} and {two.method}"
        values = [float(np.mean([pair[k][0].value for pair in pairs])) for k in (0, 1)]
        text = f"{pairs[0][0][0].name} {values[0]:.4g} and {values[1]:.4g}"
        return _of_pairs(pairs, region, where, text, ratio, same_draws and len(pairs) > 1)

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        found = []
        for group in _by(setting, runs).values():
            ones, others = (list(by_configuration(filter(part, group)).values()) for part in (first, second))
            found += [v for a in ones for b in others if a is not b and (v := judged(a, b)) is not None]
        return found

    return judge


def at_each_threat(lens: str, make: Callable[[Mapping[str, str]], Judge]) -> Judge:
    """The judge that ``make`` gives for the settings of each threat that a lens was used with."""

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        seen = {r.settings.get("threat") for run in runs for r in run.readings if r.lens == lens}
        return [
            replace(verdict, where=f"{verdict.where}, measured at {spelled(threat)}")
            for threat in sorted(str(each) for each in seen if each is not None)
            for verdict in make({"threat": threat})(runs)
        ]

    return judge


def value(ask: Ask, region: Region, *, member: Part) -> Judge:
    """A quantity of each method itself."""

    def judged(runs: Mapping[int, Run]) -> Verdict | None:
        found = [there for _, run in sorted(runs.items()) if (there := ask.of(run)) is not None]
        if not found:
            return None
        one = next(iter(runs.values()))
        samples = [linear([1.0], [each]) for each in found]
        text = found[0][0].name
        return verdict_of(samples, region, f"{describe(one)}: {one.method}", text, found[0][0].unit, "value")

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        groups = by_configuration(filter(member, runs)).values()
        return [v for group in groups if (v := judged(group)) is not None]

    return judge


def within(ask: Ask, against: Ask, region: Region, *, member: Part, ratio: bool = False) -> Judge:
    """Two quantities of the same networks: their difference, or their ratio."""

    def judged(runs: Mapping[int, Run]) -> Verdict | None:
        pairs = [
            (a, b)
            for _, run in sorted(runs.items())
            if (a := ask.of(run)) is not None and (b := against.of(run)) is not None
        ]
        if not pairs:
            return None
        one = next(iter(runs.values()))
        middle = [float(np.mean([pair[k][0].value for pair in pairs])) for k in (0, 1)]
        text = f"{pairs[0][0][0].name} {middle[0]:.4g}, {pairs[0][1][0].name} {middle[1]:.4g}"
        return _of_pairs(pairs, region, f"{describe(one)}: {one.method}", text, ratio)

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        groups = by_configuration(filter(member, runs)).values()
        return [v for group in groups if (v := judged(group)) is not None]

    return judge


def _of_pairs(
    pairs: Sequence[tuple[Found, Found]], region: Region, where: str, text: str, ratio: bool, seeds_alone: bool = False
) -> Verdict:
    """First minus second, or over it, over the seeds, and over the examples unless ``seeds_alone`` count."""
    if ratio and min(quantity.value for pair in pairs for quantity, _ in pair) <= 0:
        return Verdict("undecided", where, f"{text}; a ratio needs positive numbers.")
    samples = [_ratio(*pair) if ratio else linear([1.0, -1.0], pair) for pair in pairs]
    if seeds_alone:
        samples = [replace(sample, error=None) for sample in samples]
    unit, kind = ("", "ratio") if ratio else (pairs[0][0][0].unit, "difference")
    return verdict_of(samples, region, where, text, unit, kind, logarithmic=ratio)


def _alike(pairs: Sequence[tuple[Found, Found]]) -> bool:
    """Whether all readings are of one threat."""
    return len({str(reading.settings.get("threat")) for pair in pairs for _, reading in pair}) == 1


def _ratio(a: Found, b: Found) -> Sample:
    """log(a / b) for one seed."""
    errors = [error_of(quantity) for quantity, _ in (a, b)]
    (one, _), (two, _) = a, b
    known = None not in errors
    error = hypot((errors[0] or 0.0) / one.value, (errors[1] or 0.0) / two.value) if known else None
    together = _same_examples([a, b])
    if together is not None:
        error = paired_error([1 / one.value, -1 / two.value], together)
    return Sample(log(one.value / two.value), error, _least([a, b]), trouble_of([a, b]))


def verdict_of(
    samples: Sequence[Sample],
    region: Region,
    where: str,
    text: str,
    unit: str,
    kind: str,
    *,
    logarithmic: bool = False,
) -> Verdict:
    statistic = over_seeds(samples, unit)
    if logarithmic:
        ends = [None if end is None else exp(end) for end in (statistic.low, statistic.high)]
        statistic = Statistic(exp(statistic.value), ends[0], ends[1], statistic.seeds, statistic.n)
    trouble = next((sample.trouble for sample in samples if sample.trouble), "")
    says = f"{text}; {kind} {_shown(statistic)}."
    if trouble:
        return Verdict("undecided", where, f"{says} A reading behind it is unreliable: {trouble}", statistic, trouble)
    if statistic.low is None:
        says += " One seed and no interval over examples: more seeds decide."
    return Verdict(decide(statistic, region), where, says, statistic)


def _shown(statistic: Statistic) -> str:
    value, interval = statistic.value, ""
    if statistic.low is not None and statistic.high is not None:
        interval = f" [{statistic.low:.4g}, {statistic.high:.4g}]"
        if abs(value) < 1e-9 * (statistic.high - statistic.low):
            value = 0.0  # what cancels leaves the rounding
    return f"{value:.4g}{interval}{statistic.unit and ' '}{statistic.unit}"


def error_of(quantity: Quantity) -> float | None:
    alone = quantity.n is not None and quantity.n < 2  # one example says nothing of its chance
    if quantity.low is None or quantity.high is None or alone:
        return 0.0 if quantity.nature == "exact" else None
    return (quantity.high - quantity.low) / (2 * Z)


def _least(found: Sequence[Found]) -> int | None:
    return min((quantity.n for quantity, _ in found if quantity.n is not None), default=None)


def trouble_of(found: Sequence[Found]) -> str:
    return next((reading.outcome.why for _, reading in found if reading.outcome.status == "unreliable"), "")


def _by(key: Callable[[Run], str], runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(key(run), []).append(run)
    return grouped


def by_configuration(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Seeds of each configuration."""
    grouped: dict[str, dict[int, Run]] = {}
    for run in runs:
        grouped.setdefault(seedless(run.config), {})[run.seed] = run
    return grouped
