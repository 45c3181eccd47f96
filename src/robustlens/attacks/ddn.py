"""The decoupled direction and norm attack (DDN): the direction by gradient ascent, the norm by right or wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import require_l2, rounding, smaller
from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class DDN:
    """min ‖δ‖₂ such that f_y(x + δ) ≤ max_{j≠y} f_j(x + δ), x + δ in the box: the smallest change.

    From δ = 0, with g the gradient of the cross-entropy at x + δ:

        ε ← (1 − γ) ε where x + δ is wrong, (1 + γ) ε where it is right
        δ ← δ + α g / ‖g‖₂
        δ ← box(ε δ / ‖δ‖₂)

    α falls from ``step_size`` to a hundredth of it along half a cosine. The smallest wrong change is kept. Where there
    is none, the last one comes back; the choke point sees that it is right. An image that is wrong already comes back
    as it is. The radius of the threat limits how far the answer may lie.

    g / ‖g‖₂ is taken from u = log Σ_{j≠y} exp f_j − f_y: cross-entropy is log(1 + eᵘ), so both gradients have one
    direction, and that of u does not vanish where softmax saturates. Where logits are small, both mix the rivals, and
    the nearest of several boundaries is missed (``fmn`` is the same search by the margin). ε stops at the distance to
    the farthest corner of the box. The paper also rounds x + δ to 256 levels in every step; images here are real
    numbers, and are not rounded.

    Costs ``steps`` input passes and a forward pass.

    Attributes:
        threat: an ℓ2 ball and the box.
        steps: of gradient ascent; the paper uses 100, 300 and 1,000.
        step_size: first α in pixel units.
        gamma: γ, the relative change of ε in a step.
        init_norm: first ε in pixel units.

    Raises:
        InputError: another norm, no steps, a step size or first ε ≤ 0, or γ outside (0, 1).
    """

    name: ClassVar[str] = "ddn"
    reference: ClassVar[str] = "Rony et al. 2019, arXiv 1811.09600, algorithm 1"

    threat: Threat
    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05
    init_norm: float = 1.0

    def __post_init__(self) -> None:
        require_l2(self.threat, self.name)
        require_at_least(self, steps=1)
        for field, fits, expected in (
            ("step_size", self.step_size > 0, "a number > 0"),
            ("gamma", 0 < self.gamma < 1, "a number between 0 and 1"),
            ("init_norm", self.init_norm > 0, "a number > 0"),
        ):
            if not fits:
                raise InputError(f"ddn {field}", expected=expected, got=str(getattr(self, field)), fix="Leave it out.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 8.0), steps=20), cls(threat=Lp("l2", 1.0), steps=10, gamma=0.1, init_norm=0.5)]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        threat = self.threat
        assert isinstance(threat, Lp)
        tiny = torch.finfo(x.dtype).tiny
        delta, nearest = torch.zeros_like(x), torch.zeros_like(x)
        smallest = torch.full_like(x[:, 0, 0, 0], torch.inf)
        radius, room = torch.full_like(smallest, self.init_norm), torch.zeros_like(smallest)
        farthest = threat.size((x - threat.low).maximum(threat.high - x))
        for step in range(self.steps):
            margin, slope, logits = _ascent(model, x + delta, y)
            room = rounding(logits) if step == 0 else room
            margin += room
            nearest, smallest = smaller(threat, margin, delta, nearest, smallest)
            alpha = self.step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            delta = delta + alpha * threat.ascend(slope, floor=tiny)
            radius = torch.where(margin <= 0, (1 - self.gamma) * radius, (1 + self.gamma) * radius).minimum(farthest)
            direction = threat.ascend(delta, floor=tiny)
            delta = (x + radius[:, None, None, None] * direction).clamp(threat.low, threat.high) - x
        with torch.no_grad():
            margin = logit_margin(model(x + delta), y) + room
        nearest, smallest = smaller(threat, margin, delta, nearest, smallest)
        return x + torch.where(torch.isfinite(smallest)[:, None, None, None], nearest, delta)


def _ascent(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logit margin (B,); ∇u (B, C, H, W), along the gradient of the cross-entropy; and the logits (B, K)."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        others = logits.scatter(1, y[:, None], -torch.inf)
        u = others.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
        (slope,) = torch.autograd.grad(u.sum(), point)
    return logit_margin(logits.detach(), y), slope, logits.detach()
