"""The plain step: one gradient of the objective and its regularizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, nn

from robustlens.core.types import Batch, Objective, Regularizer, Terms


@dataclass(frozen=True, kw_only=True)
class Descend:
    """g = ∇_θ [ loss(craft(batch)) + Σ penalties ]; the optimizer moves along it."""

    name: ClassVar[str] = "descend"
    reference: ClassVar[str] = "Robbins & Monro 1951"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

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
        terms = objective.loss(model, crafted)
        parts, loss = dict(terms.parts), terms.loss
        for regularizer in regularizers:
            parts[regularizer.name] = regularizer.penalty(model, crafted, gen=gen)
            loss = loss + parts[regularizer.name]
        loss.backward()  # type: ignore[no-untyped-call]
        return Terms(loss, terms.logits, parts)
