"""The CIFAR ResNets of depth 6n + 2, with BatchNorm or without any normalisation (Fixup)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.models.classifier import Classifier, check_request
from robustlens.models.normalize import Normalized


class BatchBlock(nn.Module):
    """ReLU(BN(conv2(ReLU(BN(conv1(x))))) + shortcut(x)).

    The shortcut has no parameters (option A): every second pixel, zero channels added half before and half behind.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            half = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, x.shape[1] - half))
        block: Tensor = self.relu2(out + x)
        return block


class FixupBlock(nn.Module):
    """ReLU(conv2(ReLU(conv1(x + b1a) + b1b) + b2a) + b2b + shortcut); each b is one number.

    The shortcut has no parameters: x, or every second pixel of x + b1a with as many zero channels behind. Fixup's
    multiplier before b2b is left out, because it would change the spectral norm of the block.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.bias1a = nn.Parameter(torch.zeros(1))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bias1b = nn.Parameter(torch.zeros(1))
        self.relu1 = nn.ReLU()
        self.bias2a = nn.Parameter(torch.zeros(1))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bias2b = nn.Parameter(torch.zeros(1))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + self.bias1a
        out = self.relu1(self.conv1(shifted) + self.bias1b)
        out = self.conv2(out + self.bias2a) + self.bias2b
        if self.stride == 2:
            x = shifted[:, :, ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        block: Tensor = self.relu2(out + x)
        return block


def stage(block: Callable[[int, int], nn.Module], inputs: int, outputs: int, n: int) -> nn.Sequential:
    """``n`` blocks; the first has stride 2 where the number of channels doubles."""
    return nn.Sequential(block(inputs, outputs), *(block(outputs, outputs) for _ in range(n - 1)))


class BatchResNet(Classifier):
    """Convolutions and the linear layer are He-normal by inputs, as in He et al."""

    def __init__(self, normalize: nn.Module, channels: int, classes: int, n: int, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = stage(BatchBlock, width, width, n)
        self.layer2 = stage(BatchBlock, width, 2 * width, n)
        self.layer3 = stage(BatchBlock, 2 * width, 4 * width, n)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        return out.mean((2, 3))


class FixupResNet(Classifier):
    """With L blocks: conv1 of a block ~ N(0, 2 / (9·outputs)) / √L, conv2 and the linear layer 0, so that every
    block starts as the identity.
    """

    def __init__(self, normalize: nn.Module, channels: int, classes: int, n: int, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bias1 = nn.Parameter(torch.zeros(1))
        self.relu1 = nn.ReLU()
        self.layer1 = stage(FixupBlock, width, width, n)
        self.layer2 = stage(FixupBlock, width, 2 * width, n)
        self.layer3 = stage(FixupBlock, 2 * width, 4 * width, n)
        self.bias2 = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, FixupBlock):
                std = sqrt(2 / (9 * module.conv1.out_channels)) / sqrt(3 * n)
                nn.init.normal_(module.conv1.weight, std=std)
                nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.conv1(self.normalize(x)) + self.bias1)
        out = self.layer3(self.layer2(self.layer1(out)))
        return out.mean((2, 3)) + self.bias2


@dataclass(frozen=True, kw_only=True)
class CifarResNet(Normalized):
    """ResNet of depth 6n + 2; shapes for 3×32×32 and width 16.

    ============  ==============================  ========
    layer         change                          output
    ============  ==============================  ========
    conv1         3×3, C → 16, ReLU               16×32×32
    layer1        n blocks                        16×32×32
    layer2        n blocks, the first stride 2    32×16×16
    layer3        n blocks, the first stride 2    64×8×8
                  mean over the map               64
    linear or fc  64 → K                          K
    ============  ==============================  ========

    Any image size; tensor names are those of ``akamaster/pytorch_resnet_cifar10`` and ``hongyi-zhang/Fixup``.

    Attributes:
        norm: "batch" for BatchNorm after every convolution; "fixup" for none, with Fixup's initialisation and scalar
            biases (its multipliers left out, as in Wen, Li and Jia).
        width: channels of the first stage.
    """

    reference: ClassVar[str] = (
        "He et al., Deep residual learning, arXiv 1512.03385, §4.2; Zhang, Dauphin and Ma, Fixup initialization, "
        "arXiv 1901.09321, §3; Wen, Li and Jia, arXiv 2011.07478, appendix"
    )

    norm: Literal["batch", "fixup"] = "batch"
    width: int = 16

    def _net(self, name: str, n: int, shape: tuple[int, int, int], classes: int) -> nn.Module:
        check_request(name, shape, classes)
        net = BatchResNet if self.norm == "batch" else FixupResNet
        return net(self.normalizer(shape[0]), shape[0], classes, n, self.width)


@dataclass(frozen=True, kw_only=True)
class ResNet56(CifarResNet):
    __doc__ = CifarResNet.__doc__

    name: ClassVar[str] = "resnet56"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape) from 27 blocks (n = 9); features (B, 4·width)."""
        return self._net(self.name, 9, shape, classes)


@dataclass(frozen=True, kw_only=True)
class ResNet110(CifarResNet):
    __doc__ = CifarResNet.__doc__

    name: ClassVar[str] = "resnet110"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape) from 54 blocks (n = 18); features (B, 4·width)."""
        return self._net(self.name, 18, shape, classes)
