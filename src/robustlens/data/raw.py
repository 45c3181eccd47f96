"""What every source gives: labels at once, pixels when they are asked for, in the order of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustlens.results.errors import InputError


@dataclass(frozen=True)
class Fit:
    """Brings images (..., C, H, W) to one size: the shorter side scaled to ``resize``, then a centre crop to ``size``.

    Both are in pixels; None leaves that step out. With an odd number of pixels to cut, the crop starts at the lower
    half, as ``(H - size) // 2``. Raises InputError for an image that is smaller than the crop.
    """

    resize: int | None = None
    size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.resize is not None and min(images.shape[-2:]) != self.resize:
            images = self._scaled(images, self.resize)
        if self.size is None:
            return images
        h, w = images.shape[-2:]
        if min(h, w) < self.size:
            raise InputError(
                "size",
                expected=f"images of at least {self.size}×{self.size} pixels to crop from",
                got=f"{h}×{w}",
                fix=f"Set resize = {self.size}, or a smaller size.",
            )
        top, left = (h - self.size) // 2, (w - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]

    @staticmethod
    def _scaled(images: Tensor, side: int) -> Tensor:
        h, w = images.shape[-2:]
        shorter = min(h, w)
        target = [max(side, round(n * side / shorter)) for n in (h, w)]
        four = images.reshape(-1, *images.shape[-3:])
        return F.interpolate(four, target, mode="bilinear", antialias=True).reshape(*images.shape[:-2], *target)


@dataclass(frozen=True, eq=False)
class RawSplit:
    """One split in the order of its files.

    ``labels`` is int64 (N,). ``pixels(rows, fit)`` gives the images at ``rows`` (n,), each passed through ``fit``, as
    uint8 (n, C, H, W), or float32 in [0, 1] where the source is.
    """

    labels: Tensor
    pixels: Callable[[Tensor, Fit], Tensor]

    def images(self) -> Tensor:
        """All images (N, C, H, W), untouched, in the order of the files."""
        return self.pixels(torch.arange(len(self.labels)), Fit())


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it lies on disk: its splits by their own names (``train`` is always one), and its class names."""

    name: str
    splits: Mapping[str, RawSplit]
    classes: tuple[str, ...]


def in_memory(images: Tensor, labels: Tensor) -> RawSplit:
    """A split whose images (N, C, H, W) are decoded already."""
    return RawSplit(labels, lambda rows, fit: fit(images[rows]).contiguous())
