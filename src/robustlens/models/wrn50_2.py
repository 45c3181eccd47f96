"""WRN-50-2-bottleneck for Tiny-ImageNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustlens.models.classifier import Classifier, check_request
from robustlens.models.normalize import Normalized


class Bottleneck(nn.Module):
    """ReLU(BN(conv3(ReLU(BN(conv2(ReLU(BN(conv1(x)))))))) + shortcut(x)), convolutions 1×1, 3×3 (strided) and 1×1;
    a 1×1 convolution with BN where the shape changes.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU()
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        block: Tensor = self.relu3(out + self.downsample(x))
        return block


def stage(inputs: int, inner: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """``blocks`` bottlenecks, the first with ``stride``."""
    rest = (Bottleneck(outputs, inner, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, inner, outputs, stride), *rest)


class WRN50Net(Classifier):
    def __init__(self, normalize: nn.Module, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = stage(width, 2 * width, 4 * width, blocks=3, stride=1)
        self.layer2 = stage(4 * width, 4 * width, 8 * width, blocks=4, stride=2)
        self.layer3 = stage(8 * width, 8 * width, 16 * width, blocks=6, stride=2)
        self.layer4 = stage(16 * width, 16 * width, 32 * width, blocks=3, stride=2)
        self.fc = nn.Linear(32 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return out.mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class WRN50x2(Normalized):
    """50 layers of bottlenecks, twice as wide inside; shapes for 3×56×56 and width 64.

    =======  ===================================================  ==========
    layer    change                                               output
    =======  ===================================================  ==========
    conv1    3×3, C → 64, BN, ReLU (no max-pool)                  64×56×56
    layer1   3 bottlenecks, 128 channels inside                   256×56×56
    layer2   4 bottlenecks, 256 inside, the first stride 2        512×28×28
    layer3   6 bottlenecks, 512 inside, the first stride 2        1024×14×14
    layer4   3 bottlenecks, 1024 inside, the first stride 2       2048×7×7
             mean over the map                                    2048
    fc       2048 → K                                             K
    =======  ===================================================  ==========

    Any image size. Convolutions are Xavier-uniform; no dropout. Tensor names are those of torchvision's
    ``wide_resnet50_2``.

    Attributes:
        width: channels of the stem.
    """

    name: ClassVar[str] = "wrn50-2"
    reference: ClassVar[str] = (
        "Zagoruyko and Komodakis, Wide residual networks, arXiv 1605.07146, §3; Wen, Li and Jia, arXiv 2011.07478, "
        "appendix (Tiny-ImageNet)"
    )

    width: int = 64

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 32·width)."""
        check_request(self.name, shape, classes)
        return WRN50Net(self.normalizer(shape[0]), shape[0], classes, self.width)
