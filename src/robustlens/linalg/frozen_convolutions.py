"""Convolutions with frozen weights whose backward pass is quick, and cheap to differentiate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, fold
from torch.overrides import TorchFunctionMode

#: Weights of an output channel, up to which a CPU goes backward by a matrix product.
FEW = 32


class FrozenConvolutions(TorchFunctionMode):
    """Convolutions inside that have frozen weights go backward by a transposed convolution, which is what they are.

    The result is the same. But where torch differentiates its own backward pass of a convolution, it also computes the
    derivative by the weights, frozen or not, which made Jv three times as dear. Where an output looks at few numbers
    (3 × 3 pixels in three colours, 5 × 5 in gray) a CPU is quicker with one matrix product and overlapping sums: up
    to five times on the first layers of LeNetSmall and a CNN for MNIST, level or up to twice on that of a ResNet.
    Inside ``torch.func`` transforms everything stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            convolution = _bound(*args, **(kwargs or {}))
            parts = convolution.weight, convolution.bias
            plain = not isinstance(convolution.padding, str)
            plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(convolution.input)
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
        ctx.arguments = arguments[3:]
        ctx.height_and_width = arguments[0].shape[2:]
        ctx.save_for_backward(arguments[1])
        return torch.conv2d(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        weight = weight.to(grad.dtype)  # autocast may have left them different
        stride, padding, dilation = ([each] * 2 if isinstance(each, int) else each for each in ctx.arguments[:3])
        if weight[0].numel() <= FEW and ctx.arguments[3] == 1 and grad.device.type == "cpu":
            patches = weight.flatten(1).T @ grad.flatten(2)
            back = fold(patches, ctx.height_and_width, weight.shape[2:], dilation, padding, stride)  # type: ignore[arg-type]
            return (back, *[None] * 6)
        spare = [  # pixels at the end that no window reached
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, m, k, s, p, d in zip(
                ctx.height_and_width, grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        back = conv_transpose2d(grad, weight, None, stride, padding, spare, ctx.arguments[3], dilation)
        return (back, *[None] * 6)
