"""Random changes of training images, one draw per example, without Python per example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from robustlens.core.rng import drawn
from robustlens.results.errors import InputError


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, gen: Generator, *, batch: int = 0, end: int = 1) -> Tensor:
    """Uniform draws in [0, ``end``), whole or real, on the generator's device; dimension ``batch`` counts images."""

    def fill(t: Tensor) -> Tensor:
        return t.uniform_(0, end, generator=gen) if dtype.is_floating_point else t.random_(0, end, generator=gen)

    return drawn(torch.empty(shape, device=gen.device, dtype=dtype), fill, gen, batch=batch)


@dataclass(frozen=True, kw_only=True)
class PadCrop:
    """Pads with ``padding`` zeros (black) on each side and crops each example at random to its old size.

    Each of the (2·padding + 1)² positions is equally likely. ``padding = 0`` changes nothing. The default 4 is the
    papers' for 32×32 images; the code of MMR uses 2.

    Raises:
        InputError: a negative padding.
    """

    name: ClassVar[str] = "pad-crop"
    reference: ClassVar[str] = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016, §4.2"

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise InputError("padding of pad-crop", expected="0 or more", got=str(self.padding), fix="Use 4.")

    def augment(self, x: Tensor, *, gen: Generator) -> Tensor:
        """Images (B, C, H, W) to images of the same shape."""
        b, c, h, w = x.shape
        padded = F.pad(x, (self.padding,) * 4)
        offset = _drawn((2, b), torch.int64, gen, batch=1, end=2 * self.padding + 1).to(x.device)
        rows = offset[0, :, None] + torch.arange(h, device=x.device)
        columns = offset[1, :, None] + torch.arange(w, device=x.device)
        pixel = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(b, 1, h * w)
        return padded.flatten(2).gather(2, pixel.expand(b, c, h * w)).view(b, c, h, w)


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors each example left to right with probability ``p``.

    Raises:
        InputError: ``p`` outside [0, 1].
    """

    name: ClassVar[str] = "flip"
    reference: ClassVar[str] = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016, §4.2"

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError("p of flip", expected="a probability", got=str(self.p), fix="Use 0.5.")

    def augment(self, x: Tensor, *, gen: Generator) -> Tensor:
        """Images (B, C, H, W) to images of the same shape."""
        mirrored = _drawn((len(x),), torch.float32, gen).to(x.device) < self.p
        return torch.where(mirrored[:, None, None, None], x.flip(3), x)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Cuts a random box out of each example and scales it to ``size`` × ``size``.

    The box has an area of A·H·W with A uniform in ``scale``, and a width to height of r with log r uniform in
    ``ratio``; its place is uniform. Of ten draws the first that lies in the image is taken, otherwise the largest
    centred box with a ratio in ``ratio``, as torchvision does. Scaling is bilinear and antialiased: the tent filter
    widens by box/size where the box is larger than the output, and never sees pixels outside the box.
    ``scale = ratio = (1, 1)`` at the size of square images changes nothing.

    ``size`` is in pixels; None keeps the input's height and width.

    Raises:
        InputError: a size below 1, or ranges that are not 0 < low ≤ high (≤ 1 for ``scale``).
    """

    name: ClassVar[str] = "random-resized-crop"
    reference: ClassVar[str] = "Szegedy et al., Going Deeper with Convolutions, CVPR 2015, §6"

    size: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError("size of random-resized-crop", expected="1 or more", got=str(self.size), fix="Use 56.")
        for field, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                bound = " ≤ 1" if most == 1 else ""
                raise InputError(
                    f"{field} of random-resized-crop",
                    expected=f"0 < low ≤ high{bound}",
                    got=str((low, high)),
                    fix="Leave it out for the usual range.",
                )

    def augment(self, x: Tensor, *, gen: Generator) -> Tensor:
        """Images (B, C, H, W) to (B, C, size, size)."""
        height, width = x.shape[2:]
        top, left, h, w = self.boxes(len(x), height, width, gen=gen).to(x.device).unbind(1)
        vertical = _tent(top, h, height, self.size or height).to(x.dtype)
        horizontal = _tent(left, w, width, self.size or width).to(x.dtype)
        narrowed = x.flatten(1, 2) @ horizontal.transpose(1, 2)
        return vertical[:, None] @ narrowed.view(*x.shape[:3], -1)

    def boxes(self, count: int, height: int, width: int, *, gen: Generator, tries: int = 10) -> Tensor:
        """Random boxes (count, 4) int64 in pixels: top, left, height, width; on the generator's device."""
        draws = _drawn((4, count, tries), torch.float64, gen, batch=1)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * draws[1])
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        top = (draws[2] * (height - h + 1)).long()
        left = (draws[3] * (width - w + 1)).long()
        drawn = torch.stack((top, left, h, w), 2)
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        pick = fits.long().argmax(1)
        chosen = drawn[torch.arange(count, device=pick.device), pick]
        centre = torch.tensor(self._centred(height, width), device=pick.device)
        return torch.where(fits.any(1)[:, None], chosen, centre)

    def _centred(self, height: int, width: int) -> tuple[int, int, int, int]:
        h, w = height, width
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def _tent(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights (B, target, source) that resample the pixels from ``start`` (B,) on for ``length`` (B,) to ``target``.

    Output pixel i is centred on start + (i + ½)·length/target; its weights fall linearly to 0 over max(1,
    length/target) pixels, are 0 outside the box and sum to 1.
    """
    step = (length.float() / target)[:, None, None]
    output = torch.arange(target, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(source, device=start.device)[None, None, :]
    first = start[:, None, None]
    centre = first + output * step
    weight = (pixel + 0.5 - centre).abs_().div_(-step.clamp(min=1)).add_(1).clamp_(min=0)
    weight *= (pixel >= first) & (pixel < first + length[:, None, None])
    return weight.div_(weight.sum(2, keepdim=True))
