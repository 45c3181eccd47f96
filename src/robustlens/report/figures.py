"""Figures for papers: every chart of the report as a file of its own, with its own legend."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import altair as alt
import vl_convert

from robustlens.report.aggregate import over_seeds
from robustlens.report.charts import chart, palette, spec
from robustlens.report.collect import sections, training_curves
from robustlens.report.pictures import grid
from robustlens.results.errors import InputError
from robustlens.results.panels import Gallery, Panel
from robustlens.results.reading import Reading
from robustlens.results.runs import load, methods
from robustlens.results.store import RunDirectory, write_atomically

FORMATS = ("pdf", "svg", "png")


def vega_lite_version() -> str:
    """The Vega-Lite version of the specifications, as vl-convert names it: the newest it has of the same major."""
    major = alt.SCHEMA_VERSION.removeprefix("v").split(".")[0]
    known = [v for v in vl_convert.get_vegalite_versions() if v.split(".")[0] == major]
    return str(max(known, key=lambda v: int(v.split(".")[1])))


def write_figures(
    runs: Sequence[RunDirectory],
    directory: Path,
    *,
    format: Literal["pdf", "svg", "png"],
    only: Callable[[Reading], bool] | None = None,
) -> list[Path]:
    """Write each chart to ``directory`` as ``<lens>-<title>.<format>``; of the readings, those that ``only`` takes.

    Pictures stay pictures: a gallery becomes one PNG a method whatever the format. Tables are not drawn.

    Raises:
        InputError: an unknown format, no runs, a damaged run directory, or a directory that cannot be written to.
    """
    if format not in FORMATS:
        fix = "Choose one of these formats."
        raise InputError("figure format", expected=", ".join(FORMATS), got=repr(format), fix=fix)
    loaded = load(runs, only)
    colours = palette(methods(loaded))
    named = [("training", group) for group in training_curves(loaded)]
    named += [(section.name, group) for section in sections(loaded) for group in section.panels()]
    drawn: list[tuple[tuple[str, ...], Gallery | dict[str, Panel]]] = []
    for lens, group in named:
        merged = {method: over_seeds(panels)[0] for method, panels in group.by_method.items()}
        if group.kind == "gallery":
            drawn += [((lens, group.title, m), panel) for m, panel in merged.items() if isinstance(panel, Gallery)]
        elif group.kind != "table":
            drawn.append(((lens, group.title), merged))
    written = []
    for name, (_, what) in zip(file_names([texts for texts, _ in drawn]), drawn, strict=True):
        written.append(directory / f"{name}.{'png' if isinstance(what, Gallery) else format}")
        drawing = grid(what) if isinstance(what, Gallery) else _render(spec(chart(what, colours=colours)), format)
        write_atomically(written[-1], drawing)
    return written


def write_charts(charts: Sequence[Mapping[str, Panel]], directory: Path) -> list[Path]:
    """Write charts over many networks, a panel for each line, to ``directory`` as ``networks-<title>.svg``."""
    names = file_names([("networks", next(iter(panels.values())).title) for panels in charts])
    written = [directory / f"{name}.svg" for name in names]
    for path, panels in zip(written, charts, strict=True):
        write_atomically(path, _render(spec(chart(panels)), "svg"))
    return written


def _render(drawn: dict[str, object], format: str) -> bytes:
    version = vega_lite_version()
    if format == "svg":
        # Labels for screen readers on every point, and points that only a page's pointer finds, are nine tenths of it.
        drawing = str(vl_convert.vegalite_to_svg(drawn, vl_version=version, config={"aria": False}))
        shown = re.sub(r'<path [^>]* opacity="0"/>', "", drawing)
        names = {name: f"part{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'(?<=\bid=")[^"]+', shown)))}
        # The renderer counts on from chart to chart: by its names, what a file holds depends on what was drawn before.
        return re.sub(r'(?<=\bid=")[^"]+|(?<=url\(#)[^)]+', lambda found: names[found[0]], shown).encode()
    if format == "pdf":
        return bytes(vl_convert.vegalite_to_pdf(drawn, vl_version=version))
    return bytes(vl_convert.vegalite_to_png(drawn, vl_version=version, scale=2))


def slug(text: str) -> str:
    """``text`` as a safe file name: a to z, digits and single hyphens, at most 60 characters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "figure"


def file_names(texts: Sequence[tuple[str, ...]]) -> list[str]:
    """A file name for each text, which is in parts; names that would be alike are numbered, whatever the order."""
    names: dict[str, int] = {}
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        name = base = "-".join(map(slug, texts[i]))
        count = 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names[name] = i
    return sorted(names, key=names.__getitem__)
