"""Empirical risk minimisation on the images as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, nn

from robustlens.core.criterion import cross_entropy
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Terms


@dataclass(frozen=True, kw_only=True)
class Standard:
    """min_θ mean CE(f_θ(x), y)."""

    name: ClassVar[str] = "standard"
    reference: ClassVar[str] = "Vapnik 1991, empirical risk minimisation"

    label_smoothing: float = 0.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(label_smoothing=0.1)]

    @property
    def passes(self) -> Passes:
        return Passes(weights=1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        return Crafted(batch, batch.x)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        logits = model(crafted.x_adv)
        loss = cross_entropy(logits, crafted.batch.y, label_smoothing=self.label_smoothing)
        return Terms(loss, logits, clean_logits=logits if crafted.x_adv is crafted.batch.x else None)
