"""What the searches for the smallest adversarial change share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.types import Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

#: What rounding may move the difference of two logits, in units of the last place of their spread. Another size of
#: batch, or other kernels, move those of LeNetSmall by up to 8, deeper networks' by more.
ROUNDING = 64


def rounding(logits: Tensor) -> Tensor:
    """What rounding may move a difference of ``logits`` (B, K) that are spread like these: (B,). Take those at x.

    The searches end on the boundary. A lead of −1e-7 there may be one of +1e-7 in the pass that judges the image, so
    they raise leads by this: what is still negative is wrong in every pass.
    """
    logits = logits.detach()
    highest = logits.amax(1, keepdim=True)
    spread = (highest - torch.where(logits.isinf(), highest, logits)).amax(1)  # −∞ rules a class out
    return ROUNDING * torch.finfo(logits.dtype).eps * spread


@torch.no_grad()
def nearest_on_segment(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """The nearest wrong point known on the segment from ``x`` to ``x_adv`` (both (B, C, H, W)), by ``steps`` halvings.

    The model must be wrong at ``x_adv``, which comes back where every halving met a right answer. The segment may
    cross the boundary several times; one crossing is found, to within |x_adv − x| / 2^steps, on its wrong side. Costs
    ``steps`` + 1 forward passes.
    """
    low, high = torch.zeros_like(x[:, :1, :1, :1]), torch.ones_like(x[:, :1, :1, :1])
    best, room = x_adv, rounding(model(x))
    for _ in range(steps):
        middle = (low + high) / 2
        point = torch.lerp(x, x_adv, middle)
        wrong = (logit_margin(model(point), y) + room < 0)[:, None, None, None]
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


def margin_and_slope(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logit margin (B,), its gradient (B, C, H, W), and the logits (B, K)."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        margin = logit_margin(logits, y)
        (slope,) = torch.autograd.grad(margin.sum(), point)
    return margin.detach(), slope, logits.detach()


def smaller(threat: Lp, margin: Tensor, delta: Tensor, nearest: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest wrong change so far (B, C, H, W) and its size (B,), ``delta`` included; a tie does not count."""
    size = threat.size(delta)
    better = (margin < 0) & (size < smallest)
    return torch.where(better[:, None, None, None], delta, nearest), torch.where(better, size, smallest)


def linearised_step(threat: Lp, z: Tensor, leads: Tensor, slopes: Tensor, *, overshoot: float) -> Tensor:
    """DeepFool's step (B, C, H, W): from z to the nearest of the linearised boundaries, and a little farther.

    ``leads`` (B, R) are f_y − f_k at z and ``slopes`` (B, R, C, H, W) are ∇(f_k − f_y); without a slope there is no way
    to that rival.
    """
    slopes = movable(threat, z[:, None], slopes)
    sizes = dual_size(threat, slopes.flatten(0, 1)).view_as(leads)
    distances = torch.where(sizes > 0, leads / sizes, torch.inf)
    k = distances.argmin(1)
    each = torch.arange(len(z), device=z.device)
    return along(threat, z, slopes[each, k], (1 + overshoot) * distances[each, k])


def along(threat: Lp, z: Tensor, w: Tensor, length: Tensor) -> Tensor:
    """z moved by ``length`` (B,), at most eps, along the threat's direction of steepest ascent for w, into the box."""
    step = length.clamp(-threat.eps, threat.eps)[:, None, None, None]
    moved = z + step * threat.ascend(w, floor=torch.finfo(w.dtype).tiny)
    return moved.clamp(threat.low, threat.high)


def movable(threat: Lp, z: Tensor, w: Tensor) -> Tensor:
    """w with 0 where a pixel of z has no room along it; a step that asks for more of the others crosses."""
    return w * torch.where(w > 0, z < threat.high, z > threat.low)


def require_smooth_norm(threat: Threat, who: str) -> None:
    """Refuse a threat that is no ℓ2 or ℓ∞ ball."""
    if not isinstance(threat, Lp) or threat.norm == "l1":
        raise InputError(
            f"{who} threat", expected="an ℓ2 or ℓ∞ ball", got=str(threat), fix='Write "l2:…" or "linf:…", or use pgd.'
        )


def require_l2(threat: Threat, who: str) -> None:
    """Refuse a threat that is no ℓ2 ball."""
    if not isinstance(threat, Lp) or threat.norm != "l2":
        raise InputError(f"{who} threat", expected="an ℓ2 ball", got=str(threat), fix='Write "l2:…", or use fmn.')
