"""The seven-layer MNIST network of Carlini and Wagner, without dropout."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class MnistCNN(Normalized):
    """Seven layers; shapes for 1×28×28, every convolution 3×3 without padding.

    ========  ============  ====  ==========
    layer     change        then  output
    ========  ============  ====  ==========
    conv1     C → 32        ReLU  32×26×26
    conv2     32 → 32       ReLU  32×24×24
    pool1     max 2×2             32×12×12
    conv3     32 → 64       ReLU  64×10×10
    conv4     64 → 64       ReLU  64×8×8
    pool2     max 2×2             64×4×4
    fc1       1024 → 200    ReLU  200
    fc2       200 → 200     ReLU  200
    fc3       200 → K             K
    ========  ============  ====  ==========

    Other sizes from 16×16 on change the inputs of fc1.
    """

    name: ClassVar[str] = "mnist-cnn"
    reference: ClassVar[str] = "Carlini and Wagner, arXiv 1608.04644, table 1; Wu and Yu, arXiv 1907.11780, appendix F"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 200)."""
        check_request(self.name, shape, classes, least=16)
        channels, height, width = shape
        inputs = 64 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        return Chain(
            OrderedDict(
                normalize=self.normalizer(channels),
                conv1=nn.Conv2d(channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(inputs, 200),
                relu5=nn.ReLU(),
                fc2=nn.Linear(200, 200),
                relu6=nn.ReLU(),
                fc3=nn.Linear(200, classes),
            )
        )
