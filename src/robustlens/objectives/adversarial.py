"""Adversarial training with any attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.modes import CraftMode, Precision
from robustlens.core.passes import Passes
from robustlens.core.types import Attack, Batch, Crafted, Terms
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """min_θ mean (1 − c) · CE(f_θ(x'), y) + c · CE(f_θ(x), y), x' = attack(x), c = ``clean_weight``.

    By Danskin's theorem the gradient is taken at fixed x'.

    Attributes:
        attack: how x' is found.
        clean_weight: c in [0, 1]; 0 trains on adversarial inputs alone (Madry et al.), ½ on both alike (Roth et al.).
        label_smoothing: of both cross-entropies.
        craft_mode: the model's mode while x' is crafted. "train" lets BatchNorm see the batch, as some public
            code does; its running statistics are restored afterwards either way.
        precision: "bf16-craft" crafts under bfloat16 autocast and learns in float32.

    Raises:
        InputError: ``clean_weight`` outside [0, 1].
    """

    name: ClassVar[str] = "adversarial"
    reference: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083, eq. 2.1"

    attack: Attack
    clean_weight: float = 0.0
    label_smoothing: float = 0.0
    craft_mode: CraftMode = "eval"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.clean_weight <= 1:
            raise InputError(
                "adversarial clean_weight",
                expected="a share in [0, 1]",
                got=str(self.clean_weight),
                fix="0 is adversarial training, 1 is standard training.",
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(attack=PGD(threat=Lp("l2", 1.0), steps=3)),
            cls(attack=FGSM(threat=Lp("linf", 0.1)), clean_weight=0.5, craft_mode="train"),
        ]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(attack=PGD(threat=Lp("l2", 0.0)))

    @property
    def passes(self) -> Passes:
        return self.attack.passes + Passes(weights=2 if self.clean_weight else 1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        x_adv = craft(self.attack, model, batch.x, batch.y, gen=gen, mode=self.craft_mode, precise=self.precision)
        return Crafted(batch, x_adv)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        batch, smoothing = crafted.batch, self.label_smoothing
        logits = model(crafted.x_adv)
        loss = cross_entropy(logits, batch.y, label_smoothing=smoothing)
        if self.clean_weight == 0:
            return Terms(loss, logits)
        clean_logits = model(batch.x)
        clean = cross_entropy(clean_logits, batch.y, label_smoothing=smoothing)
        mixed = (1 - self.clean_weight) * loss + self.clean_weight * clean
        return Terms(mixed, logits, {"adversarial_loss": loss, "clean_loss": clean}, clean_logits)
