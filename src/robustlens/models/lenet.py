"""LeNet as DeepDefense trains it on MNIST: its convolutions are followed by pooling alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class LeNet(Normalized):
    """Four layers; shapes for 1×28×28, convolutions 5×5 without padding. No ReLU after the convolutions.

    ========  ============  ====  ==========
    layer     change        then  output
    ========  ============  ====  ==========
    conv1     C → 20              20×24×24
    pool1     max 2×2             20×12×12
    conv2     20 → 50             50×8×8
    pool2     max 2×2             50×4×4
    fc1       800 → 500     ReLU  500
    fc2       500 → K             K
    ========  ============  ====  ==========

    Other sizes from 16×16 on change the inputs of fc1. Its authors subtract the mean image: set ``mean``.
    """

    name: ClassVar[str] = "lenet"
    reference: ClassVar[str] = "Yan, Guo and Zhang, Deep Defense, arXiv 1803.00404, §4 (matconvnet's LeNet)"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 500)."""
        check_request(self.name, shape, classes, least=16)
        channels, height, width = shape
        inputs = 50 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        return Chain(
            OrderedDict(
                normalize=self.normalizer(channels),
                conv1=nn.Conv2d(channels, 20, 5),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(20, 50, 5),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(inputs, 500),
                relu1=nn.ReLU(),
                fc2=nn.Linear(500, classes),
            )
        )
