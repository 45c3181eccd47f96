"""Two shares measured on the same examples: their difference, its interval, and whether it can be chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, sqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

from robustlens.results.errors import InputError
from robustlens.results.intervals import Interval, wilson


def tail(successes: int, n: int) -> float:
    """P(X ≥ successes) for X ~ Binomial(n, ½), summed in whole numbers and therefore exact up to one rounding."""
    term = total = comb(n, successes)
    for k in range(successes, n):
        term = term * (n - k) // (k + 1)
        total += term
    return total / (1 << n)


@dataclass(frozen=True)
class Paired:
    """How many of the same n examples two tries got right: both, the first alone, the second alone, neither."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Self:
        """The counts of two arrays of bits (n,) about the same examples in the same order.

        Raises:
            InputError: no examples, or arrays of different length.
        """
        if first.shape != second.shape or first.size == 0:
            raise InputError(
                "paired comparison",
                expected="two arrays of bits about the same examples",
                got=f"shapes {first.shape} and {second.shape}",
                fix="Measure both on the same examples.",
            )
        counts = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(count.sum()) for count in counts))

    @property
    def n(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def shares(self) -> tuple[float, float]:
        """What each got right."""
        return (self.both + self.first) / self.n, (self.both + self.second) / self.n

    @property
    def difference(self) -> float:
        """Share of the second minus share of the first."""
        return (self.second - self.first) / self.n

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p-value: as far from an even split of the examples on which the two differ.

        2 P(X ≥ max(first, second)) for X ~ Binomial(first + second, ½), at most 1. McNemar 1947, Psychometrika 12.
        """
        return min(1.0, 2 * tail(max(self.first, self.second), self.first + self.second))

    @property
    def p_second_is_better(self) -> float:
        """The one-sided p-value P(X ≥ second), of the hypothesis that the second try is not the better one."""
        return tail(self.second, self.first + self.second)

    def interval(self, confidence: float = 0.95) -> Interval:
        """Newcombe's interval of ``difference``: the two Wilson intervals, combined as correlated errors.

        With l_i ≤ p_i ≤ u_i the Wilson intervals and φ the correlation of the table, corrected for continuity, it
        runs from θ − √((p₂−l₂)² − 2φ (p₂−l₂)(u₁−p₁) + (u₁−p₁)²) to θ + √((u₂−p₂)² − 2φ (u₂−p₂)(p₁−l₁) + (p₁−l₁)²).
        Newcombe 1998, Statistics in Medicine 17, 2635–2650, method 10.
        """
        n, (p1, p2) = self.n, self.shares
        l1, u1 = wilson(self.both + self.first, n, confidence)
        l2, u2 = wilson(self.both + self.second, n, confidence)
        phi = self._correlation()
        down = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
        up = (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2
        return self.difference - sqrt(max(down, 0.0)), self.difference + sqrt(max(up, 0.0))

    def _correlation(self) -> float:
        a, b, c, d = self.both, self.first, self.second, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        agreement = a * d - b * c
        if margins == 0:
            return 0.0
        corrected = agreement if agreement < 0 else max(agreement - self.n / 2, 0.0)
        return corrected / sqrt(margins)
