"""The fast gradient (sign) method: one step to the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Π(z + α · d), d the direction of steepest ascent of the cross-entropy at z (its sign for ℓ∞).

    z is x, or a random point of the ball (FGSM-RS, "fast" adversarial training: with α = 1.25 eps). One forward and
    one backward pass. A network trained on it can learn to fool it alone, within an epoch and from a random start
    too: read its accuracy beside that of PGD.

    Attributes:
        threat: norm, radius and box.
        random_start: begin at a uniform point of the ball instead of at x.
        step_size: α in pixel units; None is eps.

    Raises:
        InputError: a step size ≤ 0.
    """

    name: ClassVar[str] = "fgsm"
    reference: ClassVar[str] = (
        "Goodfellow et al. 2015, arXiv 1412.6572, §4; from a random start: Wong et al. 2020, arXiv 2001.03994, Alg. 3"
    )

    threat: Threat
    random_start: bool = False
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None and self.step_size <= 0:
            raise InputError(
                "fgsm step_size", expected="a number > 0", got=str(self.step_size), fix="Leave it out for eps."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 8 / 255)),
            cls(threat=Lp("l2", 1.0)),
            cls(threat=Lp("linf", 8 / 255), random_start=True, step_size=10 / 255),
        ]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        start = self.threat.start(x, gen) if self.random_start else x
        alpha = self.threat.eps if self.step_size is None else self.step_size
        point = start.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(point), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, point)
        return self.threat.project(torch.add(start, self.threat.ascend(grad), alpha=alpha), x)
