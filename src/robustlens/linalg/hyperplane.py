"""The shortest step onto a hyperplane that does not leave the box, in the ℓ∞, ℓ2 or ℓ1 norm.

To bring ⟨w, z⟩ + b from its value h at a point t to 0, every pixel moves against sign(h) w, by 0 ≤ s_i ≤ its room:

    min ‖s‖_p  such that  Σ |w_i| s_i = |h|,  s ≤ room

    ℓ∞   s_i = min(λ, room_i)           λ ≥ 0 such that the sum is |h|
    ℓ2   s_i = min(λ |w_i|, room_i)
    ℓ1   the pixels of largest |w_i| move as far as they can, one after the other, until the sum is |h|

(The projections of Croce and Hein 2020, arXiv 1907.02044, §2.2 and A, which sort. For ℓ∞ and ℓ2 the sum is a concave
piecewise linear function of λ, and Newton's method finds its root in a handful of passes.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_to_hyperplane(
    t: Tensor, w: Tensor, height: Tensor, norm: str, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """argmin_δ ‖δ‖_p (…, B, n) such that ⟨w, δ⟩ + height = 0 and low ≤ t + δ ≤ high.

    Where no point of the box is on the plane, δ leads to the corner that is the nearest to it: it minimises
    |⟨w, δ⟩ + height|. Pixels with w_i = 0 stay. For ℓ∞ and ℓ2, Σ w_i δ_i may miss the height by a few roundings.

    Args:
        t: points in the box (…, B, n).
        w: normals (B, n), shared by the leading dimensions of ``t``.
        height: ⟨w, t⟩ + b (…, B), the value at t of what is 0 on the plane. The offset b itself would lose digits
            where t is close to the plane.
        norm: "linf", "l2" or "l1".
    """
    largest = w.abs().amax(-1).clamp_min(torch.finfo(w.dtype).tiny)  # squares of small slopes must not underflow
    w = w / largest[:, None]
    missing = (height / largest).abs()
    toward = -w * height.sign()[..., None]
    sign = toward.sign()
    room = torch.maximum(sign * (high - t), sign * (low - t))  # torch.where takes several times as long
    if norm == "l1":
        step = _largest_first(w.abs(), room, missing)
    else:
        pace = torch.ones_like(w) if norm == "linf" else w.abs()
        gain = w.abs() * room
        out_of_reach = gain.sum(-1) <= missing
        scale = _scale_to(w.abs() * pace, gain, missing.masked_fill(out_of_reach, 0))
        scale = scale.masked_fill(out_of_reach, torch.finfo(w.dtype).max)
        step = (scale[..., None] * pace).minimum(room)
    return sign * step


def _scale_to(rate: Tensor, limit: Tensor, target: Tensor) -> Tensor:
    """The λ ≥ 0 (…, B) for which Σ min(λ rate, limit) = target, which Σ limit exceeds; rate (B, n), limit (…, B, n).

    Newton's method from below does not pass the root. From step to step the product of what is missing and the slope
    falls to a quarter or less.
    """
    rounding, tiny = torch.finfo(rate.dtype).eps, torch.finfo(rate.dtype).tiny
    scale = target / rate.sum(-1).clamp_min(tiny)
    for _ in range(100):
        reach = scale[..., None] * rate
        missing = target - torch.minimum(reach, limit).sum(-1)
        if bool((missing <= 8 * rounding * target).all()):
            break
        free = (limit - reach).sign_().clamp_min_(0)  # 1 where a pixel still moves; comparisons are slower
        scale = scale + missing.clamp_min(0) / free.mul_(rate).sum(-1).clamp_min(tiny)
    return scale


def _largest_first(size: Tensor, room: Tensor, target: Tensor) -> Tensor:
    """The steps (…, B, n) with Σ size · step = target (…, B) when the pixels of largest ``size`` (B, n) go first."""
    size, order = size.sort(dim=-1, descending=True)
    order = order.expand(room.shape)
    room = room.gather(-1, order)
    gain = size * room
    before = gain.cumsum(-1) - gain
    left = (target[..., None] - before).clamp_min(0)
    step = (left / size.clamp_min(torch.finfo(size.dtype).tiny)).minimum(room)
    return torch.zeros_like(step).scatter_(-1, order, step)
