"""The five-layer CIFAR network of DeepDefense."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robustlens.models.classifier import Chain, check_request
from robustlens.models.normalize import Normalized
from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ConvNet(Normalized):
    """Five layers; shapes for 3×32×32, the first three convolutions 5×5 with padding 2.

    ========  ==========================  ==========
    layer     change, then                output
    ========  ==========================  ==========
    conv1     C → 32, max 2×2, ReLU       32×16×16
    conv2     32 → 32, ReLU, mean 2×2     32×8×8
    conv3     32 → 64, ReLU, mean 2×2     64×4×4
    conv4     4×4 without padding, ReLU   64×1×1
    fc        64 → K                      K
    ========  ==========================  ==========

    fc is the paper's 1×1 convolution, which is a linear layer on a map of one pixel. Weights are He-normal
    (deviation √(2/inputs)), biases zero. The map of conv4 has one pixel for sides from 32 to 39; others are refused.
    """

    name: ClassVar[str] = "convnet"
    reference: ClassVar[str] = "Yan, Guo and Zhang, Deep Defense, arXiv 1803.00404, §4 (matconvnet's CIFAR network)"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 64)."""
        check_request(self.name, shape, classes, least=32)
        channels, height, width = shape
        if max(height, width) > 39:
            raise InputError(
                f"model {self.name!r}",
                expected="images of at most 39×39 pixels",
                got=f"{height}×{width}",
                fix="Resize the images to 32×32, or take a network with global pooling: resnet18.",
            )
        model = Chain(
            OrderedDict(
                normalize=self.normalizer(channels),
                conv1=nn.Conv2d(channels, 32, 5, padding=2),
                pool1=nn.MaxPool2d(2),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.AvgPool2d(2),
                conv3=nn.Conv2d(32, 64, 5, padding=2),
                relu3=nn.ReLU(),
                pool3=nn.AvgPool2d(2),
                conv4=nn.Conv2d(64, 64, 4),
                relu4=nn.ReLU(),
                flatten=nn.Flatten(),
                fc=nn.Linear(64, classes),
            )
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
        return model
