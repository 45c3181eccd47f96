"""Galleries of clean and adversarial images with their differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustlens.results.panels import Gallery


def compared(
    title: str, found: str, clean: Sequence[Tensor], x_adv: Sequence[Tensor], captions: Sequence[str]
) -> list[Gallery]:
    """A row for each pair of images (C, H, W): clean, ``found``, and the change, enlarged around mid-grey.

    Nothing where there are no images, or images that are neither grey nor coloured.
    """
    if not clean or clean[0].shape[0] not in (1, 3):
        return []
    before, after = torch.stack(list(clean)), torch.stack(list(x_adv))
    change = after - before
    largest = float(change.abs().max())
    k = min(100, max(1, int(0.5 / largest))) if largest > 0 else 1
    columns = torch.stack([before, after, 0.5 + k * change], dim=1)  # (rows, 3, C, H, W)
    pixels = (columns.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    return [Gallery(title, ("clean", found, f"difference × {k}"), tuple(captions), pixels)]


def class_name(classes: tuple[str, ...], k: int) -> str:
    """The name of class ``k``, its number where it has none."""
    return classes[k] if k < len(classes) else str(k)
