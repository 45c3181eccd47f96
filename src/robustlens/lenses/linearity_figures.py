"""What the lens on local linearity measured, and the numbers and pictures made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from robustlens.core.types import Threat
from robustlens.results.intervals import Interval, wilson
from robustlens.results.panels import Curve, Floats, Histogram, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading

WAYS = ("random", "adversarial")
#: Resamples of a bootstrap interval.
RESAMPLES = 1000
BINS = 40
HEADER = (
    "direction",
    "output",
    "distance",
    "deviation",
    "low",
    "high",
    "relative deviation",
    "share exactly linear",
    "n",
)


class Measured:
    """Deviations of all images, as they come in; ``ways`` are the directions, ``parts`` the outputs.

    ``deviation[way, part]`` (n, D), ``change[way, part]`` (n,) the size of J v, ``floor[way, part]`` (n, D) float64's
    rounding, ``rounding[part]`` (n,) that of float32; ``kinks[way]`` (n,); ``sigmas[way]`` and ``residuals[way]``
    (m, points) at ``norm_at``; ``radii`` (f,) by name. ``no_regions`` says why kinks and radii are missing, ``pools``
    whether they are only upper bounds.
    """

    def __init__(self, threat: Threat, distances: Floats, parts: Iterable[str]) -> None:
        self.threat, self.distances, self.parts = threat, distances, tuple(parts)
        self._seen: dict[tuple[str, str], list[list[Floats]]] = {}
        self.rounding: dict[str, list[Floats]] = {part: [] for part in self.parts}
        self.kinks: dict[str, list[Floats]] = {way: [] for way in WAYS}
        self.sigmas: dict[str, list[Floats]] = {way: [] for way in WAYS}
        self.residuals: dict[str, list[Floats]] = {way: [] for way in WAYS}
        self.norm_at: Floats = np.zeros(0)
        self.radii: dict[str, list[Floats]] = {"facet radius": [], "facet radius, ReLUs alone": []}
        self.no_regions: str | None = None
        self.pools = False

    def add(self, way: str, part: str, arrays: list[Floats]) -> None:
        """Deviations (B, D), sizes of J v (B,) and roundings (B, D) of a batch."""
        self._seen.setdefault((way, part), []).append(arrays)

    def ways(self) -> list[str]:
        return [way for way in WAYS if (way, "logits") in self._seen]

    def of(self, way: str, part: str) -> tuple[Floats, Floats, Floats]:
        deviation, change, floor = (np.concatenate(arrays) for arrays in zip(*self._seen[way, part], strict=True))
        return deviation, change, floor

    def finite(self) -> bool:
        return all(np.isfinite(a).all() for seen in self._seen.values() for arrays in seen for a in arrays)


def reading_of(lens: str, measured: Measured, *, seed: int, settings: Mapping[str, Any]) -> Reading:
    quantities: list[Quantity] = []
    curves: dict[str, list[Series]] = {}
    rows: list[tuple[str | float | None, ...]] = []
    for part in measured.parts:
        for way in measured.ways():
            found, lines, table = _deviation(measured, way, part, seed)
            quantities += found
            rows += table
            for title, line in lines.items():
                curves.setdefault(f"{title}, {part}", []).append(line)
    quantities += [*_regions(measured, seed), *_norms(measured, seed), *_roundings(measured)]
    names = [q.name for q in quantities]
    wanted = [f"relative deviation, logits, {way}" for way in reversed(WAYS)]
    headline = tuple(name for name in wanted if name in names) or ("deviation, logits, random",)
    problem = Outcome()
    if "adversarial" not in measured.ways():
        problem = Outcome.unreliable(
            "No image has an adversarial direction: the attack found no gradient to follow, so only random directions "
            "were measured, which say little about the worst ones."
        )
    return Reading(
        lens,
        _sentence(measured, quantities),
        problem,
        tuple(quantities),
        headline,
        _panels(measured, curves, rows, seed),
        settings,
    )


def _deviation(
    measured: Measured, way: str, part: str, seed: int
) -> tuple[list[Quantity], dict[str, Series], list[tuple[str | float | None, ...]]]:
    """Numbers at the radius, lines over the distances, and rows of the table, for one direction and output."""
    deviation, change, floor = measured.of(way, part)
    n, t = len(change), measured.distances
    at = int(np.searchsorted(t, measured.threat.eps))
    counts = _resampled(n, seed)
    mean, means = deviation.mean(0), counts @ deviation / n
    intervals = [_interval(means[:, k], mean[k]) for k in range(len(t))]
    bands = np.array(intervals)
    exact = (deviation <= floor).sum(0)
    shares = [wilson(int(e), n) for e in exact]
    where = f"{part}, {way}"
    found = [Quantity(f"deviation, {where}", float(mean[at]), "", *intervals[at], n)]
    lines = {
        "Deviation from linearity": Series(way, t, mean, *bands.T),
        "Deviation at small distances": Series(way, np.log10(t), mean, *bands.T),
        "Share of images where the network is exactly linear": Series(way, np.log10(t), exact / n, *np.array(shares).T),
    }
    relative: list[float | None] = [None] * len(t)
    linear, linears = t * change.mean(), np.outer(counts @ change / n, t)
    if change.mean() > 0 and bool((linears > 0).all()):
        ratio = mean / linear
        ends = [_interval(means[:, k] / linears[:, k], ratio[k]) for k in range(len(t))]
        relative = ratio.tolist()
        found.append(Quantity(f"relative deviation, {where}", float(ratio[at]), "fraction", *ends[at], n))
        lines["Deviation over linear change"] = Series(way, t, ratio, *np.array(ends).T)
    found.append(Quantity(f"share exactly linear, {where}", float(exact[at] / n), "fraction", *shares[at], n))
    small = (t <= 0.1 * measured.threat.eps * (1 + 1e-9)) & (deviation > 10 * floor).all(0)
    if small.sum() >= 3:
        order = float(_slopes(t[small], mean[None, small])[0])
        found.append(Quantity(f"order, {where}", order, "", *_interval(_slopes(t[small], means[:, small]), order), n))
    rows: list[tuple[str | float | None, ...]] = [
        (way, part, float(t[k]), float(mean[k]), *intervals[k], relative[k], float(exact[k] / n), n)
        for k in range(len(t))
    ]
    return found, lines, rows


def _regions(measured: Measured, seed: int) -> list[Quantity]:
    """Medians of the first kinks and of the facet radii."""
    nature: Literal["exact", "upper bound"] = "upper bound" if measured.pools else "exact"
    found = []
    for way in measured.ways():
        if measured.kinks[way]:
            kinks = np.concatenate(measured.kinks[way])
            draws = np.random.default_rng(seed).integers(0, len(kinks), size=(RESAMPLES, len(kinks)))
            middle = float(np.median(kinks))
            ends = np.sort(np.median(kinks[draws], axis=1))[[RESAMPLES // 40, -RESAMPLES // 40 - 1]]
            if np.isfinite([middle, *ends]).all():
                low, high = min(middle, *ends), max(middle, *ends)
                found.append(
                    Quantity(f"first kink, {way}", middle, "", float(low), float(high), len(kinks), None, nature)
                )
    for name, radii in measured.radii.items():
        if radii and np.isfinite(np.median(radii)):
            best: Literal["exact", "upper bound"] = nature if name == "facet radius" else "upper bound"
            found.append(Quantity(name, float(np.median(radii)), "", n=len(radii), nature=best))
    return found


def _norms(measured: Measured, seed: int) -> list[Quantity]:
    """Mean singular values at the image and at the radius, with the largest residual."""
    found = []
    for way in measured.ways():
        sigmas, residuals = np.concatenate(measured.sigmas[way]), np.concatenate(measured.residuals[way])
        counts = _resampled(len(sigmas), seed)
        for k, t in enumerate(measured.norm_at):
            name = {0.0: "largest singular value at the image", measured.threat.eps: f"largest singular value, {way}"}
            if t in name and (t > 0 or way == "random"):
                mean = float(sigmas[:, k].mean())
                low, high = _interval(counts @ sigmas[:, k] / len(sigmas), mean)
                worst = float(residuals[:, k].max())
                found.append(Quantity(name[t], mean, "", low, high, len(sigmas), worst, "lower bound"))
    return found


def _roundings(measured: Measured) -> list[Quantity]:
    found = []
    for part in measured.parts:
        lost = np.concatenate(measured.rounding[part])
        found.append(Quantity(f"float32 rounding, {part}", float(lost.mean()), n=len(lost)))
        floor = measured.of("random", part)[2]
        found.append(
            Quantity(f"float64 rounding, {part}", float(floor[:, 0].mean()), n=len(lost), nature="upper bound")
        )
    return found


def _panels(
    measured: Measured, curves: Mapping[str, list[Series]], rows: list[tuple[str | float | None, ...]], seed: int
) -> tuple[Panel, ...]:
    norm = str(measured.threat).partition(":")[0]
    far, near = f"distance t ({norm})", f"log10 of the distance t ({norm})"
    panels: list[Panel] = []
    for title, lines in curves.items():
        if title.startswith("Share"):
            panels.append(Curve(title, near, "share of images", tuple(lines), (0.0, 1.0)))
        elif title.startswith("Deviation at small"):
            panels.append(Curve(title, near, "‖φ(x + tv) − φ(x) − tJv‖", tuple(lines), log_y=True))
        elif title.startswith("Deviation over"):
            panels.append(Curve(title, far, "deviation / ‖tJv‖", tuple(lines)))
        else:
            panels.append(Curve(title, far, "‖φ(x + tv) − φ(x) − tJv‖", tuple(lines)))
    norms = []
    for way in measured.ways():
        sigmas = np.concatenate(measured.sigmas[way])
        mean, means = sigmas.mean(0), _resampled(len(sigmas), seed) @ sigmas / len(sigmas)
        bands = np.array([_interval(means[:, k], mean[k]) for k in range(len(mean))])
        norms.append(Series(way, measured.norm_at, mean, *bands.T))
    panels.append(Curve("Largest singular value of the Jacobian along the way", far, "σ₁ of J(x + tv)", tuple(norms)))
    kinks = {way: np.concatenate(measured.kinks[way]) for way in measured.ways() if measured.kinks[way]}
    finite = np.concatenate([k[np.isfinite(k) & (k > 0)] for k in kinks.values()] or [np.zeros(0)])
    if len(finite) and finite.min() < finite.max():
        edges = np.geomspace(finite.min(), finite.max(), BINS + 1)
        edges[[0, -1]] = finite.min(), finite.max()
        clipped = {way: np.clip(k[np.isfinite(k)], edges[0], edges[-1]) for way, k in kinks.items()}
        counts = {way: np.histogram(k, bins=edges)[0].astype(np.float64) for way, k in clipped.items()}
        panels.append(Histogram("Distance to the first kink", far, edges, counts))
    panels.append(Table("Local linearity by distance", HEADER, tuple(rows)))
    if measured.no_regions is not None:
        panels.append(Table("Linear regions", ("first kink and facet radius",), ((measured.no_regions,),)))
    return tuple(panels)


def _sentence(measured: Measured, quantities: list[Quantity]) -> str:
    value = {q.name: q.value for q in quantities}
    said = [
        f"{value[f'relative deviation, logits, {way}']:.1%} in {kind} direction"
        for way, kind in (("adversarial", "an adversarial"), ("random", "a random"))
        if f"relative deviation, logits, {way}" in value
    ]
    eps, norm = measured.threat.eps, str(measured.threat).partition(":")[0]
    moved = f"When an image moves by {eps:.4g} ({norm}), the logits depart from what the derivative predicts by"
    if not said:
        return f"{moved} {value['deviation, logits, random']:.3g} in a random direction."
    return f"{moved} {' and '.join(said)} (of the predicted change)."


def _resampled(n: int, seed: int) -> Floats:
    """How often each of ``n`` images is drawn in every bootstrap resample (RESAMPLES, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def _interval(resampled: Floats, value: float) -> Interval:
    """The middle 95 % of ``resampled``, stretched to hold ``value``."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return min(float(low), float(value)), max(float(high), float(value))


def _slopes(t: Floats, means: Floats) -> Floats:
    """Least-squares slopes (R,) of log ``means`` (R, k) in log ``t`` (k,)."""
    across = np.log(t) - np.log(t).mean()
    slopes: Floats = np.log(means) @ across / (across @ across)
    return slopes
