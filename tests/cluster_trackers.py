"""A tracker that writes down every epoch of every process, and that kills or holds the process at chosen ones."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustlens.core.signals import asked
from robustlens.studies.watch import SilentStudy
from robustlens.train import loop
from robustlens.train.together import exchange


class Follow(SilentStudy):
    """Adds a line "label epoch process" to ``events`` in the working directory after each epoch.

    Where a file ``kill-<label>-<epoch>`` is there, the process kills itself at the first step after that epoch; while a
    file ``hold-<label>-<epoch>`` is there, it waits at the epoch's end; where ``pause-<label>-<epoch>`` is, it waits in
    the middle of the second step after that epoch for a signal.
    """

    def __init__(self, run: Any, directory: Path) -> None:
        self.label, self.here, self.reached = run.label, Path.cwd(), 0

    def step(self, done: int, total: int, loss: float) -> None:
        kill = self.here / f"kill-{self.label}-{self.reached}"
        if kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.here / f"pause-{self.label}-{self.reached}").exists():
            loop.exchange = self.pause

    def pause(self, *arguments: Any, **named: Any) -> Any:
        (self.here / "paused").touch()
        while not asked():
            time.sleep(0.05)
        return exchange(*arguments, **named)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.reached = record["epoch"]
        with (self.here / "events").open("a") as file:
            file.write(f"{self.label} {self.reached} {os.getpid()}\n")
        while (self.here / f"hold-{self.label}-{self.reached}").exists():
            time.sleep(0.05)
