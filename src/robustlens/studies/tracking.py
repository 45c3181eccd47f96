"""What is written down while a study goes on: the study's log, and trackers that runs are followed with."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlens.core.discovery import load_attribute
from robustlens.results.errors import InputError, unknown_name
from robustlens.results.mirror import connect, is_remote, publish, scratch
from robustlens.studies.plan import slug
from robustlens.studies.watch import Lines, SilentStudy, StudyWatch

if TYPE_CHECKING:
    from robustlens.studies.plan import PlannedRun

#: Makes the watch of one run: called with what is run and the directory that it is written to, where it is run.
Tracker = Callable[["PlannedRun", Path], StudyWatch]

#: Size at which ``study.log`` is set aside as ``study.log.1``, and how many of those are kept.
LOG_BYTES, LOGS = 1_000_000, 3


class TensorBoard(SilentStudy):
    """Writes every number of every epoch's record below ``tensorboard/`` of the run directory."""

    def __init__(self, run: PlannedRun, directory: Path) -> None:
        self.directory = directory / "tensorboard"
        self.writer: Any = None

    def epoch(self, record: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:  # a resumed run takes back what was written after its checkpoint
            self.writer = SummaryWriter(self.directory, purge_step=record["epoch"])
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()

    def done(self, label: str, what: str, *, already: bool) -> None:
        self._close()

    def failed(self, label: str, what: str, why: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def find_trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers called ``names``: "tensorboard", or ``pkg.module:callable`` for one's own.

    Raises:
        InputError: an unknown name, something that cannot be imported or called, or TensorBoard is not installed.
    """
    return [_tracker(name) for name in names]


def _tracker(name: str) -> Tracker:
    if ":" in name:
        found: Tracker = load_attribute(name)
        if not callable(found):
            raise InputError("--track", expected="a callable", got=repr(found), fix="See docs/cluster.md.")
        return found
    if name != "tensorboard":
        raise unknown_name("tracker", name, ["tensorboard"])
    if find_spec("tensorboard") is None:
        raise InputError(
            "tracker tensorboard",
            expected="the package tensorboard",
            got="none",
            fix="Run: pip install 'robustlens[tensorboard]'.",
        )
    return TensorBoard


class StudyLog:
    """The log of a study: one line per piece begun, ended, failed or retried, and per validation."""

    def __init__(self, handler: logging.Handler) -> None:
        self.logger = logging.Logger("robustlens study")
        self.logger.addHandler(handler)

    def of(self, run: PlannedRun) -> Lines:
        return Lines(self.logger.info, f"{run.label}, seed {run.seed}")


@contextmanager
def study_log(out: str | Path, study: str) -> Iterator[StudyLog]:
    """The log ``study.log`` beside the runs of the study called ``study``; it goes on where it ended.

    Raises:
        InputError: it cannot be written.
    """
    home = scratch(str(out)) if is_remote(out) else Path(out)
    file = home / slug(study) / "study.log"
    if is_remote(out):
        connect(str(out)).below(slug(study)).pull(file.parent, lambda name: name == file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=LOGS, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"output {file}",
            expected="a file that can be written to, with free space",
            got=error.strerror or str(error),
            fix="Choose another directory with --out.",
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    try:
        yield StudyLog(handler)
    finally:
        handler.close()
        if is_remote(out):
            publish(file, home, str(out))
