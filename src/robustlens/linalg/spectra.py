"""All singular values of linear layers and of convolutions as operators on images.

A convolution with circular padding commutes with shifts, so the Fourier transform splits its matrix into one small
block per frequency (Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019, Theorem 6).
With stride s the image is first split into its s² interleaved sub-images, which become channels; then

    symbol(f)[o, (i, b)] = Σ_{taps d with offset s·a + b} K[o, i, d] · exp(2πi ⟨f, a⟩ / m),        m = n / s,

and the singular values of the operator are those of the m_h·m_w symbols together. The kernel is real, so frequencies f
and −f share their values and half of them are computed. Exact, in float64, for any kernel size (also larger than
the image), dilation and groups. The reshaped kernel K.reshape(c_out, −1) is *not* this operator.

Decompositions run on the CPU wherever the weights live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlens.results.errors import InputError

Pair = tuple[int, int]

#: Complex numbers that the symbols of one chunk of frequencies may hold (64 MiB in complex128).
CHUNK = 4 * 2**20


def linear_spectrum(weight: Tensor) -> Tensor:
    """Singular values (min(out, in),) of ``weight`` (out, in), descending, float64 on the CPU."""
    values: Tensor = torch.linalg.svdvals(weight.detach().cpu().double())
    return values


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
    values = []
    for block in blocks(kernel, size, stride, dilation, groups):
        found = torch.linalg.svdvals(block.symbols)  # (F, G, r)
        values.append(found[~block.twice].flatten())
        values.append(found[block.twice].flatten().repeat(2))
    return torch.cat(values).sort(descending=True).values


def circular_conv_norm(
    kernel: Tensor, size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> float:
    """The largest value of ``circular_conv_spectrum``, from the smaller Gram side (several times faster)."""
    largest = 0.0
    for block in blocks(kernel, size, stride, dilation, groups):
        largest = max(largest, float(torch.linalg.eigvalsh(smaller_gram(block.symbols))[..., -1].max()))
    return math.sqrt(largest)


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


def smaller_gram(matrices: Tensor) -> Tensor:
    """A·A* or A*·A, whichever is smaller, for matrices A (…, r, c)."""
    return matrices @ matrices.mH if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH @ matrices


@dataclass(frozen=True, eq=False)
class Block:
    """Symbols (F, groups, c_out/groups, c_in·s²/groups), complex128; ``twice`` (F,): stands for −f as well.

    ``phase`` (F, k_h·k_w) holds exp(2πi ⟨f, a⟩ / m) of every tap.
    """

    symbols: Tensor
    twice: Tensor
    phase: Tensor


def sub_images(taps: int, dilation: int, stride: int) -> Tensor:
    """(stride, taps), 1 where a tap of a row (or column) falls into the sub-image, in float64."""
    return (torch.arange(taps) * dilation % stride == torch.arange(stride)[:, None]).to(torch.float64)


def blocks(kernel: Tensor, size: Pair, stride: Pair, dilation: Pair, groups: int) -> Iterator[Block]:
    """Symbols of half of the frequencies, in chunks of bounded memory.

    Columns v = 0 … m_w // 2 are enough: column m_w − v holds the conjugates of column v. Column 0, and m_w / 2
    where m_w is even, are their own mirror images and count once.
    """
    (nh, nw), (sh, sw) = size, stride
    if nh % sh or nw % sw:
        raise InputError(
            "size of the image", expected=f"a multiple of the stride {stride}", got=str(size), fix="Use round_up."
        )
    c_out, c_in, kh, kw = kernel.shape
    mh, mw = nh // sh, nw // sw
    real = torch.float64
    down, right = torch.arange(kh) * dilation[0], torch.arange(kw) * dilation[1]
    rows, cols = sub_images(kh, dilation[0], sh), sub_images(kw, dilation[1], sw)
    taps = kernel.detach().cpu().to(real).reshape(groups, c_out // groups, c_in, kh, kw)
    split = torch.einsum("gopyx,ay,bx->yxgopab", taps, rows, cols).reshape(kh * kw, -1).to(torch.complex128)
    width = c_in * sh * sw

    u, v = torch.meshgrid(torch.arange(mh), torch.arange(mw // 2 + 1), indexing="ij")
    u, v = u.reshape(-1, 1, 1), v.reshape(-1, 1, 1)
    twice = ((v != 0) & (2 * v != mw)).flatten()
    step = max(1, CHUNK // (c_out * width))
    for at in range(0, len(u), step):
        here = slice(at, at + step)
        # Integer remainders before the division keep the angle exact for kernels larger than the image.
        turn_y = (u[here] * (down // sh)[:, None] % mh).to(real) / mh
        turn_x = (v[here] * (right // sw) % mw).to(real) / mw
        phase = torch.exp(2j * torch.pi * (turn_y + turn_x)).reshape(-1, kh * kw)
        yield Block((phase @ split).reshape(-1, groups, c_out // groups, width), twice[here], phase)
