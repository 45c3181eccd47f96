"""What the command line shows of many runs at once: a line per run on a terminal, else a plain line per change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from robustlens.show import plain_line
from robustlens.studies.watch import Lines, RunWatch, SilentStudy

if TYPE_CHECKING:
    from robustlens.results.store import RunDirectory
    from robustlens.studies.config import StudyConfig
    from robustlens.studies.plan import PlannedRun


class RunBoard:
    """A table of runs: what each is at, its robust accuracy on validation images so far, and how often it was retried.

    Where no terminal is, every piece that begins or ends and every epoch is one plain line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: list[Row] = []
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def of(self, run: PlannedRun) -> RunWatch:
        name = f"{run.label}, seed {run.seed}"
        if not self.console.is_terminal:
            return Lines(lambda text: plain_line(self.console, text), name)
        self.rows.append(Row(name, run.training.epochs))
        return self.rows[-1]

    def _table(self) -> Table:
        table = Table("run", "at", "robust", "retried", header_style="bold")
        for row in self._shown():
            retried = f"{row.retries} times" if row.retries else ""
            table.add_row(Text(row.name), Text(row.state, style=row.style), row.robust, retried)
        return table

    def _shown(self) -> list[Row]:
        """As many runs as fit: those at work and those that failed before those that wait or are done."""
        room = max(1, self.console.height - 6)
        first = sorted(self.rows, key=lambda row: row.style not in ("", "red"))[:room]
        return [row for row in self.rows if row in first]


def show_on_ray(console: Console, study: StudyConfig, out: str, **options: Any) -> list[RunDirectory]:
    """``run_study_on_ray`` with its board on ``console``."""
    from robustlens.studies.cluster import run_study_on_ray

    with RunBoard(console) as board:
        return run_study_on_ray(study, out, board=board, **options)


class Row(SilentStudy):
    """A run's line."""

    def __init__(self, name: str, epochs: int) -> None:
        self.name, self.epochs = name, epochs
        self.state, self.style, self.robust, self.retries = "waiting", "dim", "", 0

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        self.state, self.style = what, ""

    def step(self, done: int, total: int, loss: float) -> None:
        self.state = f"epoch {min(self.epochs, done * self.epochs // total + 1)} of {self.epochs}, loss {loss:.3f}"

    def epoch(self, record: Mapping[str, Any]) -> None:
        if "valid_robust_accuracy" in record:
            self.robust = f"{record['valid_robust_accuracy']:.1%}"

    def attacked(self, chunk: int, attack: str, done: int, batches: int, standing: int) -> None:
        self.state = f"{attack}, {done} of {batches} batches, {standing} examples stand"

    def failed(self, label: str, what: str, why: str) -> None:
        self.state, self.style = f"{what} failed: {why}", "red"

    def retried(self, times: int) -> None:
        self.retries = times

    def ended(self) -> None:
        self.state, self.style = "done", "green"
