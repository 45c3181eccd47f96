"""The orthogonality penalty, which keeps every layer near an isometry (Lipschitz regularization)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from robustlens.core.passes import Passes
from robustlens.core.types import Crafted, Terms


@dataclass(frozen=True, kw_only=True)
class Orthogonality:
    """β Σ_l ‖W_l W_lᵀ − I‖_F², or ‖W_lᵀ W_l − I‖_F² where W_l (c_out, c_in·k·k) has more rows than columns.

    The two differ by the constant rows − columns and have the same gradient; the smaller Gram matrix can reach 0.
    A flattened convolution of norm 1 can still stretch images by √(k·k).
    """

    name: ClassVar[str] = "orthogonality"
    reference: ClassVar[str] = "Wu & Yu 2019, arXiv 1907.11780, eq. 15, third term (alone: LCR)"

    beta: float = 1e-3

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(beta=0.0)

    @property
    def passes(self) -> Passes:
        return Passes()

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        total = crafted.x_adv.new_zeros(())
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                total = total + _GramDistance.apply(module.weight.flatten(1))  # type: ignore[no-untyped-call]
        return self.beta * total


class _GramDistance(torch.autograd.Function):
    """‖G − I‖_F² for the smaller Gram matrix G of W (rows, columns), with its slope 4 W (WᵀW − I) or 4 (WWᵀ − I) W.

    Two matrix products, where the product rule for both factors of G takes three.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        gram.diagonal().sub_(1)
        ctx.save_for_backward(w, gram)
        return gram.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        w, off = ctx.saved_tensors
        slope: Tensor = off @ w if w.shape[0] <= w.shape[1] else w @ off
        return 4 * grad * slope
