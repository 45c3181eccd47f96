"""MART: adversarial training that weighs the stability of an example by how wrong the network is on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.modes import CraftMode, Precision
from robustlens.core.passes import Passes
from robustlens.core.types import Attack, Batch, Crafted, Terms
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class MART:
    """min_θ mean BCE(p(x'), y) + λ · KL(p(x) ‖ p(x')) · (1 − p_y(x)), p = softmax(f_θ), x' = attack(x), with
    BCE(p, y) = −log p_y − log(1.0001 − max_{k≠y} p_k).

    The gradient flows through every p, the weight 1 − p_y(x) included, as in the authors' code. That code adds 1e-12
    inside logarithms and 1e-7 to the weight; here both come from log-softmax, which needs neither. 1.0001 is the
    authors' (the paper prints 1) and bounds the second logarithm. A network trained with MART tends to look more robust
    under PGD than under stronger attacks.

    With eps = 0 and λ = 0 what remains is the boosted cross-entropy of the clean images, not the plain one; for two
    classes it is −log p_y − log(p_y + 0.0001), about twice the cross-entropy.

    A step costs the attack, and two weight passes to learn, clean images first (one for λ = 0).

    Attributes:
        attack: how x' is found; the paper's is PGD on the cross-entropy (from x + 0.001 · N(0, 1) in its code).
        weight: λ; 5 for a ResNet-18, 6 for a WRN-34-10.
        craft_mode: the model's mode while x' is crafted; see ``adversarial``.
        precision: "bf16-craft" crafts under bfloat16 autocast and learns in float32.

    Raises:
        InputError: λ < 0.
    """

    name: ClassVar[str] = "mart"
    reference: ClassVar[str] = (
        "Wang et al. 2020, Improving adversarial robustness requires revisiting misclassified examples (ICLR), "
        "Algorithm 1"
    )

    attack: Attack
    weight: float = 5.0
    craft_mode: CraftMode = "eval"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError("mart weight", expected="a number ≥ 0", got=str(self.weight), fix="The paper uses 5 or 6.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(attack=PGD(threat=Lp("linf", 0.1), steps=3)),
            cls(attack=PGD(threat=Lp("l2", 1.0), steps=3), weight=0.0, craft_mode="train"),
        ]

    @property
    def passes(self) -> Passes:
        return self.attack.passes + Passes(weights=2 if self.weight else 1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        x_adv = craft(self.attack, model, batch.x, batch.y, gen=gen, mode=self.craft_mode, precise=self.precision)
        return Crafted(batch, x_adv)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        y = crafted.batch.y
        if self.weight == 0:
            logits = model(crafted.x_adv)
            return Terms(_boosted_cross_entropy(logits, y), logits)
        clean_logits = model(crafted.batch.x)
        logits = model(crafted.x_adv)
        boosted = _boosted_cross_entropy(logits, y)
        log_p, log_p_adv = clean_logits.log_softmax(1), logits.log_softmax(1)
        kl = (log_p.exp() * (log_p - log_p_adv)).sum(1)
        wrong = -torch.expm1(log_p.gather(1, y[:, None])[:, 0])
        weighted = (kl * wrong).mean()
        parts = {"boosted_loss": boosted, "weighted_kl": weighted}
        return Terms(boosted + self.weight * weighted, logits, parts, clean_logits)


def _boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of −log p_y − log(1.0001 − max_{k≠y} p_k) (scalar); logits (B, K), labels (B,)."""
    others = logits.softmax(1).scatter(1, y[:, None], 0.0)
    return cross_entropy(logits, y) - torch.log(1.0001 - others.amax(1)).mean()
