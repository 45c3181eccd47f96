"""The linear regions of a ReLU network: what its hidden units are at an image, and how they change with the image.

Between the points where a unit h_j is 0 the network is affine. The image x sits in one such region; unit j ends it at
the distance |h_j(x)| / ‖∇h_j(x)‖_q, with q the dual of the norm that distances are measured in. Max-pooling ends it as
well, where another entry of a window becomes the largest: there h_j is the entry less the largest.

Take the network in eval mode: images must not see each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustlens.core.modes import evaluating
from robustlens.linalg.frozen_convolutions import FrozenConvolutions
from robustlens.results.errors import InputError

#: Modules whose kink at 0 bounds the linear regions.
BENDS = (nn.ReLU, nn.LeakyReLU)

#: The operations that they, and the functions of the same name, are made of.
RELUS = ("relu", "relu_", "leaky_relu", "leaky_relu_")

#: How autograd calls the operations that have kinks; max-pooling has its own.
KINKS = ("Relu", "LeakyRelu", "PreluKernel", "Threshold", "Clamp", "Hardtanh", "Abs", "Maximum", "Minimum")

#: Those of max-pooling, which switches where two inputs tie.
POOLS = ("MaxPool", "AdaptiveMaxPool")

#: The order q of the dual of each norm.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}

#: From images (B, C, H, W) to what is 0 on the boundaries, a tensor (B, units) a layer.
Heights = Callable[[Tensor], list[Tensor]]


def observed(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The flat input (B, units) of every call of a ReLU module in one forward pass, in order, and the logits."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        seen.append(inputs[0].flatten(1))
        return (inputs[0].clone(),) if module.inplace else None

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, BENDS)]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, logits


class Bends(NamedTuple):
    """What is 0 where the network bends, (B, units) a layer: ``relus`` inputs of ReLUs, ``windows`` of max-pooling.

    The latter are the entries of all windows less their largest, so never positive, −∞ in the padding.
    """

    relus: list[Tensor]
    windows: list[Tensor]
    logits: Tensor


def bends(model: nn.Module, x: Tensor) -> Bends:
    """The bends of ``model`` at images ``x`` (B, C, H, W) in one forward pass, those of functions as well."""
    with _Watch() as watch:
        logits = model(x)
    return Bends(watch.relus, watch.windows, logits)


class _Watch(TorchFunctionMode):
    """Keeps the inputs of ReLUs and the windows of max-pooling, except for that with ``ceil_mode``."""

    def __init__(self) -> None:
        super().__init__()
        self.relus: list[Tensor] = []
        self.windows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RELUS:
            self.relus.append(args[0].clone().flatten(1))  # it may be overwritten
        elif name == "max_pool2d":
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            how = dict(zip(names, args[1:], strict=False)) | kwargs
            if not how.pop("ceil_mode", False):
                self.windows.append(_behind(args[0], how))
        return func(*args, **kwargs)


def _behind(a: Tensor, how: Mapping[str, Any]) -> Tensor:
    """Every entry of the windows of ``a`` (B, C, H, W) less the largest of its window, flat."""
    padding, size = how.get("padding", 0), how["kernel_size"]
    ph, pw = (padding, padding) if isinstance(padding, int) else padding
    padded = F.pad(a, (pw, pw, ph, ph), value=-torch.inf)
    parts = F.unfold(padded, size, dilation=how.get("dilation", 1), stride=how.get("stride") or size)
    parts = parts.view(*a.shape[:2], -1, parts.shape[-1])
    return (parts - parts.gather(2, parts.detach().argmax(2, keepdim=True))).flatten(1)


def require_relu_regions(model: nn.Module, x: Tensor, who: str) -> None:
    """Refuse a ``model`` whose linear regions at images ``x`` (B, C, H, W) are not those of its ReLU modules.

    ``who`` is the name of what asks. Costs a forward and two backward passes.

    Raises:
        InputError: no ReLU modules, a kink elsewhere, or second derivatives that are not zero.
    """
    if not any(isinstance(module, BENDS) for module in model.modules()):
        raise InputError(
            f"a network under {who}",
            expected="nn.ReLU or nn.LeakyReLU modules",
            got="none",
            fix="Write activations as modules, not as functions, so that their inputs can be seen.",
        )
    x = x.detach().requires_grad_()
    with torch.enable_grad(), evaluating(model):
        seen, logits = observed(model, x)
        kinks = Counter(_operations(logits, KINKS))
        if kinks.total() > len(seen):
            raise InputError(
                f"a network under {who}",
                expected=f"the {len(seen)} calls of its ReLU modules to be all that bends it",
                got=", ".join(f"{number} {name}" for name, number in kinks.items()),
                fix="Write every activation as an nn.ReLU or nn.LeakyReLU module.",
            )
        mixed = (logits * torch.arange(logits.shape[1], device=x.device)).sum()
        (slope,) = torch.autograd.grad(mixed, x, create_graph=True)
        curved = None
        if slope.requires_grad:
            (curved,) = torch.autograd.grad((slope * slope.detach()).sum(), x, allow_unused=True)
        if curved is not None and bool(curved.any()):
            raise InputError(
                f"a network under {who}",
                expected="a piecewise linear network",
                got="second derivatives that are not zero",
                fix="Take ReLU for other activations, and do not standardise each image by its own statistics.",
            )


def slopes_along(heights: Heights, x: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The ``heights`` h at images ``x`` and their derivatives ∇h·v along ``v``, both (B, C, H, W).

    u ↦ Jᵀu is linear, so that its own derivative along v is Jv; see ``linalg.jacobian``.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad(), FrozenConvolutions():
        layers = heights(point)
        us = [torch.zeros_like(layer, requires_grad=True) for layer in layers]
        (pulled,) = torch.autograd.grad(layers, point, us, create_graph=True)
    return [layer.detach() for layer in layers], list(torch.autograd.grad(pulled, us, v))


def gradient_norms(heights: Heights, x: Tensor, q: float, *, chunk: int) -> list[Tensor]:
    """‖∇h_j‖_q of all heights at images ``x`` (B, C, H, W), q in {1, 2, ∞}, as ``heights`` has them.

    The derivative along a pixel is a column of J: ``chunk`` // B pixels at a time, C·H·W columns an image in all.
    ``heights`` is called with copies of ``x`` one after the other, (copies · B, C, H, W).
    """
    copies, pixels = max(1, chunk // len(x)), torch.arange(x[0].numel(), device=x.device)
    many = x.detach().repeat(copies, 1, 1, 1).requires_grad_()
    with torch.enable_grad(), FrozenConvolutions():
        layers = heights(many)
        us = [torch.zeros_like(layer, requires_grad=True) for layer in layers]
        (pulled,) = torch.autograd.grad(layers, many, us, create_graph=True)
    sizes = [torch.zeros_like(layer[: len(x)]) for layer in layers]
    for first in range(0, len(pixels), copies):
        part = torch.arange(first, first + copies, device=x.device)
        pixel = (part[:, None] == pixels).to(x.dtype).view(copies, 1, *x.shape[1:])
        columns = torch.autograd.grad(pulled, us, pixel.expand(-1, *x.shape).reshape_as(many), retain_graph=True)
        for size, column in zip(sizes, columns, strict=True):
            slopes = column.view(copies, *size.shape)
            if q == 2:
                size += slopes.square().sum(0)
            elif q == 1:
                size += slopes.abs().sum(0)
            else:
                torch.maximum(size, slopes.abs().amax(0), out=size)
    return [size.sqrt() if q == 2 else size for size in sizes]


def other_pools(model: nn.Module, x: Tensor) -> bool:
    """Whether ``model`` takes maxima that ``bends`` does not see: adaptive, with indices, or with ``ceil_mode``."""
    with torch.enable_grad(), evaluating(model):
        found = bends(model, x.detach().requires_grad_())
    return sum(1 for _ in _operations(found.logits, POOLS)) > len(found.windows)


def _operations(logits: Tensor, names: tuple[str, ...]) -> Iterator[str]:
    """The names that begin like one of ``names``, of the operations that ``logits`` were computed by."""
    todo, seen = [logits.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
            if node.name().startswith(names):
                yield node.name()
