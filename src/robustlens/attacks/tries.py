"""Several tries on each example: restarts, or targets."""

from __future__ import annotations

from torch import Tensor

#: Numbers in the images of a batch, up to which a pass costs hardly more for more of them: 334 digits.
SMALL = 2**18


def together(x: Tensor, left: int, done: int) -> int:
    """How many tries of the ``left`` examples of ``x`` (B, C, H, W) are made in one batch, when ``done`` are made.

    The first is made alone: it breaks most of what breaks, and what one try breaks the next need not look at. Later
    ones fill a batch that is no larger than ``x``, or than ``SMALL``.
    """
    return 1 if done == 0 else max(1, max(len(x), SMALL // x[0].numel()) // left)
