"""Means over examples with their 95 % bootstrap intervals; NaN stands for an example that has no value."""

from __future__ import annotations

import numpy as np

from robustlens.results.intervals import bootstrap_mean
from robustlens.results.panels import Floats, Series
from robustlens.results.reading import Quantity


def averaged(
    name: str, values: Floats, *, seed: int, unit: str = "", residual: float | None = None
) -> tuple[Quantity, ...]:
    """The mean of ``values`` (n,) with its interval and the number of values; nothing where there are none."""
    there = values[~np.isnan(values)]
    if len(there) == 0:
        return ()
    low, high = bootstrap_mean(there, seed=seed)
    mean = float(there.mean())
    # Rounding may put the mean of equal values outside of the interval of means.
    return (Quantity(name, mean, unit, min(low, mean), max(high, mean), len(there), residual),)


def band(name: str, x: Floats, values: Floats, *, seed: int) -> Series:
    """The mean of every column of ``values`` (n, len(x)) with its band; columns without a value are left out."""
    columns = [(at, averaged(name, column, seed=seed)) for at, column in zip(x, values.T, strict=True)]
    rows = [(at, q[0].value, q[0].low, q[0].high) for at, q in columns if q]
    return Series(name, *np.asarray(rows, dtype=np.float64).reshape(-1, 4).T)
