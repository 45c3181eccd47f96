"""The fast gradient (sign) method: one step to the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.types import Threat
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Π(x + eps · d), d the direction of steepest ascent of the cross-entropy at x (its sign for ℓ∞).

    One forward and one backward pass. A network trained on it can learn to fool it alone: read its accuracy
    beside that of PGD.
    """

    name: ClassVar[str] = "fgsm"
    reference: ClassVar[str] = "Goodfellow et al. 2015, arXiv 1412.6572, §4"

    threat: Threat

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 8 / 255)), cls(threat=Lp("l2", 1.0))]

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(point), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, point)
        return self.threat.project(torch.add(x, self.threat.ascend(grad), alpha=self.threat.eps), x)
