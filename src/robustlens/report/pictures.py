"""Gallery images → PNG: data URIs for the page, one grid for a figure."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustlens.results.panels import Gallery

SHOWN = 84  # side of a picture on the page, in CSS pixels
KEPT = 2 * SHOWN  # larger pictures are reduced to this, for screens of two device pixels a CSS pixel


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """An image (height, width, 1 or 3) as a picture, reduced to KEPT pixels a side where it is larger."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(image.size) > KEPT:
        image.thumbnail((KEPT, KEPT), Image.Resampling.LANCZOS)
    return image


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """The image as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(_png(picture(pixels))).decode()


def grid(gallery: Gallery, *, gap: int = 8) -> bytes:
    """All pictures of the gallery as one PNG, rows and columns as they are, pixels enlarged but not smoothed."""
    rows, columns, height, width = gallery.images.shape[:4]
    scale = max(1, round(KEPT / max(height, width, 1)))
    high, wide = height * scale, width * scale
    size = (max(1, columns * (wide + gap) - gap), max(1, rows * (high + gap) - gap))
    sheet = Image.new("RGB", size, "white")
    for r in range(rows):
        for c in range(columns):
            pixels = gallery.images[r, c]
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
            sheet.paste(tile.resize((wide, high), Image.Resampling.NEAREST), (c * (wide + gap), r * (high + gap)))
    return _png(sheet)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
