"""What stands at the head of a page: the ledger of claims, and a paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustlens.report.numbers import interval, number
from robustlens.results.reading import Reading, spelled
from robustlens.results.runs import Run
from robustlens.results.verdict import Beside, Entry, Statistic


@dataclass(frozen=True)
class Front:
    """A table with a verdict at the end of every row; ``rows`` are texts, ``detail`` the words below each."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    detail: tuple[str, ...]


def ledger(entries: Sequence[Entry]) -> Front:
    """A row a claim and setting."""
    rows, details = [], []
    for entry in entries:
        for verdict in entry.verdicts:
            rows.append(
                (entry.name, entry.sentence, verdict.where or "—", evidence(verdict.statistic), verdict.judgement)
            )
            details.append(f"{entry.paper}, {entry.section}. {entry.measured} {verdict.says}")
    judged = [entry.judgement for entry in entries]
    words = ("supported", "contradicted", "undecided", "not run")
    counts = ", ".join(f"{judged.count(each)} {each}" for each in words if each in judged)
    note = (
        f"{len(entries)} claims: {counts}. A claim is supported where the whole 95 % interval lies where the claim puts"
        " it, contradicted where none of it does, and undecided else."
    )
    header = ("claim", "what the paper says", "on", "seeds, examples", "verdict")
    return Front("Claims", note, header, tuple(rows), tuple(details))


def beside(rows: Sequence[Beside], what: str) -> Front:
    """A row a number of the paper."""
    cells, details = [], []
    for row in rows:
        ours = row.ours
        percent = ours is not None and ours.unit == "fraction"
        paper, allowed = _exact(row.paper, percent), _exact(row.tolerance, percent)
        if ours is None:
            mine = difference = "—"
        else:
            ends = "" if ours.low is None else f" [{_exact(ours.low, percent)}, {_exact(ours.high or 0.0, percent)}]"
            mine, difference = f"{_exact(ours.value, percent)}{ends}", _exact(ours.value - row.paper, percent)
        on = "; ".join(filter(None, (evidence(ours), row.where)))
        verdict = f"{row.verdict} ⚠" if row.trouble else row.verdict
        cells.append((row.row, row.column, paper, mine, difference, on, verdict))
        details.append(f"Within {allowed} of the paper's number it agrees. {row.trouble}".strip())
    header = ("row", "column", "paper", "ours", "difference", "seeds, examples; on", "verdict")
    note = f"{what}. Brackets: 95 % intervals."
    if any(row.trouble for row in rows):
        note += " ⚠: a reading behind our number is unreliable."
    return Front("The paper beside ours", note, header, tuple(cells), tuple(details))


def attacked(runs: Sequence[Run]) -> Front | None:
    """A row a network that AutoAttack-standard was run on: what the study's own attack left at the same radius, what
    the health checks of that attack leave, and what AutoAttack-standard leaves; None where it was run on none.
    """
    cells, details = [], []
    seeds = {method: {run.seed for run in runs if run.method == method} for method in {run.method for run in runs}}
    for run in runs:
        for standard in (reading for reading in run.readings if reading.lens == "standard-accuracy"):
            alike = [reading for reading in run.readings if _threat(reading) == _threat(standard)]
            own = next((reading for reading in alike if reading.lens == "accuracy"), None)
            health = next((reading for reading in alike if reading.lens == "health"), None)
            label = f"{run.method}, seed {run.seed}" if len(seeds[run.method]) > 1 else run.method
            n = next((quantity.n for quantity in standard.quantities), None)
            cells.append(
                (
                    label,
                    _threat(standard),
                    _left(own, "robust accuracy"),
                    _left(health, "robust accuracy after all checks"),
                    _left(standard, "robust accuracy"),
                    "—" if n is None else f"{n:,}",
                    "not run" if health is None else health.outcome.status,
                )
            )
            details.append(" ".join(each.outcome.why or each.says for each in (standard, health) if each).strip())
    note = "The share of images that stays right; every one is an upper bound. n: under AutoAttack-standard."
    header = ("network", "radius", "its attack", "all health checks", "AutoAttack-standard", "n", "the checks")
    return Front("Can the attack be believed?", note, header, tuple(cells), tuple(details)) if cells else None


def _threat(reading: Reading) -> str:
    attack = reading.settings.get("attack") if reading.lens == "accuracy" else None
    return spelled(str((attack or reading.settings).get("threat", "")))


def _left(reading: Reading | None, name: str) -> str:
    found = {quantity.name: quantity for quantity in reading.quantities}.get(name) if reading else None
    if found is None:
        return "—"
    return f"{number(found.value, 'fraction')} {interval(found.low, found.high, 'fraction')}".strip()


def _exact(value: float, percent: bool) -> str:
    """As many digits as papers print."""
    text = f"{100 * value:.2f} %" if percent else f"{value:.4g}"
    return text.replace("-", "−")


def evidence(statistic: Statistic | None) -> str:
    """How many seeds and examples are behind a number."""
    if statistic is None:
        return "—"
    seeds = f"{statistic.seeds} seed{'' if statistic.seeds == 1 else 's'}"
    return seeds if statistic.n is None else f"{seeds}, n = {statistic.n:,}"
