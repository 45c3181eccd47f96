"""Linear layers with frozen weights, multiplied by oneDNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.linalg.frozen import passing, transformed

#: Weights, up to which a product is too small to gain.
SMALL = 4096


@contextmanager
def quick_linears(model: nn.Module) -> Iterator[None]:
    """The ``nn.Linear`` layers of ``model`` go through oneDNN inside, on CPUs and with frozen weights in float32.

    The results agree to rounding. torch multiplies by MKL, which leaves the wide instructions of CPUs that are not
    Intel's unused: there oneDNN takes less than half of the time, elsewhere as much. torch's compiler calls the same
    operation. Inside ``torch.func`` transforms, and where torch compiles, all stays as it is.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() > SMALL] if _here() else []
    with passing(model, layers, _forward):
        yield


def _here() -> bool:
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found and bool(torch.backends.mkldnn.enabled)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return F.linear(x, layer.weight, layer.bias)
    weights = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    frozen = not any(p.requires_grad for p in weights)
    alike = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in (x, *weights))
    plain = not torch.is_autocast_enabled("cpu") and not transformed(x)
    if frozen and alike and plain and x.dim() > 1 and x.numel():
        found: Tensor = _Product.apply(x, *weights)  # type: ignore[no-untyped-call]
        return found
    return F.linear(x, layer.weight, layer.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        if transformed(grad):
            return grad @ weight, None, None
        return _Product.apply(grad, weight.mT), None, None  # type: ignore[no-untyped-call]
