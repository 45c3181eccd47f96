"""Carrying out a recipe, and writing the paper's numbers beside ours."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import robustlens
from robustlens.claims.statistics import linear, over_seeds
from robustlens.recipes.recipe import Printed, Recipe, Scale
from robustlens.results.runs import Run, read_runs
from robustlens.results.store import RunDirectory, write_atomically
from robustlens.results.verdict import Statistic, decide
from robustlens.studies.config import make_study, write_study
from robustlens.studies.plan import slug
from robustlens.studies.run import StudyWatch, run_study

#: What a judgement is called where a number stands beside a paper's.
AGREEMENT = {"supported": "agrees", "contradicted": "differs", "undecided": "undecided", "not run": "not run"}


@dataclass(frozen=True)
class Row:
    """A number of the paper beside ours; ``ours`` is None where it was not measured, ``trouble`` says what to doubt."""

    row: str
    column: str
    paper: float
    tolerance: float
    ours: Statistic | None
    verdict: str
    trouble: str = ""


@dataclass(frozen=True)
class Reproduction:
    """What came of a recipe: its rows, its runs, and everything needed to get them again."""

    recipe: Recipe
    scale: Scale
    rows: tuple[Row, ...]
    runs: tuple[RunDirectory, ...]
    record: dict[str, Any]


def reproduce(
    recipe: Recipe,
    scale: Scale = "paper",
    out: str | Path = "runs",
    *,
    seeds: Sequence[int] | None = None,
    overrides: Iterable[str] = (),
    device: str = "auto",
    watch: StudyWatch | None = None,
) -> Reproduction:
    """Train and look as ``recipe`` says, at ``scale``; interrupted, it goes on where it stopped.

    Raises:
        InputError: data that is not here, an override that does not fit.
    """
    overrides = list(overrides)
    groups: list[list[RunDirectory]] = []
    for settings in recipe.at(scale):
        if seeds is not None:
            settings["seeds"] = list(seeds)
        study = make_study(settings, overrides)
        groups.append(run_study(study, out, device=device, watch=watch))
        home = groups[-1][0].path.parent
        write_atomically(home / "study.toml", write_study(study).encode())
    runs = [read_runs(group) for group in groups]
    rows = tuple(beside(printed, runs[printed.study]) for printed in recipe.printed)
    flags = "" if seeds is None else f" --seeds {','.join(map(str, seeds))}"
    flags += "".join(f" --set {each}" for each in overrides)
    flags += "" if device == "auto" else f" --device {device}"
    first = runs[0][0].provenance
    record = {
        "recipe": recipe.name,
        "paper": recipe.paper,
        "what": recipe.what,
        "scale": scale,
        "command": f"robustlens reproduce {recipe.name} --scale {scale}{flags}",
        "version": robustlens.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: first.get(key) for key in ("device", "cores", "threads", "platform", "torch", "python")},
        "data": [group[0].provenance.get("data", {}) for group in runs],
        "training_seconds": round(sum(run.provenance.get("seconds", 0.0) for group in runs for run in group), 1),
        "networks": sum(len(group) for group in runs),
        "differs": recipe.differs,
        "rows": [asdict(row) for row in rows],
    }
    return Reproduction(recipe, scale, rows, tuple(run for group in groups for run in group), record)


def beside(printed: Printed, runs: Sequence[Run]) -> Row:
    """Our number for a number of the paper, over the seeds there are."""
    asked = [printed.ask.of(run) for run in runs if run.method == printed.method]
    found = [each for each in asked if each is not None]
    if not found:
        return Row(printed.row, printed.column, printed.value, printed.tolerance, None, "not run")
    samples = [linear([1.0], [each]) for each in found]
    ours = over_seeds(samples, found[0][0].unit)
    trouble = next((sample.trouble for sample in samples if sample.trouble), "")
    region = (printed.value - printed.tolerance, printed.value + printed.tolerance)
    verdict = AGREEMENT[decide(ours, region)]
    return Row(printed.row, printed.column, printed.value, printed.tolerance, ours, verdict, trouble)


def keep(found: Reproduction, place: Path) -> Path:
    """Write the record, the pages' figures aside, and the runs without weights and panels below ``place``.

    The runs stay good enough to judge claims by, at some kilobytes each.
    """
    home = place / slug(found.recipe.name)
    for run in found.runs:
        copy_slim(run, home / "runs" / run.path.parent.name / run.path.name)
    write_atomically(home / "record.json", (json.dumps(found.record, indent=1, ensure_ascii=False) + "\n").encode())
    return home


def copy_slim(run: RunDirectory, to: Path) -> None:
    """A run's configuration and its readings' numbers."""
    shutil.rmtree(to, ignore_errors=True)
    record = run.read_json("run.json")
    write_atomically(to / "run.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    for file in sorted((run.path / "readings").glob("[!.]*/reading.json")):
        reading = json.loads(file.read_text()) | {"panels": []}
        text = json.dumps(reading, indent=1, ensure_ascii=False) + "\n"
        write_atomically(to / "readings" / file.parent.name / "reading.json", text.encode())


def commit() -> str:
    """The commit of the checkout that this code runs from, ending in "+" where files differ; "" outside one."""
    place = Path(robustlens.__file__).parent
    try:
        asked = ["git", "-C", str(place), "describe", "--always", "--abbrev=12", "--dirty=+"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
