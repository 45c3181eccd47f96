"""A linear classifier on other images that are the same problem: what a lens reads of it must not change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.oracle import linear_subject

#: Leaves images, or a weight for every pixel, as they are.
SAME: Callable[[Tensor], Tensor] = torch.clone


def _twin(
    subject: Subject,
    *,
    pixels: Callable[[Tensor], Tensor] = SAME,
    negative: bool = False,
    names: Tensor | None = None,
    order: Callable[[int], Tensor] = torch.arange,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Subject:
    """Pixels moved, x ↦ 1 − x, class k named ``names``[k], examples in another order, logits z ↦ scale · z + shift."""
    layer, splits = subject.model[1], subject.splits
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    if negative:
        bias, weight = bias + weight.sum(1), -weight
    weight = pixels(weight.view(-1, *splits.shape)).flatten(1)
    names = torch.arange(len(weight)) if names is None else names
    back = names.argsort()

    def split(one: Split) -> Split:
        at = order(len(one))
        images = pixels(one.images[at])
        return Split(1 - images if negative else images, names[one.labels[at]])

    train, test = split(splits.train), split(splits.test)
    other = linear_subject(
        (scale * weight)[back], (scale * bias + shift)[back], train=train, test=test, threat=subject.threat
    )
    classes = tuple(splits.classes[k] for k in back.tolist())
    return Subject(other.model, Splits("twin", train, test, test, classes), subject.threat)


def scaled(subject: Subject, scale: float, shift: float) -> Subject:
    """The same decisions from logits scale · z + shift."""
    return _twin(subject, scale=scale, shift=shift)


def shuffled(subject: Subject) -> Subject:
    return _twin(subject, order=lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(3)))


def renamed(subject: Subject) -> Subject:
    """Class k is called k + 1, the last one 0; the names of the classes go with them."""
    return _twin(subject, names=torch.arange(len(subject.splits.classes)).roll(-1))


def mirrored(subject: Subject) -> Subject:
    return _twin(subject, pixels=lambda images: images.flip(3))


def turned(subject: Subject) -> Subject:
    return _twin(subject, pixels=lambda images: images.transpose(2, 3).flip(2))


def negative(subject: Subject) -> Subject:
    """White for black: the box goes over into itself."""
    return _twin(subject, negative=True)


TWINS = (shuffled, renamed, mirrored, turned, negative)
