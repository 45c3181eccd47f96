"""Who may touch a model, and when: guards that leave it as they found it, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from robustlens.core.rng import forked

CraftMode = Literal["eval", "train"]
Precision = Literal["float32", "bf16-craft"]

#: Convolutions that read no more channels than this are quicker in the usual layout (LeNetSmall forward: by a third).
NARROW = 16


@contextmanager
def untouched(model: nn.Module, *, mode: CraftMode = "eval") -> Iterator[None]:
    """Run the model in ``mode`` with its parameters frozen, and restore everything at the end.

    Restored: the train/eval mode of every module, ``requires_grad`` of every parameter, the buffers (BatchNorm
    statistics move in train mode) and the global random state, which dropout draws from in train mode. ``.grad`` is
    never written because frozen parameters get no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    moving = mode == "train"
    buffers = [(b, b.clone()) for b in model.buffers()] if moving else []
    try:
        if moving != model.training or any(was != moving for _, was in modes):
            model.train(moving)
        for p, was in wanted:
            if was:
                p.requires_grad_(False)
        with forked():
            yield
    finally:
        for module, was in modes:
            module.training = was
        for p, was in wanted:
            p.requires_grad_(was)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's mode restored at the end; the weights can be differentiated."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was in modes:
            module.training = was


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Passes inside draw dropout and move BatchNorm statistics as ever, and are forgotten at the end.

    Buffers and the global random state are afterwards what they were. The weights may be differentiated.
    """
    kept = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        for module, name, buffer in kept:  # a copy takes its place: the graph may hold on to what a pass reads
            setattr(module, name, buffer.clone())
        with forked():
            yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


@contextmanager
def channels_last(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Convolutions in channels-last layout inside, on a CPU, where they take a third to a half less time.

    A network that cannot, or is narrow, is left as it is. The weights themselves come back, not copies of them.
    """
    weights = _convolutions(model) if x.device.type == "cpu" else []
    before = [weight.data for weight in weights]
    try:
        if weights:
            lay_channels_last(model, x)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def lay_channels_last(model: nn.Module, x: Tensor) -> None:
    """Copy the weights of all convolutions into channels-last layout, which their outputs then have too.

    A network that cannot (one that views activations flat, say), or whose convolutions all read ``NARROW`` channels or
    fewer, is left as it is; ``x`` (B, C, H, W) is tried.
    ``contiguous`` would leave weights with one input channel as they are, because both layouts fit them; but their
    strides decide how the activations lie, and a ReLU or a convolution between two layouts takes up to ten times as
    long.
    """
    weights = _convolutions(model)
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = torch.empty_like(weight.data, memory_format=torch.channels_last).copy_(weight.data)
    if not _answers(model, x[:1]):
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def _convolutions(model: nn.Module) -> list[Tensor]:
    """Weights of all convolutions; none where none reads more than ``NARROW`` channels."""
    found = [module for module in model.modules() if type(module) is nn.Conv2d]
    return [module.weight for module in found] if any(each.in_channels > NARROW for each in found) else []


def _answers(model: nn.Module, x: Tensor) -> bool:
    try:
        with untouched(model), torch.no_grad():
            model(x)
    except RuntimeError:
        return False
    return True


@contextmanager
def precision(choice: Precision, device: torch.device) -> Iterator[None]:
    """bfloat16 autocast for what runs inside when ``choice`` is "bf16-craft", nothing otherwise."""
    if choice == "float32":
        yield
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
