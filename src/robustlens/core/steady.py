"""Whether a network's answer to an image depends on that image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.results.errors import InputError

#: How far an answer may move with the company of an image, relative to the largest logit: kernels round differently.
COMPANY = 1e-3


def unsteadiness(model: nn.Module, x: Tensor) -> float:
    """How far the answer to the first of the images ``x`` (B, C, H, W) moves, relative to the largest logit.

    In eval mode, among the others and in a batch of copies: what chance or the company of an image adds, in 2 passes.
    """
    with untouched(model), torch.no_grad():
        among, alone = model(x), model(x[:1].expand_as(x))
    return float((alone - among[:1]).abs().max() / among.abs().max().clamp_min(1e-30))


def require_steady(model: nn.Module, x: Tensor, who: str) -> None:
    """Refuse a ``model`` whose answer to an image depends on chance or on its batch; ``who`` is what asks.

    Raises:
        InputError: the answers differ (BatchNorm without running statistics, dropout that is always on).
    """
    moved = unsteadiness(model, x)
    if moved > COMPANY:
        raise InputError(
            f"a network under {who}",
            expected="the same answer to an image every time, whatever else is in its batch",
            got=f"logits that move by {moved:.2g} of the largest",
            fix="Give BatchNorm running statistics (track_running_stats = true), and take randomness out of eval mode.",
        )
