"""Lenses at chosen epochs of a run, and what they found put side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustlens.core import discovery
from robustlens.core.types import Followed, Lens
from robustlens.report.numbers import number
from robustlens.results.errors import InputError, require_at_least
from robustlens.results.panels import Curve, Gallery, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading

#: How ``when`` is written.
WHEN = re.compile(r"epochs:\s*\d{1,9}(\s*,\s*\d{1,9})*")


@dataclass(frozen=True)
class Scheduled:
    """A lens, and after which epochs it looks; none is the end of training."""

    lens: Lens
    epochs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.lens.name} over epochs" if self.epochs else self.lens.name


def schedule(choice: str | Mapping[str, Any]) -> Scheduled:
    """A lens of a study: its name or its settings, among them ``when`` = "end" or "epochs:1,10,20".

    Raises:
        InputError: another ``when``, an epoch below 1, or what ``discovery.build`` refuses.
    """
    settings = {"name": choice} if isinstance(choice, str) else dict(choice)
    when = settings.pop("when", "end")
    lens: Lens = discovery.build("lens", settings)
    if hasattr(lens, "n_examples"):
        require_at_least(lens, n_examples=1)
    if when == "end":
        return Scheduled(lens)
    fits = isinstance(when, str) and WHEN.fullmatch(when)
    epochs = sorted({int(number) for number in re.findall(r"\d+", when)}) if fits else []
    if not epochs or epochs[0] < 1:
        raise InputError(
            f"when of lens {lens.name!r}",
            expected='"end" or epochs from 1 on',
            got=repr(when),
            fix='Write for example when = "epochs:1,10,20".',
        )
    return Scheduled(lens, tuple(epochs))


def side_by_side(scheduled: Scheduled, found: Sequence[tuple[int, Reading]]) -> Reading:
    """One reading of what a lens found after each epoch: its headline numbers as curves, its pictures one below the
    other, every number in a table, and what the lens has to say of them together."""
    first, last = found[0][1], found[-1][1]
    names = list(dict.fromkeys(name for _, reading in found for name in reading.headline))
    spans = [f"{name} {_brief(first, name)} → {_brief(last, name)}" for name in names]
    marks = [str(epoch) for epoch, _ in found]
    epochs = f"epochs {', '.join(marks)}" if len(marks) <= 6 else f"{len(marks)} epochs from {marks[0]} to {marks[-1]}"
    troubled = [f"after epoch {e}: {r.outcome.why}" for e, r in found if r.outcome.status != "ok"]
    together = scheduled.lens.follow(found) if isinstance(scheduled.lens, Followed) else None
    together = together or Reading(scheduled.lens.name, "")
    nothing = all(reading.outcome.status == "failed" for _, reading in found)
    doubt = Outcome.failed if nothing else Outcome.unreliable
    return Reading(
        lens=scheduled.name,
        says=f"Over {epochs}: {'; '.join(spans) or 'nothing was measured'}. {together.says}".rstrip(),
        outcome=doubt(" ".join(troubled)) if troubled else Outcome(),
        quantities=(
            *together.quantities,
            *(
                Quantity(**{**vars(quantity), "name": f"{quantity.name}, epoch {epoch}"})
                for epoch, reading in found
                for quantity in reading.quantities
            ),
        ),
        panels=(*together.panels, *_curves(names, found), *_galleries(found), _table(found)),
        settings={**last.settings, "when": f"epochs:{','.join(str(epoch) for epoch in scheduled.epochs)}"},
        examples={f"{name}, epoch {e}": values for e, reading in found for name, values in reading.examples.items()},
    )


def _quantity(reading: Reading, name: str) -> Quantity | None:
    return next((quantity for quantity in reading.quantities if quantity.name == name), None)


def _brief(reading: Reading, name: str) -> str:
    quantity = _quantity(reading, name)
    return "nothing" if quantity is None else number(quantity.value, quantity.unit)


def _curves(names: Sequence[str], found: Sequence[tuple[int, Reading]]) -> list[Panel]:
    curves: list[Panel] = []
    for name in names:
        points = [(epoch, q) for epoch, reading in found if (q := _quantity(reading, name)) is not None]
        x = np.array([float(epoch) for epoch, _ in points])
        y, low, high = (
            np.array([q.value if end is None or getattr(q, end) is None else getattr(q, end) for _, q in points])
            for end in (None, "low", "high")
        )
        unit = points[0][1].unit
        banded = any(q.low is not None for _, q in points)
        line = Series(name, x, y, low, high) if banded else Series(name, x, y)
        curves.append(Curve(name[:1].upper() + name[1:], "epoch", unit or name, (line,)))
    return curves


def _galleries(found: Sequence[tuple[int, Reading]]) -> list[Panel]:
    """The pictures of all epochs under one title, where they are of one shape."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[int, Gallery]]] = {}
    for epoch, reading in found:
        for panel in reading.panels:
            if isinstance(panel, Gallery):
                groups.setdefault((panel.title, panel.header), []).append((epoch, panel))
    return [
        Gallery(
            title,
            header,
            tuple(f"epoch {epoch}: {caption}" for epoch, panel in panels for caption in panel.captions),
            np.concatenate([panel.images for _, panel in panels]),
        )
        for (title, header), panels in groups.items()
    ]


def _table(found: Sequence[tuple[int, Reading]]) -> Table:
    names = dict.fromkeys(quantity.name for _, reading in found for quantity in reading.quantities)
    rows = []
    for name in names:
        cells = [_quantity(reading, name) for _, reading in found]
        rows.append((name, *(None if cell is None else cell.value for cell in cells)))
    return Table("Every number by epoch", ("", *(f"epoch {epoch}" for epoch, _ in found)), tuple(rows))
