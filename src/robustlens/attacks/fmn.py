"""The fast minimum-norm attack (FMN): gradient descent on the margin in a ball that breathes around the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import dual_size, margin_and_slope, require_smooth_norm, rounding, smaller
from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class FMN:
    """min ‖δ‖_p such that M(x + δ) = f_y − max_{j≠y} f_j ≤ 0, x + δ in the box: the smallest change.

    From δ = 0, with g = ∇M and q the dual of p, in every step first the radius ε, then δ:

        ε ← min((1 − γ) ε, ‖δ*‖_p)     where x + δ is wrong (δ* the smallest wrong change so far)
        ε ← (1 + γ) ε                  where it is right, but was wrong before
        ε ← max((1 + γ) ε, ‖δ‖_p + (1 + γ) M / ‖g‖_q)    where it was never wrong (beyond the linearised boundary)
        δ ← box(ball_ε(δ − α g / ‖g‖₂))

    The paper has ‖δ‖_p + M / ‖g‖_q there: a radius on the boundary, which an affine network does not let it cross, and
    one that stops growing where the box takes a part of every step.

    α falls from ``step_size`` to a hundredth of it and γ from ``gamma`` to a fiftieth, along half a cosine. The
    smallest wrong change is kept. Where there is none, the last one comes back; the choke point sees that it is right.
    An image that is wrong already comes back as it is. The radius of the threat limits how far the answer may lie.

    Costs ``steps`` input passes and a forward pass.

    Attributes:
        threat: norm (ℓ2 or ℓ∞), radius and box.
        steps: of gradient descent; the paper uses up to 1,000.
        step_size: first α in pixel units; None is 1 for ℓ2 and 3 for ℓ∞, where steps of ℓ2 size 1 are short.
        gamma: first γ.

    Raises:
        InputError: another norm, no steps, a step size ≤ 0, or γ outside (0, 1).
    """

    name: ClassVar[str] = "fmn"
    reference: ClassVar[str] = "Pintor et al. 2021, arXiv 2102.12827, algorithm 1"

    threat: Threat
    steps: int = 100
    step_size: float | None = None
    gamma: float = 0.05

    def __post_init__(self) -> None:
        require_smooth_norm(self.threat, self.name)
        for field, fits, expected in (
            ("steps", self.steps >= 1, "at least 1"),
            ("step_size", self.step_size is None or self.step_size > 0, "a number > 0"),
            ("gamma", 0 < self.gamma < 1, "a number between 0 and 1"),
        ):
            if not fits:
                raise InputError(
                    f"fmn {field}",
                    expected=expected,
                    got=str(getattr(self, field)),
                    fix="Leave it out.",
                )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 8.0), steps=20), cls(threat=Lp("linf", 0.5), steps=15, gamma=0.1)]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        threat = self.threat
        assert isinstance(threat, Lp)
        delta, nearest = torch.zeros_like(x), torch.zeros_like(x)
        smallest = torch.full_like(x[:, 0, 0, 0], torch.inf)
        radius = room = torch.zeros_like(smallest)
        first = self.step_size or (3.0 if threat.norm == "linf" else 1.0)
        for step in range(self.steps):
            margin, slope, logits = margin_and_slope(model, x + delta, y)
            room = rounding(logits) if step == 0 else room
            margin += room
            nearest, smallest = smaller(threat, margin, delta, nearest, smallest)
            fall = (1 + math.cos(math.pi * step / self.steps)) / 2
            alpha = first * (0.01 + 0.99 * fall)
            gamma = self.gamma * (0.02 + 0.98 * fall)
            linear = threat.size(delta) + (1 + gamma) * margin / dual_size(threat, slope).clamp_min(
                torch.finfo(x.dtype).tiny
            )
            grown = (1 + gamma) * radius
            grown = torch.where(torch.isfinite(smallest), grown, grown.maximum(linear))
            radius = torch.where(margin <= 0, ((1 - gamma) * radius).minimum(smallest), grown)
            direction = -Lp("l2", 1.0).ascend(slope, floor=torch.finfo(x.dtype).tiny)
            delta = _into_ball(threat, delta + alpha * direction, radius)
            delta = (x + delta).clamp(threat.low, threat.high) - x
        with torch.no_grad():
            margin = logit_margin(model(x + delta), y) + room
        nearest, smallest = smaller(threat, margin, delta, nearest, smallest)
        return x + torch.where(torch.isfinite(smallest)[:, None, None, None], nearest, delta)


def _into_ball(threat: Lp, delta: Tensor, radius: Tensor) -> Tensor:
    """The nearest change in the ball of ``radius`` (B,)."""
    r = radius[:, None, None, None]
    if threat.norm == "linf":
        return delta.maximum(-r).minimum(r)
    size = threat.size(delta).clamp_min(torch.finfo(delta.dtype).tiny)[:, None, None, None]
    return delta * (r / size).clamp_max(1)
