"""The linear operators inside a model: which there are, on which image size each works, and their spectra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.linalg.spectra import (
    Pair,
    circular_conv_norm,
    circular_conv_spectrum,
    linear_spectrum,
    round_up,
    zero_padded_norm_bound,
)


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A fully connected layer's ``weight`` (out, in)."""

    name: str
    weight: Tensor

    @property
    def label(self) -> str:
        """Which matrix the spectrum belongs to."""
        return "exact"

    def spectrum(self) -> Tensor:
        """All singular values, descending, float64."""
        return linear_spectrum(self.weight)

    def norm(self) -> float:
        return float(self.spectrum()[0])

    def norm_bound(self) -> float | None:
        """A certified upper bound of the layer's norm as it is used (here the norm itself)."""
        return self.norm()


@dataclass(frozen=True, eq=False)
class ConvOperator:
    """A convolution's ``weight`` (c_out, c_in / groups, k_h, k_w) on input images of ``size``.

    ``wraps`` says that the layer pads circularly to full size, ``padded`` that it pads with zeros at all, and
    ``mirrored`` that it pads by reflection or replication, for which no bound is known here.
    """

    name: str
    weight: Tensor
    size: Pair
    stride: Pair
    dilation: Pair
    groups: int
    wraps: bool
    padded: bool
    mirrored: bool

    @property
    def circle(self) -> Pair:
        """The image size of the circular operator: ``size``, rounded up to a multiple of the stride."""
        return round_up(self.size, self.stride)

    @property
    def exact(self) -> bool:
        """Whether the circular operator is the layer itself: it wraps, or its windows tile the image."""
        if self.circle != self.size:
            return False
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        tiles = not self.padded and not self.mirrored and reach[0] <= self.stride[0] and reach[1] <= self.stride[1]
        return self.wraps or tiles

    @property
    def label(self) -> str:
        """Which matrix the spectrum belongs to."""
        return "exact" if self.exact else f"circular operator at {self.circle[0]}×{self.circle[1]}"

    def _how(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}

    def spectrum(self) -> Tensor:
        """All singular values of the circular operator, descending, float64."""
        return circular_conv_spectrum(self.weight, self.circle, **self._how())

    def norm(self) -> float:
        """The largest of ``spectrum``, without the others."""
        return circular_conv_norm(self.weight, self.circle, **self._how())

    def norm_bound(self) -> float | None:
        """A certified upper bound of the layer's norm as it is used; None where no bound is known."""
        if self.exact:
            return self.norm()
        if self.mirrored or self.wraps:
            return None
        return zero_padded_norm_bound(self.weight, self.size, **self._how())


Operator = LinearOperator | ConvOperator


@dataclass(frozen=True)
class Skipped:
    """A layer with a weight matrix that was not measured, and why."""

    name: str
    why: str


def operators(model: nn.Module, x: Tensor) -> list[Operator | Skipped]:
    """The Linear and Conv2d layers of ``model`` in the order of their definition, and every layer left out.

    ``x`` (1, C, H, W) is sent through once, in eval mode, to learn the image size of every convolution; a layer that
    runs several times counts once, at the size of its first call.
    """
    sizes: dict[nn.Module, tuple[Pair, Pair] | None] = {}
    with untouched(model), _recorded(model, sizes), torch.no_grad():
        model(x)
    found: list[Operator | Skipped] = []
    for name, module in model.named_modules():
        if ".parametrizations" in f".{name}":
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module not in sizes:
                found.append(Skipped(name, "not used in the forward pass"))
            elif isinstance(module, nn.Linear):
                found.append(LinearOperator(name, module.weight.detach()))
            else:
                called = sizes[module]
                found.append(Skipped(name, "no image") if called is None else _conv(name, module, *called))
        elif any(p.ndim >= 2 for p in module.parameters(recurse=False)):
            found.append(Skipped(name, type(module).__name__))
    return found


def _conv(name: str, module: nn.Conv2d, size: Pair, out: Pair) -> ConvOperator:
    (nh, nw), (sh, sw) = size, (module.stride[0], module.stride[1])
    pads = module.padding != "valid" and module.padding != (0, 0)
    full = out == (nh // sh, nw // sw)
    mirrored = pads and module.padding_mode in ("reflect", "replicate")
    return ConvOperator(
        name=name,
        weight=module.weight.detach(),
        size=size,
        stride=(sh, sw),
        dilation=(module.dilation[0], module.dilation[1]),
        groups=module.groups,
        wraps=pads and module.padding_mode == "circular" and full,
        padded=pads,
        mirrored=mirrored or (pads and module.padding_mode == "circular" and not full),
    )


@contextmanager
def _recorded(model: nn.Module, sizes: dict[nn.Module, tuple[Pair, Pair] | None]) -> Iterator[None]:
    """Note, at the first call of every Linear and Conv2d, height and width of its input and output (None: no image)."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        image = isinstance(module, nn.Conv2d) and bool(args)
        sizes.setdefault(module, (_extent(args[0]), _extent(output)) if image else None)

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extent(x: Tensor) -> Pair:
    return int(x.shape[-2]), int(x.shape[-1])
