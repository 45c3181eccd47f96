"""ResNet-18 for small images: the ImageNet network with a 3×3 stem of stride 1 and without its max-pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustlens.models.classifier import Classifier, check_request
from robustlens.models.normalize import Normalized


class BasicBlock(nn.Module):
    """ReLU(BN(conv2(ReLU(BN(conv1(x))))) + shortcut(x)); a 1×1 convolution with BN where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        block: Tensor = self.relu2(out + self.shortcut(x))
        return block


class ResNet18Net(Classifier):
    def __init__(self, normalize: nn.Module, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.linear = nn.Linear(8 * width, classes)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return out.mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class ResNet18(Normalized):
    """Post-activation ResNet-18; shapes for 3×32×32 and width 64.

    =======  =============================  =========
    layer    change                         output
    =======  =============================  =========
    conv1    3×3, C → 64, BN, ReLU          64×32×32
    layer1   2 blocks                       64×32×32
    layer2   2 blocks, the first stride 2   128×16×16
    layer3   2 blocks, the first stride 2   256×8×8
    layer4   2 blocks, the first stride 2   512×4×4
             mean over the map              512
    linear   512 → K                        K
    =======  =============================  =========

    Any image size; tensor names are those of ``kuangliu/pytorch-cifar``.

    Attributes:
        width: channels of the first stage.
    """

    name: ClassVar[str] = "resnet18"
    reference: ClassVar[str] = "He et al., Deep residual learning, arXiv 1512.03385, §3.3 (table 1, 18 layers)"

    width: int = 64

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 8·width)."""
        check_request(self.name, shape, classes)
        return ResNet18Net(self.normalizer(shape[0]), shape[0], classes, self.width)
