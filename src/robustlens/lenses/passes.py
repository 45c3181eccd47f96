"""Streaming a split through a model, and choosing which examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from robustlens.core.criterion import cross_entropy
from robustlens.core.modes import untouched
from robustlens.core.types import Batch, Split, Subject
from robustlens.results.errors import InputError


def sample(split: Split, n: int | None) -> Tensor:
    """Positions (min(n, N),) of a fixed random sample without replacement; None takes every example in order.

    The sample depends on the size of the split alone, so that models and seeds are compared on the same examples,
    and files sorted by class do no harm.

    Raises:
        InputError: fewer than one example.
    """
    if n is not None and n < 1:
        raise InputError("n_examples", expected="at least 1", got=str(n), fix="Raise it; leave it out for the default.")
    if n is None or n >= len(split):
        return torch.arange(len(split))
    return torch.randperm(len(split), generator=Generator().manual_seed(0))[:n]


def require_split(lens: Any) -> None:
    """Refuse a lens whose field ``split`` names none."""
    if lens.split not in ("train", "valid", "test"):
        raise InputError(
            f"{lens.name} split", expected="train, valid or test", got=repr(lens.split), fix="Choose one of them."
        )


def count(split: Split, n: int | None) -> int:
    """How many examples ``sample`` takes."""
    return len(split) if n is None else min(n, len(split))


def batches(subject: Subject, split: Split, order: Tensor, size: int) -> Iterator[Batch]:
    """The examples at ``order``, in batches of at most ``size``, on the subject's device."""
    for batch in split.batches(size, order=order):
        yield Batch(batch.x.to(subject.device), batch.y.to(subject.device), batch.index.to(subject.device))


def logits(
    subject: Subject, split: Split, order: Tensor, size: int, of: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float64 and labels (N,) of the examples at ``order``, both on the CPU, in eval mode.

    ``of`` takes another function of the images (B, C, H, W) than the model.
    """
    outputs, labels, of = [], [], of or subject.model
    with untouched(subject.model), torch.no_grad():
        for batch in batches(subject, split, order, size):
            outputs.append(of(batch.x).cpu().double())
            labels.append(batch.y.cpu())
    return torch.cat(outputs), torch.cat(labels)


def useless_gradients(model: nn.Module, batch: Batch, *, floor: float = 0.0) -> int:
    """Examples whose input gradient g of the cross-entropy has ‖g‖₂ ≤ ``floor`` or is not finite."""
    x = batch.x.detach().clone().requires_grad_()
    with untouched(model), torch.enable_grad():
        # The mean times the batch size is the sum: no example's gradient depends on how many there are.
        loss = cross_entropy(model(x), batch.y) * len(batch)
        if not loss.requires_grad:
            return len(batch)
        (grad,) = torch.autograd.grad(loss, x)
    flat = grad.flatten(1).double()  # in which the squares of single precision's smallest numbers are not zero
    return int(((flat.norm(dim=1) <= floor) | ~torch.isfinite(flat).all(1)).sum())


def draw_seed(gen: Generator) -> int:
    """A seed for numpy, drawn from ``gen``."""
    return int(torch.randint(2**31, (1,), generator=gen, device=gen.device))
