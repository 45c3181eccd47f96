"""What the networks of this package share: logits are a linear ``head`` of ``features``, and requests are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from robustlens.results.errors import InputError


class Chain(nn.Sequential):
    """Named layers one after the other, the last one linear; parameters are called ``<layer>.weight``."""

    def features(self, x: Tensor) -> Tensor:
        """Input (B, F) of the last layer, for images (B, C, H, W)."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x

    @property
    def head(self) -> nn.Linear:
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last


class Classifier(nn.Module, ABC):
    """A network whose logits (B, K) are ``head(features(x))``."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The last layer, F → K."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Input (B, F) of the last layer, for images (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def check_request(name: str, shape: tuple[int, int, int], classes: int, *, least: int = 1) -> None:
    """Raise InputError unless ``shape`` is (channels, height, width) with sides of at least ``least`` pixels, and
    there are two classes or more.
    """
    what = f"model {name!r}"
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            what, expected="(channels, height, width)", got=str(tuple(shape)), fix="Give the shape of one image."
        )
    if min(shape[1:]) < least:
        raise InputError(
            what,
            expected=f"images of at least {least}×{least} pixels",
            got=f"{shape[1]}×{shape[2]}",
            fix="Take larger images, or a network for small ones: lenet-small, mlp, softmax-regression.",
        )
    if classes < 2:
        raise InputError(what, expected="2 classes or more", got=str(classes), fix="Check the labels of the data.")
