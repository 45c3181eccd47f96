"""Rank correlation, with its interval."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from robustlens.results.errors import InputError
from robustlens.results.intervals import Floats, Interval


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's ρ of paired ``a`` and ``b`` (n,): the correlation of their ranks, ties sharing the mean rank.

    NaN where all of ``a`` or all of ``b`` are equal.

    Raises:
        InputError: fewer than two pairs.
    """
    if len(a) < 2:
        raise InputError("rank correlation", expected="at least 2 pairs", got=str(len(a)), fix="Measure more examples.")
    return float(_rho(a[None], b[None])[0])


def bootstrap_spearman(a: Floats, b: Floats, *, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval of ``spearman`` over resampled pairs; resamples without ranks are left out."""
    draws = np.random.default_rng(seed).integers(0, len(a), size=(resamples, len(a)))
    found = _rho(a[draws], b[draws])
    low, high = np.nanquantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _rho(a: Floats, b: Floats) -> Floats:
    """ρ (rows,) of every row of ``a`` with the same row of ``b``."""
    r, s = (rankdata(values, axis=1) for values in (a, b))
    r, s = r - r.mean(1, keepdims=True), s - s.mean(1, keepdims=True)
    spread = np.sqrt((r * r).sum(1) * (s * s).sum(1))
    out = np.full(len(r), np.nan)
    np.divide((r * s).sum(1), spread, out=out, where=spread > 0)
    return out
