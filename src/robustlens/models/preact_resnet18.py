"""Pre-activation ResNet-18 for small images, the network of the robust overfitting and AWP studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from robustlens.models.classifier import Classifier, check_request
from robustlens.models.normalize import Normalized


class PreActBlock(nn.Module):
    """conv2(ReLU(BN(conv1(a)))) + shortcut with a = ReLU(BN(x)): x itself, or a 1×1 convolution of a where the
    shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (self.shortcut(active) if self.projects else x)


class PreActResNet18Net(Classifier):
    def __init__(self, normalize: nn.Module, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(width, width, 1), PreActBlock(width, width, 1))
        self.layer2 = nn.Sequential(PreActBlock(width, 2 * width, 2), PreActBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(PreActBlock(2 * width, 4 * width, 2), PreActBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(PreActBlock(4 * width, 8 * width, 2), PreActBlock(8 * width, 8 * width, 1))
        self.bn = nn.BatchNorm2d(8 * width)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(8 * width, classes)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = self.relu(self.bn(out))
        return out.mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class PreActResNet18(Normalized):
    """Pre-activation ResNet-18; shapes for 3×32×32 and width 64.

    =======  =============================  =========
    layer    change                         output
    =======  =============================  =========
    conv1    3×3, C → 64                    64×32×32
    layer1   2 blocks                       64×32×32
    layer2   2 blocks, the first stride 2   128×16×16
    layer3   2 blocks, the first stride 2   256×8×8
    layer4   2 blocks, the first stride 2   512×4×4
    bn       BN, ReLU, mean over the map    512
    linear   512 → K                        K
    =======  =============================  =========

    Any image size; tensor names are those of ``locuslab/robust_overfitting`` and ``csdongxian/AWP``.

    Attributes:
        width: channels of the first stage.
    """

    name: ClassVar[str] = "preact-resnet18"
    reference: ClassVar[str] = (
        "He et al., Identity mappings in deep residual networks, arXiv 1603.05027, §2; "
        "Rice, Wong and Kolter, Overfitting in adversarially robust deep learning, arXiv 2002.11569, §3"
    )

    width: int = 64

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Logits (B, K) of images (B, *shape); features (B, 8·width)."""
        check_request(self.name, shape, classes)
        return PreActResNet18Net(self.normalizer(shape[0]), shape[0], classes, self.width)
