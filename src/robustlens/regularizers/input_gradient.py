"""Input-gradient regularization: a small slope of the loss with respect to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms
from robustlens.regularizers.loss_surface import clean_logits, losses, nearby_and_clean_logits, slope
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp, Norm


@dataclass(frozen=True, kw_only=True)
class InputGradient:
    """(λ/2) · mean ‖∇_x ℓ(x, y)‖², ℓ the cross-entropy of one example; λ = ``weight``.

    "double-backward" differentiates the printed term. "difference" needs no second derivative: with d = ∇_x ℓ / ‖∇_x ℓ‖
    held fixed it is (λ/2) · mean ((ℓ(x + h·d) − ℓ(x)) / h)², which tends to the same as h → 0. x + h·d is not clipped
    to the box, as in the authors' code. Their g comes from the mean loss, which makes no difference to d.

    Cost: one double pass; or, for the difference, an input pass for d and a weight pass at x + h·d (and one more at x
    where dropout is on, whose masks the two must share).

    Attributes:
        weight: λ; the authors use 0.1 and 1.
        form: how the norm is computed.
        norm: of the gradient, dual to that of the threat: "l1" for ℓ∞ attacks, with d = sign(g)/√n and the size
            ‖g‖₁/√n of n pixels, as the authors' code scales it; "linf" for ℓ1 attacks, where d is ± one pixel.
        h: length of the step in pixel units, in ℓ2, of "difference".

    Raises:
        InputError: a negative weight, a step ≤ 0; in ``check``, a network without a second derivative.
    """

    name: ClassVar[str] = "input-gradient"
    reference: ClassVar[str] = "Finlay & Oberman 2019, arXiv 1905.11468; Drucker & LeCun 1991 (double backpropagation)"

    weight: float = 0.1
    form: Literal["double-backward", "difference"] = "double-backward"
    norm: Norm = "l2"
    h: float = 0.01

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError("input-gradient weight", expected="a number ≥ 0", got=str(self.weight), fix="Use 0.1.")
        if self.h <= 0:
            raise InputError("input-gradient h", expected="a length > 0", got=str(self.h), fix="Use 0.01.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(norm="l1"),
            cls(norm="linf"),
            cls(form="difference"),
            cls(form="difference", norm="l1"),
            cls(form="difference", norm="linf"),
        ]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes(double=1) if self.differentiates_input else Passes(inputs=1, weights=1)

    @property
    def differentiates_input(self) -> bool:
        return self.form == "double-backward"

    def check(self, model: nn.Module, x: Tensor) -> None:
        if self.differentiates_input:
            require_second_derivative(model, x, self.name)

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> Tensor | None:
        """d (B, C, H, W) of unit ℓ2 length, along which a difference is taken; None where nothing has to be found."""
        if self.differentiates_input:
            return None
        grad, _ = slope(model, crafted.batch.x, crafted.batch.y)
        flat = grad.flatten(1)
        if self.norm == "l1":
            flat = flat.sign() / flat.shape[1] ** 0.5
        elif self.norm == "linf":
            largest = flat.abs().argmax(1, keepdim=True)
            flat = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign())
        else:
            return Lp("l2", 1.0).ascend(grad)
        return flat.view_as(grad)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: Tensor | None) -> Tensor:
        x, y = crafted.batch.x, crafted.batch.y
        if found is None:
            (grad,) = torch.autograd.grad(losses(clean_logits(model, crafted, terms), y).sum(), x, create_graph=True)
            square = self._square(grad.flatten(1))
        else:
            near, clean = nearby_and_clean_logits(model, x + self.h * found, crafted, terms)
            square = ((losses(near, y) - losses(clean, y)) / self.h).square()
        return self.weight / 2 * square.mean()

    def _square(self, grad: Tensor) -> Tensor:
        """Squared size (B,) of gradients (B, n)."""
        if self.norm == "l1":
            return grad.abs().sum(1).square() / grad.shape[1]
        return grad.square().sum(1) if self.norm == "l2" else grad.abs().amax(1).square()
