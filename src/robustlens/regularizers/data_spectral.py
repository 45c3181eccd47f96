"""Data-dependent spectral norm regularization: the Jacobian's largest singular value at every training image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.rng import drawn
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms
from robustlens.linalg.jacobian import power_method
from robustlens.regularizers.loss_surface import clean_logits, inner, nearby_and_clean_logits
from robustlens.results.errors import require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class DataSpectralNorm:
    """λ/2 mean ‖f(x + εv) − f(x)‖₂² (difference), or λε²/2 mean (uᵀJ_f(x)v)² (jacobian): f at the clean images.

    u, v maximise uᵀJv with ‖u‖₂ = 1 and ‖v‖_p = 1 (the power method, ``linalg.jacobian``), started at a Gaussian v
    every time; they are constants of the gradient, which flows through both f. The two forms agree where the ball of
    radius ε lies in one linear piece of f and the power method has converged. x + εv may leave [0, 1], as in the paper.

    J is the exact Jacobian in eval mode; f is evaluated in the mode of the training step, as in the authors' code,
    so BatchNorm sees x + εv as a batch of its own; dropout has one mask for both. The paper's ½, which that code lacks,
    is there. ‖f(x + εv) − f(x)‖ does not change with the unit of the pixels, so λ does not either: the
    paper's ε = 1.75 for pixels in [−1, 1] is 0.875 here.

    A step of the power method costs half an input pass and a tangent; the images are sent through once more for all
    steps together, or once a step where the point moves. The difference form adds a weight pass (two where the network
    draws at random), the other a double.

    Attributes:
        weight: λ.
        eps: ε in pixel units; length of the difference, and radius within which ``dynamic`` moves.
        norm: of v; "linf" replaces the singular value by the ∞→2 norm, for which the method finds a local maximum.
        form: equation 8 (jacobian) or 9 (difference, the paper's choice for its numbers).
        iterations: steps of the power method.
        dynamic: after every step J is taken at Π(z + dynamic · ε · v) instead of z, which starts at x; Π projects on
            the ball of radius ε around x. 0 stays at x, as printed; the authors' code knows both.

    Raises:
        InputError: a negative weight, radius or step, no iterations, or a network that has no second derivative.
    """

    name: ClassVar[str] = "data-spectral-norm"
    reference: ClassVar[str] = "Roth, Kilcher & Hofmann 2020, arXiv 1906.01527, eq. 8 and 9"

    weight: float = 3e-2
    eps: float = 0.875
    norm: Literal["l2", "linf"] = "l2"
    form: Literal["jacobian", "difference"] = "difference"
    iterations: int = 10
    dynamic: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(self, weight=0, eps=0, iterations=1, dynamic=0)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(eps=0.5, iterations=3),
            cls(eps=0.5, iterations=3, form="jacobian"),
            cls(eps=0.03, norm="linf", iterations=3),
            cls(eps=0.5, iterations=3, dynamic=0.25),
        ]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def differentiates_input(self) -> bool:
        return self.form == "jacobian" and self._acts

    @property
    def passes(self) -> Passes:
        if not self._acts:
            return Passes()
        points = self.iterations if self.dynamic else 1
        search = Passes(inputs=points + self.iterations / 2, tangent=self.iterations)
        return search + (Passes(double=1) if self.form == "jacobian" else Passes(weights=1))

    @property
    def _acts(self) -> bool:
        return self.weight * self.eps > 0

    def check(self, model: nn.Module, x: Tensor) -> None:
        if self._acts:
            require_second_derivative(model, x, self.name)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if not self._acts:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> tuple[Tensor, Tensor]:
        """u (B, K) and v (B, C, H, W) at the clean images."""
        x = crafted.batch.x.detach()
        v = drawn(x, lambda t: t.normal_(generator=gen), gen)
        p = math.inf if self.norm == "linf" else 2
        with untouched(model):
            if self.dynamic == 0:
                u, v, _ = power_method(model, x, v, self.iterations, p=p)
                return u, v
            ball, point = Lp(self.norm, self.eps, low=-math.inf, high=math.inf), x
            for _ in range(self.iterations):
                u, v, _ = power_method(model, point, v, 1, p=p)
                point = ball.project(point + self.dynamic * self.eps * v, x)
        return u, v

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: tuple[Tensor, Tensor]) -> Tensor:
        """The penalty along directions ``found`` (u, v), differentiable at the weights."""
        (u, v), x = found, crafted.batch.x
        if self.form == "jacobian":
            (pulled,) = torch.autograd.grad(clean_logits(model, crafted, terms), x, u, create_graph=True)
            stretch = self.eps * inner(pulled, v)[:, None]
        else:
            moved, clean = nearby_and_clean_logits(model, x + self.eps * v, crafted, terms)
            stretch = moved - clean
        return self.weight / 2 * stretch.square().sum(1).mean()
