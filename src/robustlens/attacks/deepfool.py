"""DeepFool: step by step to the nearest boundary of the linearised network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import linearised_step, require_smooth_norm, rounding
from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.linalg.rivals import rivals
from robustlens.results.errors import require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class DeepFool:
    """min_z ‖z − x‖_p such that some f_k(z) ≥ f_y(z), z in the box: a greedy way to a small change.

    From z = x, until z is wrong, with w_k = ∇(f_k − f_y)(z), q the dual of p, and v the unit vector of steepest ascent
    (w / ‖w‖₂ for ℓ2, sign(w) for ℓ∞):

        k ← argmin_k (f_y − f_k)(z) / ‖w_k‖_q
        z ← z + (1 + overshoot) · (f_y − f_k)(z) / ‖w_k‖_q · v(w_k)

    The first wrong z is the answer: nothing draws it back to x, so it is fast, and farther than what ``superdeepfool``
    or ``fmn`` find. Every step overshoots, as in the authors' program; the paper stretches the sum at the end. The
    paper knows no box: here w is 0 at pixels that cannot move along it, and every z is moved into the box; without
    that, steps that ask black pixels to become darker fall short of the boundary.

    The radius of the threat limits how far the answer may lie: take the diameter of the box to measure distances. Where
    nothing wrong was met, the last z comes back; the choke point sees that it is right. An image that is wrong already
    comes back as it is.

    Costs at most ``steps`` × ``rivals`` input passes and a forward pass; 2 to 5 steps do for most images, and
    finished ones leave the batch.

    Attributes:
        threat: norm (ℓ2 or ℓ∞), radius and box.
        steps: linearisations of an image at most.
        rivals: the wrong classes that are looked at, those with the highest logits; the paper looks at all.
        overshoot: η, how much farther than the linearised boundary a step goes.

    Raises:
        InputError: another norm, no steps, no rivals, or a negative overshoot.
    """

    name: ClassVar[str] = "deepfool"
    reference: ClassVar[str] = "Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, algorithm 2 and §3.3 (ℓp steps)"

    threat: Threat
    steps: int = 50
    rivals: int = 9
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        require_smooth_norm(self.threat, self.name)
        require_at_least(self, steps=1, rivals=1, overshoot=0)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 8.0)), cls(threat=Lp("linf", 0.5), steps=10, rivals=2)]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps * self.rivals, forward=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        threat = self.threat
        assert isinstance(threat, Lp)
        with torch.no_grad():
            room = rounding(model(x))
        reached, alive = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            leads, slopes = rivals(model, reached[alive], y[alive], self.rivals)
            leads = leads + room[alive, None]
            right = leads[:, 0] > 0
            alive, leads, slopes = alive[right], leads[right], slopes[right]
            if len(alive) == 0:
                break
            reached[alive] = linearised_step(threat, reached[alive], leads, slopes, overshoot=self.overshoot)
        return reached
