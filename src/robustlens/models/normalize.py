"""Normalisation inside the model: a threat is measured in [0, 1] pixels, so a network standardises for itself.

The layers hold no parameters and their buffers are not saved: a network has the same tensor names with and without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlens.results.errors import InputError


class ChannelStandardize(nn.Module):
    """(x − mean) / std with one constant a channel, for images (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ImageStandardize(nn.Module):
    """(x − mean(x)) / max(std(x), 1/√n) over the n values of each image (B, C, H, W).

    Differentiable, so attacks see through it. The maximum is taken under the root, max(std, 1/√n) =
    √max(variance, 1/n): an image of one grey has variance 0, where the slope of the root alone is infinite.

    Reference: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, CIFAR-10
    network (``tf.image.per_image_standardization``).
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        return centred / variance.clamp(min=1 / x[0].numel()).sqrt()


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """The settings of what a network does to its pixels first.

    Attributes:
        mean: subtracted, one value a channel or one for all; None (or no values) subtracts nothing.
        std: divided by, likewise; None (or no values) divides by nothing.
        per_image: standardise each image by its own mean and deviation instead.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    per_image: bool = False

    def normalizer(self, channels: int) -> nn.Module:
        """The first layer of a network for images with ``channels`` channels.

        Raises:
            InputError: constants for another number of channels or outside [0, 1], a deviation that is not positive,
                or ``per_image`` together with constants.
        """
        if not self.mean and not self.std:
            return ImageStandardize() if self.per_image else nn.Identity()
        if self.per_image:
            raise InputError(
                "per_image",
                expected="no mean or std beside it",
                got="both",
                fix="Set per_image = false, or mean = [] and std = [].",
            )
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        for field, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    field,
                    expected="1 value" if channels == 1 else f"1 value or {channels} (one a channel)",
                    got=f"{len(values)} of them",
                    fix="Give one value for every channel of the images.",
                )
            if not all(0 <= value <= 1 for value in values):
                raise InputError(
                    field,
                    expected="statistics of pixels in [0, 1]",
                    got=str(values),
                    fix="Divide those of 0–255 pixels by 255.",
                )
        if not all(value > 0 for value in std):
            raise InputError("std", expected="positive values", got=str(std), fix="Give the deviation of each channel.")
        return ChannelStandardize(mean, std)
