"""Randomness that can be replayed: every draw comes from a generator named by the run's seed and a purpose.

Because the generator of step 4,711 depends on the seed and the number 4,711 alone, a run that is killed and resumed
draws what the uninterrupted run draws; nothing has to be saved.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, independent of every other purpose's."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(device: torch.device | str, seed: int, *purpose: str | int) -> Generator:
    """A generator on ``device`` for ``purpose`` of the run with ``seed``."""
    return Generator(device=device).manual_seed(derive(seed, *purpose))
