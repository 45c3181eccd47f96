"""Whether a network's answer to an image depends on that image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.results.errors import InputError

#: How far an answer may move with the company of an image, relative to the largest logit: kernels round differently.
COMPANY = 1e-3


def unsteadiness(model: nn.Module, x: Tensor) -> float:
    """How far answers to the images ``x`` (B, C, H, W) move from one time to the next, relative to the largest logit.

    In eval mode: all of them twice, and the first in a batch of copies, which shows what company adds. What is not
    finite counts as 0. Three passes.
    """
    with untouched(model), torch.no_grad():
        passes = (model(each) for each in (x, x, x[:1].expand_as(x)))
        among, again, alone = (torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0) for z in passes)
    far = torch.maximum((again - among).abs().max(), (alone - among[:1]).abs().max())
    return float(far / among.abs().max().clamp_min(1e-30))


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
