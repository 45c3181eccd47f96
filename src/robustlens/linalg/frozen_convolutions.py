"""Convolutions with frozen weights whose backward pass is quick, and cheap to differentiate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, fold
from torch.overrides import TorchFunctionMode

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
            convolution = _bound(*args, **(kwargs or {}))
            parts = convolution.weight, convolution.bias
            plain = not isinstance(convolution.padding, str) and not transformed(convolution.input)
            if plain and not any(p is not None and p.requires_grad for p in parts):
                return _Convolution.apply(*convolution)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@contextmanager
def quick_gradients(model: nn.Module) -> Iterator[None]:
    """Every forward pass of ``model`` inside that builds a graph has ``FrozenConvolutions``.

    The mode is on during those passes alone, because it slows down every operation a little.
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        yield
        return
    on: list[ExitStack] = []

    def begin(*_: Any) -> None:
        on.append(ExitStack())
        if torch.is_grad_enabled():
            on[-1].enter_context(FrozenConvolutions())

    def end(*_: Any) -> None:
        on.pop().close()

    handles = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is in the hands of ``torch.func``, or of autograd with ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


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
    (down, across), (out, channels) = stride, weight.shape[:2]
    high, wide = weight.shape[2] // down, weight.shape[3] // across
    taps = weight.view(out, channels, high, down, wide, across).flip(2, 4).permute(3, 5, 1, 0, 2, 4)
    phases = conv2d(grad, taps.reshape(-1, out, high, wide), padding=(high - 1, wide - 1))
    reached = [q * s - p for q, s, p in zip(phases.shape[2:], stride, padding, strict=True)]
    spare = reached[0] < size[0] or reached[1] < size[1]  # pixels at the end that no window reached
    layout = torch.channels_last if phases.stride(1) == 1 else torch.contiguous_format
    back = torch.empty(len(grad), channels, *size, dtype=grad.dtype, memory_format=layout)
    if spare:
        back.zero_()
    of_phase = phases.view(len(grad), down, across, channels, *phases.shape[2:])
    for r in range(down):
        for c in range(across):
            (top, first), (left, second) = _first(r, down, padding[0]), _first(c, across, padding[1])
            here = back[:, :, first : reached[0] : down, second : reached[1] : across]
            here.copy_(of_phase[:, r, c, :, top : top + here.shape[2], left : left + here.shape[3]])
    return back


def _first(phase: int, stride: int, padding: int) -> tuple[int, int]:
    """The first q and the first pixel of a phase that lie in the image."""
    q = max(-((phase - padding) // stride), 0)
    return q, q * stride + phase - padding
