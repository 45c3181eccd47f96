"""The summary table as plain data: a row per method, a column per headline quantity of every lens.

With one seed a cell is the quantity and its interval. With several it is their mean, and the interval runs from the
lowest to the highest end of the seeds' intervals (of their values, where they have none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from robustlens.report import numbers
from robustlens.report.collect import Section, sections
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run, load, methods
from robustlens.results.store import RunDirectory


@dataclass(frozen=True)
class Column:
    """A headline quantity of a lens; ``lens`` is the name to show, with settings where the lens ran with several."""

    lens: str
    quantity: str
    unit: str
    nature: str

    @property
    def title(self) -> str:
        return self.quantity.replace("_", " ")


@dataclass(frozen=True)
class Cell:
    """One method's number. ``status`` is the worst outcome among its seeds; ``why`` says what went wrong."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: tuple[int, ...] = ()
    by_seed: tuple[tuple[int, float], ...] = ()
    status: Literal["ok", "unreliable", "failed", "absent"] = "ok"
    why: str = ""
    best: bool = False

    @property
    def interval(self) -> str:
        """The interval alone, as it stands in ``text``."""
        return self.text[self.text.find("[") :] if self.low is not None else ""

    @property
    def detail(self) -> str:
        """What stands behind the number: examples, seeds, reasons."""
        parts = []
        if self.n:
            sizes = sorted(set(self.n))
            parts.append("n = " + " / ".join(f"{size:,}" for size in sizes) + (" a seed" if len(self.n) > 1 else ""))
        if len(self.by_seed) > 1:
            parts.append("by seed: " + ", ".join(f"{seed}: {value:.4g}" for seed, value in self.by_seed))
        if self.why:
            parts.append(f"{self.status}: {self.why}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Row:
    method: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Summary:
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def texts(self) -> list[list[str]]:
        """Formatted rows with a header, for a terminal; a number that cannot be trusted carries its status."""
        header = ["method", *(f"{column.lens}: {column.title}" for column in self.columns)]
        return [header, *([row.method, *(plain(cell) for cell in row.cells)] for row in self.rows)]


def plain(cell: Cell) -> str:
    """The cell's text, with its status behind it unless all is well."""
    return cell.text if cell.status in ("ok", "absent") or cell.value is None else f"{cell.text} ⚠ {cell.status}"


def summarise(runs: Sequence[RunDirectory]) -> Summary:
    """Aggregate the headline numbers of the runs over seeds; raises InputError on a damaged run directory."""
    return summary_of(load(runs))


def summary_of(runs: Sequence[Run]) -> Summary:
    """As ``summarise``, of runs that are in memory."""
    grouped, columns, cells = methods(runs), [], []
    for section in sections(runs):
        for name in dict.fromkeys(name for _, reading in section.entries for name in reading.headline):
            found = [q for _, reading in section.entries if (q := _find(reading, name))]
            if found:
                natures = dict.fromkeys(q.nature for q in found)
                columns.append(Column(section.name, name, found[0].unit, " / ".join(natures)))
                shown = [_cell(section, method, name) for method in grouped]
                cells.append(_mark_best(shown, found[0]) if section.alike else shown)
    rows = [
        Row(method, tuple(run.seed for run in group), tuple(column[i] for column in cells))
        for i, (method, group) in enumerate(grouped.items())
    ]
    return Summary(tuple(columns), tuple(rows))


def _find(reading: Reading, name: str) -> Quantity | None:
    return next((q for q in reading.quantities if q.name == name), None)


def _cell(section: Section, method: str, name: str) -> Cell:
    entries = [(run.seed, reading) for run, reading in section.entries if run.method == method]
    if not entries:
        return Cell("—", status="absent", why="not measured")
    outcome = worst([reading.outcome for _, reading in entries])
    found = [(seed, q) for seed, reading in entries if (q := _find(reading, name))]
    if not found:
        text = "failed" if outcome.status == "failed" else "—"
        return Cell(text, status=outcome.status if outcome.status != "ok" else "absent", why=outcome.why)
    quantities = [q for _, q in found]
    value = sum(q.value for q in quantities) / len(quantities)
    low = high = None
    if len(quantities) > 1 or (quantities[0].low is not None and quantities[0].high is not None):
        low = min(q.value if q.low is None else q.low for q in quantities)
        high = max(q.value if q.high is None else q.high for q in quantities)
    if low == high and all(q.low is None for q in quantities):
        low = high = None  # seeds that agree exactly: an exact number, not an interval
    unit = quantities[0].unit
    text = f"{numbers.number(value, unit)} {numbers.interval(low, high, unit)}".strip()
    sizes = tuple(q.n for q in quantities if q.n is not None)
    by_seed = tuple((seed, q.value) for seed, q in found)
    return Cell(text, value, low, high, sizes, by_seed, outcome.status, outcome.why)


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The worst of the outcomes, with every distinct reason of that kind."""
    for status in ("failed", "unreliable"):
        reasons = dict.fromkeys(outcome.why for outcome in outcomes if outcome.status == status)
        if reasons:
            return Outcome("failed" if status == "failed" else "unreliable", " ".join(reasons))
    return Outcome()


def _mark_best(cells: list[Cell], quantity: Quantity) -> list[Cell]:
    """Mark an accuracy whose whole interval lies above all the others', where every number can be trusted.

    Of other quantities nobody said which direction is better: nothing is marked.
    """
    measured = [cell for cell in cells if cell.status != "absent"]
    if "accuracy" not in quantity.name.lower() or quantity.unit != "fraction" or len(measured) < 2:
        return cells
    if any(c.status != "ok" or c.low is None or c.high is None or not math.isfinite(c.low) for c in measured):
        return cells
    top = max(measured, key=lambda cell: cell.value or 0.0)
    clear = all((other.high or 0.0) < (top.low or 0.0) for other in measured if other is not top)
    return [replace(cell, best=clear and cell is top) for cell in cells]
