"""SuperDeepFool: the nearest adversarial image by DeepFool and orthogonal projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import (
    along,
    dual_size,
    linearised_step,
    movable,
    nearest_on_segment,
    require_smooth_norm,
    rounding,
)
from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.linalg.rivals import rivals
from robustlens.results.errors import require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class SuperDeepFool:
    """min_z ‖z − x‖_p such that some f_k(z) ≥ f_y(z), z in the box: the smallest change, not the worst in a ball.

    With w = ∇(f_k − f_y), q the dual of p, and v the unit vector of steepest ascent (w / ‖w‖₂ for ℓ2, sign(w) for ℓ∞):

        where z is right:  z ← z + (1 + overshoot) · (f_y − f_k)(z) / ‖w‖_q · v      (DeepFool; k nearest, linearised)
        where it is wrong: z ← x + ⟨w, z − x⟩ / ‖w‖_q · v                            (projection; k the class on top)

    The projection takes x to the nearest point of the plane through z along the boundary, so that z − x becomes
    orthogonal to the boundary, as it is at the nearest point. Once a projected z is wrong an image is finished. For ℓ2
    this is the paper's algorithm 2, SDF(∞, 1); for ℓ∞ the steps are DeepFool's ℓp form, and the projection is the same
    one in that norm. The authors' code goes on otherwise where a projected z is right: it adds the next projection to
    the last instead of putting it in its place, and has steps of DeepFool by itself clipped to the box.

    The paper clips the result to the box, and no more: here w is 0 at pixels that cannot move along it, and every z is
    moved into the box; without that, steps that ask black pixels to become darker fall short of the boundary.

    Of all wrong z the nearest is kept, and the segment to it is bisected (in the paper only a way to look at results,
    in the code 10 halvings). The radius of the threat limits how far the answer may lie: take the diameter of the box
    to measure distances. Where nothing wrong was met, the last z comes back; the choke point sees that it is right. An
    image that is wrong already comes back as it is.

    Costs at most ``steps`` × ``rivals`` input passes and ``bisections`` + 2 forward passes; 5 to 15 steps do for
    most images, and finished ones leave the batch.

    Attributes:
        threat: norm (ℓ2 or ℓ∞), radius and box.
        steps: gradient evaluations of an image, in both phases together.
        rivals: the wrong classes that DeepFool looks at, those with the highest logits.
        overshoot: how much farther than the linearised boundary a step goes; 0.02 in the authors' code, none in the
            paper's algorithm.
        bisections: halvings of the segment from x to the result.

    Raises:
        InputError: another norm, no steps, no rivals, a negative overshoot or number of halvings.
    """

    name: ClassVar[str] = "superdeepfool"
    reference: ClassVar[str] = (
        "Abdollahpoorrostam et al. 2023, arXiv 2303.12481, eq. 4 and algorithm 2; "
        "Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, §3 (ℓp steps)"
    )

    threat: Threat
    steps: int = 100
    rivals: int = 9
    overshoot: float = 0.02
    bisections: int = 10

    def __post_init__(self) -> None:
        require_smooth_norm(self.threat, self.name)
        require_at_least(self, steps=1, rivals=1, overshoot=0, bisections=0)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 8.0), steps=20), cls(threat=Lp("linf", 0.5), steps=10, rivals=2, bisections=3)]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps * self.rivals, forward=self.bisections + 2)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        threat = self.threat
        assert isinstance(threat, Lp)
        with torch.no_grad():
            room = rounding(model(x))
        nearest, distance = x.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf)
        alive, point = torch.arange(len(x), device=x.device), x
        projected = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(self.steps):
            origin = x[alive]
            leads, slopes = rivals(model, point, y[alive], self.rivals)
            leads = leads + room[alive, None]
            wrong, size = leads[:, 0] <= 0, threat.distance(point, origin)
            closer = alive[wrong & (size < distance[alive])]
            better = wrong & (size < distance[alive])
            nearest[closer], distance[closer] = point[better], size[better]
            stepped = linearised_step(threat, point, leads, slopes, overshoot=self.overshoot)
            back = _projected(threat, point, origin, slopes[:, 0])
            point = torch.where(wrong[:, None, None, None], back, stepped)
            going = ~(wrong & projected)
            projected = wrong[going]
            alive, point = alive[going], point[going]
            if len(alive) == 0:
                break
        found = torch.isfinite(distance)
        lost = ~found[alive]
        nearest[alive[lost]] = point[lost]
        nearest[found] = nearest_on_segment(model, x[found], nearest[found], y[found], steps=self.bisections)
        return nearest


def _projected(threat: Lp, z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """x moved to the plane through z along the boundary whose slope is w (all (B, C, H, W))."""
    w = movable(threat, x, w)
    size = dual_size(threat, w).clamp_min(torch.finfo(z.dtype).tiny)
    return along(threat, x, w, (w * (z - x)).flatten(1).sum(1) / size)
