"""The linear operators inside a model: which there are, on which image size each works, and their spectra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.modes import untouched
from robustlens.linalg.golub_kahan import Top, top_singular_value
from robustlens.linalg.spectra import (
    Pair,
    circular_conv_norm,
    circular_conv_spectrum,
    linear_spectrum,
    round_up,
    zero_padded_norm_bound,
)

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A fully connected layer's ``weight`` (out, in).

    ``scale`` (out,) float64 is γ / √(v + ε) of the BatchNorm that takes the layer's output in eval mode, if one does.
    """

    name: str
    weight: Tensor
    scale: Tensor | None = None

    @property
    def exact(self) -> bool:
        return True

    @property
    def label(self) -> str:
        """Which matrix the spectrum belongs to."""
        return "exact"

    def folded(self) -> LinearOperator:
        """The layer and its BatchNorm as one linear map, in float64; without one the layer itself."""
        return self if self.scale is None else LinearOperator(self.name, self.weight.double() * self.scale[:, None])

    def spectrum(self) -> Tensor:
        """All singular values, descending, float64."""
        return linear_spectrum(self.weight)

    def norm(self) -> float:
        return float(self.spectrum()[0])

    def norm_bound(self) -> float | None:
        """A certified upper bound of the layer's norm as it is used (here the norm itself)."""
        return self.norm()

    def row_norms(self) -> Tensor:
        """‖row‖₂ (out,) of the matrix, float64."""
        norms: Tensor = self.weight.double().norm(dim=1)
        return norms


@dataclass(frozen=True, eq=False)
class ConvOperator:
    """A convolution's ``weight`` (c_out, c_in / groups, k_h, k_w) on input images of ``size``.

    ``pads`` are the pixels added left, right, above and below, with ``mode`` as in ``torch.nn.functional.pad``;
    ``scale`` (c_out,) is that of LinearOperator.
    """

    name: str
    weight: Tensor
    size: Pair
    stride: Pair
    dilation: Pair
    groups: int
    pads: tuple[int, ...]
    mode: str
    scale: Tensor | None = None

    @property
    def circle(self) -> Pair:
        """The image size of the circular operator: ``size``, rounded up to a multiple of the stride."""
        return round_up(self.size, self.stride)

    @property
    def reach(self) -> Pair:
        """Height and width of the window."""
        (dh, dw), (kh, kw) = self.dilation, self.weight.shape[2:]
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def wraps(self) -> bool:
        """Whether the layer pads circularly, to as many outputs as the circular operator has."""
        sums = self.pads[2] + self.pads[3], self.pads[0] + self.pads[1]
        triples = zip(self.size, sums, self.reach, self.stride, strict=True)
        outputs = [(n + added - r) // s + 1 == n // s for n, added, r, s in triples]
        return self.mode == "circular" and any(self.pads) and all(outputs)

    @property
    def exact(self) -> bool:
        """Whether the circular operator is the layer itself: it wraps, or its windows tile the image."""
        if self.circle != self.size:
            return False
        tiles = not any(self.pads) and self.reach[0] <= self.stride[0] and self.reach[1] <= self.stride[1]
        return self.wraps or tiles

    @property
    def label(self) -> str:
        """Which matrix the spectrum belongs to."""
        return "exact" if self.exact else f"circular operator at {self.circle[0]}×{self.circle[1]}"

    def folded(self) -> ConvOperator:
        """The layer and its BatchNorm as one linear map, in float64; without one the layer itself."""
        if self.scale is None:
            return self
        return replace(self, weight=self.weight.double() * self.scale[:, None, None, None], scale=None)

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
        if self.mode != "constant" and any(self.pads):
            return None
        return zero_padded_norm_bound(self.weight, self.size, **self._how())

    def apply(self, x: Tensor) -> Tensor:
        """The layer without its bias on images ``x`` (B, C, H, W) of ``size``, with its own padding, in x's dtype."""
        return F.conv2d(F.pad(x, self.pads, mode=self.mode), self.weight.to(x.dtype), **self._how())

    def adjoint(self, y: Tensor) -> Tensor:
        """The transpose of ``apply`` on ``y`` (B, c_out, m_h, m_w)."""
        image = y.new_zeros(len(y), self.weight.shape[1] * self.groups, *self.size, requires_grad=True)
        with torch.enable_grad():
            padded = F.pad(image, self.pads, mode=self.mode)
        left = [
            (full - r) % s for full, r, s in zip(padded.shape[2:], self.reach, self.stride, strict=True)
        ]  # pixels at the end that no window reaches
        pulled = F.conv_transpose2d(y, self.weight.to(y.dtype), output_padding=left, **self._how())
        return torch.autograd.grad(padded, image, pulled)[0] if any(self.pads) else pulled

    def top(self, *, gen: Generator, steps: int) -> Top:
        """The largest singular value of the layer as it is used, a lower bound with its residual.

        Golub and Kahan's method in single precision, from a Gaussian image; value and residual are float64.
        """
        size = self.weight.abs().max()
        if size == 0:
            return Top(0.0, 0.0, 0)
        single = replace(self, weight=(self.weight / size).float())  # so that no square underflows
        shape = 1, self.weight.shape[1] * self.groups, *self.size
        start = torch.randn(shape, generator=gen, device=gen.device).to(self.weight.device)

        def at(x: Tensor) -> ConvOperator:
            return single if x.dtype == torch.float32 else self

        return top_singular_value(lambda x: at(x).apply(x), lambda y: at(y).adjoint(y), start, steps=steps)

    def row_norms(self) -> Tensor:
        """‖row‖₂ of the layer's matrix, float64; with padding that is not zeros, of the circular operator's."""
        kernel = self.weight.double()
        if self.mode == "constant" or not any(self.pads):
            squares = replace(self, weight=kernel.square())
            ones = kernel.new_ones(1, self.weight.shape[1] * self.groups, *self.size)
            return squares.apply(ones).sqrt().flatten()
        # Taps that fall on the same pixel of the circle add up before they are squared.
        rows, cols = (
            torch.arange(k, device=kernel.device) * d % n
            for k, d, n in zip(kernel.shape[2:], self.dilation, self.circle, strict=True)
        )
        _, pixel = torch.unique(rows[:, None] * self.circle[1] + cols, return_inverse=True)
        sums = kernel.new_zeros(*kernel.shape[:2], int(pixel.max()) + 1)
        norms: Tensor = sums.index_add(2, pixel.flatten(), kernel.flatten(2)).flatten(1).norm(dim=1)
        return norms.repeat_interleave(self.circle[0] * self.circle[1] // (self.stride[0] * self.stride[1]))


Operator = LinearOperator | ConvOperator


@dataclass(frozen=True)
class Skipped:
    """A layer that was not measured, and why."""

    name: str
    why: str


def operators(model: nn.Module, x: Tensor, *, as_called: bool = False) -> list[Operator | Skipped]:
    """The Linear and Conv2d layers of ``model`` in the order of their definition, and every layer left out.

    With ``as_called`` those that run come first, in the order in which they do. ``x`` (1, C, H, W) is sent through
    once, in eval mode, to learn the image size of every convolution and which BatchNorm takes the output of which
    layer; a layer that runs several times counts once, as in its first call.
    """
    notes = _Notes({}, {}, set())
    with untouched(model), _recorded(model, notes), torch.no_grad():
        model(x)
    found: list[Operator | Skipped] = []
    modules = list(model.named_modules())
    if as_called:
        place = {module: number for number, module in enumerate(notes.sizes)}
        modules.sort(key=lambda named: place.get(named[1], len(place)))
    for name, module in modules:
        if ".parametrizations" in f".{name}":
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = _scale(notes.norms[module]) if module in notes.norms else None
            if module not in notes.sizes:
                found.append(Skipped(name, "not used in the forward pass"))
            elif isinstance(module, nn.Linear):
                found.append(LinearOperator(name, module.weight.detach(), scale))
            else:
                size = notes.sizes[module]
                found.append(Skipped(name, "no image") if size is None else _conv(name, module, size, scale))
        elif module in notes.loose:
            found.append(Skipped(name, "BatchNorm that no layer comes right before, or without running statistics"))
        elif any(p.ndim >= 2 for p in module.parameters(recurse=False)):
            found.append(Skipped(name, type(module).__name__))
    return found


def linear_head(model: nn.Module, x: Tensor) -> nn.Linear | None:
    """``model.head`` where the logits are head(features(x)), by the answers to the images ``x``; else None.

    Two attributes of these names are no promise: an activation or a mean may lie between them.
    """
    head, features = getattr(model, "head", None), getattr(model, "features", None)
    if not isinstance(head, nn.Linear) or not callable(features):
        return None
    with untouched(model), torch.no_grad():
        logits, inside = model(x), features(x)
        if inside.shape != (len(x), head.in_features):
            return None
        error = (head(inside) - logits).norm() if logits.shape == (len(x), head.out_features) else torch.inf
        return head if error <= 1e-4 * logits.norm() else None


def _conv(name: str, module: nn.Conv2d, size: Pair, scale: Tensor | None) -> ConvOperator:
    return ConvOperator(
        name=name,
        weight=module.weight.detach(),
        size=size,
        stride=(module.stride[0], module.stride[1]),
        dilation=(module.dilation[0], module.dilation[1]),
        groups=module.groups,
        pads=tuple(module._reversed_padding_repeated_twice),
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
        scale=scale,
    )


def _scale(norm: Norm) -> Tensor:
    """γ / √(v + ε) (channels,), float64."""
    assert norm.running_var is not None
    inverse = (norm.running_var.detach().double() + norm.eps).rsqrt()
    return inverse if norm.weight is None else inverse * norm.weight.detach().double()


@dataclass(frozen=True)
class _Notes:
    """Layer → height and width of its input (None: no image), layer → its BatchNorm, and the other BatchNorms."""

    sizes: dict[nn.Module, Pair | None]
    norms: dict[nn.Module, Norm]
    loose: set[nn.Module]


@contextmanager
def _recorded(model: nn.Module, notes: _Notes) -> Iterator[None]:
    """Fill ``notes`` at the first call of every Linear, Conv2d and BatchNorm."""
    # Layer, output and its version by the output's id, which is not given out again while the output is held on to.
    makers: dict[int, tuple[nn.Module, Tensor, int]] = {}

    def layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module not in notes.sizes:
            image = isinstance(module, nn.Conv2d) and bool(args)
            notes.sizes[module] = (int(args[0].shape[-2]), int(args[0].shape[-1])) if image else None
            makers[id(output)] = module, output, output._version

    def norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, Norm)
        maker = makers.get(id(args[0])) if args else None
        if maker is None or maker[1]._version != maker[2] or module.running_var is None:  # or changed in place since
            notes.loose.add(module)
        else:
            notes.norms.setdefault(maker[0], module)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(layer) for m in layers]
    handles += [m.register_forward_pre_hook(norm) for m in model.modules() if isinstance(m, Norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
