"""Sharpness-aware minimisation: the gradient is taken where the loss nearby is highest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import still
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Objective, Regularizer, Terms
from robustlens.results.errors import InputError
from robustlens.updates.awp import aside, displaced
from robustlens.updates.descend import Descend, backward_to_weights, whole


@dataclass(frozen=True, kw_only=True)
class SAM:
    """min_θ max_e L(θ + e) over ‖e‖₂ ≤ ρ, or ‖e / |θ|‖₂ ≤ ρ if ``adaptive``; L is the whole loss, with penalties.

    To first order the maximum is at e = ρ g / ‖g‖₂ with g = ∇L(θ), one norm over all layers, or at
    e = ρ θ² g / ‖|θ| g‖₂ (ASAM, elementwise), which does not change when a weight is scaled and the next one undoes it.
    The step's gradient is ∇L(θ + e).

    Both passes see the same x', dropout masks and random draws. BatchNorm's statistics and the memory of plug-ins move
    in the first pass, at θ; the second is forgotten. The terms returned are those of the first. Cost of a step: the
    passes to the weights and the regularizers' twice, crafting once (twice with ``recraft``).

    Attributes:
        rho: ρ. 0.05 for SAM. The ASAM authors use 0.5 on CIFAR-10 with biases that are perturbed as by SAM; for the
            form here, which treats every parameter alike, they advised 2.0 (davda54/sam, issue 37).
        adaptive: ASAM.
        recraft: craft x' again at θ + e, so that its max is over both images and weights.

    Raises:
        InputError: a negative ρ.
    """

    name: ClassVar[str] = "sam"
    reference: ClassVar[str] = (
        "Foret et al. 2021, arXiv 2010.01412, Algorithm 1; adaptive: Kwon et al. 2021, arXiv 2102.11600, Algorithm 1"
    )

    replays: ClassVar[int] = 1

    rho: float = 0.05
    adaptive: bool = False
    recraft: bool = False

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise InputError("sam rho", expected="a number ≥ 0", got=str(self.rho), fix="0 is the plain step.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(rho=2.0, adaptive=True), cls(recraft=True)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals the plain step bit for bit."""
        return cls(rho=0.0)

    def passes(self, objective: Passes, regularizers: Passes) -> Passes:
        again = objective if self.recraft else objective.learning
        return objective + again + regularizers * 2

    def backward(
        self,
        model: nn.Module,
        objective: Objective,
        regularizers: tuple[Regularizer, ...],
        batch: Batch,
        *,
        gen: Generator,
    ) -> Terms:
        if self.rho == 0:
            return Descend().backward(model, objective, regularizers, batch, gen=gen)
        start, twin = aside(batch), gen.clone_state()
        crafted = objective.craft(model, batch, gen=gen)
        if not self.recraft:
            again, twin = dataclasses.replace(crafted, batch=aside(crafted.batch)), gen.clone_state()
        masks = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        weights = [p for p in model.parameters() if p.requires_grad]
        terms = whole(model, objective, regularizers, crafted, gen=gen)
        grads = torch.autograd.grad(terms.loss, weights, materialize_grads=True)
        batch.moment.world.average(grads)
        with still(model), displaced(weights, self._ascent([w.detach() for w in weights], grads)):
            if self.recraft:
                again = objective.craft(model, start, gen=twin)
            torch.set_rng_state(masks[0])
            torch.cuda.set_rng_state_all(masks[1])
            backward_to_weights(model, whole(model, objective, regularizers, again, gen=twin))
        return terms

    def _ascent(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """e; zero where the gradient is."""
        scales = [w.abs() if self.adaptive else torch.ones_like(w) for w in weights]
        length = torch.stack([(t * g).norm() for t, g in zip(scales, grads, strict=True)]).norm()
        return [self.rho * t.square() * g / (length + 1e-12) for t, g in zip(scales, grads, strict=True)]
