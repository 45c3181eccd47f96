"""The CIFAR-10 network of the data-dependent spectral norm regularization."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized


@dataclass(frozen=True, kw_only=True)
class CNN7(Normalized):
    """Seven convolutions and a linear layer; shapes for 3×32×32 and width 128.

    ============  =================================  ==========
    layer         change                             output
    ============  =================================  ==========
    conv1, conv2  C → 128, 128 → 128; max 2×2        128×16×16
    conv3, conv4  128 → 256, 256 → 256; max 2×2      256×8×8
    conv5, conv6  256 → 512, 512 → 512; max 2×2      512×4×4
    conv7         512 → 1024, no padding; max 2×2    1024×1×1
    fc            1024 → K                           K
    ============  =================================  ==========

    Convolutions are 3×3 with padding 1 and a bias, each followed by BatchNorm without scale and shift, then ReLU.
    Larger sizes change the inputs of fc.

    Attributes:
        mean, std: (0.5,) and (0.5,): the network sees [−1, 1], as in the authors' code. Radii there are on that scale.
        width: channels of the first layer.
    """

    name: ClassVar[str] = "cnn7"
    reference: ClassVar[str] = (
        "Roth, Kilcher and Hofmann, Adversarial training is a form of data-dependent operator norm regularization, "
        "arXiv 1906.01527, appendix A.4 (layers from the authors' code)"
    )

    mean: tuple[float, ...] | None = (0.5,)
    std: tuple[float, ...] | None = (0.5,)
    width: int = 128

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 8·width) for 32×32."""
        check_request(self.name, shape, classes, least=32)
        channels, height, width = shape
        layers = OrderedDict(normalize=self.normalizer(channels))
        plan = [self.width * factor for factor in (1, 1, 2, 2, 4, 4, 8)]
        for i, outputs in enumerate(plan, start=1):
            layers[f"conv{i}"] = nn.Conv2d(channels, outputs, 3, padding=0 if i == 7 else 1)
            layers[f"bn{i}"] = nn.BatchNorm2d(outputs, affine=False)
            layers[f"relu{i}"] = nn.ReLU()
            if i in (2, 4, 6, 7):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = outputs
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels * ((height // 8 - 2) // 2) * ((width // 8 - 2) // 2), classes)
        return Chain(layers)
