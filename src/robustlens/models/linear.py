"""Linear classifiers: margins, adversaries and Hessians in closed form."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized
from robustlens.results.errors import InputError


class LogisticNet(nn.Module):
    """z = w·x (+ b), returned as the two logits (0, z); ``fc.weight`` is the row w (1, C·H·W)."""

    def __init__(self, inputs: int, *, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.fc(x.flatten(1))
        return torch.cat([torch.zeros_like(z), z], dim=1)


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Binary logistic regression with one weight row: min over w of mean log(1 + exp(−y w·x)), y ∈ {−1, 1}.

    The logits are (0, z) with z = w·x, label 1 standing for y = 1 and label 0 for y = −1. Softmax cross-entropy of
    them is softplus(−y z), so that losses, attacks and lenses treat this model as any other. Pixels are not
    normalised: w is the gradient of z.

    Attributes:
        bias: add a bias to z; the paper has none.
    """

    name: ClassVar[str] = "logistic"
    reference: ClassVar[str] = (
        "Yamada et al., Adversarial training makes weight loss landscape sharper in logistic regression, "
        "arXiv 2102.02950, §2.1"
    )

    bias: bool = False

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, 2) of images (B, *shape)."""
        check_request(self.name, shape, classes)
        if classes != 2:
            raise InputError(
                f"model {self.name!r}",
                expected="2 classes",
                got=str(classes),
                fix="Take softmax-regression, or keep two classes of the data.",
            )
        return LogisticNet(prod(shape), bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class SoftmaxRegression(Normalized):
    """One linear layer: fc C·H·W → K.

    Attributes:
        bias: add a bias to every logit, as the paper's code does.
    """

    name: ClassVar[str] = "softmax-regression"
    reference: ClassVar[str] = "Wu and Yu, arXiv 1907.11780, appendix F (MNIST-LR, CIFAR-LR)"

    bias: bool = True

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); the features are the normalised pixels."""
        check_request(self.name, shape, classes)
        return Chain(
            OrderedDict(
                normalize=self.normalizer(shape[0]),
                flatten=nn.Flatten(),
                fc=nn.Linear(prod(shape), classes, bias=self.bias),
            )
        )
