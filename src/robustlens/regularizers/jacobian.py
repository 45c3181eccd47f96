"""Jacobian regularization: logits that hardly change with the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.rng import drawn
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms
from robustlens.regularizers.loss_surface import clean_logits
from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """(λ/2) · mean ‖J(x)‖_F², J (K, C·H·W) the derivative of the logits by the image; λ = ``weight``.

    With v uniform on the unit sphere of ℝ^K, E K·‖vᵀJ‖² = ‖J‖_F²: the norm is estimated without bias by
    (K/projections) Σ ‖vᵀJ‖² with v of its own for every example and projection. The ½ is part of the authors' loss and
    code, so their λ is this one; for images that they standardise, λ by pixels in [0, 1] is theirs × σ².

    Cost: one double pass a projection; one a class for all rows (counted as 10).

    Attributes:
        weight: λ.
        projections: random directions per example; None takes every row of J, for the exact norm.

    Raises:
        InputError: a negative weight, no projections; in ``check``, a network without a second derivative.
    """

    name: ClassVar[str] = "jacobian"
    reference: ClassVar[str] = "Hoffman, Roberts & Yaida 2019, arXiv 1908.02729, Algorithm 1"

    differentiates_input: ClassVar[bool] = True

    weight: float = 0.01
    projections: int | None = 1

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError("jacobian weight", expected="a number ≥ 0", got=str(self.weight), fix="Use 0.01.")
        if self.projections is not None and self.projections < 1:
            raise InputError(
                "jacobian projections", expected="at least 1", got=str(self.projections), fix="None is the exact norm."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(projections=3), cls(projections=None)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes(double=self.projections or 10)

    def check(self, model: nn.Module, x: Tensor) -> None:
        require_second_derivative(model, x, self.name)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        logits = clean_logits(model, crafted, terms)
        directions = self._directions(logits, gen)
        square = logits.new_zeros(())
        for v in directions:
            (along,) = torch.autograd.grad(logits, crafted.batch.x, v, create_graph=True)
            square = square + along.square().sum()
        classes, batch = logits.shape[1], len(logits)
        return self.weight / 2 * classes / (len(directions) * batch) * square

    def _directions(self, logits: Tensor, gen: Generator) -> Tensor:
        """Unit vectors (projections, B, K): random, or the K axes."""
        batch, classes = logits.shape
        if self.projections is None:
            axes = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            return axes[:, None].expand(classes, batch, classes)
        v = torch.empty((self.projections, batch, classes), dtype=logits.dtype, device=logits.device)
        return nn.functional.normalize(drawn(v, lambda t: t.normal_(generator=gen), gen, batch=1), dim=2)
