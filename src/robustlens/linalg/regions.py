"""The linear regions of a ReLU network: what its hidden units are at an image, and how they change with the image.

Between the points where a unit h_j is 0 the network is affine. The image x sits in one such region; unit j ends it at
the distance |h_j(x)| / ‖∇h_j(x)‖_q, with q the dual of the norm that distances are measured in. Max-pooling ends it as
well, where another entry of a window becomes the largest: there h_j is the entry less the largest.

Take the network in eval mode: images must not see each other.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustlens.core.modes import evaluating
from robustlens.linalg.frozen_convolutions import FrozenConvolutions
from robustlens.linalg.receptive import Sweep, cheapest_sweep, receptive_fields
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


class _Reached(Exception):
    """The forward pass is where it was wanted."""


def observed(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The flat input (B, units) of every call of a ReLU module in one forward pass, in order, and the logits."""
    seen: list[Tensor] = []
    with _hooked(model, seen.append):
        logits = model(x)
    return seen, logits


def observed_until(model: nn.Module, x: Tensor, call: int, *, held: bool = False) -> list[Tensor]:
    """``observed`` up to one call of a ReLU module, counted from 0; what comes later is not computed.

    With ``held``, for dual numbers in forward mode: which units are on is held fixed in the derivatives of tangents.
    It is piecewise constant, but going backward torch would add its zeros to everything before.
    """
    seen: list[Tensor] = []

    def keep(heights: Tensor) -> None:
        seen.append(heights)
        if len(seen) > call:
            raise _Reached

    with _hooked(model, keep, held=held), suppress(_Reached):
        model(x)
    return seen


@contextmanager
def _hooked(model: nn.Module, keep: Callable[[Tensor], None], *, held: bool = False) -> Iterator[None]:
    """Inside, ``keep`` is called with the flat input of every ReLU module."""

    def seen(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        keep(inputs[0].flatten(1))
        here = inputs[0].clone() if module.inplace else inputs[0]
        return (_held(here) if held else here,)

    hooks = [module.register_forward_pre_hook(seen) for module in model.modules() if isinstance(module, BENDS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _held(dual: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return forward_ad.make_dual(primal.detach(), tangent)  # type: ignore[no-untyped-call, no-any-return]


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
    """The ``heights`` h at images ``x`` and their derivatives ∇h·v along ``v``, both (B, C, H, W)."""
    point = x.detach().requires_grad_()
    with torch.enable_grad(), FrozenConvolutions():
        layers = heights(point)
    return [layer.detach() for layer in layers], list(_pusher(layers, point)(v))


def heights_along(heights: Heights, x: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As ``slopes_along`` in one pass, where both can be differentiated by the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, about what it loads for this
        values, slopes = torch.func.jvp(heights, (x,), (v,))[:2]
    return values, slopes


def gradient_norms(heights: Heights, x: Tensor, q: float, *, chunk: int, sweep: Sweep | None = None) -> list[Tensor]:
    """‖∇h_j‖_q of all heights at images ``x`` (B, C, H, W), q in {1, 2, ∞}, as ``heights`` has them.

    A pass gives columns of J for the units of the layers whose receptive fields are small, along all pixels of a colour
    (``linalg.receptive``), or a row of J for one unit of the others: of lenet-small's units 100 columns and 110 rows
    instead of a column a pixel, which are 784. ``chunk`` // B passes are made at a time. ``heights`` is called with
    copies of ``x`` one after the other, (copies · B, C, H, W). ``sweep`` is that of the network where it is known.
    """
    sweep = sweep or cheapest_sweep(receptive_fields(heights, x, chunk=chunk))
    copies = max(1, chunk // len(x))
    many = x.detach().repeat(copies, 1, 1, 1).requires_grad_()
    with torch.enable_grad(), FrozenConvolutions():
        layers = heights(many)
    sizes = [torch.zeros_like(layer[: len(x)]).detach() for layer in layers]
    near, far = layers[: sweep.layers], layers[sweep.layers :]
    columns = _pusher(near, many)
    for along in _colours(sweep, many, copies):
        for size, column in zip(sizes, columns(along), strict=False):
            slopes = column.view(copies, *size.shape)
            if q == 2:
                size += slopes.square().sum(0)
            elif q == 1:
                size += slopes.abs().sum(0)
            else:
                torch.maximum(size, slopes.abs().amax(0), out=size)
    for size, layer in zip(sizes[sweep.layers :], far, strict=True):
        for first in range(0, size.shape[1], copies):
            unit = torch.arange(first, first + copies, device=x.device)
            chosen = (unit[:, None] == torch.arange(size.shape[1], device=x.device)).to(x.dtype)
            (rows,) = torch.autograd.grad(layer, many, chosen.repeat_interleave(len(x), 0), retain_graph=True)
            found = rows.flatten(1).norm(q, dim=1).view(copies, -1).T
            size[:, first : first + copies] = found[:, : size.shape[1] - first]
    return [size.sqrt() if q == 2 and k < sweep.layers else size for k, size in enumerate(sizes)]


def norms_by_column(
    model: nn.Module, call: int, x: Tensor, q: float, shares: list[Tensor], *, sweep: Sweep, chunk: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Parts of Σ_j p_j ‖∇h_j‖_q^q / q, q in {1, 2}: tensors, and the slopes of the sum by them.

    h_j are the inputs of the ReLU calls 0 … ``call``, ``shares`` (B, units) a layer their p_j. The tensors, which can
    be differentiated by the weights, are columns of J along some colours, as in ``gradient_norms``: a pass serves all
    units.
    """
    copies, x = max(1, chunk // len(x)), x.detach()

    def column(along: Tensor) -> list[Tensor]:
        return heights_along(lambda z: observed_until(model, z, call, held=True), x, along)[1]

    for along in _colours(sweep, x.repeat(copies, 1, 1, 1), copies):
        # The heights themselves are computed once for all colours.
        columns = torch.func.vmap(column)(along.view(copies, *x.shape))
        with torch.no_grad():
            slopes = [p * (c if q == 2 else c.sign()) for p, c in zip(shares, columns, strict=True)]
        yield list(zip(columns, slopes, strict=True))


def _pusher(layers: list[Tensor], many: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """From a direction v like ``many`` to the derivatives Jv of ``layers`` along it.

    u ↦ Jᵀu is linear, so that its own derivative along v is Jv; see ``linalg.jacobian``.
    """
    if not layers:
        return lambda along: ()
    us = [torch.zeros_like(layer, requires_grad=True) for layer in layers]
    with torch.enable_grad(), FrozenConvolutions():
        (pulled,) = torch.autograd.grad(layers, many, us, create_graph=True)
    return lambda along: torch.autograd.grad(pulled, us, along, retain_graph=True)


def _colours(sweep: Sweep, many: Tensor, copies: int) -> Iterator[Tensor]:
    """Directions like ``many``: in each of its ``copies`` the pixels of the next colour, until all had their turn."""
    colour = sweep.colour.to(many.device)
    for first in range(0, sweep.colours if sweep.layers else 0, copies):
        part = torch.arange(first, first + copies, device=many.device)
        along = (part[:, None] == colour).to(many.dtype).repeat_interleave(len(many) // copies, 0)
        yield along.view_as(many)


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
