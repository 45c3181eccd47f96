"""Everything that was reproduced, on one page of Markdown: the paper beside ours, and the ledger of claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from robustlens.claims.ledger import ledger
from robustlens.recipes.recipe import recipes
from robustlens.report import front
from robustlens.report.figures import write_charts
from robustlens.report.numbers import seconds
from robustlens.results.runs import Run, read_runs
from robustlens.results.store import find_runs, write_atomically
from robustlens.results.verdict import Beside, Entry, Judgement, Statistic

HEAD = """# The papers, reproduced

Every section was written by the command that stands in it, with `--keep {place}` added; the ledger at the end by
`robustlens claims {place}`. A number of ours agrees where its whole 95 % interval lies within a tolerance of the
paper's (the tolerance is in the record beside this page), differs where none of it does, and is undecided else.
Intervals are over the test images and over the seeds; in the claims, numbers of the same images are compared image by
image. `paper` scale is the paper's protocol; `laptop` scale keeps the protocol and shrinks data, network or epochs, as
each section says.
"""


def write_summary(place: Path) -> Path:
    """Write ``place``.md from the records and the runs below ``place``."""
    records = [json.loads(file.read_text()) for file in sorted(place.glob("*.json"))]
    runs = read_runs(find_runs([place]))
    for record in records:
        _draw(record, runs, place)
    entries = ledger(runs)
    parts = [HEAD.format(place=place), _contents(records), _papers(entries)]
    parts += [*(_section(record, place) for record in records), _ledger(entries)]
    page = place.parent / f"{place.name}.md"
    write_atomically(page, "\n".join(parts).encode())
    return page


def _contents(records: Sequence[dict[str, Any]]) -> str:
    """One row a section: what was trained, and with how many of the paper's numbers ours agree."""
    found = [[row["verdict"] for row in record["rows"]] for record in records]
    words = ("agrees", "differs", "undecided", "not run")
    heads = [word for word in words if any(word in verdicts for verdicts in found)]
    lines = [_row(("reproduced", "scale", "networks", "training", *heads)), "|" + " --- |" * (4 + len(heads))]
    for record, verdicts in zip(records, found, strict=True):
        link = f"[{record['recipe']}](#{record['recipe']}-{record['scale']}-scale)"
        counts = (str(verdicts.count(head)) if verdicts else "" for head in heads)
        training = seconds(record["training_seconds"])
        lines.append(_row((link, record["scale"], str(record["networks"]), training, *counts)))
    return "\n".join([*lines, ""])


def _papers(entries: Sequence[Entry]) -> str:
    """One row a paper: what became of its claims."""
    heads = get_args(Judgement)
    lines = [_row(("[claims](#the-ledger-of-claims) of", *heads)), "|" + " --- |" * (1 + len(heads))]
    for paper in dict.fromkeys(entry.paper for entry in entries):
        judged = [entry.judgement for entry in entries if entry.paper == paper]
        lines.append(_row((paper, *(str(judged.count(head)) for head in heads))))
    return "\n".join([*lines, ""])


def _draw(record: dict[str, Any], runs: Sequence[Run], place: Path) -> None:
    """The recipe's charts over its networks, from all runs of its studies that are kept."""
    recipe = recipes().get(record["recipe"])
    if recipe is not None and recipe.charts:
        studies = {settings["name"] for settings in recipe.at(record["scale"])}
        drawn = [chart.draw([run for run in runs if run.study in studies]) for chart in recipe.charts]
        directory = place / "figures" / f"{record['recipe']}-{record['scale']}"
        write_charts([panels for panels in drawn if panels], directory)


def _section(record: dict[str, Any], place: Path) -> str:
    name = f"{record['recipe']}-{record['scale']}"
    machine = record["machine"]
    facts = (
        f"`{record['command']}` at {record['commit'] or 'version ' + record['version']}, {record['date'][:10]}; "
        f"{record['networks']} networks, {seconds(record['training_seconds'])} of training on {machine['device']} "
        f"({machine['cores']} cores, torch {machine['torch']})."
    )
    if earlier := [commit for commit in record.get("trained at", ()) if commit != record["commit"]]:
        facts += f" Trained at {', '.join(earlier)}."
    lines = [f"## {record['recipe']} ({record['scale']} scale)\n", f"{record['what']} [{record['paper']}].\n"]
    lines += [f"{facts}\n", f"{record['differs']}\n"]
    if record["rows"]:
        rows = [_beside(row) for row in record["rows"]]
        lines += [*_table(front.beside(rows, record["what"])), ""]
        counts = {row.verdict: 0 for row in rows}
        for row in rows:
            counts[row.verdict] += 1
        lines.append(f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}.\n")
        troubles = [row.trouble for row in rows if row.trouble]
        if troubles:
            lines.append(f"⚠ {len(troubles)} of these numbers rest on unreliable readings. The first: {troubles[0]}\n")
    if record["attacks"]:
        attacks = front.Front(**record["attacks"])
        lines += [f"**{attacks.title}** {attacks.note}\n", *_table(attacks), ""]
    figures = sorted((place / "figures" / name).glob("*.svg"))
    if figures:
        links = (f"[{figure.stem}]({place.name}/figures/{name}/{figure.name})" for figure in figures)
        lines.append(f"Figures: {', '.join(links)}.\n")
    return "\n".join(lines)


def _beside(row: dict[str, Any]) -> Beside:
    ours = None if row["ours"] is None else Statistic(**row["ours"])
    return Beside(**{**row, "ours": ours})


def _table(found: front.Front) -> list[str]:
    return [_row(found.header), "|" + " --- |" * len(found.header), *(_row(row) for row in found.rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "∣").replace("\n", " ") for cell in cells) + " |"


def _ledger(entries: Sequence[Entry]) -> str:
    note = front.ledger(entries).note
    lines = ["## The ledger of claims\n", f"{note}\n", "| claim | paper says | found | verdict |", "|" + " --- |" * 4]
    for entry in entries:
        said = f"{entry.sentence} ({entry.paper}, {entry.section}) *{entry.measured}*"
        found = "<br>".join(
            f"{verdict.where and verdict.where + ': '}{verdict.says} ({front.evidence(verdict.statistic)}; "
            f"{verdict.judgement})"
            for verdict in entry.verdicts
        )
        lines.append(_row((f"`{entry.name}`", said, found, f"**{entry.judgement}**")))
    return "\n".join([*lines, ""])
