"""Drawable results: curves, histograms, heat maps, tables and picture galleries.

A panel is frozen numpy data. ``columns()`` gives it as a flat table for parquet and ``facts()`` gives the rest as
JSON values; ``restore(facts, columns)`` is their inverse, and checks what it gets: anybody may have written it. Panels
of equal ``title`` from several runs are drawn over each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

Floats = NDArray[np.float64]
Columns = Mapping[str, Sequence[Any]]


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)


def column(values: Any) -> Floats:
    """Stored numbers (n,), infinite beyond 1e300 so that what is computed with them stays a number.

    Raises:
        TypeError, ValueError: something else.
    """
    found = _floats(values)
    if found.ndim != 1:
        raise ValueError("a column is not made of numbers")
    return np.where(np.abs(found) > 1e300, np.copysign(np.inf, found), found)


Size = Annotated[int, Field(ge=1)]


class CurveFacts(BaseModel):
    title: str
    x_label: str
    y_label: str
    y_range: tuple[float, float] | None
    log_y: bool
    names: list[str]


class HistogramFacts(BaseModel):
    title: str
    x_label: str
    names: list[str]
    edges: list[float]


class HeatmapFacts(BaseModel):
    title: str
    x_label: str
    y_label: str
    x: list[float]
    y: list[float]


class TableFacts(BaseModel):
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


class GalleryFacts(BaseModel):
    title: str
    header: tuple[str, ...]
    captions: tuple[str, ...]
    shape: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Size, Size, Literal[1, 3]]


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
    def restore(cls, facts: CurveFacts, columns: Columns) -> Self:
        owner = columns["series"]

        def part(end: str, name: str) -> Floats | None:
            values = [v for v, o in zip(columns[end], owner, strict=True) if o == name]
            return None if any(v is None for v in values) else column(values)

        series = []
        for name in facts.names:
            x, y = part("x", name), part("y", name)
            if x is None or y is None:
                raise ValueError("a curve without numbers")
            series.append(Series(name, x, y, part("low", name), part("high", name)))
        return cls(facts.title, facts.x_label, facts.y_label, tuple(series), facts.y_range, facts.log_y)


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
    def restore(cls, facts: HistogramFacts, columns: Columns) -> Self:
        counts = {name: column(columns[name]) for name in facts.names}
        if any(len(each) + 1 != len(facts.edges) for each in counts.values()):
            raise ValueError("a histogram has one edge more than it has counts")
        edges = column(facts.edges)
        if np.isnan(edges).any() or (edges[1:] < edges[:-1]).any():
            raise ValueError("a histogram's edges ascend")
        return cls(facts.title, facts.x_label, edges, counts)


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
    def restore(cls, facts: HeatmapFacts, columns: Columns) -> Self:
        x, y = column(facts.x), column(facts.y)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("a heat map stands on finite numbers")
        return cls(facts.title, facts.x_label, facts.y_label, x, y, column(columns["z"]).reshape(len(y), len(x)))


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
    def restore(cls, facts: TableFacts, columns: Columns) -> Self:
        return cls(facts.title, facts.header, facts.rows)


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
    def restore(cls, facts: GalleryFacts, columns: Columns) -> Self:
        images = np.frombuffer(b"".join(columns["pixels"]), dtype=np.uint8).reshape(facts.shape)
        if len(facts.captions) != len(images):
            raise ValueError("a gallery has a caption a row")
        return cls(facts.title, facts.header, facts.captions, images)


Panel = Curve | Histogram | Heatmap | Table | Gallery
PANELS: dict[str, type[Panel]] = {p.kind: p for p in (Curve, Histogram, Heatmap, Table, Gallery)}
#: What a stored panel of each kind says beside its table.
FACTS: dict[str, type[BaseModel]] = {
    Curve.kind: CurveFacts,
    Histogram.kind: HistogramFacts,
    Heatmap.kind: HeatmapFacts,
    Table.kind: TableFacts,
    Gallery.kind: GalleryFacts,
}


def restore(facts: Mapping[str, Any], columns: Columns) -> Panel:
    """The panel that was stored as ``facts`` (with its ``kind`` and ``title``) and ``columns``.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    kind: Any = PANELS[facts["kind"]]
    panel: Panel = kind.restore(FACTS[facts["kind"]].model_validate(facts), columns)
    return panel
