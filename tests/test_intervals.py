"""Intervals against published values, exact distributions and their promised coverage."""

from __future__ import annotations

import numpy as np
import pytest

from robustlens.lenses.curve_shape import half_width, resampled
from robustlens.results.errors import InputError
from robustlens.results.intervals import bootstrap_difference, bootstrap_mean, difference_of_shares, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation() -> None:
    for end in wilson(37, 120, confidence=0.9):
        assert (37 / 120 - end) ** 2 == pytest.approx(1.6448536269514722**2 * end * (1 - end) / 120, rel=1e-9)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0
    low, high = wilson(7, 7)
    assert high == 1.0 and low == pytest.approx(1 - wilson(0, 7)[1])
    with pytest.raises(InputError, match="expected 0 to 3"):
        wilson(4, 3)


@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10, columns (a), (b), (d) and (e).
    [(48, 80, 56, 70, 0.0524, 0.3339), (3, 10, 9, 10, 0.1705, 0.8090), (0, 29, 5, 56, -0.0381, 0.1926),
     (0, 20, 0, 10, -0.1611, 0.2775)],
)  # fmt: skip
def test_difference_of_shares_as_published(a: int, m: int, b: int, n: int, low: float, high: float) -> None:
    assert difference_of_shares(a, m, b, n) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap_mean(np.full(5, 2.0), seed=0) == (2.0, 2.0)
    assert bootstrap_difference(np.full(5, 2.0), np.full(9, 5.0), seed=0) == (3.0, 3.0)


def test_bootstrap_mean_of_bits_is_binomial() -> None:
    """Resampled means of bits are Binomial(n, p)/n; their quantiles, within 4 standard errors of 20,000 resamples."""
    values = np.repeat([0.0, 1.0], [300, 100])
    low, high = bootstrap_mean(values, seed=1, resamples=20_000)
    std = (0.25 * 0.75 / 400) ** 0.5
    # Standard error of a 2.5 % quantile: √(q(1−q)/N) / density, about 0.019 std; plus a step of the lattice, 1/400.
    assert low == pytest.approx(0.25 - 1.96 * std, abs=4 * 0.019 * std + 1 / 400)
    assert high == pytest.approx(0.25 + 1.96 * std, abs=4 * 0.019 * std + 1 / 400)


def test_bootstrap_difference_covers() -> None:
    """Of 400 intervals of a true difference of ½, 95 % hold it; bounds at 5 standard errors (1.1 % each)."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(400):
        low, high = bootstrap_difference(rng.normal(0, 1, 80), rng.normal(0.5, 2, 60), seed=seed, resamples=300)
        held += low <= 0.5 <= high
    assert 0.89 <= held / 400 <= 1.0


def test_bootstrap_is_repeatable_and_chunks_do_not_change_its_law() -> None:
    values = np.random.default_rng(3).exponential(size=50_000)
    found = bootstrap_mean(values, seed=5, resamples=200)
    assert found == bootstrap_mean(values, seed=5, resamples=200)
    std = values.std() / 50_000**0.5
    assert found == pytest.approx((values.mean() - 1.96 * std, values.mean() + 1.96 * std), abs=1.2 * std)


def test_no_values_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one value"):
        bootstrap_mean(np.empty(0), seed=0)


@pytest.mark.parametrize("directions", [2, 3, 10])
def test_the_interval_covers_few_directions_as_well(directions: int) -> None:
    """Chance of directions 1, of examples 2 over √100 of them; 400 intervals, of which 95 % hold the truth."""
    rng, held = np.random.default_rng(directions), 0
    for seed in range(400):
        losses = rng.normal(0, 1, (directions, 1, 1)) + rng.normal(0, 2, (1, 1, 100))
        means = losses.mean(2)[:, 0]
        again = np.array(resampled(losses, seed))[:, :, 0]
        held += abs(means.mean()) <= half_width(means, again)
    assert 0.925 <= held / 400 <= 0.99
