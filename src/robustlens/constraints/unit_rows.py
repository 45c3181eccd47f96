"""Rows of unit norm in the last layer, so that a logit of a linear classifier is a distance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class UnitRows:
    """W ← argmin ‖V − W‖_F over ‖v_k‖₂ = 1 for all rows of the last linear layer, after every step.

    That divides each row by its norm; a bias stays, and a row of zeros, which has no nearest unit vector, does too.
    For binary logistic regression it is the constraint ‖w‖ = 1, under which y w·x is the signed distance to the
    decision boundary. The fact it leaves is ``unit_rows_before``, the largest norm that the step had reached.

    Raises:
        InputError: no linear layer.
    """

    name: ClassVar[str] = "unit-rows"
    reference: ClassVar[str] = "Wu & Yu 2019, arXiv 1907.11780, eq. 9 and the normalised rows of eq. 14"

    every: ClassVar[Literal["step"]] = "step"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    @torch.no_grad()
    def apply(self, model: nn.Module, x: Tensor) -> Mapping[str, float]:
        weight = last_linear(model).weight
        norms = weight.norm(dim=1, keepdim=True)
        weight.div_(torch.where(norms > 0, norms, 1.0))
        return {"unit_rows_before": float(norms.max())}


def last_linear(model: nn.Module) -> nn.Linear:
    """The ``head`` of a network that names one, else its last linear layer."""
    head = getattr(model, "head", None)
    found = [head] if isinstance(head, nn.Linear) else [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not found:
        raise InputError("unit-rows", expected="a linear layer", got="none", fix="Use another constraint.")
    return found[-1]
