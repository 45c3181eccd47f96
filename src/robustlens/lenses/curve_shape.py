"""The shape of a loss curve around 0: slope, curvature, width, and how far chance moves them."""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student

from robustlens.results.panels import Floats

#: The loss above g(0) at which the width is measured, in nats.
RISE = 0.1
#: Bootstrap draws of examples.
DRAWS = 400


def resampled(losses: Floats, seed: int) -> list[Floats]:
    """Mean curves (directions, α) of ``losses`` (directions, α, n) for resampled examples."""
    rng, n = np.random.default_rng(seed), losses.shape[2]
    return [losses @ (np.bincount(rng.integers(0, n, n), minlength=n) / n) for _ in range(DRAWS)]


def half_width(values: Floats, again: Floats) -> Floats:
    """Half a 95 % interval of the mean of ``values`` (directions, …), which are ``again`` (draws, directions, …).

    Over the examples it comes from the draws, over k > 1 directions it is t_{k−1} s / √k: with the three that are usual
    a bootstrap of directions would be far too narrow. Both are put together as independent errors; one direction
    speaks of itself.
    """
    k = len(values)
    by_examples = 1.96 * again.mean(1).std(0, ddof=1)
    by_directions = student.ppf(0.975, k - 1) * values.std(0, ddof=1) / np.sqrt(k) if k > 1 else 0.0
    return np.hypot(by_examples, by_directions)  # type: ignore[no-any-return]


def fitted(alphas: Floats, curves: Floats) -> tuple[Floats, Floats, Floats]:
    """Slope, second derivative and its standard error (directions,) of the least-squares parabolas of ``curves``.

    ``curves`` is (directions, α) with at least 4 α. The error is that of the fit, from its residuals: where it is not
    small, g is no parabola there.
    """
    design = np.vander(alphas, 3, increasing=True)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = curves @ design @ inverse
    residual = curves - coefficients @ design.T
    variance = (residual**2).sum(1) / (len(alphas) - 3)
    return coefficients[:, 1], 2 * coefficients[:, 2], 2 * np.sqrt(variance * inverse[2, 2])


def widths(grid: Floats, curves: Floats) -> tuple[Floats, Floats]:
    """Length of the interval around 0 on which each curve (directions, α) is below its value at 0 plus 0.1.

    Beside it, whether both of its ends lie inside the grid.
    """
    zero = len(grid) // 2
    found, whole = [], []
    for curve in curves:
        right = _crossing(grid[zero:], curve[zero:])
        left = _crossing(-grid[zero::-1], curve[zero::-1])
        found.append((right or grid[-1]) + (left or grid[-1]))
        whole.append(right is not None and left is not None)
    return np.asarray(found), np.asarray(whole)


def _crossing(away: Floats, curve: Floats) -> float | None:
    """Where ``curve``, linear between the points ``away`` ≥ 0, first exceeds its start by 0.1, if it does."""
    target = curve[0] + RISE
    above = np.nonzero(curve > target)[0]
    if len(above) == 0:
        return None
    j = above[0]
    share = (target - curve[j - 1]) / (curve[j] - curve[j - 1])
    return float(away[j - 1] + share * (away[j] - away[j - 1]))
