"""Projections of layers on balls of the operator norm: the largest singular value is brought down to a bound c.

Weights live in a small space (a kernel has k·k taps), the symbols of ``linalg/spectra.py`` in a large one. The map
T: kernel → symbols is linear, and clipping the singular values of every symbol at c is the exact projection on the
ball *of symbols*. Back on the kernel's support (T⁺, the least-squares inverse: inverse transform, real part, crop)

    K ← K − T⁺(excess of T K),      excess of U D V* = U max(D − c, 0) V*,

is "clip and crop" (Sedghi, Gupta and Long, arXiv 1805.10408, §3). After it the norm is above c in general, because
cropping undoes a part of the clipping. It is the exact projection where nothing is cropped: for linear layers, and for
kernels that cover the whole circle. Stride, dilation, groups and kernels larger than the image are all in T; taps that
fall on the same pixel of the circle share a change equally.

Repeated, it is the method of alternating projections, which takes ever smaller steps. Each step is therefore lengthened
by λ = ‖excess‖² / ‖T T⁺ excess‖² ≥ 1, which still takes it nearer to every kernel inside the ball (Bauschke, Combettes
and Kruk 2006, "Extrapolation algorithm for affine-convex feasibility problems"): 7 passes do the work of 231 on a
He-initialised 16 → 16 layer. It ends near the kernel that it began at, not at the nearest kernel inside the ball.

Only singular values above c matter, and they come from the smaller Gram side: the relative error of an excess is
about 1e-16·(σ_max / c)² instead of an SVD's 1e-16. Everything is float64, on the CPU, and weights whose norm is c or
less are returned as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robustlens.linalg.singular import smaller_gram
from robustlens.linalg.spectra import Pair, blocks, circular_conv_norm, each_tap, linear_spectrum

How = Literal["clip", "alternating", "rescale"]

#: The alternating projection ends when σ_max ≤ c·(1 + SLACK), or after PASSES; what is left is rescaled away.
SLACK = 1e-3
PASSES = 50


@dataclass(frozen=True, eq=False)
class Projected:
    """The new ``weight`` (same shape, dtype and device) and the operator's norm before and after."""

    weight: Tensor
    before: float
    after: float


def project_linear(weight: Tensor, bound: float, *, how: How = "clip") -> Projected:
    """The nearest matrix (out, in) of norm at most ``bound``, or ``weight`` rescaled; "alternating" is "clip"."""
    old = weight.detach()
    before = float(linear_spectrum(old)[0])
    if before <= bound:
        return Projected(old, before, before)
    wide = old.cpu().double()
    if how == "rescale":
        wide = _rescaled(wide, before, bound, old.dtype)
    else:
        wide = _rescaled(wide - excess(wide, bound)[0], bound, bound, old.dtype)
    new = wide.to(old)
    return Projected(new, before, float(linear_spectrum(new)[0]))


def project_conv(
    kernel: Tensor,
    size: Pair,
    bound: float,
    *,
    how: How = "alternating",
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Projected:
    """A kernel whose convolution on a circle of ``size`` has a norm near, or at most, ``bound``.

    Args:
        kernel: (c_out, c_in / groups, k_h, k_w).
        size: height and width of the circle, a multiple of ``stride``.
        bound: c.
        how: "clip" clips and crops once, which brings the norm closer to c but not down to it. "alternating"
            repeats that, extrapolated, until the norm is at most c·(1 + SLACK), and rescales by the rest. "rescale"
            multiplies the kernel by c / σ_max.

    Raises:
        InputError: ``size`` is not a multiple of ``stride``.
    """
    layer = _Layer(size, stride, dilation, groups)
    old = kernel.detach()
    before = norm = layer.norm(old)
    if before <= bound:
        return Projected(old, before, before)
    new = old.cpu().double()
    if how == "clip":
        new = new - layer.step(new, bound).change
    elif how == "alternating":
        for _ in range(PASSES):
            step = layer.step(new, bound)
            norm = step.norm
            if norm <= bound * (1 + SLACK):
                break
            new = new - step.extrapolation * step.change
        else:
            norm = layer.norm(new)
    new = (new if how == "clip" else _rescaled(new, norm, bound, old.dtype)).to(old)
    return Projected(new, before, layer.norm(new))


def excess(matrices: Tensor, bound: float) -> tuple[Tensor, float]:
    """U max(D − bound, 0) V* of matrices U D V* (…, r, c), and the largest singular value, or ``bound`` if below.

    A Cholesky factorisation of bound²·I − A·A* exists where the norm is below the bound; only the others are
    decomposed.
    """
    gram = smaller_gram(matrices)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    over = torch.linalg.cholesky_ex(bound**2 * eye - gram).info != 0
    result = torch.zeros_like(matrices)
    if not bool(over.any()):
        return result, bound
    values, vectors = torch.linalg.eigh(gram[over])
    values = values.clamp(min=0).sqrt()
    share = (1 - bound / values.clamp(min=bound)).to(vectors.dtype)
    part = (vectors * share[..., None, :]) @ vectors.mH
    chosen = matrices[over]
    result[over] = part @ chosen if matrices.shape[-2] <= matrices.shape[-1] else chosen @ part
    return result, max(bound, float(values[..., -1].max()))


def _rescaled(weight: Tensor, norm: float, bound: float, dtype: torch.dtype) -> Tensor:
    """``weight``·bound / norm, less a few units of the last place, so that rounding does not lift it over again."""
    down = 1 - max(4 * torch.finfo(dtype).eps, 1e-12)
    return weight * min(1.0, bound / norm) * down


class _Step(NamedTuple):
    """``change`` is T⁺(excess), float64 on the CPU; ``norm`` that of the kernel, or the bound where it is below."""

    change: Tensor
    norm: float
    extrapolation: float


@dataclass(frozen=True)
class _Layer:
    """The circular convolution that a kernel is seen as."""

    size: Pair
    stride: Pair
    dilation: Pair
    groups: int

    def norm(self, kernel: Tensor) -> float:
        return circular_conv_norm(kernel, self.size, stride=self.stride, dilation=self.dilation, groups=self.groups)

    def step(self, kernel: Tensor, bound: float) -> _Step:
        c_out, c_in, kh, kw = kernel.shape
        (sh, sw), norm, energy = self.stride, bound, 0.0
        # Row t of ``taps``: what T* gives tap t, summed over both halves of the frequencies.
        taps = torch.zeros(kh * kw, c_out * c_in * sh * sw, dtype=torch.float64)
        for block in blocks(kernel, self.size, self.stride, self.dilation, self.groups):
            over, largest = excess(block.symbols, bound)
            times = torch.where(block.twice, 2.0, 1.0).to(over)
            norm = max(norm, largest)
            energy += float(times.real @ torch.view_as_real(over).square().sum((1, 2, 3, 4)))
            taps += ((times[:, None] * block.phase).mH @ over.flatten(1)).real
        adjoint = torch.zeros(c_out, c_in, kh, kw, dtype=torch.float64)
        for y, x, tap in each_tap(taps.reshape(kh, kw, c_out, c_in, sh, sw), self.dilation, self.stride):
            adjoint[:, :, y, x] = tap
        frequencies = self.size[0] * self.size[1] // (sh * sw)
        change = adjoint / (frequencies * self._sharing(kh, kw))
        # ⟨T* E, T⁺ E⟩ = ‖T T⁺ E‖², which is 0 only where there is no excess E.
        return _Step(change, norm, energy / float((adjoint * change).sum()) if energy else 1.0)

    def _sharing(self, kh: int, kw: int) -> Tensor:
        """(k_h, k_w): how many taps fall on the same pixel of the circle; 1 unless the kernel wraps around."""
        rows, cols = (torch.arange(k) * d % n for k, d, n in zip((kh, kw), self.dilation, self.size, strict=True))
        share_y = (rows[:, None] == rows).sum(1)
        share_x = (cols[:, None] == cols).sum(1)
        return share_y[:, None] * share_x
