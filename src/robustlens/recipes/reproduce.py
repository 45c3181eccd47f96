"""Carrying out a recipe, and writing the paper's numbers beside ours."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import ItemsView, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import robustlens
from robustlens.claims.evidence import describe as describe_run
from robustlens.claims.ledger import ledger
from robustlens.claims.statistics import linear, over_seeds
from robustlens.core.discovery import describe
from robustlens.recipes.recipe import Printed, Recipe, Scale
from robustlens.recipes.summary import write_summary
from robustlens.report.figures import write_figures
from robustlens.report.front import Front, attacked, beside
from robustlens.report.front import ledger as claims_table
from robustlens.report.page import write_page
from robustlens.results.errors import InputError
from robustlens.results.panels import Curve
from robustlens.results.reading import Reading
from robustlens.results.runs import Run, read_runs
from robustlens.results.seal import SEAL
from robustlens.results.store import EXAMPLES, RunDirectory, write_atomically
from robustlens.results.verdict import Beside, Entry, decide
from robustlens.studies.config import make_study, write_study
from robustlens.studies.epochs import Scheduled, schedule
from robustlens.studies.run import commit, run_study
from robustlens.studies.watch import StudyWatch

#: What a judgement is called where a number stands beside a paper's.
AGREEMENT = {"supported": "agrees", "contradicted": "differs", "undecided": "undecided", "not run": "not run"}


@dataclass(frozen=True)
class Reproduction:
    """What came of a recipe: its rows, the claims that were judged, its runs, and what is needed to get them again."""

    recipe: Recipe
    scale: Scale
    rows: tuple[Beside, ...]
    entries: tuple[Entry, ...]
    runs: tuple[RunDirectory, ...]
    record: dict[str, Any]
    lenses: tuple[Scheduled, ...] = ()
    attacks: Front | None = None
    charts: tuple[Mapping[str, Curve], ...] = ()

    @property
    def front(self) -> list[Front]:
        """The paper's numbers beside ours, what AutoAttack-standard leaves of them, and its claims."""
        numbers = [beside(self.rows, self.recipe.what)] if self.rows else []
        attacks = [self.attacks] if self.attacks else []
        return numbers + attacks + ([claims_table(self.entries)] if self.entries else [])

    def asked(self, reading: Reading) -> bool:
        """Whether the recipe asks for it; other recipes may have looked at its networks through other lenses."""
        return not self.lenses or any(
            reading.lens == name and all(reading.settings.get(key) == value for key, value in settings)
            for name, settings in self._wanted
        )

    @cached_property
    def _wanted(self) -> list[tuple[str, ItemsView[str, Any]]]:
        """The names and settings of the lenses, as readings have them."""
        return [(each.name, json.loads(json.dumps(describe(each.lens))).items()) for each in self.lenses]


def reproduce(
    recipe: Recipe,
    scale: Scale = "paper",
    out: str | Path = "runs",
    *,
    seeds: Sequence[int] | None = None,
    overrides: Iterable[str] = (),
    weights: Path | None = None,
    device: str = "auto",
    watch: StudyWatch | None = None,
) -> Reproduction:
    """Train and look as ``recipe`` says, at ``scale``; interrupted, it goes on where it stopped.

    ``weights`` is the directory of published networks, for recipes that look at those.

    Raises:
        InputError: data or weights that are not here, an override that does not fit.
    """
    overrides = list(overrides)
    groups: list[list[RunDirectory]] = []
    lenses: list[Scheduled] = []
    if recipe.networks is not None:
        if weights is None or not weights.is_dir():
            raise InputError(
                f"weights of {recipe.name}",
                expected="the directory of the published networks",
                got="none" if weights is None else str(weights),
                fix="Name it with --weights.",
            )
        home = Path(out) / (recipe.name if scale == "paper" else f"{recipe.name}-{scale}")
        groups.append(recipe.networks(weights, home, scale, device))
    for settings in recipe.at(scale):
        if seeds is not None:
            settings["seeds"] = list(seeds)
        study = make_study(settings, overrides)
        lenses += [schedule(lens) for lens in study.lenses]
        groups.append(run_study(study, out, device=device, watch=watch))
        home = groups[-1][0].path.parent
        write_atomically(home / "study.toml", write_study(study).encode())
    runs = [read_runs(group) for group in groups]
    rows = tuple(compared(printed, runs[printed.study]) for printed in recipe.printed)
    flags = "" if seeds is None else f" --seeds {','.join(map(str, seeds))}"
    flags += "".join(f" --set {each}" for each in overrides)
    flags += "" if weights is None else " --weights DIRECTORY"
    flags += "" if device == "auto" else f" --device {device}"
    first = runs[0][0].provenance
    believed = recipe.networks is not None or any(lens.name == "standard-accuracy" for lens in lenses)
    attacks = attacked([run for group in runs for run in group]) if believed else None
    record = {
        "recipe": recipe.name,
        "paper": recipe.paper,
        "what": recipe.what,
        "scale": scale,
        "command": f"robustlens reproduce {recipe.name} --scale {scale}{flags}",
        "version": robustlens.__version__,
        "commit": commit(),
        "trained at": sorted({run.provenance.get("commit") or "" for group in runs for run in group} - {""}),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: first.get(key) for key in ("device", "cores", "threads", "platform", "torch", "python")},
        "data": [group[0].provenance.get("data", {}) for group in runs],
        "training_seconds": round(sum(run.provenance.get("seconds", 0.0) for group in runs for run in group), 1),
        "networks": sum(len(group) for group in runs),
        "differs": recipe.differs,
        "rows": [asdict(row) for row in rows],
        "attacks": attacks and asdict(attacks),
    }
    entries = tuple(
        entry
        for entry in ledger([run for group in runs for run in group])
        if recipe.paper.startswith(entry.paper.removeprefix("ours, after ")) and entry.judgement != "not run"
    )
    directories = tuple(run for group in groups for run in group)
    drawn = (chart.draw([run for group in runs for run in group]) for chart in recipe.charts)
    charts = tuple(panels for panels in drawn if panels)
    return Reproduction(recipe, scale, rows, entries, directories, record, tuple(lenses), attacks, charts)


def compared(printed: Printed, runs: Sequence[Run]) -> Beside:
    """Our number for a number of the paper, over the seeds there are."""
    asked = [printed.ask.of(run) for run in runs if run.method == printed.method]
    found = [each for each in asked if each is not None]
    if not found:
        return Beside(printed.row, printed.column, printed.value, printed.tolerance, None, "not run")
    samples = [linear([1.0], [each]) for each in found]
    same_images = printed.same_images and len(found) > 1  # one network says nothing of another
    if same_images:
        samples = [replace(sample, error=0.0) for sample in samples]
    quantity = found[0][0]
    ours = over_seeds(samples, quantity.unit)
    if len(found) == 1 and quantity.low is not None and not same_images:
        ours = replace(ours, low=quantity.low, high=quantity.high)  # Wilson's does not leave [0, 1]
    trouble = next((sample.trouble for sample in samples if sample.trouble), "")
    region = (printed.value - printed.tolerance, printed.value + printed.tolerance)
    verdict = AGREEMENT[decide(ours, region)]
    where = describe_run(next(run for run in runs if run.method == printed.method))
    return Beside(printed.row, printed.column, printed.value, printed.tolerance, ours, verdict, trouble, where)


def write(found: Reproduction, out: Path, keep: Path | None = None) -> Path:
    """Write the page and the record of what came of a recipe into ``out``, and return the page.

    The page shows what the recipe asks for. ``keep`` also takes the record, the page's charts as SVG, and the runs
    without weights and panels, at some kilobytes each: enough to judge claims by. The summary of everything kept there
    is written anew beside it.
    """
    name = f"{found.recipe.name}-{found.scale}"
    page = write_page(
        found.runs, out / f"{name}.html", title=name, front=found.front, charts=found.charts, only=found.asked
    )
    for place in (out, keep):
        if place is not None:
            text = json.dumps(found.record, indent=1, ensure_ascii=False) + "\n"
            write_atomically(place / f"{name}.json", text.encode())
    if keep is not None:
        for run in found.runs:
            copy_slim(run, keep / "runs" / run.path.parent.name / run.path.name)
        place = keep / "figures" / name
        figures = write_figures(found.runs, place, format="svg", only=found.asked)
        kept = [path for path in figures if not path.name.startswith("training")]
        for path in place.glob("*"):  # older ones, of other names, too
            if path not in kept:
                path.unlink()
        write_summary(keep)
    return page


def parse_seeds(text: str | None) -> list[int] | None:
    """Read "0,1,2"."""
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError("--seeds", expected="whole numbers with commas between", got=repr(text), fix="Write 0,1,2.")
    return [int(part) for part in text.split(",")]


def copy_slim(run: RunDirectory, to: Path) -> None:
    """A run's configuration, its epochs and its readings' numbers, with the answers to the examples behind shares."""
    shutil.rmtree(to, ignore_errors=True)
    record = run.read_json("run.json")
    write_atomically(to / "run.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    if (run.path / "metrics.jsonl").is_file():
        write_atomically(to / "metrics.jsonl", (run.path / "metrics.jsonl").read_bytes())
    for file in sorted((run.path / "readings").glob("[!.]*/reading.json")):
        reading = json.loads(file.read_text())
        sums = {name: sha256 for name, sha256 in reading.get("files", {}).items() if name == EXAMPLES}
        reading |= {"panels": [], "files": sums}
        reading.pop(SEAL, None)
        if (bits := file.parent / EXAMPLES).is_file():
            write_atomically(to / "readings" / file.parent.name / EXAMPLES, bits.read_bytes())
        text = json.dumps(reading, indent=1, ensure_ascii=False) + "\n"
        write_atomically(to / "readings" / file.parent.name / "reading.json", text.encode())
