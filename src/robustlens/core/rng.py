"""Randomness that can be replayed: every draw comes from a generator named by the run's seed and a purpose.

Because the generator of step 4,711 depends on the seed and the number 4,711 alone, a run that is killed and resumed
draws what the uninterrupted run draws; nothing has to be saved. What is drawn for each example of a batch is drawn
through ``drawn``, so that processes that share a batch draw for an example what one process would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

import torch
from torch import Generator, Tensor

from robustlens.results.errors import InputError


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, independent of every other purpose's."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(device: torch.device | str, seed: int, *purpose: str | int) -> Generator:
    """A generator on ``device`` for ``purpose`` of the run with ``seed``."""
    return Generator(device=device).manual_seed(derive(seed, *purpose))


def seed_torch(device: torch.device, seed: int) -> None:
    """Seed what torch draws without a generator on ``device`` and on the CPU.

    ``torch.manual_seed`` also writes down its caller's whole stack, for GPUs that may be used later: a third of a
    millisecond, which a step of training on a CPU need not pay.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def forked() -> AbstractContextManager[None]:
    """What torch draws inside without a generator, on the CPU and on every GPU, changes nothing outside."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


@contextmanager
def detour(gen: Generator) -> Iterator[None]:
    """However much is drawn from ``gen`` inside, what is drawn afterwards does not depend on it."""
    seed = derive(0, hashlib.sha256(gen.get_state().numpy().tobytes()).hexdigest())
    yield
    gen.manual_seed(seed)


def for_part(gen: Generator, part: Tensor, examples: int) -> SharedGenerator:
    """For those at ``part`` (A,) of the ``examples`` that ``gen`` draws for: draws for all, and takes its own rows.

    It goes on from where ``gen`` is, and ``gen`` elsewhere, wherever the draws of the part end.
    """
    rows, whole = (gen.rows[part], gen.examples) if isinstance(gen, SharedGenerator) else (part, examples)
    with detour(gen):
        return SharedGenerator.of(gen, rows=rows, examples=whole)


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

    def keep(self, standing: Tensor) -> None:
        """Go on for those of its examples that ``standing`` (B,) marks."""
        self.rows = self.rows[standing]


def drawn(like: Tensor, fill: Callable[[Tensor], Tensor], gen: Generator, *, batch: int = 0) -> Tensor:
    """A tensor shaped like ``like``, whose dimension ``batch`` counts examples, that ``fill`` filled from ``gen``.

    Where ``gen`` is shared, the draw is made for the whole batch, and its part is taken. An attack that has left some
    of its examples alone draws from ``for_part``, so that what an example gets does not depend on who else is left.

    Raises:
        InputError: ``gen`` is shared and for another number of examples.
    """
    if not isinstance(gen, SharedGenerator):
        return fill(torch.empty_like(like))
    shape = list(like.shape)
    if shape[batch] != len(gen.rows):
        raise InputError(
            "a draw of a batch that several share",
            expected=f"{len(gen.rows)} examples, as its generator is for",
            got=str(shape[batch]),
            fix="For some of them draw from robustlens.core.rng.for_part(gen, left, len(x)).",
        )
    shape[batch] = gen.examples
    whole = fill(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like)))
    return whole[(slice(None),) * batch + (gen.rows.to(like.device),)]


def layout(like: Tensor) -> torch.memory_format:
    """How ``like`` lies in memory, which decides what a draw puts where."""
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
