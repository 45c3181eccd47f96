"""Ascent with a step size that finds itself: what Auto-PGD does within one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from robustlens.attacks.tries import together
from robustlens.core.criterion import logit_margin
from robustlens.core.types import Threat

#: Share of a step that goes along the gradient, the rest along the last step (α of the paper).
MOMENTUM = 0.75
#: A step size is halved where fewer than this share of the steps since the last checkpoint went up (ρ).
RISING = 0.75
#: First gap between checkpoints, what each gap is shorter than the last, and the shortest: shares of all steps.
GAPS = (0.22, 0.03, 0.06)

#: What is climbed: (logits (B, K), labels (B, L)) → (B,). The first column of the labels is y.
Height = Callable[[Tensor, Tensor], Tensor]


class Climbed(NamedTuple):
    """Where an ascent ended: the points (B, C, H, W), whether each is ``broken`` (B,), and its ``height`` (B,).

    A broken example's point is the first that the model answers wrongly, any other's is its highest.
    """

    point: Tensor
    broken: Tensor
    height: Tensor


#: Where a try starts: (positions (A,)) → points (A, C, H, W). It draws anew each time.
Begin = Callable[[Tensor], Tensor]

#: Tries: (positions (A,), the number of the try of each, its start (A, C, H, W)) → where they end.
Climb = Callable[[Tensor, Tensor, Tensor], Climbed]


def highest(begin: Begin, climb: Climb, tries: int, x: Tensor) -> Tensor:
    """Points (B, C, H, W) from ``tries`` numbered from 0, each on the positions (A,) of what is not yet broken.

    A broken example keeps its point; among those of the others the highest is kept.
    """
    result, left, done = x.clone(), torch.arange(len(x), device=x.device), 0
    height = torch.full_like(x[:, 0, 0, 0], -torch.inf)
    while done < tries and len(left):
        count = min(together(x, len(left), done), tries - done)
        start = torch.cat([begin(left) for _ in range(count)])
        number = torch.arange(done, done + count, device=x.device).repeat_interleave(len(left))
        found = climb(left.repeat(count), number, start)
        standing = torch.ones_like(left, dtype=torch.bool)
        for point, broken, value in zip(*(part.chunk(count) for part in found), strict=True):
            better = standing & (broken | (value > height[left]))
            result[left[better]], height[left[better]] = point[better], value[better].to(height)
            standing &= ~broken
        left, done = left[standing], done + count
    return result


@dataclass(eq=False)
class Climbers:
    """The examples that are still right, and where each stands; all tensors have one row for each.

    ``index`` counts in the batch, ``previous`` is the point before this one, ``best`` the highest point, with its
    gradient and value. ``rises`` counts since the last checkpoint, ``best_before`` is the highest value then.
    """

    index: Tensor
    x: Tensor
    labels: Tensor
    point: Tensor
    previous: Tensor
    grad: Tensor
    value: Tensor
    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    step: Tensor
    rises: Tensor
    best_before: Tensor
    halved: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def keep(self, mask: Tensor) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[mask] for field in dataclasses.fields(self)})


def climbers(x: Tensor, labels: Tensor, start: Tensor, value: Tensor, grad: Tensor, *, step: float) -> Climbers:
    """All examples at ``start`` (B, C, H, W), where ``value`` (B,) and ``grad`` were found."""
    return Climbers(
        index=torch.arange(len(x), device=x.device),
        x=x,
        labels=labels,
        point=start,
        previous=start,
        grad=grad,
        value=value,
        best=start.clone(),
        best_grad=grad.clone(),
        best_value=value.clone(),
        step=torch.full_like(value, step),
        rises=torch.zeros_like(value),
        best_before=value,
        halved=torch.ones_like(value, dtype=torch.bool),
    )


def momentum_ascent(
    model: nn.Module, threat: Threat, x: Tensor, labels: Tensor, height: Height, start: Tensor, *, steps: int
) -> Climbed:
    """Algorithm 1 from ``start`` (B, C, H, W)."""
    value, grad, wrong = look(model, start, labels, height)
    result = Climbed(start.clone(), wrong.clone(), value.clone())
    here = climbers(x, labels, start, value, grad, step=2 * threat.eps)
    gap, since = max(int(GAPS[0] * steps), 1), 0
    for number in range(steps):
        if bool(wrong.any()):
            here = here.keep(~wrong)
        if len(here) == 0:
            return result
        with torch.no_grad():
            move = here.point - here.previous
            here.previous = here.point
            u = threat.project(here.point.addcmul(here.step[:, None, None, None], threat.ascend(here.grad)), here.x)
            if number > 0:
                u = threat.project(here.point.lerp(u, MOMENTUM).add_(move, alpha=1 - MOMENTUM), here.x)
            here.point = u
        value, grad, wrong = look(model, u, here.labels, height, gradient=number + 1 < steps)
        record(here, value, grad)
        fallen = here.index[wrong]
        result.point[fallen], result.height[fallen], result.broken[fallen] = u[wrong], value[wrong], True
        since += 1
        if since == gap:
            _checkpoint(here, gap)
            gap, since = max(gap - max(int(GAPS[1] * steps), 1), int(GAPS[2] * steps), 1), 0
    right = ~wrong
    standing = here.index[right]
    result.point[standing], result.height[standing] = here.best[right], here.best_value[right]
    return result


def look(
    model: nn.Module, point: Tensor, labels: Tensor, height: Height, *, gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (B,) and gradient (B, C, H, W; zero where none is asked for) at ``point``, and whether it is wrong (B,)."""
    point = point.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits = model(point)
        value = height(logits, labels)
    slope = torch.autograd.grad(value.sum(), point)[0] if gradient else torch.zeros_like(point)
    return value.detach(), slope, logit_margin(logits.detach(), labels[:, 0]) <= 0


def record(here: Climbers, value: Tensor, grad: Tensor) -> None:
    """Enter what was found at ``here.point``."""
    here.rises = here.rises + (value > here.value)
    here.value, here.grad = value, grad
    higher = (value > here.best_value).nonzero()[:, 0]
    for best, now in ((here.best, here.point), (here.best_grad, grad), (here.best_value, value)):
        best.index_copy_(0, higher, now.index_select(0, higher))  # quicker than brackets


def _checkpoint(here: Climbers, gap: int) -> None:
    stuck = ~here.halved & (here.best_before >= here.best_value)
    here.halved = (here.rises <= RISING * gap) | stuck
    here.best_before = here.best_value.clone()
    here.rises = torch.zeros_like(here.rises)
    here.step = torch.where(here.halved, here.step / 2, here.step)
    back = here.halved[:, None, None, None]
    here.point = torch.where(back, here.best, here.point)
    here.grad = torch.where(back, here.best_grad, here.grad)
