"""Robust overfitting: the robust error on new images rises again in the course of training (Rice et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robustlens.results.intervals import bootstrap_mean
from robustlens.results.panels import Curve, Floats, Series
from robustlens.results.reading import Quantity, Reading

ERROR = "robust error, test"
RISE = "rise of the robust error since its lowest, test"


def overfitting(found: Sequence[tuple[int, Reading]]) -> Reading | None:
    """How much the robust test error rose from the best epoch to the last, from generalisation gaps by epoch.

    The epoch that is best on some images looks better on them than it is. So each half of the images is measured at
    the epoch that is best on the other half, and the rise is the mean over all of them, with a 95 % bootstrap
    interval over the images, each paired with itself.
    None where not at least two images were attacked after at least two epochs.
    """
    kept = [reading.examples[ERROR] for _, reading in found if ERROR in reading.examples]
    if len(kept) < max(2, len(found)) or len(kept[0]) < 2:
        return None
    errors = np.array(kept, dtype=float)
    best, last = found[int(errors.mean(1).argmin())][0], found[-1][0]
    rises = _since_the_lowest(errors)
    rise, (low, high) = float(rises.mean()), bootstrap_mean(rises, seed=0)
    said = f"Robust test error is lowest after epoch {best}"
    if best == last:
        said += ", the last: no robust overfitting."
    else:
        points, ends = _signed(rise), f"[{_signed(low)}, {_signed(high)}]"
        verdict = "robust overfitting" if low > 0 else "no more than chance"
        said += f", and {points} points {ends} from there to epoch {last}: {verdict}."
    return Reading(
        lens="generalisation-gap",
        says=said,
        quantities=(Quantity(RISE, rise, "fraction", low, high, errors.shape[1]),),
        panels=tuple(_curve(measure, found) for measure in ("robust error", "robust loss")),
    )


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _since_the_lowest(errors: Floats) -> Floats:
    """(n,): an example's last error less that at the epoch which is best for the other half, ``errors`` (epochs, n)."""
    half = np.arange(errors.shape[1]) % 2 == 0
    rises = np.empty(errors.shape[1])
    for mine, other in ((half, ~half), (~half, half)):
        rises[mine] = (errors[-1] - errors[errors[:, other].mean(1).argmin()])[mine]
    return rises


def _curve(measure: str, found: Sequence[tuple[int, Reading]]) -> Curve:
    epochs = np.array([float(epoch) for epoch, _ in found])
    lines = []
    for split in ("train", "test"):
        points = [reading[f"{measure}, {split}"] for _, reading in found]
        y, low, high = (np.array([getattr(q, end) for q in points]) for end in ("value", "low", "high"))
        lines.append(Series(split, epochs, y, low, high))
    return Curve(f"{measure[:1].upper()}{measure[1:]}", "epoch", points[0].unit, tuple(lines))
