"""The seven-layer CIFAR network of Carlini and Wagner, with dropout after both hidden linear layers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class CifarCNN(Normalized):
    """Seven layers; shapes for 3×32×32, every convolution 3×3 without padding.

    ========  ============  =============  ==========
    layer     change        then           output
    ========  ============  =============  ==========
    conv1     C → 64        ReLU           64×30×30
    conv2     64 → 64       ReLU           64×28×28
    pool1     max 2×2                      64×14×14
    conv3     64 → 128      ReLU           128×12×12
    conv4     128 → 128     ReLU           128×10×10
    pool2     max 2×2                      128×5×5
    fc1       3200 → 256    ReLU, dropout  256
    fc2       256 → 256     ReLU, dropout  256
    fc3       256 → K                      K
    ========  ============  =============  ==========

    Other sizes from 16×16 on change the inputs of fc1.

    Attributes:
        dropout: probability of dropping a unit after fc1 and after fc2 (Wu and Yu's code; Carlini and Wagner drop
            after fc1 alone).
    """

    name: ClassVar[str] = "cifar-cnn"
    reference: ClassVar[str] = "Carlini and Wagner, arXiv 1608.04644, table 1; Wu and Yu, arXiv 1907.11780, appendix F"

    dropout: float = 0.5

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 256)."""
        check_request(self.name, shape, classes, least=16)
        channels, height, width = shape
        inputs = 128 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        return Chain(
            OrderedDict(
                normalize=self.normalizer(channels),
                conv1=nn.Conv2d(channels, 64, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(64, 64, 3),
                relu2=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(64, 128, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(128, 128, 3),
                relu4=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(inputs, 256),
                relu5=nn.ReLU(),
                dropout1=nn.Dropout(self.dropout),
                fc2=nn.Linear(256, 256),
                relu6=nn.ReLU(),
                dropout2=nn.Dropout(self.dropout),
                fc3=nn.Linear(256, classes),
            )
        )
