"""Paired comparisons against scipy, published numbers and exact coverage."""

from __future__ import annotations

import itertools
from math import factorial, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from robustlens.results.errors import InputError
from robustlens.results.intervals import bootstrap_mean
from robustlens.results.paired import Paired, tail


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_examples_that_differ(first: int, second: int) -> None:
    found = Paired(7, first, second, 3)
    if first + second:
        assert found.p == pytest.approx(binomtest(first, first + second).pvalue, rel=1e-9)
        greater = binomtest(second, first + second, alternative="greater").pvalue
        assert found.p_second_is_better == pytest.approx(greater, rel=1e-9)
    else:
        assert found.p == found.p_second_is_better == 1.0


def test_tails_in_closed_form() -> None:
    assert [tail(k, 3) for k in range(5)] == [1, 7 / 8, 4 / 8, 1 / 8, 0]
    assert tail(1000, 1000) == 2.0**-1000
    assert tail(5001, 10_001) == 0.5


def test_counts_by_hand() -> None:
    first, second = np.array([1, 1, 1, 0, 0, 0, 0], bool), np.array([1, 0, 0, 1, 0, 0, 0], bool)
    found = Paired.of(first, second)
    assert (found.both, found.first, found.second, found.neither, found.n) == (1, 2, 1, 3, 7)
    assert found.shares == (3 / 7, 2 / 7) and found.difference == pytest.approx(-1 / 7)
    for a, b in ((first, second[:3]), (first[:0], second[:0])):
        with pytest.raises(InputError, match="about the same examples"):
            Paired.of(a, b)


def test_interval_of_a_published_example() -> None:
    """Altman et al. 2000, Statistics with Confidence, p. 52: 14, 5, 0, 22 of 41 pairs: 0.122 with 0.011 to 0.226."""
    low, high = Paired(14, 0, 5, 22).interval()
    assert Paired(14, 0, 5, 22).difference == pytest.approx(0.122, abs=5e-4)
    assert (low, high) == pytest.approx((0.011, 0.226), abs=5e-4)


def test_exchanging_the_two_mirrors_everything() -> None:
    one, other = Paired(30, 4, 9, 7), Paired(30, 9, 4, 7)
    assert one.interval() == pytest.approx(tuple(-end for end in reversed(other.interval())))
    assert one.p == other.p and one.difference == -other.difference


@pytest.mark.parametrize("cells", list(itertools.product((0, 1, 6), repeat=4))[1:])
def test_interval_holds_the_difference_and_stays_in_range(cells: tuple[int, int, int, int]) -> None:
    found = Paired(*cells)
    low, high = found.interval()
    assert -1 <= low <= found.difference <= high <= 1
    assert low < high


@pytest.mark.parametrize(
    "cells", [(0.6, 0.1, 0.1, 0.2), (0.3, 0.05, 0.25, 0.4), (0.85, 0.02, 0.08, 0.05), (0.1, 0.3, 0.3, 0.3)]
)
def test_coverage_by_enumerating_every_table(cells: tuple[float, ...]) -> None:
    """The interval holds the truth in 95 % of all tables of 24 examples, weighted by their probability."""
    n, truth = 24, cells[2] - cells[1]
    held = total = 0.0
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        if (d := n - a - b - c) < 0:
            continue
        ways = factorial(n) // (factorial(a) * factorial(b) * factorial(c) * factorial(d))
        weight = ways * cells[0] ** a * cells[1] ** b * cells[2] ** c * cells[3] ** d
        low, high = Paired(a, b, c, d).interval()
        held, total = held + weight * (low <= truth <= high), total + weight
    assert total == pytest.approx(1)
    assert 0.93 <= held <= 0.995


def test_interval_agrees_with_the_paired_bootstrap_where_there_are_many_examples() -> None:
    found = Paired(2400, 200, 320, 1080)
    bits = np.repeat([0.0, -1.0, 1.0, 0.0], [2400, 200, 320, 1080])
    std = sqrt(((200 + 320) / 4000 - found.difference**2) / 4000)
    assert found.interval() == pytest.approx(bootstrap_mean(bits, seed=0, resamples=4000), abs=0.2 * std)
