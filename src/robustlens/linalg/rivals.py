"""By how much a class leads its rivals at an image, and the slopes of these leads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def strongest(logits: Tensor, y: Tensor, most: int) -> Tensor:
    """The R = min(most, K − 1) classes k ≠ y with the highest ``logits`` (B, K), strongest first: (B, R) int64."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(most, logits.shape[1] - 1), dim=1).indices


def rivals(model: nn.Module, x: Tensor, y: Tensor, most: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Leads and slopes of rivals of the classes ``y`` (B,) at images ``x`` (B, C, H, W).

    The rivals are ``among`` (B, R), or else the ``most`` strongest there. Costs a forward and R backward passes. Take
    the model in eval mode: images must not see each other.

    Returns:
        f_y − f_k (B, R), and ∇(f_k − f_y) (B, R, C, H, W).
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        among = strongest(logits.detach(), y, most) if among is None else among
        leads = logits.gather(1, y[:, None]) - logits.gather(1, among)
        count = among.shape[1]
        slopes = [torch.autograd.grad(-leads[:, r].sum(), point, retain_graph=r + 1 < count)[0] for r in range(count)]
    return leads.detach(), torch.stack(slopes, 1)
