"""Several tries on each example, restarts or targets, that share batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_room: ContextVar[int] = ContextVar("room", default=0)


@contextmanager
def room(examples: int) -> Iterator[None]:
    """Attacks inside may look at so many images at a time, also where they are given fewer."""
    before = _room.set(examples)
    try:
        yield
    finally:
        _room.reset(before)


def together(x: Tensor, left: int, done: int) -> int:
    """How many tries of the ``left`` examples of ``x`` (B, C, H, W) are made in one batch, when ``done`` are made.

    The first is made alone: it breaks most of what breaks, and what one try breaks the next need not look at. Later
    ones fill a batch that is no larger than ``x``, or than there is ``room`` for: passes of few images cost more each.
    """
    return 1 if done == 0 else max(1, max(len(x), _room.get()) // left)
