"""Adversarial weight perturbation: the gradient is taken where the weights are worst, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import still
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Objective, Regularizer, Terms
from robustlens.results.errors import InputError
from robustlens.updates.descend import Descend, backward_to_weights, whole


@dataclass(frozen=True, kw_only=True)
class AWP:
    """min_θ max_v L(θ + v) over ‖v_l‖ ≤ γ ‖θ_l‖ for every layer l; L is the loss on the crafted inputs.

    One ascent step finds v: v_l = γ ‖θ_l‖ ∇_l L / ‖∇_l L‖ for the weights of more than one dimension; biases and
    BatchNorm's own weights stay. The step's gradient is that of the whole loss at θ + v, on the same x', and the
    optimizer moves θ along it. The authors let the optimizer move θ + v and subtract v afterwards. This is the same,
    except that their weight decay then also acts on v.

    The ascent climbs the objective's loss without the regularizers. Both passes draw the same dropout masks, and only
    the one at θ + v moves BatchNorm's statistics and the memory of plug-ins, as in the authors' code, which ascends on
    a copy of the network. The terms returned are those at θ; penalties are evaluated at θ + v alone, and recorded as
    they are there. Cost of a step: one more pass to the weights.

    Attributes:
        gamma: γ, relative to each layer's norm. 0.01 with adversarial training, 0.005 with TRADES.
        warmup: epochs of plain steps before.

    Raises:
        InputError: a negative γ or warm-up.
    """

    name: ClassVar[str] = "awp"
    reference: ClassVar[str] = "Wu, Xia & Wang 2020, arXiv 2004.05884, AT-AWP and TRADES-AWP, one step on the weights"

    replays: ClassVar[int] = 1

    gamma: float = 0.01
    warmup: float = 0.0

    def __post_init__(self) -> None:
        for field in ("gamma", "warmup"):
            if getattr(self, field) < 0:
                raise InputError(
                    f"awp {field}", expected="a number ≥ 0", got=str(getattr(self, field)), fix="0 switches it off."
                )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(gamma=0.005, warmup=10)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals the plain step bit for bit."""
        return cls(gamma=0.0)

    def passes(self, objective: Passes, regularizers: Passes) -> Passes:
        return objective + objective.learning + regularizers

    def backward(
        self,
        model: nn.Module,
        objective: Objective,
        regularizers: tuple[Regularizer, ...],
        batch: Batch,
        *,
        gen: Generator,
    ) -> Terms:
        if self.gamma == 0 or batch.moment.epoch < self.warmup:
            return Descend().backward(model, objective, regularizers, batch, gen=gen)
        crafted = objective.craft(model, batch, gen=gen)
        layers = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        with still(model):
            before = objective.loss(model, dataclasses.replace(crafted, batch=aside(crafted.batch)))
            grads = torch.autograd.grad(before.loss, layers, materialize_grads=True)
        batch.moment.world.average(grads)
        with displaced(layers, [self._step(w.detach(), g) for w, g in zip(layers, grads, strict=True)]):
            after = whole(model, objective, regularizers, crafted, gen=gen)
            backward_to_weights(model, after)
        penalties = {regularizer.name: after.parts[regularizer.name].detach() for regularizer in regularizers}
        loss = before.loss.detach() + sum(penalties.values())
        return dataclasses.replace(before, loss=loss, parts={**before.parts, **penalties})

    def _step(self, w: Tensor, grad: Tensor) -> Tensor:
        """v_l; zero where the gradient is."""
        step: Tensor = self.gamma * w.norm() * grad / (grad.norm() + 1e-20)
        return step


def aside(batch: Batch) -> Batch:
    """The same, with a memory of its own, so that a pass that is only tried leaves nothing behind."""
    moment = dataclasses.replace(batch.moment, memory=dict(batch.moment.memory))
    return dataclasses.replace(batch, moment=moment)


@contextmanager
def displaced(weights: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each weight is moved by its step; afterwards it is what it was, to the bit."""
    kept = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w, step in zip(weights, steps, strict=True):
                w.add_(step)
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, kept, strict=True):
                w.copy_(before)
