"""Free adversarial training: one backward pass serves the weights and the attack alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Objective, Regularizer, Terms, Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.descend import whole

#: The perturbation (B, C, H, W) of the latest batch, in its order.
DELTA = "rows/free/delta"


@dataclass(frozen=True, kw_only=True)
class Free:
    """min_θ max_δ L(θ, x + δ), with ``replays`` steps on every batch that move θ and δ at once.

    In every step x' = Π(x + δ); one backward pass gives the gradient of the loss with respect to θ, along which the
    optimizer moves, and to x', along which δ ← Π(x' + ε d) − x, d the threat's direction of steepest ascent and Π the
    nearest allowed point. δ starts at 0 and is never reset: it passes from each batch to the next, example by example
    in the batch's order, so with one replay it is a stale guess and not a fresh draw as in FGSM-RS. A smaller batch
    uses and moves the first rows.

    The box is applied to the stored δ, as in Wong et al.'s code; the authors' own clips δ to the ball alone and
    x + δ to the box at the network's door. The two differ only in pixels at the border of the box.

    The objective's ``loss`` is evaluated on x', and its ``craft`` is not called: use "standard", or for its loss
    "trades". The gradient to x' is that of the whole loss, penalties included. An epoch costs ``replays`` epochs of
    plain steps, and moves BatchNorm's statistics as often; divide the epochs by it.

    Attributes:
        threat: norm and radius ε of δ, which is also the step size.
        replays: steps on every batch, m. Their weights differ, so that δ lags one step behind.

    Raises:
        InputError: no replays, or an objective (one with ``needs_craft``) whose loss needs what only crafting finds.
    """

    name: ClassVar[str] = "free"
    reference: ClassVar[str] = "Shafahi et al. 2019, arXiv 1904.12843, Algorithm 1"

    threat: Threat
    replays: int = 8

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise InputError("free replays", expected="at least 1", got=str(self.replays), fix="The paper uses 8.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 8 / 255)), cls(threat=Lp("l2", 1.0), replays=2)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals the plain step bit for bit."""
        return cls(threat=Lp("linf", 0.0), replays=1)

    def passes(self, objective: Passes, regularizers: Passes) -> Passes:
        return (objective.learning + regularizers) * self.replays

    def check_objective(self, objective: Objective) -> None:
        """Raise InputError if the objective's loss cannot be evaluated without its ``craft``."""
        if getattr(objective, "needs_craft", False):
            raise InputError(
                f"update free with objective {objective.name!r}",
                expected="an objective whose loss can be evaluated on any inputs",
                got="one that needs what its own attack found",
                fix='Use objective = "standard" or "trades", or another update.',
            )

    def backward(
        self,
        model: nn.Module,
        objective: Objective,
        regularizers: tuple[Regularizer, ...],
        batch: Batch,
        *,
        gen: Generator,
    ) -> Terms:
        x, memory, rows = batch.x, batch.moment.memory, len(batch)
        delta = memory.get(DELTA, torch.zeros_like(x))
        x_adv = self.threat.project(x + delta[:rows], x).requires_grad_()
        terms = whole(model, objective, regularizers, Crafted(batch, x_adv), gen=gen)
        torch.autograd.backward(terms.loss, inputs=[x_adv, *(p for p in model.parameters() if p.requires_grad)])
        memory[DELTA] = torch.cat([self._ascended(x_adv, x), delta[rows:]])
        return terms

    @torch.no_grad()
    def _ascended(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """δ one step on. The loss is a mean; times B it gives each example the gradient of its own loss."""
        slope = torch.zeros_like(x_adv) if x_adv.grad is None else x_adv.grad  # a loss of clean images alone
        direction = self.threat.ascend(len(x) * slope)
        return self.threat.project(torch.add(x_adv, direction, alpha=self.threat.eps), x) - x
