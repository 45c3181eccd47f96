"""Uniform random noise: the adversary that does not look at the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class UniformNoise:
    """x + η, η uniform in the ball, then moved into the box. No gradients, no forward pass."""

    name: ClassVar[str] = "uniform-noise"
    reference: ClassVar[str] = "Yamada et al. 2021, arXiv 2102.02950, Theorem 2"

    threat: Threat

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1)), cls(threat=Lp("l2", 1.0)), cls(threat=Lp("l1", 5.0))]

    @property
    def passes(self) -> Passes:
        return Passes()

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return self.threat.start(x, gen)
