"""Randomness that can be replayed: every draw comes from a generator named by the run's seed and a purpose.

Because the generator of step 4,711 depends on the seed and the number 4,711 alone, a run that is killed and resumed
draws what the uninterrupted run draws; nothing has to be saved. What is drawn for each example of a batch is drawn
through ``drawn``, so that processes that share a batch draw for an example what one process would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Self

import torch
from torch import Generator, Tensor


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, independent of every other purpose's."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(device: torch.device | str, seed: int, *purpose: str | int) -> Generator:
    """A generator on ``device`` for ``purpose`` of the run with ``seed``."""
    return Generator(device=device).manual_seed(derive(seed, *purpose))


class SharedGenerator(Generator):
    """For a process that has the examples ``rank``, ``rank`` + ``ways``, … of the ``examples`` of a batch."""

    rank: int
    ways: int
    examples: int

    @classmethod
    def of(cls, gen: Generator, *, rank: int, ways: int, examples: int) -> Self:
        """One that draws what ``gen`` would draw for the whole batch."""
        found = cls(device=gen.device)
        found.set_state(gen.get_state())
        found.rank, found.ways, found.examples = rank, ways, examples
        return found

    def clone_state(self) -> Self:
        return type(self).of(self, rank=self.rank, ways=self.ways, examples=self.examples)

    def whole(self, own: int) -> int:
        """How many examples the batch has of which this process has ``own``."""
        return self.examples if own == len(range(self.rank, self.examples, self.ways)) else own * self.ways


def drawn(like: Tensor, fill: Callable[[Tensor], Tensor], gen: Generator, *, batch: int = 0) -> Tensor:
    """A tensor shaped like ``like``, whose dimension ``batch`` counts examples, that ``fill`` filled from ``gen``.

    Where ``gen`` is shared, the draw is made for the whole batch, and the process takes its part. An attack that has
    left some of its examples alone draws as if every process had.
    """
    if not isinstance(gen, SharedGenerator):
        return fill(torch.empty_like(like))
    shape = list(like.shape)
    shape[batch] = gen.whole(shape[batch])
    lies = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if lies else torch.contiguous_format
    whole = fill(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout))
    return whole[(slice(None),) * batch + (slice(gen.rank, None, gen.ways),)]
