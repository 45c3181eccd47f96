"""Which layers' singular values draw together from one network to another, and which spread out."""

from __future__ import annotations

from typing import NamedTuple

from robustlens.lenses.spectra import PLAIN
from robustlens.results.errors import InputError
from robustlens.results.panels import Table
from robustlens.results.reading import Reading


class Change(NamedTuple):
    """Σ |s_i(after) − s_i(before)| over a group of ``layers`` layers, in ``total`` and per layer (0 for no layer)."""

    total: float
    mean: float
    layers: int


class SpreadChange(NamedTuple):
    """The layers whose standard deviation is smaller in the second network, and those where it is larger."""

    shrinking: Change
    growing: Change


def compare_spreads(
    before: Reading, after: Reading, *, table: str = PLAIN, column: str = "standard deviation"
) -> SpreadChange:
    """Compare the standard deviations s_i of the layers' singular values in two readings of ``layer-spectra``.

    With ``before`` at the weaker and ``after`` at the stronger adversarial training these are the sums
    Σ (s_i^4 − s_i^16) over the layers that shrink and Σ (s_i^16 − s_i^4) over those that grow of Wen, Li and Jia 2020,
    arXiv 2011.07478, appendix B.2. A layer that does not change is in neither.

    Args:
        table: title of the table to read, ``spectra.PLAIN`` or ``spectra.FOLDED``.
        column: "standard deviation", or "reshaped: standard deviation".

    Raises:
        InputError: a reading without that table or column, or two networks with different layers.
    """
    old, new = _column(before, table, column), _column(after, table, column)
    if old.keys() != new.keys():
        raise InputError(
            "comparing spreads",
            expected="two networks with the same layers",
            got=f"{', '.join(sorted(old.keys() ^ new.keys()))} in one of them",
            fix="Compare runs of one architecture.",
        )
    changes = [new[layer] - old[layer] for layer in old]
    return SpreadChange(_change([-c for c in changes if c < 0]), _change([c for c in changes if c > 0]))


def _change(amounts: list[float]) -> Change:
    return Change(sum(amounts), sum(amounts) / max(len(amounts), 1), len(amounts))


def _column(reading: Reading, title: str, column: str) -> dict[str, float]:
    """Layer → number, of the layers that were measured."""
    for panel in reading.panels:
        if isinstance(panel, Table) and panel.title == title and column in panel.header:
            at = panel.header.index(column)
            return {str(row[0]): float(cell) for row in panel.rows if (cell := row[at]) is not None}
    raise InputError(
        "comparing spreads",
        expected=f"a reading with the table {title!r} and its column {column!r}",
        got=f"{reading.lens} ({reading.outcome.status})",
        fix="Give readings of the lens layer-spectra.",
    )
