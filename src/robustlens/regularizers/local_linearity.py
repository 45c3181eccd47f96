"""Local linearity regularization (LLR): a loss that is flat and straight in the ball around an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import still
from robustlens.core.passes import Passes
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms, Threat
from robustlens.regularizers.loss_surface import inner, losses, nearby_and_clean_logits, slope
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class LocalLinearity:
    """λ γ + μ |δᵀ∇_x ℓ(x, y)|, mean over examples, where γ = max_δ |ℓ(x + δ, y) − ℓ(x, y) − δᵀ∇_x ℓ(x, y)|.

    λ = ``weight``, μ = ``slope_weight``, and δ in the second term is the maximiser of the first, found in the threat by
    projected gradient steps from a random point (at δ = 0 the gradient is zero) and then held fixed; ∇_x ℓ is
    differentiated with the weights. Meant for ``standard``.

    Cost: an input pass for ∇_x ℓ and one a step; a weight pass at x + δ and a double pass at x (and a weight pass
    where dropout is on, whose masks both must share).

    Attributes:
        threat: the ball of δ.
        weight, slope_weight: λ and μ. The paper's for CIFAR-10 at 8/255 are 4 and 3; the authors' code has
            2·CE + 4·(γ + 0.3·|δᵀ∇_x ℓ|), which is λ = 2 and μ = 0.6 beside one cross-entropy.
        steps: of the search; 10 in the authors' code for CIFAR-10.
        step_size: in pixel units; None is 2.5 · eps / steps. The authors' code takes steps of 0.1 by Adam, which
            reach the border of their ball at once; here steps go along the threat's steepest ascent.

    Raises:
        InputError: a negative weight, no steps, a step size ≤ 0; in ``check``, a network without a second derivative.
    """

    name: ClassVar[str] = "local-linearity"
    reference: ClassVar[str] = "Qin et al. 2019, arXiv 1907.02610"

    differentiates_input: ClassVar[bool] = True

    threat: Threat
    weight: float = 4.0
    slope_weight: float = 3.0
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        for field, value in (("weight", self.weight), ("slope_weight", self.slope_weight)):
            if value < 0:
                raise InputError(f"local-linearity {field}", expected="a number ≥ 0", got=str(value), fix="Raise it.")
        require_at_least(self, steps=1)
        if self.step_size is not None and self.step_size <= 0:
            raise InputError(
                "local-linearity step_size",
                expected="a number > 0",
                got=str(self.step_size),
                fix="Leave it out for 2.5 · eps / steps.",
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1)), cls(threat=Lp("l2", 1.0), weight=3.0, slope_weight=6.0, steps=2)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("linf", 0.1), weight=0.0, slope_weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes(inputs=1 + self.steps, weights=1, double=1)

    def check(self, model: nn.Module, x: Tensor) -> None:
        require_second_derivative(model, x, self.name)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == self.slope_weight == 0 or self.threat.eps == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> Tensor:
        """δ (B, C, H, W), where the loss is far from its linear part."""
        x, y = crafted.batch.x.detach(), crafted.batch.y
        grad, height = slope(model, x, y)
        alpha = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        point = self.threat.start(x, gen)
        for _ in range(self.steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad(), still(model):  # the same dropout masks at every step
                gamma = (losses(model(point), y) - height - inner(point - x, grad)).abs()
            (ascent,) = torch.autograd.grad(gamma.sum(), point)
            point = self.threat.project(point.detach() + alpha * self.threat.ascend(ascent), x)
        return point - x

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: Tensor) -> Tensor:
        x, y = crafted.batch.x, crafted.batch.y
        near, clean = nearby_and_clean_logits(model, x + found, crafted, terms)
        height = losses(clean, y)
        (grad,) = torch.autograd.grad(height.sum(), x, create_graph=True)
        rise = inner(found, grad)
        gamma = (losses(near, y) - height - rise).abs()
        return (self.weight * gamma + self.slope_weight * rise.abs()).mean()
