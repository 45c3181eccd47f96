"""Encoded images (PNG, JPEG, WebP, …) to one tensor."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from robustlens.data.raw import Fit
from robustlens.results.errors import InputError

#: Pillow modes with more than 8 bits a channel: converting them would clip.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_GREY = ("L", "1", "LA")
_ORIENTATION = 0x0112
#: The formats that are opened: Pillow knows others that are seldom tested, or that run a program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: Bytes of the largest file that is read as an image.
LARGEST = 2**28
#: Trying every format that Pillow knows takes longer than decoding a small image; these tell by their first bytes.
_MAGIC = {b"\x89PNG": ("PNG",), b"\xff\xd8\xff\xe0": ("JPEG",), b"RIFF": ("WEBP",)}
#: Bytes of an image from which decoding in threads pays; below, they only wait for each other.
_WORTH_A_THREAD = 32_768

_Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images that are decoded when asked for.

    ``read(row)`` gives the bytes of one, ``where(row)`` names it in errors, and ``grey`` decides whether all become one
    channel or three: a grey-scale image in a colour set is repeated over the channels.
    """

    read: Callable[[int], bytes]
    where: Callable[[int], str]
    grey: bool

    def __call__(self, rows: Tensor, fit: Fit) -> Tensor:
        """Images (n, C, H, W) uint8 at ``rows`` (n,).

        Raises:
            InputError: an image that cannot be read, has more than 8 bits a channel, or differs in size.
        """
        wanted = rows.tolist()
        with _no_bombs():
            first = self._decoded(wanted[0], fit)
        out = _room(self.where(wanted[0]), (len(wanted), *first.shape))

        def fill(part: range) -> None:
            for position in part:
                image = self._decoded(wanted[position], fit)
                if image.shape != first.shape:
                    raise self._other_size(wanted[position], image, wanted[0], first)
                out[position] = image

        parts = [range(start, min(start + 256, len(wanted))) for start in range(0, len(wanted), 256)]
        large = len(self.read(wanted[0])) >= _WORTH_A_THREAD
        with _no_bombs(), ThreadPoolExecutor(min(8, os.cpu_count() or 1) if large else 1) as pool:
            list(pool.map(fill, parts))
        return torch.from_numpy(out)

    def _decoded(self, row: int, fit: Fit) -> _Pixels:
        """One image (C, H, W) after ``fit``."""
        try:
            image = np.asarray(_open(self.read(row), self.grey))
        except _TooDeep as error:
            raise InputError(
                self.where(row), expected="8 bits a channel", got=f"mode {error}", fix="Convert it to 8 bits first."
            ) from error
        except Exception as error:  # decoders of damaged files raise almost anything
            raise InputError(
                self.where(row),
                expected="an image that Pillow can read",
                got=f"{type(error).__name__} ({' '.join(re.sub(' <_io.BytesIO.*?>', '', str(error)).split())[:120]})",
                fix="Replace or remove it.",
            ) from error
        image = image[None] if self.grey else image.transpose(2, 0, 1)
        return image if fit == Fit() else fit(torch.from_numpy(image.copy())).numpy()

    def _other_size(self, row: int, image: _Pixels, first_row: int, first: _Pixels) -> InputError:
        (h, w), (h0, w0) = image.shape[1:], first.shape[1:]
        return InputError(
            self.where(row),
            expected=f"{h0}×{w0} pixels (height × width) as {self.where(first_row)} has",
            got=f"{h}×{w}",
            fix="Set size (and resize) to bring all images to one size.",
        )


def _room(what: str, shape: tuple[int, ...]) -> _Pixels:
    """An array for decoded images, where this machine has the memory for it."""
    there, asked = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), math.prod(shape)
    if asked > there:
        raise InputError(
            what,
            expected=f"images that fit into this machine's {there / 2**30:.1f} GiB of memory",
            got=f"{asked / 2**30:.1f} GiB for {shape[0]:,} of them with {shape[-2]}×{shape[-1]} pixels",
            fix="Set resize or size, or keep fewer images with train, valid and test.",
        )
    return np.empty(shape, dtype=np.uint8)


def read_image(path: Path) -> bytes:
    """The bytes of the regular file ``path`` (a pipe would wait for ever); raises OSError for another or a huge one."""
    if not path.is_file():
        raise OSError("no regular file")
    if path.stat().st_size > LARGEST:
        raise OSError(f"a file of more than {LARGEST:,} bytes")
    return path.read_bytes()


@contextmanager
def _no_bombs() -> Iterator[None]:
    """An image of more than 89 million pixels, at which Pillow warns, is an error before it is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


class _TooDeep(Exception):
    pass


def _check_png(data: bytes) -> None:
    """Compare the checksum of every chunk: Pillow leaves out those of pixels, and would show a flipped bit."""
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if len(data) < end + 4 or zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("a PNG chunk whose checksum does not fit")
        at = end + 4


def _open(data: bytes, grey: bool) -> Image.Image:
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    image: Image.Image = Image.open(io.BytesIO(data), formats=_MAGIC.get(data[:4], FORMATS))
    if image.mode in _DEEP:
        raise _TooDeep(image.mode)
    if image.format in ("JPEG", "MPO", "TIFF", "WEBP") and image.getexif().get(_ORIENTATION):
        image = ImageOps.exif_transpose(image)
    mode = "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def decide_grey(name: str, splits: Mapping[str, tuple[Callable[[int], bytes], int]]) -> bool:
    """Whether the data set ``name`` is grey-scale: most of its training images are. ``splits`` are readers and sizes.

    Raises:
        InputError: it is, but all images of another split are in colour.
    """
    grey, colour = _kinds(*splits["train"])
    for split in splits.keys() - {"train"} if grey > colour else ():
        greys, colours = _kinds(*splits[split])
        if colours and not greys:
            raise InputError(
                f"data set {name}",
                expected=f"grey images in the {split} split, as the training images are",
                got="colour images",
                fix="Convert them, or the training images.",
            )
    return grey > colour


def _kinds(read: Callable[[int], bytes], count: int) -> tuple[int, int]:
    """Grey and colour images among 65, evenly spread over ``count`` (unreadable ones count out)."""
    found = [0, 0]
    rows = np.unique(np.linspace(0, count - 1, min(count, 65)).astype(int))
    with _no_bombs():
        for row in rows:
            try:
                found[Image.open(io.BytesIO(read(int(row))), formats=FORMATS).mode not in _GREY] += 1
            except Exception:  # said with its place when it is decoded
                continue
    return found[0], found[1]
