"""GradAlign: a loss whose slope keeps its direction inside the ball, against catastrophic overfitting of FGSM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import still
from robustlens.core.passes import Passes
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms, Threat
from robustlens.regularizers.loss_surface import inner, losses, slope
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class GradAlign:
    """λ · mean (1 − cos(∇_x ℓ(x, y), ∇_x ℓ(x + η, y))), η uniform in the threat's ball; λ = ``weight``.

    Meant for ``adversarial`` with ``fgsm``. As in the authors' code the gradient at x is a constant, the one at x + η
    is differentiated, x + η is not clipped to the box, and an example with a zero gradient is left out: here it
    contributes 0 to the mean over the whole batch, where they average over the rest (NaN where none is left). Both
    gradients are taken in the model's mode and with the same dropout masks.

    Cost: an input pass at x, a weight pass and a double pass at x + η.

    Attributes:
        threat: the ball of η, the one that is trained against.
        weight: λ; the authors take 0.02 · 10^(ε/8) on CIFAR-10 (0.2 at ε = 8/255, 2 at 16/255), 2.5 · 1.6^(ε/8 − 1)
            on SVHN, ε in 8-bit units.

    Raises:
        InputError: a negative weight; in ``check``, a network without a second derivative.
    """

    name: ClassVar[str] = "grad-align"
    reference: ClassVar[str] = "Andriushchenko & Flammarion 2020, arXiv 2007.02617"

    threat: Threat
    weight: float = 0.2

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError("grad-align weight", expected="a number ≥ 0", got=str(self.weight), fix="Use 0.2.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1)), cls(threat=Lp("l2", 1.0), weight=2.0)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("linf", 0.1), weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes(inputs=1, weights=1, double=1)

    def check(self, model: nn.Module, x: Tensor) -> None:
        require_second_derivative(model, x, self.name)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0 or self.threat.eps == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> tuple[Tensor, Tensor]:
        """x + η and ∇_x ℓ(x, y), both (B, C, H, W)."""
        x = crafted.batch.x.detach()
        grad, _ = slope(model, x, crafted.batch.y)
        return x + self.threat.noise(x, gen), grad

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: tuple[Tensor, Tensor]) -> Tensor:
        near, here = found
        near = near.detach().requires_grad_()
        with still(model):
            loss = losses(model(near), crafted.batch.y).sum()
        (there,) = torch.autograd.grad(loss, near, create_graph=True)
        here, there = _rescaled(here), _rescaled(there)
        cosine = inner(here, there) / (_length(here) * _length(there))
        sloping = here.flatten(1).any(1) & there.flatten(1).any(1)
        return self.weight * torch.where(sloping, 1 - cosine, 0).mean()


def _rescaled(grad: Tensor) -> Tensor:
    """``grad`` over its largest component, so that squares do not underflow; the cosine does not notice."""
    largest = grad.detach().flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
    return grad / largest.view(-1, 1, 1, 1)


def _length(rescaled: Tensor) -> Tensor:
    """ℓ2 norm (B,), which is at least 1 unless it is 0: the bound keeps 0 / 0 away."""
    length: Tensor = torch.linalg.vector_norm(rescaled.flatten(1), dim=1)
    return length.clamp_min(0.5)
