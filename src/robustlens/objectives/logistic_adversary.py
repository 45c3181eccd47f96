"""Adversarial training of logistic regression without an attack: the worst case in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.criterion import cross_entropy
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Terms, Threat
from robustlens.models.linear import LogisticNet
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

#: Order of the dual norm: max over ‖δ‖_p ≤ 1 of w·δ is ‖w‖_q with 1/p + 1/q = 1.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


@dataclass(frozen=True, kw_only=True)
class LogisticAdversary:
    """min_w mean log(1 + exp(−y w·x + ε ‖w‖_*)), which is min_w mean max_{‖δ‖ ≤ ε} log(1 + exp(−y w·(x + δ))).

    ‖·‖_* is the dual of the threat's norm (ℓ2: ‖w‖₂, ℓ∞: ‖w‖₁, ℓ1: ‖w‖_∞) and y = ±1. The adversary ignores the pixel
    box, so it is stronger than one that has to keep to it; ``adversarial`` with ``linear-exact`` is the one inside.
    The loss is differentiated through ‖w‖: as the maximum is attained, this is also its gradient at fixed δ (Danskin),
    while its Hessian has the curvature of ‖w‖ that a fixed δ lacks.

    Nothing is crafted. ``logits`` (B, 2) are (0, z − y ε ‖w‖_*), those of the worst case, and ``clean_logits`` (0, z).
    One forward and backward pass a step.

    Attributes:
        threat: norm and radius, the radius in pixel units of [0, 1]; 0 is standard training.

    Raises:
        InputError: a threat that is no ball of a norm; a network other than ``logistic``.
    """

    name: ClassVar[str] = "logistic-adversary"
    reference: ClassVar[str] = "Yamada et al. 2021, arXiv 2102.02950, eq. 4 and 7 with Lemma 1"

    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Lp):
            raise InputError(
                "logistic-adversary threat", expected="l2, linf or l1", got=repr(self.threat), fix='Write "l2:1.0".'
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 0.0))]  # a positive radius runs on logistic regression alone

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("l2", 0.0))

    @property
    def passes(self) -> Passes:
        return Passes(weights=1)

    def check(self, model: nn.Module, x: Tensor) -> None:
        if not isinstance(model, LogisticNet):
            raise InputError(
                "logistic-adversary",
                expected='the model "logistic", which has one row of weights',
                got=type(model).__name__,
                fix="Use adversarial with an attack.",
            )

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        return Crafted(batch, batch.x)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        y = crafted.batch.y
        clean_logits = model(crafted.batch.x)
        if self.threat.eps == 0:
            return Terms(cross_entropy(clean_logits, y), clean_logits, clean_logits=clean_logits)
        assert isinstance(self.threat, Lp) and isinstance(model, LogisticNet)
        reach = self.threat.eps * torch.linalg.vector_norm(model.fc.weight, DUAL[self.threat.norm])
        signs = F.pad((2 * y - 1).to(clean_logits)[:, None], (1, 0))  # (B, 2), rows (0, ±1)
        logits = clean_logits - reach * signs
        return Terms(cross_entropy(logits, y), logits, clean_logits=clean_logits)
