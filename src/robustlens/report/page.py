"""The report: one HTML file that opens from disk, with nothing to load from anywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

import robustlens
from robustlens.report import numbers
from robustlens.report.aggregate import over_seeds
from robustlens.report.charts import chart, palette, spec, undrawn
from robustlens.report.collect import PanelGroup, Section, overfitting_view, sections, training_curves
from robustlens.report.figures import file_names, slug, vega_lite_version
from robustlens.report.front import Front
from robustlens.report.pictures import SHOWN, data_uri
from robustlens.report.provenance import origins
from robustlens.report.summary import summary_of
from robustlens.results.panels import Gallery, Panel, Table
from robustlens.results.reading import Reading
from robustlens.results.runs import Run, load, methods
from robustlens.results.store import RunDirectory, write_atomically

MANY_READINGS = 60  # beyond this the readings that are ok are folded away, lens by lens
MANY_MARKS = 4000  # beyond this a chart is drawn on a canvas: that many SVG elements make a page slow


@dataclass(frozen=True)
class Block:
    """One panel title: a chart (``spec`` is its place among the specifications), tables or picture grids.

    ``merging`` tells how seeds became one panel, ``notes`` what else to know.
    """

    title: str
    kind: str
    merging: str = ""
    notes: tuple[str, ...] = ()
    spec: int | None = None
    wide: bool = False
    by_method: tuple[tuple[str, Any], ...] = ()


def write_page(
    runs: Sequence[RunDirectory],
    path: Path,
    *,
    title: str,
    front: Sequence[Front] = (),
    charts: Sequence[Mapping[str, Panel]] = (),
    only: Callable[[Reading], bool] | None = None,
) -> Path:
    """Write the report on ``runs`` to ``path`` and return it; ``front`` stands before everything else.

    ``charts`` (a panel for each line) are over all networks and stand before the readings' own; of the readings it
    shows those that ``only`` takes.

    The page is self-contained: scripts, styles, data and pictures are inside, and its security policy forbids the
    browser to load anything. Runs of one label and configuration are seeds of one method.

    Raises:
        InputError: no runs, a damaged run directory, or a path that cannot be written to.
    """
    loaded = load(runs, only)
    found = sections(loaded)
    specs: list[dict[str, Any]] = []
    grouped = methods(loaded)
    colours = palette(grouped)
    parts = [{"name": "Over the networks", "id": "networks", "blocks": _over(charts, colours, specs), "merging": []}]
    parts += [_part("Training", "training", training_curves(loaded), colours, specs)]
    parts += [_part("Robust overfitting", "overfitting", overfitting_view(found), colours, specs)]
    parts += [_part(s.name, f"lens-{i}-{slug(s.name)}", s.panels(), colours, specs) for i, s in enumerate(found)]
    outcomes = [_outcomes(section) for section in found]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robustlens.report", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": numbers.number, "seconds": numbers.seconds, "cell": _cell}
    text = environment.get_template("page.html").render(
        title=title,
        front=front,
        intro=_intro(loaded, found),
        methods=[{"name": name, "colour": colours[name]} for name in grouped],
        place={name: i for i, name in enumerate(grouped)},
        colours=colours,
        summary=summary_of(loaded),
        several_seeds=any(len(group) > 1 for group in grouped.values()),
        outcomes=outcomes,
        fold=sum(len(outcome["fine"]) for outcome in outcomes) > MANY_READINGS,
        parts=[part for part in parts if part["blocks"]],
        origins=origins(loaded),
        shown=SHOWN,
        specs=_embedded(specs),
        labels=_embedded(list(grouped)),
        style=Markup(_asset(environment, "page.css")),
        script=Markup(_asset(environment, "page.js")),
        bundle=Markup(_bundle() if specs else ""),
        version=robustlens.__version__,
    )
    write_atomically(Path(path), text.encode("utf-8", "replace"))  # a title can hold bytes that are not UTF-8
    return Path(path)


def _block(part: str, group: PanelGroup, colours: Mapping[str, str], specs: list[dict[str, Any]]) -> Block:
    """A panel group of ``part`` of the page merged over seeds; a chart's specification is added to ``specs``."""
    merged: dict[str, Panel] = {}
    merging = ""
    for method, panels in group.by_method.items():
        merged[method], note = over_seeds(panels)
        merging = note or merging
    if group.kind == "table":
        tables = [(method, panel) for method, panel in merged.items() if isinstance(panel, Table)]
        return Block(group.title, "table", merging, by_method=tuple(tables))
    if group.kind == "gallery":
        galleries = [(method, _pictures(panel)) for method, panel in merged.items() if isinstance(panel, Gallery)]
        return Block(group.title, "gallery", merging, by_method=tuple(galleries))
    return _drawn(part, merged, colours, specs, merging)


def _over(
    charts: Sequence[Mapping[str, Panel]], colours: Mapping[str, str], specs: list[dict[str, Any]]
) -> list[Block]:
    """Charts over all networks; those whose lines are no methods have colours and legends of their own."""
    blocks = []
    for panels in charts:
        known = panels.keys() <= colours.keys()
        blocks.append(_drawn("networks", panels, colours if known else palette(panels), specs, legend=not known))
    return blocks


def _drawn(
    part: str,
    merged: Mapping[str, Panel],
    colours: Mapping[str, str],
    specs: list[dict[str, Any]],
    merging: str = "",
    *,
    legend: bool = False,
) -> Block:
    first, notes = next(iter(merged.values())), []
    if left_out := undrawn(merged.values()):
        verb = "value is" if left_out == 1 else "values are"
        notes.append(f"{left_out:,} {verb} not drawn (not finite, or not positive on a logarithmic axis).")
    drawn = spec(chart(merged, colours=colours, legend=legend))
    drawn.pop("title", None)  # the page has it
    rows = len(drawn["data"]["values"])
    if not rows:
        return Block(first.title, first.kind, merging, (*notes, "There is nothing to draw."))
    (file,) = file_names([(part, first.title)])
    drawn["usermeta"] = {"renderer": "canvas" if rows > MANY_MARKS else "svg", "file": file}
    specs.append(drawn)
    return Block(first.title, first.kind, merging, tuple(notes), len(specs) - 1, wide="facet" in drawn)


def _part(
    name: str, place: str, groups: Sequence[PanelGroup], colours: Mapping[str, str], specs: Any
) -> dict[str, Any]:
    """A section of the page, with what its panels say about seeds said once."""
    blocks = [_block(name, group, colours, specs) for group in groups]
    merging = list(dict.fromkeys(block.merging for block in blocks if block.merging and "mean" in block.merging))
    return {"name": name, "id": place, "blocks": blocks, "merging": merging}


def _pictures(gallery: Gallery) -> dict[str, Any]:
    rows = [
        {"caption": caption, "images": [data_uri(pixels) for pixels in images]}
        for caption, images in zip(gallery.captions, gallery.images, strict=True)
    ]
    return {"header": gallery.header, "rows": rows, "small": max(gallery.images.shape[2:4], default=0) <= SHOWN}


def _outcomes(section: Section) -> dict[str, Any]:
    """The readings in words: what is not ok, then one that is ok for each method, then their further seeds."""
    lines = [
        {
            "method": run.method,
            "seed": run.seed,
            "status": reading.outcome.status,
            "why": reading.outcome.why,
            "says": reading.says,
        }
        for run, reading in section.entries
    ]
    fine: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    for line in lines:
        if line["status"] == "ok":
            (more if any(line["method"] == other["method"] for other in fine) else fine).append(line)
    flagged = [line for line in lines if line["status"] != "ok"]
    return {"name": section.name, "flagged": flagged, "fine": fine, "more": more}


def _intro(runs: Sequence[Run], found: Sequence[Section]) -> str:
    """What was run, and how much of it can be believed, in two or three sentences."""
    grouped = methods(runs)
    studies = list(dict.fromkeys(run.study for run in runs if run.study))
    seeds = sorted({len(group) for group in grouped.values()})
    text = f"{_count(len(grouped), 'method')}, {_count(len(runs), 'trained network')}"
    if seeds != [1]:
        text += f" ({_count(seeds[0], 'seed')} each)" if len(seeds) == 1 else f" ({seeds[0]} to {seeds[-1]} seeds each)"
    if studies:
        text += f", from the {'study' if len(studies) == 1 else 'studies'} {', '.join(f'“{s}”' for s in studies)}"
    outcomes = [reading.outcome.status for section in found for _, reading in section.entries]
    if not outcomes:
        return f"{text}. No lens has looked at them yet: there are training curves only."
    text += f". {_count(len(found), 'lens', 'lenses')} looked at them, in {_count(len(outcomes), 'reading')}."
    flagged = [(outcomes.count(kind), kind) for kind in ("unreliable", "failed") if kind in outcomes]
    if not flagged:
        return f"{text} Every reading passed its own checks."
    verbs = {"unreliable": "is unreliable", "failed": "failed"}
    said = " and ".join(f"{n} {verbs[k] if n == 1 else verbs[k].replace('is ', 'are ')}" for n, k in flagged)
    return f"{text} Of these, {said}: the numbers concerned are marked ⚠, and the reasons stand under “Readings”."


def _count(count: int, word: str, plural: str = "") -> str:
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def _cell(value: object) -> str:
    """A table's cell: numbers with four digits, text as it is."""
    return numbers.number(float(value)) if isinstance(value, int | float) else "—" if value is None else str(value)


def _embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever the labels contain."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script (making it takes seconds)."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite_version())
    return str(bundle).replace("</script", "<\\/script")
