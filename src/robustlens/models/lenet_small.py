"""The small LeNet of the maximum-margin regularizer (MMR): two strided convolutions and one hidden layer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class LeNetSmall(Normalized):
    """Four layers; shapes for 1×28×28, convolutions 4×4 with stride 2 and padding 1.

    ========  ============  ====  ==========
    layer     change        then  output
    ========  ============  ====  ==========
    conv1     C → 16        ReLU  16×14×14
    conv2     16 → 32       ReLU  32×7×7
    fc1       1568 → 100    ReLU  100
    fc2       100 → K             K
    ========  ============  ====  ==========

    Other sizes from 4×4 on change the inputs of fc1 (2,048 for 32×32). Padding 1 is TensorFlow's SAME where the
    sides divide by 4; elsewhere the last row or column is dropped.
    """

    name: ClassVar[str] = "lenet-small"
    reference: ClassVar[str] = (
        "Croce, Andriushchenko and Hein, Provable robustness of ReLU networks via maximization of linear regions, "
        "arXiv 1810.07481, §5"
    )

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 100)."""
        check_request(self.name, shape, classes, least=4)
        channels, height, width = shape
        return Chain(
            OrderedDict(
                normalize=self.normalizer(channels),
                conv1=nn.Conv2d(channels, 16, 4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, 4, stride=2, padding=1),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(32 * (height // 4) * (width // 4), 100),
                relu3=nn.ReLU(),
                fc2=nn.Linear(100, classes),
            )
        )
