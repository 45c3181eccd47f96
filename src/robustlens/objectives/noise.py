"""Training on uniformly random noise, the baseline that looks at no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, nn

from robustlens.core.criterion import cross_entropy
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Terms, Threat
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class Noise:
    """min_θ mean E_η CE(f_θ(clip(x + η)), y), η uniform in the threat's ball, fresh at every step."""

    name: ClassVar[str] = "noise"
    reference: ClassVar[str] = "Yamada et al. 2021, arXiv 2102.02950, Theorem 2, Tables 2 and 4"

    threat: Threat
    label_smoothing: float = 0.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("l2", 1.0)), cls(threat=Lp("linf", 8 / 255))]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("l2", 0.0))

    @property
    def passes(self) -> Passes:
        return Passes(weights=1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        return Crafted(batch, self.threat.start(batch.x, gen))

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        logits = model(crafted.x_adv)
        return Terms(cross_entropy(logits, crafted.batch.y, label_smoothing=self.label_smoothing), logits)
