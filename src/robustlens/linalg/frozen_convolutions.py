"""Convolutions with frozen weights whose backward pass is quick, and cheap to differentiate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, fold, pad
from torch.overrides import TorchFunctionMode

from robustlens.linalg.frozen import passing, transformed

#: Weights of an output channel, up to which a CPU goes backward by a matrix product.
FEW = 32


class FrozenConvolutions(TorchFunctionMode):
    """Convolutions inside that have frozen weights go backward by a transposed convolution, which is what they are.

    The result is the same. But where torch differentiates its own backward pass of a convolution, it also computes the
    derivative by the weights, frozen or not, which made Jv three times as dear. Where an output looks at few numbers
    (3 × 3 pixels in three colours, 5 × 5 in gray) a CPU is quicker with one matrix product and overlapping sums: up
    to five times on the first layers of LeNetSmall and a CNN for MNIST, level or up to twice on that of a ResNet.
    Where the kernel is a multiple of the stride, a CPU makes the pixels of each phase by themselves. Inside
    ``torch.func`` transforms everything stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return _frozen(_bound(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


@contextmanager
def quick_gradients(model: nn.Module) -> Iterator[None]:
    """The ``nn.Conv2d`` layers of ``model`` go backward inside as in ``FrozenConvolutions``.

    That mode itself would slow down every operation a little. Where torch compiles, everything stays as it is.
    """
    with passing(model, [m for m in model.modules() if isinstance(m, nn.Conv2d) and _plain(m)], _forward):
        yield


def _plain(layer: nn.Conv2d) -> bool:
    """Whether it is torch's own forward pass that runs, and by one convolution."""
    own = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    return own and layer.padding_mode == "zeros"


def _forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    how = _Arguments(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    own = not torch.compiler.is_compiling() and x.requires_grad and torch.is_grad_enabled()
    return _frozen(how) if own else torch.conv2d(*how)


def _frozen(convolution: _Arguments) -> Tensor:
    """It, by a backward pass of our own where its weights are frozen."""
    parts = convolution.weight, convolution.bias
    plain = not isinstance(convolution.padding, str) and not transformed(convolution.input)
    if plain and not any(p is not None and p.requires_grad for p in parts):
        found: Tensor = _Convolution.apply(*convolution)  # type: ignore[no-untyped-call]
        return found
    return torch.conv2d(*convolution)


class _Arguments(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int


def _bound(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Arguments:
    return _Arguments(input, weight, bias, stride, padding, dilation, groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.geometry = arguments[3:]
        ctx.size = arguments[0].shape[2:]
        ctx.save_for_backward(arguments[1])
        return torch.conv2d(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        weight = weight.to(grad.dtype)  # autocast may have left them different
        back = (_transposed if transformed(grad) else _Transposed.apply)(grad, weight, ctx.size, *ctx.geometry)
        return (back, *[None] * 6)


class _Transposed(torch.autograd.Function):
    """The derivative of a convolution by its input, whose own is the convolution again, whatever computes it."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, size: torch.Size, *geometry: Any) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(weight)
        return _transposed(grad, weight, size, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forth = _Convolution.apply(grads[0], *ctx.saved_tensors, None, *ctx.geometry)  # type: ignore[no-untyped-call]
        return (forth, *[None] * 6)


def _transposed(
    grad: Tensor, weight: Tensor, size: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    stride, padding, dilation = ([each] * 2 if isinstance(each, int) else each for each in (stride, padding, dilation))
    if grad.device.type == "cpu" and groups == 1 and not transformed(grad):
        if _alike(weight, stride) and max(dilation) == 1:
            return _phase_by_phase(grad, weight, size, stride, padding)
        if weight[0].numel() <= FEW:
            patches = weight.flatten(1).T @ grad.flatten(2)
            return fold(patches, size, weight.shape[2:], dilation, padding, stride)
    spare = [  # pixels at the end that no window reached
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, k, s, p, d in zip(size, grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return conv_transpose2d(grad, weight, None, stride, padding, spare, groups, dilation)


def _alike(weight: Tensor, stride: Any) -> bool:
    """Whether there is a stride, and pixels of all phases, which are their places within it, meet as many weights."""
    return max(stride) > 1 and all(k % s == 0 for k, s in zip(weight.shape[2:], stride, strict=True))


def _phase_by_phase(grad: Tensor, weight: Tensor, size: torch.Size, stride: Any, padding: Any) -> Tensor:
    """The transposed convolution (B, C, H, W) of ``size``, by one convolution without stride for all phases.

    Pixel u has the phase r = (u + p) mod s and, with q = (u + p − r) / s, the sum over taps j of g_{q−j} w_{sj+r}.
    """
    (down, across), channels = stride, weight.shape[1]
    high, wide = weight.shape[2] // down, weight.shape[3] // across
    taps = torch.take(weight, _taps(weight.shape, down, across))
    phases = conv2d(grad, taps, padding=(high - 1, wide - 1))
    last = phases.stride(1) == 1
    flat = (phases.permute(0, 2, 3, 1) if last else phases).flatten(1)
    reached = [min(n, q * s - p) for n, q, s, p in zip(size, phases.shape[2:], stride, padding, strict=True)]
    places = _places(phases.shape[1:], down, across, *padding, *reached, last)
    back = flat.index_select(1, places)
    back = back.view(-1, *reached, channels).permute(0, 3, 1, 2) if last else back.view(-1, channels, *reached)
    spare = [0, size[1] - reached[1], 0, size[0] - reached[0]]  # pixels at the end that no window reached
    return pad(back, spare) if any(spare) else back


@lru_cache(maxsize=32)
def _taps(shape: torch.Size, down: int, across: int) -> Tensor:
    """Where in a weight of ``shape`` (O, C, H, W) lie the taps (phases · C, O, H / ``down``, W / ``across``)."""
    out, channels, height, width = shape
    high, wide = height // down, width // across
    every = torch.arange(shape.numel()).view(out, channels, high, down, wide, across)
    return every.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(-1, out, high, wide)


@lru_cache(maxsize=32)
def _places(
    shape: torch.Size, down: int, across: int, top: int, left: int, height: int, width: int, last: bool
) -> Tensor:
    """Where in the phases of an image, ``shape`` (phases · C, H, W), lie its pixels (C, ``height``, ``width``).

    The image begins at ``top`` and ``left``, which were padding. With ``last`` both have their channels last in memory.
    """
    _, high, wide = shape
    every = torch.arange(shape.numel())
    every = every.view(high, wide, -1).permute(2, 0, 1) if last else every.view(shape)
    whole = every.reshape(down, across, -1, high, wide).permute(2, 3, 0, 4, 1).reshape(-1, high * down, wide * across)
    image = whole[:, top : top + height, left : left + width]
    return (image.permute(1, 2, 0) if last else image).flatten()
