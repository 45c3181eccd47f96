"""How the watches of a study hear of runs on other machines; nothing here loads torch or Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from robustlens.studies.watch import Told

#: Seconds between messages of a run.
QUIET = 1.0

#: The number of a run, a method of its watch, and what to call it with.
Event = tuple[int, str, tuple[Any, ...], dict[str, Any]]


class Mailbox:
    """A Ray actor between the workers, which put events in, and the driver, which takes them out."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, events: list[Event]) -> None:
        self.events += events

    def take(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken


class Reporter(Told):
    """Sends what a run's watch is told, at most about once a second; of the steps in between only the last."""

    def __init__(self, number: int, send: Callable[[list[Event]], Any]) -> None:
        self.number, self.send = number, send
        self.waiting: list[Event] = []
        self.sent = 0.0

    def tell(self, event: str, *arguments: Any, **named: Any) -> None:
        if event == "failed":  # the driver hears of it by the task's result, also where the process died
            return
        if self.waiting and event == self.waiting[-1][1] in ("step", "attacked"):
            self.waiting.pop()
        self.waiting.append((self.number, event, arguments, named))
        if time.monotonic() - self.sent >= QUIET:
            self.flush()

    def flush(self) -> Any:
        self.waiting, waiting = [], self.waiting
        self.sent = time.monotonic()
        return self.send(waiting)
