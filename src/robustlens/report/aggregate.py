"""Several seeds of one method → one panel to draw.

Curves and histograms become means over seeds. A curve's band runs from the lowest to the highest end of the seeds'
bands (of the seeds' values, where they have none). Tables that differ in numbers only are averaged. Heat maps and
galleries have no meaningful average (directions and pictures differ from seed to seed): the lowest seed's is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from robustlens.results.panels import Curve, Histogram, Panel, Series, Table

Floats = NDArray[np.float64]
Seeded = Sequence[tuple[int, Panel]]


def over_seeds(panels: Seeded) -> tuple[Panel, str]:
    """One panel for all seeds, and a sentence on how it came about (empty for a single seed)."""
    ordered = [panel for _, panel in sorted(panels, key=lambda pair: pair[0])]
    first = ordered[0]
    if len(ordered) == 1:
        return first, ""
    if isinstance(first, Curve):
        curves = [p for p in ordered if isinstance(p, Curve)]
        return _mean_curve(curves), "Lines are means over seeds; bands run from the lowest to the highest seed."
    if isinstance(first, Histogram):
        return _mean_histogram([p for p in ordered if isinstance(p, Histogram)]), "Shares are means over seeds."
    if isinstance(first, Table):
        mean = _mean_table([p for p in ordered if isinstance(p, Table)])
        if mean is not None:
            return mean, "Numbers are means over seeds."
    return first, f"Of {len(ordered)} seeds, seed {min(seed for seed, _ in panels)} is shown."


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    names = dict.fromkeys(series.name for curve in curves for series in curve.series)
    lines = [_mean_series([s for c in curves for s in c.series if s.name == name]) for name in names]
    first = curves[0]
    return Curve(first.title, first.x_label, first.y_label, tuple(lines), first.y_range, first.log_y)


def _mean_series(lines: Sequence[Series]) -> Series:
    longest = max(lines, key=lambda s: len(s.x))
    if len(lines) == 1:
        return longest
    same = all(np.array_equal(s.x, longest.x) for s in lines)
    if not same and not all(len(s.x) and np.all(np.diff(s.x) > 0) for s in lines):
        return lines[0]  # a path, not a function of x: nothing to average over
    y = np.stack([_at(longest.x, s.x, s.y) for s in lines])
    low = np.stack([_at(longest.x, s.x, s.y if s.low is None else s.low) for s in lines])
    high = np.stack([_at(longest.x, s.x, s.y if s.high is None else s.high) for s in lines])
    reached = np.stack([_inside(longest.x, s.x) if not same else np.ones(len(s.x), bool) for s in lines])
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, which is not drawn
        mean = np.where(reached, y, 0.0).sum(axis=0) / np.maximum(reached.sum(axis=0), 1)
    lowest = np.where(reached, low, np.inf).min(axis=0)
    highest = np.where(reached, high, -np.inf).max(axis=0)
    return Series(longest.name, longest.x, mean, lowest, highest)


def _inside(grid: Floats, x: Floats) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (grid >= x[0]) & (grid <= x[-1])
    return inside


def _at(grid: Floats, x: Floats, y: Floats) -> Floats:
    return y if np.array_equal(grid, x) else np.interp(grid, x, y)


def _mean_histogram(histograms: Sequence[Histogram]) -> Histogram:
    edges = common_edges([h.edges for h in histograms])
    names = dict.fromkeys(name for h in histograms for name in h.counts)
    counts = {
        name: np.mean([shares(h.edges, h.counts[name], edges) for h in histograms if name in h.counts], axis=0)
        for name in names
    }
    return Histogram(histograms[0].title, histograms[0].x_label, edges, counts)


def common_edges(many: Sequence[Floats]) -> Floats:
    """The edges themselves if all agree, else as many bins as the finest has over the whole range."""
    first = many[0]
    if all(np.array_equal(edges, first) for edges in many):
        return first
    finite = [edges[np.isfinite(edges)] for edges in many]
    finite = [edges for edges in finite if len(edges) > 1]
    if not finite:
        return np.array([0.0, 1.0])
    low, high = min(e[0] for e in finite), max(e[-1] for e in finite)
    bins = max(len(e) for e in finite)
    return np.geomspace(low, high, bins) if all(geometric(e) for e in finite) else np.linspace(low, high, bins)


def geometric(edges: Floats) -> bool:
    """Whether the bins are of equal width on a logarithmic axis (and not also on a linear one)."""
    if len(edges) < 3 or not np.all(np.isfinite(edges)) or edges[0] <= 0 or np.any(np.diff(edges) <= 0):
        return False
    steps = np.diff(np.log(edges))
    return bool(np.allclose(steps, steps[0], rtol=1e-3) and edges[-1] / edges[0] > 10)


def shares(edges: Floats, counts: Floats, onto: Floats) -> Floats:
    """Share of all counts in each bin of ``onto``, taking counts as spread evenly within their bins."""
    bounded = np.isfinite(edges[:-1]) & np.isfinite(edges[1:])
    held = np.where(bounded & np.isfinite(counts), counts, 0.0)
    total = float(held.sum())
    if total <= 0:
        return np.zeros(len(onto) - 1)
    if np.array_equal(edges, onto):
        return held / total
    cumulative = np.concatenate([[0.0], np.cumsum(held[bounded])])
    shared: Floats = np.diff(np.interp(onto, edges[np.isfinite(edges)], cumulative)) / total
    return shared


def _mean_table(tables: Sequence[Table]) -> Table | None:
    first = tables[0]
    if any(t.header != first.header or len(t.rows) != len(first.rows) for t in tables):
        return None
    rows: list[tuple[str | float | None, ...]] = []
    for same_row in zip(*(t.rows for t in tables), strict=True):
        if len({len(row) for row in same_row}) > 1:
            return None
        cells: list[str | float | None] = []
        for values in zip(*same_row, strict=True):
            numbers = [v for v in values if isinstance(v, int | float)]
            if len(numbers) == len(values):
                cells.append(numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers))
            elif all(v == values[0] for v in values):
                cells.append(values[0])
            else:
                return None
        rows.append(tuple(cells))
    return Table(first.title, first.header, tuple(rows))
