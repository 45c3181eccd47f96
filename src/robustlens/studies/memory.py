"""Lenses that want more memory than there is: looked through again with fewer images at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from robustlens.core.discovery import describe
from robustlens.core.types import Lens
from robustlens.results.reading import Outcome, Reading

#: What PyTorch's allocators of host memory say; they raise a bare RuntimeError.
REFUSALS = ("can't allocate memory", "not enough memory")


def within_memory(lens: Lens, look: Callable[[Lens], Reading]) -> Reading:
    """``look(lens)``, with the lens's ``batch_size`` halved until it fits.

    The reading says so. Its settings stay those that were asked for: its place and its seeds are found by them. It is
    ``failed`` where a single image is too much, or the lens has no ``batch_size``.
    """
    asked: int | None = getattr(lens, "batch_size", None)
    size, smaller = asked, lens
    while True:
        try:
            reading = look(smaller)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        else:
            break
        # Here and not above, where the exception still holds the tensors that filled the memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size is None or size == 1:
            why = "Memory ran out" + (" with a single image at a time." if size else "; it has no batch_size to lower.")
            return Reading(lens.name, "Nothing was measured.", Outcome.failed(why), settings=describe(lens))
        size //= 2
        resized: Any = lens
        smaller = dataclasses.replace(resized, batch_size=size)
    if size == asked:
        return reading
    return dataclasses.replace(
        reading,
        says=f"{reading.says} Memory ran out with {asked} images at a time; measured with {size}.",
        settings={**reading.settings, "batch_size": asked},
    )


def ran_out(error: RuntimeError | MemoryError) -> bool:
    """Whether it says that there is no memory left, on the device or the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in REFUSALS)
