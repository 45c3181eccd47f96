"""Those who watch a study, and how what they are told is passed on; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from robustlens.studies.plan import PlannedRun


class StudyWatch(Protocol):
    """Someone who watches a study: told of each piece as it begins and ends, and of every step and epoch."""

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None: ...

    def step(self, done: int, total: int, loss: float) -> None: ...

    def epoch(self, record: Mapping[str, Any]) -> None: ...

    def attacked(self, chunk: int, attack: str, done: int, batches: int, standing: int) -> None:
        """An attack is through with ``done`` of its ``batches`` in a chunk of which ``standing`` examples stand."""
        ...

    def done(self, label: str, what: str, *, already: bool) -> None: ...

    def failed(self, label: str, what: str, why: str) -> None: ...


class RunWatch(StudyWatch, Protocol):
    """Someone who watches one run that is carried out elsewhere."""

    def retried(self, times: int) -> None:
        """The process that carried it out ended before its time, and another one goes on, for the ``times``-th time."""
        ...

    def ended(self) -> None:
        """Everything about it is done."""
        ...


class Board(Protocol):
    """Someone who watches many runs at once."""

    def of(self, run: PlannedRun) -> RunWatch: ...


class Told:
    """A watch that is told everything in one place; alone it watches nothing."""

    def tell(self, event: str, *arguments: Any, **named: Any) -> None:
        """``event`` is the name of a method of RunWatch, and the rest is what it was called with."""
        return

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        self.tell("begin", piece, pieces, label, what)

    def step(self, done: int, total: int, loss: float) -> None:
        self.tell("step", done, total, loss)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.tell("epoch", record)

    def attacked(self, chunk: int, attack: str, done: int, batches: int, standing: int) -> None:
        self.tell("attacked", chunk, attack, done, batches, standing)

    def done(self, label: str, what: str, *, already: bool) -> None:
        self.tell("done", label, what, already=already)

    def failed(self, label: str, what: str, why: str) -> None:
        self.tell("failed", label, what, why)

    def retried(self, times: int) -> None:
        self.tell("retried", times)

    def ended(self) -> None:
        self.tell("ended")


class SilentStudy(Told):
    """Watches nothing; the class to derive from for a watch that needs only some of the methods."""


class Watches(Told):
    """Several watches at once, told in their order."""

    def __init__(self, *watches: StudyWatch | RunWatch) -> None:
        self.watches = watches

    def tell(self, event: str, *arguments: Any, **named: Any) -> None:
        for watch in self.watches:
            getattr(watch, event)(*arguments, **named)


class Lines(SilentStudy):
    """One plain line per piece begun or ended and per epoch record, given to ``say``.

    A line opens with ``name``, or with the label of the piece at hand.
    """

    def __init__(self, say: Callable[[str], None], name: str = "") -> None:
        self.say, self.name, self.label = say, name, ""

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        self.label = label
        self._say(f"{what} begins ({piece + 1} of {pieces})")

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._say(f"epoch {record['epoch']}, {summary(record)}")

    def done(self, label: str, what: str, *, already: bool) -> None:
        self._say(f"{what} {'was there already' if already else 'is done'}")

    def failed(self, label: str, what: str, why: str) -> None:
        self._say(f"{what} failed: {why}")

    def retried(self, times: int) -> None:
        self._say(f"retried {times} time{'s' * (times > 1)}")

    def ended(self) -> None:
        self._say("run is done")

    def _say(self, text: str) -> None:
        self.say(f"{self.name or self.label}: {text}")


def summary(record: Mapping[str, Any]) -> str:
    """What an epoch came to, on one line."""
    shown = [f"loss {record['loss']:.3f}"]
    if "valid_robust_accuracy" in record:
        shown += [f"valid {record['valid_accuracy']:.1%}", f"robust {record['valid_robust_accuracy']:.1%}"]
    return ", ".join([*shown, *([record["stopped"]] if "stopped" in record else [])])
