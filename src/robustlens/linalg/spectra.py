"""All singular values of linear layers and of convolutions as operators on images.

A convolution with circular padding commutes with shifts, so the Fourier transform splits its matrix into one small
block per frequency (Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019, Theorem 6).
With stride s the image is first split into its s² interleaved sub-images, which become channels; then

    symbol(f)[o, (i, b)] = Σ_{taps d with offset s·a + b} K[o, i, d] · exp(2πi ⟨f, a⟩ / m),        m = n / s,

and the singular values of the operator are those of the m_h·m_w symbols together. The kernel is real, so frequencies f
and −f share their values and one of them is computed; where f = −f the symbol is real. Exact, in float64, for any
kernel size (also larger than the image), dilation and groups. The reshaped kernel K.reshape(c_out, −1) is *not* this
operator.

Everything runs in float64 and complex128, on the GPU where the weights are on one and on the CPU otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from robustlens.linalg.singular import by_workers, singular_values, smaller_gram
from robustlens.results.errors import InputError

Pair = tuple[int, int]

#: Complex numbers that the symbols of one chunk of frequencies may hold (64 MiB in complex128), and those that a worker
#: on the CPU computes at a time, which its cache can hold.
CHUNK, CACHED = 4 * 2**20, 2**16


def linear_spectrum(weight: Tensor) -> Tensor:
    """Singular values (min(out, in),) of ``weight`` (out, in), descending, float64 on the CPU."""
    return singular_values(_precise(weight)).flip(-1).cpu()


def circular_conv_spectrum(
    kernel: Tensor, size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> Tensor:
    """All singular values of the convolution with circular padding on images of ``size``.

    Args:
        kernel: (c_out, c_in / groups, k_h, k_w).
        size: height and width (n_h, n_w) of the layer's input; a multiple of ``stride``.

    Returns:
        (m_h·m_w·min(c_out, c_in·s_h·s_w),) descending, float64 on the CPU, with m = n / s. They do not depend on
        where the padding starts, because a shift of the image is orthogonal.

    Raises:
        InputError: ``size`` is not a multiple of ``stride``.
    """
    narrow, copies = _apart(kernel, size, stride, dilation)
    values: list[Tensor] = []
    for block in blocks(kernel, narrow, stride, dilation, groups):
        at_once = max(1, (CHUNK if block.taps.is_cuda else CACHED) // block.taps[0].numel())
        phases = block.phase[block.twice], block.phase[~block.twice].real
        twice, once = by_workers(partial(_values, block.taps), *phases, size=at_once)
        values += [*once, *(part.repeat(2) for part in twice)]
    found = np.sort(torch.cat(values).repeat(copies).cpu().numpy())  # torch's takes ten times as long
    return torch.from_numpy(found[::-1].copy())


def _values(taps: Tensor, phase: Tensor) -> Tensor:
    return singular_values(_symbols(phase, taps)).flatten()


def circular_conv_norm(
    kernel: Tensor, size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> float:
    """The largest value of ``circular_conv_spectrum``, without the others.

    Only matrices A for which a Cholesky factorisation of σ²I − AA* fails can have a value above σ, the largest one
    found so far. A first look in single precision, at 0.99·σ², leaves few for double precision.
    """
    largest = 0.0
    narrow, _ = _apart(kernel, size, stride, dilation)
    for block in blocks(kernel, narrow, stride, dilation, groups):
        (squares,) = by_workers(_largest_square, block.symbols.flatten(0, 1))
        largest = max(largest, *squares)
    return math.sqrt(largest)


def _largest_square(symbols: Tensor) -> float:
    """The largest σ² over ``symbols`` (F, r, c)."""
    scale = float(symbols.abs().max()) or 1.0
    symbols = symbols / scale  # squares of very small or large numbers do not fit single precision
    coarse = smaller_gram(symbols.to(torch.complex64))
    best = _promising(coarse)
    largest = _top_eigenvalue(smaller_gram(symbols[best]))
    left = _above(coarse, 0.99 * largest)
    left[best] = False
    gram = smaller_gram(symbols[left])
    gram = gram[_above(gram, largest)]
    while len(gram):
        best = _promising(gram)
        largest = max(largest, _top_eigenvalue(gram[best]))
        left = _above(gram, largest)
        left[best] = False
        gram = gram[left]
    return largest * scale**2


def _promising(gram: Tensor) -> Tensor:
    """The index of the matrix of ``gram`` (F, r, r) with the largest Rayleigh quotient after a few power steps."""
    x = gram.sum(-1, keepdim=True)
    for _ in range(16):
        x = gram @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    best: Tensor = torch.linalg.vector_norm(x, dim=(1, 2)).argmax()
    return best


def _above(gram: Tensor, level: float) -> Tensor:
    """(F,): which matrices of ``gram`` (F, r, r) have, up to rounding, an eigenvalue of ``level`` or more."""
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(level)
    found: Tensor = torch.linalg.cholesky_ex(shifted).info != 0
    return found


def _top_eigenvalue(gram: Tensor) -> float:
    return float(torch.linalg.eigvalsh(gram)[-1])


def _apart(kernel: Tensor, size: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, int]:
    """A smaller circle with the same singular values, and how often each then counts.

    Along an axis where windows do not overlap, all frequencies have the same ones.
    """
    _check_stride(size, stride)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    height, width = (s if r <= s else n for n, s, r in zip(size, stride, reach, strict=True))
    return (height, width), size[0] // height * (size[1] // width)


def zero_padded_norm_bound(
    kernel: Tensor, size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> float:
    """An upper bound of the norm of the convolution with zero padding, of any width, on images of ``size``.

    On a circle of at least n + dilation·(k − 1) pixels no window reaches around to the image again, so the
    zero-padded convolution is the circular one on that circle, restricted to images that vanish outside the n pixels
    and with some outputs left out; neither can raise the norm. The circular norm at n itself is *not* a bound.
    """
    circle = padded_circle(kernel, size, stride=stride, dilation=dilation)
    return circular_conv_norm(kernel, circle, stride=stride, dilation=dilation, groups=groups)


def padded_circle(kernel: Tensor, size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1)) -> Pair:
    """The smallest circle, in multiples of ``stride``, on which no window of ``kernel`` reaches around to the image."""
    reach = [n + d * (k - 1) for n, d, k in zip(size, dilation, kernel.shape[2:], strict=True)]
    return round_up((reach[0], reach[1]), stride)


def round_up(size: Pair, stride: Pair) -> Pair:
    """The smallest multiple of ``stride`` that is at least ``size``."""
    return -(-size[0] // stride[0]) * stride[0], -(-size[1] // stride[1]) * stride[1]


@dataclass(frozen=True, eq=False)
class Block:
    """``phase`` (F, k_h·k_w) holds exp(2πi ⟨f, a⟩ / m) of every tap; ``twice`` (F,): stands for −f as well.

    ``taps`` (k_h·k_w, groups, c_out/groups, c_in·s²/groups): the kernel on the sub-images, float64.
    """

    phase: Tensor
    twice: Tensor
    taps: Tensor

    @property
    def symbols(self) -> Tensor:
        """(F, groups, c_out/groups, c_in·s²/groups), complex128."""
        return _symbols(self.phase, self.taps)


def _symbols(phase: Tensor, taps: Tensor) -> Tensor:
    """Σ_t ``phase[:, t]``·``taps[t]``, real where ``phase`` is."""
    flat = taps.flatten(1)
    found = torch.complex(phase.real @ flat, phase.imag @ flat) if phase.is_complex() else phase @ flat
    return found.reshape(-1, *taps.shape[1:])


def each_tap(split: Tensor, dilation: Pair, stride: Pair) -> Iterator[tuple[int, int, Tensor]]:
    """y, x and where ``split`` (k_h, k_w, c_out, c_in, s_h, s_w) has tap (y, x): in the sub-image it falls into."""
    for y, x in itertools.product(*(range(taps) for taps in split.shape[:2])):
        yield y, x, split[y, x, :, :, y * dilation[0] % stride[0], x * dilation[1] % stride[1]]


def blocks(kernel: Tensor, size: Pair, stride: Pair, dilation: Pair, groups: int) -> Iterator[Block]:
    """Symbols of one of every pair of frequencies f and −f, in chunks of bounded memory, on the GPU or the CPU.

    Columns v = 1 … (m_w − 1) // 2 stand for columns m_w − v, which hold their conjugates. Column 0, and m_w / 2 where
    m_w is even, mirror into themselves: rows u = 0 … m_h // 2 of them are enough. The up to four frequencies with
    f = −f count once.
    """
    _check_stride(size, stride)
    (nh, nw), (sh, sw) = size, stride
    c_out, c_in, kh, kw = kernel.shape
    mh, mw = nh // sh, nw // sw
    kernel, device, real = kernel.detach().to(_device(kernel)), _device(kernel), torch.float64
    down, right = (torch.arange(k, device=device) * d for k, d in ((kh, dilation[0]), (kw, dilation[1])))
    split = torch.zeros(kh, kw, c_out, c_in, sh, sw, dtype=real, device=device)
    for y, x, tap in each_tap(split, dilation, stride):
        tap.copy_(kernel[:, :, y, x])
    taps = split.reshape(kh * kw, groups, c_out // groups, c_in * sh * sw)

    u, v = torch.meshgrid(torch.arange(mh, device=device), torch.arange(mw // 2 + 1, device=device), indexing="ij")
    own_column = (v == 0) | (2 * v == mw)
    own_row = (u == 0) | (2 * u == mh)
    needed = ~own_column | (2 * u <= mh)
    u, v, twice = u[needed][:, None, None], v[needed][:, None, None], ~(own_column & own_row)[needed]
    step = max(1, CHUNK // taps[0].numel())
    for at in range(0, len(u), step):
        here = slice(at, at + step)
        # Integer remainders before the division keep the angle exact for kernels larger than the image.
        turn_y = (u[here] * (down // sh)[:, None] % mh).to(real) / mh
        turn_x = (v[here] * (right // sw) % mw).to(real) / mw
        phase = torch.exp(2j * torch.pi * (turn_y + turn_x)).reshape(-1, kh * kw)
        yield Block(phase, twice[here], taps)


def _check_stride(size: Pair, stride: Pair) -> None:
    if size[0] % stride[0] or size[1] % stride[1]:
        raise InputError(
            "size of the image", expected=f"a multiple of the stride {stride}", got=str(size), fix="Use round_up."
        )


def _precise(weight: Tensor) -> Tensor:
    return weight.detach().to(device=_device(weight), dtype=torch.float64)


def _device(weight: Tensor) -> torch.device:
    """The CUDA device of ``weight``, or else the CPU: not every accelerator has float64."""
    return weight.device if weight.is_cuda else torch.device("cpu")
