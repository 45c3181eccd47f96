"""Confidence intervals of shares and of means."""

from __future__ import annotations

from math import hypot
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from robustlens.results.errors import InputError

Interval = tuple[float, float]
Floats = NDArray[np.float64]

#: Draws that one chunk of bootstrap resamples may hold.
CHUNK = 2**22


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share: all p with |successes/n − p| ≤ z √(p (1 − p) / n).

    Stays inside [0, 1] and keeps its width at 0 and n successes, where the textbook interval has none; (0, 1) for
    n = 0. Wilson 1927, JASA 22, 209–212.

    Raises:
        InputError: ``successes`` outside 0 … n.
    """
    if not 0 <= successes <= n:
        raise InputError("successes", expected=f"0 to {n}", got=str(successes), fix="Count them again.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def difference_of_shares(a: int, m: int, b: int, n: int) -> Interval:
    """Newcombe's interval of b/n − a/m for independent samples: both Wilson intervals, put together as errors.

    It keeps its width where nothing or everything succeeds. Newcombe 1998, Statistics in Medicine 17, 873–890,
    method 10.
    """
    (low_a, high_a), (low_b, high_b), p, q = wilson(a, m), wilson(b, n), a / m, b / n
    return q - p - hypot(q - low_b, high_a - p), q - p + hypot(high_b - q, p - low_a)


def bootstrap_mean(values: Floats, *, seed: int, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean of independent ``values`` (n,).

    Raises:
        InputError: no values.
    """
    return _percentiles(_means(values, np.random.default_rng(seed), resamples), confidence)


def bootstrap_difference(
    a: Floats, b: Floats, *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of mean(b) − mean(a) for two independent samples (n_a,) and (n_b,).

    Raises:
        InputError: an empty sample.
    """
    rng = np.random.default_rng(seed)
    means_a = _means(a, rng, resamples)
    return _percentiles(_means(b, rng, resamples) - means_a, confidence)


def _means(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Means (resamples,) of draws with replacement, in chunks of bounded memory."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise InputError("bootstrap", expected="at least one value", got="none", fix="Measure some examples.")
    rows = max(1, CHUNK // n)
    means = np.empty(resamples)
    for at in range(0, resamples, rows):
        here = min(rows, resamples - at)
        draws = rng.integers(0, n, size=(here, n), dtype=np.int32)
        means[at : at + here] = values[draws].mean(axis=1)
    return means


def _percentiles(means: Floats, confidence: float) -> Interval:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
