"""Randomness that can be replayed: every draw comes from a generator named by the run's seed and a purpose.

Because the generator of step 4,711 depends on the seed and the number 4,711 alone, a run that is killed and resumed
draws what the uninterrupted run draws; nothing has to be saved. What is drawn for each example of a batch is drawn
through ``drawn``, so that processes that share a batch draw for an example what one process would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def detour(gen: Generator) -> Iterator[None]:
    """However much is drawn from ``gen`` inside, what is drawn afterwards does not depend on it."""
    seed = derive(0, hashlib.sha256(gen.get_state().numpy().tobytes()).hexdigest())
    yield
    gen.manual_seed(seed)


def for_part(gen: Generator, part: Tensor, examples: int) -> SharedGenerator:
    """A copy of ``gen`` that draws for all of ``examples``, of which it is for those at ``part`` (A,)."""
    if isinstance(gen, SharedGenerator):
        return SharedGenerator.of(gen, rows=gen.rows[part], examples=gen.examples)
    return SharedGenerator.of(gen, rows=part, examples=examples)


class SharedGenerator(Generator):
    """For those at ``rows`` (B,) of the ``examples`` of a batch, of which others look after the rest."""

    rows: Tensor
    examples: int

    @classmethod
    def of(cls, gen: Generator, *, rows: Tensor, examples: int) -> Self:
        """One that draws what ``gen`` would draw for the whole batch."""
        found = cls(device=gen.device)
        found.set_state(gen.get_state())
        found.rows, found.examples = rows.to(gen.device), examples
        return found

    def clone_state(self) -> Self:
        return type(self).of(self, rows=self.rows, examples=self.examples)


def drawn(like: Tensor, fill: Callable[[Tensor], Tensor], gen: Generator, *, batch: int = 0) -> Tensor:
    """A tensor shaped like ``like``, whose dimension ``batch`` counts examples, that ``fill`` filled from ``gen``.

    Where ``gen`` is shared, the draw is made for the whole batch, and its part is taken. An attack that has left some
    of its examples alone must draw for all that it was given and take the rows of the others, so that what an example
    gets does not depend on who else is left. A multiple of the examples is drawn as so many batches.
    """
    if not isinstance(gen, SharedGenerator):
        return fill(torch.empty_like(like))
    shape = list(like.shape)
    times = -(-shape[batch] // max(len(gen.rows), 1))
    rows = torch.cat([gen.rows + number * gen.examples for number in range(times)] or [gen.rows])[: shape[batch]]
    shape[batch] = times * gen.examples
    lies = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if lies else torch.contiguous_format
    whole = fill(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout))
    return whole[(slice(None),) * batch + (rows.to(like.device),)]
