"""Signals that ask the process to end (Ctrl-C, a cluster's SIGTERM), held back where they would leave half a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds after which a signal is raised again: what runs in a library's callback or import may have swallowed it.
AGAIN = 2.0

#: How deep the process is in ``whole`` sections, the signal that waits for their end, and the one that asked to end.
_depth = 0
_pending = 0
_asked = 0


class Terminated(SystemExit):
    """SIGTERM came; the exit code is the shell's for it, 128 + 15."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated, at the end of a ``whole`` section if the
    process is in one, and again every two seconds until this is left. To be called in the main thread."""
    global _pending, _asked
    _pending = _asked = 0
    before = {number: signal.signal(number, _heed) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole() -> Iterator[None]:
    """What is inside is done to its end: a signal that comes meanwhile takes effect behind it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _pending and not _depth:
        _end(_pending)


def asked() -> bool:
    """Whether a signal waits for the end of the ``whole`` section that the process is in."""
    return bool(_pending)


def _heed(number: int, frame: FrameType | None) -> None:
    global _pending, _asked
    if number != signal.SIGALRM:
        _asked = number
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
    if _depth:
        _pending = _asked
    else:
        _end(_asked)


def _end(number: int) -> None:
    global _pending
    _pending = 0
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
