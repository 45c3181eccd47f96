"""Panels of one title, one per method → one chart, for the page and for figures alike.

Every chart has a parameter ``highlight``, a list of methods: all others are drawn faintly while it is not empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from robustlens.report.aggregate import common_edges, geometric, shares
from robustlens.results.panels import Curve, Floats, Heatmap, Histogram, Panel, Series

# Okabe and Ito's colours without black and yellow, then darker and lighter companions; readable on white and on ink.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#8561C5", "#A6761D", "#B2182B", "#5AAE61", "#8C8C8C", "#DD6FB0",
)  # fmt: skip
LIT = "length(highlight) == 0 || indexof(highlight, datum.label) >= 0"
# A long label keeps its end, where the strengths of one method differ.
MIDDLE = "length(datum.label) > 30 ? slice(datum.label, 0, 14) + '…' + slice(datum.label, -14) : datum.label"
MAX_POINTS = 300
MAX_CELLS = 72
_SHARE = re.compile(r"accuracy|fraction|rate|share|probability|confidence|error", re.IGNORECASE)
Row = dict[str, Any]


def palette(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label by its place; after twelve they come round again."""
    return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}


def chart(
    panels_by_label: Mapping[str, Panel], *, colours: Mapping[str, str] | None = None, legend: bool = True
) -> alt.TopLevelMixin:
    """Draw panels of one kind over each other (heat maps side by side).

    Args:
        panels_by_label: a panel per method; all of the kind of the first.
        colours: a colour per method, so that charts agree; by default the palette in order of the labels.
        legend: whether the chart carries its title and the legend of methods itself.

    Raises:
        TypeError: tables and galleries are not charts.
    """
    panels = dict(panels_by_label)
    first = next(iter(panels.values()))
    colours = palette(panels) if colours is None else colours
    if isinstance(first, Curve):
        drawn = _curves({k: p for k, p in panels.items() if isinstance(p, Curve)}, colours, legend)
    elif isinstance(first, Histogram):
        drawn = _histograms({k: p for k, p in panels.items() if isinstance(p, Histogram)}, colours, legend)
    elif isinstance(first, Heatmap):
        drawn = _heatmaps({k: p for k, p in panels.items() if isinstance(p, Heatmap)})
    else:
        raise TypeError(f"a {first.kind} is not a chart; expected a curve, a histogram or a heat map")
    if legend:
        drawn = drawn.properties(title=first.title)
    drawn = drawn.add_params(alt.param(name="highlight", value=[])).properties(description=first.title)
    return drawn.configure(
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(gridOpacity=0.5, domain=False, tickSize=4, labelFontSize=11, titleFontWeight="normal"),
        header=alt.HeaderConfig(title=None, labelFontSize=12),
        legend=alt.LegendConfig(title=None, labelFontSize=12, labelLimit=320, symbolStrokeWidth=2),
    )


def spec(drawn: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart as a Vega-Lite specification with its data inline."""
    written: dict[str, Any] = drawn.to_dict(validate=False)  # checking every row of data takes seconds
    return written


def undrawn(panels: Iterable[Panel]) -> int:
    """How many values a chart leaves out: not finite, or not positive where the axis is logarithmic."""
    count = 0
    for panel in panels:
        if isinstance(panel, Curve):
            count += sum(int(np.sum(~_drawable(s.y, panel.log_y) | ~np.isfinite(s.x))) for s in panel.series)
        elif isinstance(panel, Histogram):
            count += sum(int(np.sum(~np.isfinite(counts))) for counts in panel.counts.values())
        elif isinstance(panel, Heatmap):
            count += int(np.sum(~np.isfinite(panel.z)))
    return count


def _drawable(values: Floats, log: bool) -> Any:
    return np.isfinite(values) & (values > 0) if log else np.isfinite(values)


def _plain(values: Floats, log: bool = False) -> list[float | None]:
    """Five significant digits are more than a screen shows; what cannot be drawn becomes null."""
    good = _drawable(values, log)
    return [float(f"{v:.5g}") if ok else None for v, ok in zip(values.tolist(), good.tolist(), strict=True)]


def _colour(colours: Mapping[str, str], labels: Sequence[str], legend: bool) -> alt.Color:
    scale = alt.Scale(domain=list(labels), range=[colours[label] for label in labels])
    shown = alt.Legend(orient="bottom", columns=4) if legend and len(labels) > 1 else None
    return alt.Color("label:N", scale=scale, legend=shown)


def _lit(full: float, faint: float) -> Any:
    return alt.condition(LIT, alt.value(full), alt.value(faint))


def _thinned(series: Series) -> Series:
    """At most MAX_POINTS points: of each stretch the lowest and the highest, so that no peak is lost."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    y = np.where(np.isfinite(series.y), series.y, 0.0)
    kept = {0, count - 1}
    for part in np.array_split(np.arange(count), MAX_POINTS // 2 - 1):
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    at = np.array(sorted(kept))
    low, high = (None if end is None else end[at] for end in (series.low, series.high))
    return Series(series.name, series.x[at], series.y[at], low, high)


def _curves(panels: Mapping[str, Curve], colours: Mapping[str, str], legend: bool) -> alt.TopLevelMixin:
    first = next(iter(panels.values()))
    names = list(dict.fromkeys(s.name for p in panels.values() for s in p.series))
    rows: list[Row] = []
    banded, longest, ordered = False, 0, True
    for label, panel in panels.items():
        for line in map(_thinned, panel.series):
            longest = max(longest, len(line.x))
            ordered = ordered and not np.any(line.x[1:] < line.x[:-1])
            columns = [_plain(line.x), _plain(line.y, first.log_y)]
            has_band = line.low is not None and line.high is not None
            banded = banded or has_band
            if line.low is not None and line.high is not None:
                columns += [_plain(line.low, first.log_y), _plain(line.high, first.log_y)]
            keys = ("x", "y", "low", "high")
            for i, values in enumerate(zip(*columns, strict=True)):
                rows.append({"label": label, "series": line.name, "i": i, **dict(zip(keys, values, strict=False))})
    percent = first.y_range == (0.0, 1.0) and bool(_SHARE.search(first.y_label))
    style = ".1%" if percent else ".4~g"
    axis = alt.Axis(format="%") if percent else _y_axis(first, rows)
    across = alt.Scale(type="log" if _by_factors(panels) else "linear", zero=False, nice=False)
    x = alt.X("x:Q", title=first.x_label, scale=across, axis=_x_axis(panels))
    y = alt.Y("y:Q", title=first.y_label, scale=_y_scale(first, rows), axis=axis)
    facet = len(names) > 3
    dash = alt.Undefined
    if 1 < len(names) <= 3:
        styles = alt.Scale(domain=names, range=[[1, 0], [6, 3], [2, 2]][: len(names)])
        dash = alt.StrokeDash("series:N", scale=styles, legend=alt.Legend(orient="top", symbolType="stroke"))
    base = alt.Chart().encode(x=x, color=_colour(colours, list(panels), legend), detail="series:N")
    layers = []
    if banded:
        band = base.mark_area(clip=True).encode(y=y, y2="high:Q", fillOpacity=_lit(0.16, 0.03))
        layers.append(band.encode(y=alt.Y("low:Q", title=first.y_label, scale=_y_scale(first, rows), axis=axis)))
    order = alt.Undefined if ordered else alt.Order("i:Q")
    width = 1.8 if len(panels) <= 6 else 1.4
    layers.append(base.mark_line(strokeWidth=width).encode(y=y, strokeDash=dash, order=order, opacity=_lit(1, 0.1)))
    tooltip = [
        alt.Tooltip("label:N", title="method"),
        *([alt.Tooltip("series:N", title="series")] if len(names) > 1 else []),
        alt.Tooltip("x:Q", title=first.x_label, format=".5~g"),
        alt.Tooltip("y:Q", title=first.y_label, format=style),
        *([alt.Tooltip(f"{end}:Q", title=end, format=style) for end in ("low", "high")] if banded else []),
    ]
    dots = base.mark_point(filled=True, size=26).encode(y=y, tooltip=tooltip)
    layers.append(dots.encode(opacity=_lit(1, 0.1) if longest <= 15 else alt.value(0)))
    data = alt.Data(values=rows)
    if not facet:
        return alt.layer(*layers, data=data).properties(width="container" if not legend else 460, height=240)
    drawn = alt.layer(*layers, data=data).properties(width=300, height=170)
    return drawn.facet(facet=alt.Facet("series:N", sort=names), columns=2 if len(names) <= 4 else 3)


def _by_factors(panels: Mapping[str, Curve]) -> bool:
    """Whether half of all points would stick together in a twentieth of a linear axis, as of epochs 1, 2, 5, 10, …"""
    values = np.concatenate([np.zeros(0), *(s.x for p in panels.values() for s in p.series)])
    usual = len(values) > 0 and bool(np.all(np.isfinite(values) & (values > 0)))
    return usual and bool(20 * np.median(values) < values.max())


def _x_axis(panels: Mapping[str, Curve]) -> alt.Axis:
    values = np.concatenate([s.x for p in panels.values() for s in p.series] or [np.zeros(1)])
    finite = values[np.isfinite(values)]
    whole = len(finite) > 0 and bool(np.all(finite == np.round(finite))) and np.ptp(finite) < 12
    if whole and len(np.unique(finite)) <= 12:
        return alt.Axis(values=np.unique(finite).tolist(), format="d", grid=False)
    return alt.Axis(format=".6~g", grid=False, tickCount=6, labelOverlap=True)


def _y_axis(panel: Curve, rows: Sequence[Row]) -> alt.Axis:
    drawn = [row[k] for row in rows for k in ("y", "low", "high") if row.get(k)]
    if not panel.log_y or not drawn:
        return alt.Axis(format=".6~g", tickCount=6)
    lowest, highest = math.floor(math.log10(min(drawn))), math.ceil(math.log10(max(drawn)))
    step = max(1, math.ceil((highest - lowest) / 7))
    short = lowest >= -3 and highest <= 5
    return alt.Axis(values=[10.0**k for k in range(lowest, highest + 1, step)], format=".6~g" if short else ".3~e")


def _y_scale(panel: Curve, rows: Sequence[Row]) -> alt.Scale:
    drawn = [row[k] for row in rows for k in ("y", "low", "high") if row.get(k) is not None]
    kind = "log" if panel.log_y else "linear"
    if panel.y_range is None or (panel.log_y and panel.y_range[0] <= 0):
        return alt.Scale(type=kind, zero=alt.Undefined if panel.log_y else False)
    domain = [min([panel.y_range[0], *drawn]), max([panel.y_range[1], *drawn])]
    return alt.Scale(type=kind, domain=domain, nice=False)


def _histograms(panels: Mapping[str, Histogram], colours: Mapping[str, str], legend: bool) -> alt.TopLevelMixin:
    first = next(iter(panels.values()))
    edges = common_edges([p.edges for p in panels.values()])
    names = list(dict.fromkeys(name for p in panels.values() for name in p.counts))
    rows: list[Row] = []
    starts, ends = _plain(edges[:-1]), _plain(edges[1:])
    for label, panel in panels.items():
        for name, counts in panel.counts.items():
            heights = _plain(shares(panel.edges, counts, edges))
            for low, high, height in zip(starts, ends, heights, strict=True):
                if low is not None and high is not None:
                    rows.append({"label": label, "series": name, "x": low, "end": high, "y": height})
            if rows and rows[-1]["label"] == label and rows[-1]["series"] == name:
                rows.append({**rows[-1], "x": rows[-1]["end"]})  # closes the last step
    log = geometric(edges)
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=False)
    x = alt.X("x:Q", title=first.x_label, scale=scale, axis=alt.Axis(format=".6~g", grid=False, tickCount=6))
    y = alt.Y("y:Q", title="share of examples", axis=alt.Axis(format="%", tickCount=5), stack=None)
    base = alt.Chart().encode(x=x, y=y, color=_colour(colours, list(panels), legend))
    filled = 0.16 if len(panels) <= 3 else 0.08
    tooltip = [
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("x:Q", title="from", format=".4~g"),
        alt.Tooltip("end:Q", title="to", format=".4~g"),
        alt.Tooltip("y:Q", title="share", format=".1%"),
    ]
    layers = [
        base.mark_area(interpolate="step-after", line=False).encode(fillOpacity=_lit(filled, 0.02)),
        base.mark_line(interpolate="step-after", strokeWidth=1.6).encode(opacity=_lit(1, 0.1)),
        base.mark_point(size=40).encode(opacity=alt.value(0), tooltip=tooltip),
    ]
    data = alt.Data(values=rows)
    if len(names) <= 1:
        return alt.layer(*layers, data=data).properties(width="container" if not legend else 460, height=220)
    drawn = alt.layer(*layers, data=data).properties(width=300, height=190)
    return drawn.facet(facet=alt.Facet("series:N", sort=names), columns=2)


def _cells(centres: Floats) -> tuple[list[float | None], list[float | None]]:
    """Starts and ends of cells around ``centres``, half-way between neighbours.

    A cell reaches a little into the next one, which closes the hairlines that renderers leave between them.
    """
    if len(centres) <= 1:
        return _plain(centres - 0.5), _plain(centres + 0.5)
    middle = (centres[1:] + centres[:-1]) / 2
    bounds = np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
    overlap = 0.05 * np.diff(bounds)
    overlap[-1] = 0
    return _plain(bounds[:-1]), _plain(bounds[1:] + overlap)


def _heatmaps(panels: Mapping[str, Heatmap]) -> alt.TopLevelMixin:
    first = next(iter(panels.values()))
    rows: list[Row] = []
    for label, panel in panels.items():
        across = slice(None, None, math.ceil(max(len(panel.x), 1) / MAX_CELLS))
        down = slice(None, None, math.ceil(max(len(panel.y), 1) / MAX_CELLS))
        xs, ys, z = panel.x[across], panel.y[down], panel.z[down, across]
        (x_bounds, x_ends), (y_bounds, y_ends) = _cells(xs), _cells(ys)
        for j, line in enumerate(z):
            for i, value in enumerate(_plain(line)):
                if value is not None:
                    row = {"label": label, "z": value, "x": x_bounds[i], "x2": x_ends[i]}
                    rows.append({**row, "y": y_bounds[j], "y2": y_ends[j]})
    values = [row["z"] for row in rows]
    signed = bool(values) and min(values) < 0 < max(values)
    scale = alt.Scale(scheme="blueorange", domainMid=0) if signed else alt.Scale(scheme="viridis")
    ends = alt.Scale(zero=False, nice=False)
    plain_axis = alt.Axis(format=".6~g", grid=False, tickCount=5)
    drawn = alt.Chart(alt.Data(values=rows)).mark_rect(strokeWidth=0).encode(
        x=alt.X("x:Q", title=first.x_label, scale=ends, axis=plain_axis),
        x2="x2:Q",
        y=alt.Y("y:Q", title=first.y_label, scale=ends, axis=plain_axis),
        y2="y2:Q",
        color=alt.Color("z:Q", scale=scale, legend=alt.Legend(orient="right", gradientLength=150, format=".6~g")),
        opacity=_lit(1, 0.15),
        tooltip=[
            alt.Tooltip("label:N", title="method"),
            alt.Tooltip("at_x:Q", title=first.x_label, format=".4~g"),
            alt.Tooltip("at_y:Q", title=first.y_label, format=".4~g"),
            alt.Tooltip("z:Q", title="value", format=".4~g"),
        ],
    )  # fmt: skip
    drawn = drawn.transform_calculate(at_x="(datum.x + datum.x2) / 2", at_y="(datum.y + datum.y2) / 2")
    square = drawn.properties(width=190, height=190)
    return square.facet(
        facet=alt.Facet("label:N", sort=list(panels), header=alt.Header(labelLimit=230, labelExpr=MIDDLE)), columns=4
    )
