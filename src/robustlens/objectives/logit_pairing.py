"""Adversarial logit pairing: a negative control that hides gradients more than it moves the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Generator, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.modes import CraftMode, Precision
from robustlens.core.passes import Passes
from robustlens.core.types import Attack, Batch, Crafted, Terms
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class LogitPairing:
    """min_θ mean (1 − c) · CE(f_θ(x'), y) + c · CE(f_θ(x), y) + λ · (1/K) ‖f_θ(x) − f_θ(x')‖₂², x' = attack(x).

    Kept as a negative control: it is known to mask gradients. The network released for ImageNet at 64×64, said to hold
    27.8 % under targeted PGD at 16/255, keeps 0.6 % under a longer attack (Engstrom et al. 2018, arXiv 1807.10272;
    0.1 % with their code). Look at attacks without gradients, and with many steps, before believing it.

    The squares are averaged over the K logits, as in the authors' code (a mean squared error over all elements); a
    sum over the classes, as the paper's L(·, ·) may be read, is λ' = λ/K. The gradient flows through both logits. That
    code sends clean and adversarial images through the network as one batch; here they are two, x' first, as in
    ``adversarial``, and BatchNorm statistics move with each.

    A step costs the attack, and two weight passes to learn (one for c = λ = 0).

    Attributes:
        attack: how x' is found; the paper's aims at a class, a random or the least likely one.
        weight: λ; 0.5 in the paper, 0.25 for the network released for ImageNet.
        clean_weight: c in [0, 1]; ½ is the paper's mixed mini-batch.
        craft_mode: the model's mode while x' is crafted; see ``adversarial``.
        precision: "bf16-craft" crafts under bfloat16 autocast and learns in float32.

    Raises:
        InputError: λ < 0, or c outside [0, 1].
    """

    name: ClassVar[str] = "logit-pairing"
    reference: ClassVar[str] = "Kannan, Kurakin & Goodfellow 2018, arXiv 1803.06373, §4"

    attack: Attack
    weight: float = 0.5
    clean_weight: float = 0.5
    craft_mode: CraftMode = "eval"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(
                "logit-pairing weight", expected="a number ≥ 0", got=str(self.weight), fix="The paper uses 0.5."
            )
        if not 0 <= self.clean_weight <= 1:
            raise InputError(
                "logit-pairing clean_weight",
                expected="a share in [0, 1]",
                got=str(self.clean_weight),
                fix="The paper uses 0.5.",
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(attack=PGD(threat=Lp("linf", 0.1), steps=3)),
            cls(attack=PGD(threat=Lp("l2", 1.0), steps=3), clean_weight=0.0, craft_mode="train"),
        ]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(attack=PGD(threat=Lp("l2", 0.0)), weight=0.0, clean_weight=0.0)

    @property
    def passes(self) -> Passes:
        return self.attack.passes + Passes(weights=2 if self.weight or self.clean_weight else 1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        x_adv = craft(self.attack, model, batch.x, batch.y, gen=gen, mode=self.craft_mode, precise=self.precision)
        return Crafted(batch, x_adv)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        y, c = crafted.batch.y, self.clean_weight
        logits = model(crafted.x_adv)
        adversarial = cross_entropy(logits, y)
        if self.weight == c == 0:
            return Terms(adversarial, logits)
        clean_logits = model(crafted.batch.x)
        clean = cross_entropy(clean_logits, y)
        pairing = (clean_logits - logits).square().mean()
        parts = {"adversarial_loss": adversarial, "clean_loss": clean, "pairing": pairing}
        return Terms((1 - c) * adversarial + c * clean + self.weight * pairing, logits, parts, clean_logits)
