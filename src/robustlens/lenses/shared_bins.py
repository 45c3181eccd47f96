"""Histograms of several groups over the same bins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from robustlens.results.panels import Histogram


def histogram(title: str, label: str, values: Mapping[str, NDArray[np.float64]], bins: int) -> Histogram:
    """Counts of each group of ``values`` in ``bins`` bins over the range of them all."""
    every = np.concatenate(list(values.values()))
    low, high = every.min(), every.max()
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # bins for what differs by rounding would have no width
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    counts = {name: np.histogram(each, bins=edges)[0].astype(np.float64) for name, each in values.items()}
    return Histogram(title, label, edges, counts)
