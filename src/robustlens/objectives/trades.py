"""TRADES: accuracy on clean images against stability of the prediction around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.losses import attack_loss
from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.modes import CraftMode, Precision
from robustlens.core.passes import Passes
from robustlens.core.rng import drawn
from robustlens.core.types import Batch, Crafted, Terms, Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """min_θ mean CE(f_θ(x), y) + β · KL(p(x) ‖ p(x')), x' = argmax_{z in the threat} KL(p(x) ‖ p(z)), p = softmax(f_θ).

    x' is found by projected ascent from x + ``start_noise`` · N(0, 1): at x itself the divergence has its minimum and
    no gradient. In the loss the gradient flows through both p(x) and p(x'). It takes two forward passes, clean images
    first, and BatchNorm statistics move with each (the authors' code runs the clean images once more, for the KL).

    A step costs ``steps`` input passes and one forward pass to craft, and two weight passes to learn.

    Attributes:
        threat: norm, radius and box.
        beta: β, the paper's 1/λ.
        steps, step_size: of the ascent; None is 2 · eps / steps, the authors' choice for ℓ2. For ℓ∞ with eps 0.031
            they take 10 steps of 0.007.
        start_noise: standard deviation per pixel of the start.
        craft_mode: the model's mode while x' is crafted; see ``adversarial``.
        precision: "bf16-craft" crafts under bfloat16 autocast. So close to x the divergence is smaller than its
            rounding: on untrained networks the first step has almost nothing in common with the one in float32.

    Raises:
        InputError: β < 0, no steps, a step size or a start noise ≤ 0.
    """

    name: ClassVar[str] = "trades"
    reference: ClassVar[str] = "Zhang et al. 2019, arXiv 1901.08573, Algorithm 1"

    threat: Threat
    beta: float = 6.0
    steps: int = 10
    step_size: float | None = None
    start_noise: float = 0.001
    craft_mode: CraftMode = "eval"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise InputError("trades beta", expected="a weight ≥ 0", got=str(self.beta), fix="The paper uses 6.")
        require_at_least(self, steps=1)
        if self.step_size is not None and self.step_size <= 0:
            raise InputError(
                "trades step_size", expected="a number > 0", got=str(self.step_size), fix="None is 2 · eps / steps."
            )
        if self.start_noise <= 0:
            raise InputError(
                "trades start_noise",
                expected="a number > 0",
                got=str(self.start_noise),
                fix="At the clean image the divergence has no gradient; the paper starts 0.001 away.",
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1), steps=3), cls(threat=Lp("l2", 1.0), steps=3, beta=1.0, craft_mode="train")]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("linf", 0.1), beta=0.0)

    @property
    def attack(self) -> _Divergence:
        """The inner maximisation."""
        size = 2 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        return _Divergence(self.threat, self.steps, size, self.start_noise)

    @property
    def passes(self) -> Passes:
        return self.attack.passes + Passes(weights=2) if self.beta else Passes(weights=1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        if self.beta == 0:
            return Crafted(batch, batch.x)
        x_adv = craft(self.attack, model, batch.x, batch.y, gen=gen, mode=self.craft_mode, precise=self.precision)
        return Crafted(batch, x_adv)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        clean_logits = model(crafted.batch.x)
        clean = cross_entropy(clean_logits, crafted.batch.y)
        if self.beta == 0:
            return Terms(clean, clean_logits, clean_logits=clean_logits)
        logits = model(crafted.x_adv)
        kl = F.kl_div(logits.log_softmax(1), clean_logits.log_softmax(1), log_target=True, reduction="batchmean")
        return Terms(clean + self.beta * kl, logits, {"clean_loss": clean, "kl": kl}, clean_logits)


@dataclass(frozen=True)
class _Divergence:
    """max_z KL(p(x) ‖ p(z)) over the threat, by ``steps`` projected steps from x + ``start_noise`` · N(0, 1)."""

    name: ClassVar[str]

    threat: Threat
    steps: int
    step_size: float
    start_noise: float

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            clean = model(x)
        noise = drawn(x, lambda t: t.normal_(std=self.start_noise, generator=gen), gen)
        point = self.threat.project(x + noise, x)
        for _ in range(self.steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                divergence = attack_loss("kl", model(point), y, clean).sum()
            (grad,) = torch.autograd.grad(divergence, point)
            with torch.no_grad():
                point = self.threat.project(point + self.step_size * self.threat.ascend(grad), x)
        return point
