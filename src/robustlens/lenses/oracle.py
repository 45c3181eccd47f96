"""Subjects whose readings are known in closed form, to test lenses against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustlens.core.types import Lens, Split, Splits, Subject, Threat
from robustlens.threats.lp import Lp


class Oracle(NamedTuple):
    """On ``subject``, ``lens`` must read ``expected``: name of a quantity → (value, absolute tolerance)."""

    subject: Subject
    lens: Lens
    expected: Mapping[str, tuple[float, float]]


def linear_subject(
    weight: Tensor,
    bias: Tensor,
    *,
    train: Split,
    test: Split,
    threat: Threat | None = None,
) -> Subject:
    """The classifier z = weight · x + bias on flattened images (weight (K, C·H·W), bias (K,))."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    classes = tuple(str(k) for k in range(len(weight)))
    return Subject(model, Splits("oracle", train, test, test, classes), threat or Lp("l2", 0.2))


def two_sided_subject(*, train_shifts: list[float], test_shifts: list[float], slope: float = 4.0) -> Subject:
    """Two classes told apart by the first of four pixels, on which a classifier z = (0, slope · (x₁ − ½)) works.

    Every example of class 1 has x₁ = ½ + shift and every example of class 0 has x₁ = ½ − shift, alternately, so each
    has logit margin slope · shift and ℓ2 distance |shift| to the boundary; a negative shift is a mistake.
    """

    def split(shifts: list[float]) -> Split:
        y = torch.arange(len(shifts)) % 2
        images = torch.full((len(shifts), 1, 2, 2), 0.5)
        images[:, 0, 0, 0] += torch.tensor(shifts) * (2 * y - 1)
        return Split(images, y)

    weight = torch.zeros(2, 4)
    weight[1, 0] = slope
    bias = torch.tensor([0.0, -slope / 2])
    return linear_subject(weight, bias, train=split(train_shifts), test=split(test_shifts))
