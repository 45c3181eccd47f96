"""The plain step: one gradient of the objective and its regularizers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, nn

from robustlens.core.denormals import drop_denormals
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Objective, Regularizer, Terms


@dataclass(frozen=True, kw_only=True)
class Descend:
    """g = ∇_θ [ loss(craft(batch)) + Σ penalties ]; the optimizer moves along it."""

    name: ClassVar[str] = "descend"
    reference: ClassVar[str] = "Robbins & Monro 1951"

    replays: ClassVar[int] = 1

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def passes(self, objective: Passes, regularizers: Passes) -> Passes:
        return objective + regularizers

    def backward(
        self,
        model: nn.Module,
        objective: Objective,
        regularizers: tuple[Regularizer, ...],
        batch: Batch,
        *,
        gen: Generator,
    ) -> Terms:
        crafted = objective.craft(model, batch, gen=gen)
        terms = whole(model, objective, regularizers, crafted, gen=gen)
        backward_to_weights(model, terms)
        return terms


def whole(
    model: nn.Module,
    objective: Objective,
    regularizers: tuple[Regularizer, ...],
    crafted: Crafted,
    *,
    gen: Generator,
) -> Terms:
    """The objective's loss and every penalty on it, differentiable at the model's weights."""
    if any(getattr(each, "differentiates_input", False) for each in regularizers):
        crafted = _with_leaf(crafted)
    terms = objective.loss(model, crafted)
    drop_denormals(terms.logits)
    parts, loss = dict(terms.parts), terms.loss
    for regularizer in regularizers:
        parts[regularizer.name] = regularizer.penalty(model, crafted, terms, gen=gen)
        loss = loss + parts[regularizer.name]
    return Terms(loss, terms.logits, parts, terms.clean_logits)


def backward_to_weights(model: nn.Module, terms: Terms) -> None:
    """Add the gradient of the loss to ``.grad`` of the weights, and to nothing else."""
    torch.autograd.backward(terms.loss, inputs=[p for p in model.parameters() if p.requires_grad])


def _with_leaf(crafted: Crafted) -> Crafted:
    """The same, with clean images that require a gradient."""
    x = crafted.batch.x.detach().requires_grad_()
    x_adv = x if crafted.x_adv is crafted.batch.x else crafted.x_adv
    return dataclasses.replace(crafted, batch=dataclasses.replace(crafted.batch, x=x), x_adv=x_adv)
