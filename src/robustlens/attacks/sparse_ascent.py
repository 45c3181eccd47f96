"""Auto-PGD in ℓ1, where good steps change few pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustlens.attacks.ascent import Climbed, Climbers, Height, climbers, look, record
from robustlens.attacks.smallest import movable
from robustlens.threats.lp import Lp

#: Radii of the three stages in multiples of eps, and the share of the steps that the first two get.
STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
#: Share of the steps between checkpoints.
GAP = 0.04
#: Share of the pixels that the first steps change; later as many as the best change has non-zero, divided by SPARSER.
FIRST = 0.2
SPARSER = 1.5
#: A step size is divided by SHRINK down to a LEAST-th where the best change did not become this much sparser.
SHRINK, LEAST, DENSITY = 1.5, 10.0, 0.95


def sparse_ascent(
    model: nn.Module, threat: Lp, x: Tensor, labels: Tensor, height: Height, start: Tensor, *, steps: int
) -> Climbed:
    """Ascent in balls of 3, 2 and 1 times the radius, each from the best point of the last, projected.

    The first is from ``start`` (B, C, H, W), projected. What is wrong outside the threat does not count: only the last
    stage ends an example.
    """
    counts = [math.ceil(share * steps) for _, share in STAGES[:-1]]
    counts.append(max(steps - sum(counts), 1))
    for (times, _), count in zip(STAGES, counts, strict=True):
        ball = threat.with_eps(min(times * threat.eps, _diameter(threat, x)))
        found = _stage(model, ball, x, labels, height, ball.project(start, x), steps=count, final=times == 1.0)
        start = found.point
    return found


def _diameter(threat: Lp, x: Tensor) -> float:
    return (threat.high - threat.low) * x[0].numel()


def _stage(
    model: nn.Module, ball: Lp, x: Tensor, labels: Tensor, height: Height, start: Tensor, *, steps: int, final: bool
) -> Climbed:
    """x_{k+1} = Π(x_k + η s / ‖s‖₁), s the sign of the gradient's largest components, η = eps at first.

    Components that the box stops do not count; in the reference they do, and waste the step.

    At checkpoints: where the best change has become at least 5 % sparser η is eps again and the ascent goes back to
    the best point; elsewhere η shrinks.
    """
    pixels = x[0].numel()
    value, grad, wrong = look(model, start, labels, height)
    wrong = wrong & final
    result = Climbed(start.clone(), wrong.clone(), value.clone())
    here = climbers(x, labels, start, value, grad, step=ball.eps)
    share = torch.full_like(value, FIRST)
    sparsity = torch.full_like(value, float(pixels))
    gap, since = max(int(GAP * steps), 1), 0
    for number in range(steps):
        if bool(wrong.any()):
            right = ~wrong
            here, share, sparsity = here.keep(right), share[right], sparsity[right]
        if len(here) == 0:
            return result
        with torch.no_grad():
            sign = _largest(movable(ball, here.point, here.grad), share).sign()
            long = sign.flatten(1).abs().sum(1).clamp_min(1)
            here.point = ball.project(here.point + (here.step / long).view(-1, 1, 1, 1) * sign, here.x)
        value, grad, wrong = look(model, here.point, here.labels, height, gradient=number + 1 < steps)
        wrong = wrong & final
        record(here, value, grad)
        fallen = here.index[wrong]
        result.point[fallen], result.height[fallen], result.broken[fallen] = here.point[wrong], value[wrong], True
        since += 1
        if since == gap:
            share, sparsity = _checkpoint(here, sparsity, ball.eps, pixels)
            since = 0
    right = ~wrong
    standing = here.index[right]
    result.point[standing], result.height[standing] = here.best[right], here.best_value[right]
    return result


def _largest(grad: Tensor, share: Tensor) -> Tensor:
    """``grad`` (B, C, H, W) with all but its ``share`` (B,) of largest components at zero."""
    size = grad.flatten(1).abs()
    last = ((1 - share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
    least = size.sort(dim=1).values.gather(1, last[:, None])
    return grad * (size >= least).view_as(grad)


def _checkpoint(here: Climbers, sparsity: Tensor, eps: float, pixels: int) -> tuple[Tensor, Tensor]:
    """The next share of components and the number of pixels that the best change has non-zero, both (B,)."""
    now = (here.best != here.x).flatten(1).sum(1).to(sparsity)
    sparser = now / sparsity.clamp_min(1) < DENSITY
    here.step = torch.where(sparser, eps, here.step / SHRINK).clamp(eps / LEAST, eps)
    back = sparser.view(-1, 1, 1, 1)
    here.point = torch.where(back, here.best, here.point)
    here.grad = torch.where(back, here.best_grad, here.grad)
    return now / pixels / SPARSER, now
