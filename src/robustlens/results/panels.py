"""Drawable results: curves, histograms, heat maps, tables and picture galleries.

A panel is frozen numpy data. ``columns()`` gives it as a flat table for parquet and ``facts()`` gives the rest as
JSON values; ``restore(facts, columns)`` is their inverse. Panels of equal ``title`` from several runs are drawn
over each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Columns = Mapping[str, Sequence[Any]]


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a curve; ``low``/``high`` is its 95 % band, where it has one."""

    name: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """Lines over a common axis. ``y_range`` fixes the axis (accuracies: 0 to 1); ``log_y`` makes it logarithmic."""

    kind: ClassVar[str] = "curve"
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_range: tuple[float, float] | None = None
    log_y: bool = False

    def facts(self) -> dict[str, Any]:
        return {
            "x_label": self.x_label,
            "y_label": self.y_label,
            "y_range": self.y_range,
            "log_y": self.log_y,
            "names": [s.name for s in self.series],
        }

    def columns(self) -> Columns:
        rows: dict[str, list[Any]] = {"series": [], "x": [], "y": [], "low": [], "high": []}
        for s in self.series:
            rows["series"] += [s.name] * len(s.x)
            rows["x"] += _floats(s.x).tolist()
            rows["y"] += _floats(s.y).tolist()
            rows["low"] += [None] * len(s.x) if s.low is None else _floats(s.low).tolist()
            rows["high"] += [None] * len(s.x) if s.high is None else _floats(s.high).tolist()
        return rows

    @classmethod
    def restore(cls, title: str, facts: Mapping[str, Any], columns: Columns) -> Self:
        owner = np.asarray(columns["series"], dtype=object)

        def part(column: str, name: str) -> Floats | None:
            values = [v for v, o in zip(columns[column], owner, strict=True) if o == name]
            return None if any(v is None for v in values) else _floats(values)

        series = []
        for name in facts["names"]:
            x, y = part("x", name), part("y", name)
            assert x is not None and y is not None
            series.append(Series(name, x, y, part("low", name), part("high", name)))
        y_range = facts["y_range"]
        return cls(
            title,
            facts["x_label"],
            facts["y_label"],
            tuple(series),
            None if y_range is None else (float(y_range[0]), float(y_range[1])),
            facts["log_y"],
        )


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts per bin: ``edges`` (n + 1,), ``counts`` one array (n,) per series (for example train and test)."""

    kind: ClassVar[str] = "histogram"
    title: str
    x_label: str
    edges: Floats
    counts: Mapping[str, Floats]

    def facts(self) -> dict[str, Any]:
        return {"x_label": self.x_label, "names": list(self.counts), "edges": _floats(self.edges).tolist()}

    def columns(self) -> Columns:
        return {name: _floats(values).tolist() for name, values in self.counts.items()}

    @classmethod
    def restore(cls, title: str, facts: Mapping[str, Any], columns: Columns) -> Self:
        counts = {name: _floats(columns[name]) for name in facts["names"]}
        return cls(title, facts["x_label"], _floats(facts["edges"]), counts)


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Values ``z`` (len(y), len(x)) on a grid."""

    kind: ClassVar[str] = "heatmap"
    title: str
    x_label: str
    y_label: str
    x: Floats
    y: Floats
    z: Floats

    def facts(self) -> dict[str, Any]:
        return {
            "x_label": self.x_label,
            "y_label": self.y_label,
            "x": _floats(self.x).tolist(),
            "y": _floats(self.y).tolist(),
        }

    def columns(self) -> Columns:
        return {"z": _floats(self.z).ravel().tolist()}

    @classmethod
    def restore(cls, title: str, facts: Mapping[str, Any], columns: Columns) -> Self:
        x, y = _floats(facts["x"]), _floats(facts["y"])
        z = _floats(columns["z"]).reshape(len(y), len(x))
        return cls(title, facts["x_label"], facts["y_label"], x, y, z)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of text and numbers."""

    kind: ClassVar[str] = "table"
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]

    def facts(self) -> dict[str, Any]:
        return {"header": list(self.header), "rows": [list(row) for row in self.rows]}

    def columns(self) -> Columns:
        return {}

    @classmethod
    def restore(cls, title: str, facts: Mapping[str, Any], columns: Columns) -> Self:
        return cls(title, tuple(facts["header"]), tuple(tuple(row) for row in facts["rows"]))


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures in rows: ``images`` uint8 (rows, len(header), height, width, channels 1 or 3), a caption a row."""

    kind: ClassVar[str] = "gallery"
    title: str
    header: tuple[str, ...]
    captions: tuple[str, ...]
    images: NDArray[np.uint8]

    def facts(self) -> dict[str, Any]:
        return {
            "header": list(self.header),
            "captions": list(self.captions),
            "shape": list(self.images.shape),
        }

    def columns(self) -> Columns:
        return {"pixels": [row.tobytes() for row in self.images]}

    @classmethod
    def restore(cls, title: str, facts: Mapping[str, Any], columns: Columns) -> Self:
        images = np.frombuffer(b"".join(columns["pixels"]), dtype=np.uint8).reshape(facts["shape"])
        return cls(title, tuple(facts["header"]), tuple(facts["captions"]), images)


Panel = Curve | Histogram | Heatmap | Table | Gallery
PANELS: dict[str, type[Panel]] = {p.kind: p for p in (Curve, Histogram, Heatmap, Table, Gallery)}
