"""What the searches for the smallest adversarial change share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.types import Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@torch.no_grad()
def nearest_on_segment(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """The nearest wrong point known on the segment from ``x`` to ``x_adv`` (both (B, C, H, W)), by ``steps`` halvings.

    The model must be wrong at ``x_adv``, which comes back where every halving met a right answer. The segment may
    cross the boundary several times; one crossing is found, to within |x_adv − x| / 2^steps, on its wrong side.
    """
    low, high = torch.zeros_like(x[:, :1, :1, :1]), torch.ones_like(x[:, :1, :1, :1])
    best = x_adv
    for _ in range(steps):
        middle = (low + high) / 2
        point = torch.lerp(x, x_adv, middle)
        wrong = (logit_margin(model(point), y) <= 0)[:, None, None, None]
        best = torch.where(wrong, point, best)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return best


def dual_size(threat: Lp, w: Tensor) -> Tensor:
    """‖w‖_q (B,) in the dual of the threat's norm, ℓ2 or ℓ∞; largest components first, so that nothing underflows."""
    flat = w.flatten(1)
    if threat.norm == "linf":
        return flat.abs().sum(1)
    largest = flat.abs().amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    size: Tensor = (flat / largest[:, None]).norm(dim=1) * largest
    return size


def require_smooth_norm(threat: Threat, who: str) -> None:
    """Refuse a threat that is no ℓ2 or ℓ∞ ball."""
    if not isinstance(threat, Lp) or threat.norm == "l1":
        raise InputError(
            f"{who} threat", expected="an ℓ2 or ℓ∞ ball", got=str(threat), fix='Write "l2:…" or "linf:…", or use pgd.'
        )
