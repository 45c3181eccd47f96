"""What the command line shows: progress bars while work goes on, tables at its end."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from robustlens.report.front import evidence, ledger
from robustlens.results.errors import unknown_name
from robustlens.results.reading import spelled
from robustlens.results.runs import load
from robustlens.results.store import RunDirectory
from robustlens.studies.watch import Lines

if TYPE_CHECKING:
    from robustlens.recipes.recipe import Recipe
    from robustlens.report.front import Front
    from robustlens.results.verdict import Entry
    from robustlens.studies.compare import Compared

#: Statuses of a number that a reader must be warned of.
DOUBTFUL = ("unreliable", "failed")


#: Colours of verdicts.
VERDICTS = {
    "supported": "green",
    "agrees": "green",
    "contradicted": "red",
    "differs": "red",
    "undecided": "yellow",
}


class Show:
    """Two bars: the pieces of the study, and the steps of the training at hand; plain lines where no terminal is."""

    def __init__(self, console: Console) -> None:
        self._lines = None if console.is_terminal else Lines(lambda text: plain_line(console, text))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._pieces: TaskID | None = None
        self._steps: TaskID | None = None
        self._last: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        """A piece of work starts: ``piece`` of ``pieces`` are done."""
        if self._lines is not None:
            self._lines.begin(piece, pieces, label, what)
        if self._pieces is None:
            self._pieces = self._progress.add_task("study", total=pieces, note="")
        self._progress.update(self._pieces, completed=piece, total=pieces, note=f"{label}: {what}")
        self._last = {}
        if self._steps is not None:
            self._progress.remove_task(self._steps)
            self._steps = None

    def step(self, done: int, total: int, loss: float) -> None:
        if self._steps is None:
            self._steps = self._progress.add_task("  steps", total=total, note="")
        robust = self._last.get("valid_robust_accuracy")
        note = f"loss {loss:.3f}" + (
            "" if robust is None else f", robust {robust:.1%} after epoch {self._last['epoch']}"
        )
        self._progress.update(self._steps, completed=done, note=note)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._last = record
        if self._lines is not None:
            self._lines.epoch(record)

    def attacked(self, chunk: int, attack: str, done: int, batches: int, standing: int) -> None:
        if self._steps is None:
            self._steps = self._progress.add_task("", total=batches, note="")
        where = f"  {attack}" if chunk == 0 else f"  {attack}, chunk {chunk + 1}"
        self._progress.update(
            self._steps, completed=done, total=batches, description=where, note=f"{standing} examples stand"
        )

    def done(self, label: str, what: str, *, already: bool) -> None:
        """A piece of work ended."""
        if self._pieces is not None:
            self._progress.advance(self._pieces)
        if self._lines is not None:
            self._lines.done(label, what, already=already)
        elif already:
            self._progress.console.print(f"[dim]{escape(label)}: {what} was there already[/dim]")

    def failed(self, label: str, what: str, why: str) -> None:
        return None  # the command ends with it


def plain_line(console: Console, text: str) -> None:
    """``text`` as one line of a log, at once."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def table(console: Console, runs: Sequence[RunDirectory]) -> None:
    """The headline numbers of ``runs``: a row a number, a column a method, as many side by side as fit."""
    from robustlens.report.summary import plain, summary_of

    loaded = load(runs)
    summary = summary_of(loaded)
    fit = max(1, (console.width - 32) // 16)
    for first in range(0, len(summary.rows), fit):
        group = summary.rows[first : first + fit]
        shown = Table(header_style="bold", show_lines=True)
        shown.add_column("")
        for row in group:
            shown.add_column(escape(row.method), justify="right")
        for number, column in enumerate(summary.columns):
            shown.add_row(escape(column.title), *(escape(plain(row.cells[number])) for row in group))
        console.print(shown)
    said = {"failed": "{} was not measured: {}", "unreliable": "{} is unreliable: {}"}
    failed = {
        (run.method, said[reading.outcome.status].format(reading.lens, reading.outcome.why)): None
        for run in loaded
        for reading in run.readings
        if reading.outcome.status == "failed" or (reading.outcome.status == "unreliable" and not reading.headline)
    }
    reasons = {(row.method, c.why): None for row in summary.rows for c in row.cells if c.status in DOUBTFUL}
    for method, why in reasons | failed:
        console.print(f"⚠ {escape(method)}: {escape(why)}", soft_wrap=True)


def comparison(console: Console, found: Sequence[Compared]) -> None:
    """What sets two runs apart on the same examples: a column an accuracy."""
    from robustlens.report.numbers import interval, number

    first, second = (escape(label) for label in found[0].labels)
    shown = Table("", header_style="bold")
    for each in found:
        shown.add_column(escape(f"{each.quantity} ({each.lens}, {spelled(each.threat)})"), justify="right")
    pairs = [each.paired for each in found]
    shown.add_row(first, *(number(pair.shares[0], "fraction") for pair in pairs))
    shown.add_row(second, *(number(pair.shares[1], "fraction") for pair in pairs))
    spans = [interval(*pair.interval(), "fraction") for pair in pairs]
    gains = [number(pair.difference, "fraction") for pair in pairs]
    shown.add_row("difference", *(f"{gain} {span}" for gain, span in zip(gains, spans, strict=True)))
    shown.add_row(f"right in {first} alone", *(str(pair.first) for pair in pairs))
    shown.add_row(f"right in {second} alone", *(str(pair.second) for pair in pairs))
    shown.add_row("p", *(f"{pair.p:.2g}" for pair in pairs))
    shown.add_row("n", *(f"{pair.n:,}" for pair in pairs))
    console.print(shown)
    console.print(
        f"The difference is {second} minus {first} on the same examples, with its 95 % interval (Newcombe); p is "
        "McNemar's exact test of the examples that only one of them gets right.",
        soft_wrap=True,
    )
    for doubt in dict.fromkeys(each.doubt for each in found if each.doubt):
        console.print(f"⚠ {escape(doubt)}", soft_wrap=True)


def front(console: Console, found: Front) -> None:
    """A table of verdicts."""
    shown = Table(header_style="bold")
    for name in found.header:
        shown.add_column(escape(name), overflow="fold")
    for row in found.rows:
        shown.add_row(*(escape(cell) for cell in row[:-1]), f"[{VERDICTS.get(row[-1], 'dim')}]{escape(row[-1])}[/]")
    console.print(shown)
    console.print(escape(found.note), soft_wrap=True)


def claims(console: Console, entries: Sequence[Entry]) -> None:
    """The ledger: each claim with its verdict, and below it what was found on each setting."""
    for entry in entries:
        word = f"[{VERDICTS.get(entry.judgement, 'dim')}]{entry.judgement}[/]"
        console.print(f"[bold]{escape(entry.name)}[/bold]  {word}", highlight=False)
        console.print(Padding(escape(f"{entry.sentence} [{entry.paper}, {entry.section}]"), (0, 0, 0, 4)))
        for verdict in entry.verdicts:
            where = f"{verdict.where}: " if verdict.where else ""
            seeds = "" if verdict.statistic is None else f" ({evidence(verdict.statistic)}; {verdict.judgement})"
            text = escape(f"{where}{verdict.says}{seeds}")
            console.print(Padding(text, (0, 0, 0, 4)), style="dim", highlight=False)
    console.print()
    console.print(escape(ledger(entries).note), soft_wrap=True)


def recipe_list(console: Console, recipes: Iterable[Recipe]) -> None:
    """Every recipe with what it shows and how long it takes."""
    for recipe in recipes:
        facts = " · ".join(f"{scale}: {time}" for scale, time in recipe.expects.items())
        _entry(console, recipe.name, facts, f"{recipe.what} [{recipe.paper}]")


def expectation(console: Console, seconds: Mapping[str, float]) -> None:
    """How long the lenses will take, the longest first."""
    from robustlens.report.numbers import seconds as written

    parts = sorted(seconds.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {written(each)}" for name, each in parts if each >= 1)
    console.print(f"About {written(sum(seconds.values()))} on this machine{named and f': {named}'}.", soft_wrap=True)


def catalogue(console: Console, kind: str | None) -> None:
    """What there is of ``kind`` (of every kind for None; one or many: "lens", "methods") with settings and source."""
    from robustlens.claims.ledger import claims
    from robustlens.core.discovery import KINDS, discover
    from robustlens.data.embedded import EMBEDDED
    from robustlens.data.hub import WELL_KNOWN
    from robustlens.recipes.recipe import recipes

    kinds = [*KINDS, "method", "data", "recipe", "claim"]
    asked = kinds if kind is None else [each for each in kinds if kind in (each, f"{each}s", f"{each}es")]
    if not asked:
        raise unknown_name("kind", str(kind), kinds)
    for each in asked:
        console.print(f"[bold underline]{each}[/bold underline]\n")
        if each == "method":
            _methods(console)
        elif each == "data":
            for name in EMBEDDED:
                _entry(console, name, "", "installed with the library")
            for name, address in WELL_KNOWN.items():
                _entry(console, name, "", f"ROBUSTLENS_DATA/{name}, or {address} on the Hub")
        elif each == "recipe":
            recipe_list(console, recipes().values())
        elif each == "claim":
            for claim in claims():
                _entry(console, claim.name, claim.measured, f"{claim.sentence} [{claim.paper}, {claim.section}]")
        else:
            for name, cls in discover(each).items():
                _entry(console, name, _settings(cls), _about(cls))
        console.print()


def _methods(console: Console) -> None:
    """Every preset: what the steps on a batch cost, and where its settings come from; a line between methods."""
    from itertools import groupby

    from robustlens.methods.preset import presets
    from robustlens.studies.plan import preset_recipe

    console.print(
        "Cost in passes of a batch: forward, input (to the images), weight (a plain training step), double (what "
        "differentiating a gradient adds), tangent (forward mode). @paper is as printed, @sound mends it.\n"
    )
    for number, (_, group) in enumerate(groupby(presets().values(), key=lambda preset: preset.method)):
        if number:
            console.print()
        for each in group:
            facts = [str(preset_recipe(each.name).passes)]
            facts += ["@paper | @sound"] * bool(each.sound) + ["fine-tunes"] * each.fine_tunes
            _entry(console, each.name, " · ".join(facts), each.reference)


def _entry(console: Console, name: str, facts: str, about: str) -> None:
    """A name with its facts, and below it, indented, what it is."""
    console.print(f"[bold]{name}[/bold]  {escape(facts)}", highlight=False)
    console.print(Padding(escape(about), (0, 0, 0, 4)), style="dim", highlight=False)


def _settings(cls: type) -> str:
    shown = []
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        shown.append(field.name if required else f"{field.name}={_default(field)}")
    return ", ".join(shown)


def _default(field: dataclasses.Field[Any]) -> str:
    return "…" if field.default is dataclasses.MISSING else repr(field.default)


def _about(cls: type) -> str:
    first = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    source = getattr(cls, "reference", "")
    return f"{first} [{source}]" if source else first
