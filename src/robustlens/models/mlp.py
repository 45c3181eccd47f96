"""A network with one hidden layer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class MLP(Normalized):
    """fc1 C·H·W → hidden, ReLU; fc2 hidden → K.

    Attributes:
        hidden: units of the hidden layer (the paper's 1,024).
    """

    name: ClassVar[str] = "mlp"
    reference: ClassVar[str] = "Wu and Yu, arXiv 1907.11780, appendix F (MNIST-MLP, CIFAR-MLP)"

    hidden: int = 1024

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, hidden)."""
        check_request(self.name, shape, classes)
        return Chain(
            OrderedDict(
                normalize=self.normalizer(shape[0]),
                flatten=nn.Flatten(),
                fc1=nn.Linear(prod(shape), self.hidden),
                relu1=nn.ReLU(),
                fc2=nn.Linear(self.hidden, classes),
            )
        )
