"""Projections on operator-norm balls against dense matrices and their singular value decompositions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import gen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from robustlens.linalg.projection import SLACK, _Layer, excess, project_conv, project_linear
from robustlens.linalg.spectra import circular_conv_norm, padded_circle, zero_padded_norm_bound


def matrix_of(kernel: Tensor, size: tuple[int, int], stride: Any, dilation: Any, groups: int) -> Tensor:
    """The dense matrix of the circular convolution, column by column, for kernels of any size."""
    basis = torch.eye(kernel.shape[1] * groups * size[0] * size[1], dtype=torch.float64)
    x = basis.view(-1, kernel.shape[1] * groups, *size)
    rows = torch.arange(size[0] + dilation[0] * (kernel.shape[2] - 1)) % size[0]
    cols = torch.arange(size[1] + dilation[1] * (kernel.shape[3] - 1)) % size[1]
    y = F.conv2d(x[:, :, rows][:, :, :, cols], kernel, stride=stride, dilation=dilation, groups=groups)
    return y.flatten(1).T


def clipped(matrix: Tensor, bound: float) -> Tensor:
    u, d, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(d.clamp(max=bound)) @ v


def he(c_out: int, c_in: int, k: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(c_out, c_in, k, k, dtype=dtype, generator=gen(seed)) * math.sqrt(2 / (c_in * k * k))


shapes = {
    "maps": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "strides": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "k": st.tuples(st.integers(1, 4), st.integers(1, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "groups": st.integers(1, 2),
    "channels": st.tuples(st.integers(1, 3), st.integers(1, 2)),
    "seed": st.integers(0, 2**16),
}


def drawn(maps, strides, k, dilation, groups, channels, seed):
    size = maps[0] * strides[0], maps[1] * strides[1]
    kernel = torch.randn(channels[0] * groups, channels[1], *k, dtype=torch.float64, generator=gen(seed))
    return kernel, size, {"stride": strides, "dilation": dilation, "groups": groups}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0.2, 0.9), **shapes)
def test_clip_and_crop_is_least_squares_on_the_dense_clipped_matrix(share: float, **shape: Any) -> None:
    """K ← K + argmin ‖T(δ) − (clip(T(K)) − T(K))‖_F of least norm, with the matrix of T written out."""
    kernel, size, how = drawn(**shape)
    whole = matrix_of(kernel, size, *how.values())
    units = torch.eye(kernel.numel(), dtype=torch.float64).view(-1, *kernel.shape)
    of_taps = torch.stack([matrix_of(unit, size, *how.values()).flatten() for unit in units], 1)
    bound = share * float(torch.linalg.matrix_norm(whole, ord=2))
    wanted = (clipped(whole, bound) - whole).flatten()
    truth = kernel + (torch.linalg.pinv(of_taps) @ wanted).view(kernel.shape)
    found = project_conv(kernel, size, bound, how="clip", **how)
    assert torch.allclose(found.weight, truth, rtol=0, atol=1e-9)
    assert found.before == pytest.approx(bound / share, rel=1e-10)
    dense_after = torch.linalg.matrix_norm(matrix_of(found.weight, size, *how.values()), ord=2)
    assert found.after == pytest.approx(float(dense_after), rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0.2, 0.9), **shapes)
def test_alternating_reaches_the_bound_of_the_dense_matrix(share: float, **shape: Any) -> None:
    kernel, size, how = drawn(**shape)
    bound = share * circular_conv_norm(kernel, size, **how)
    found = project_conv(kernel, size, bound, how="alternating", **how)
    dense = float(torch.linalg.matrix_norm(matrix_of(found.weight, size, *how.values()), ord=2))
    assert bound * (1 - 1e-9) <= dense <= bound * (1 + 1e-12)
    # Every kernel inside the ball is at least as near to the result as it was to the start, up to the last rescaling.
    inside = project_conv(torch.randn_like(kernel), size, bound, how="rescale", **how).weight
    rest = SLACK * float(found.weight.norm())
    assert float((found.weight - inside).norm()) <= float((kernel - inside).norm()) + 2 * rest


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0.2, 0.9), **shapes)
def test_extrapolation_is_the_ratio_of_energies(share: float, **shape: Any) -> None:
    """λ = ‖excess‖² / ‖T T⁺ excess‖² of the dense matrices, and never a shorter step than clip and crop."""
    kernel, size, how = drawn(**shape)
    whole = matrix_of(kernel, size, *how.values())
    bound = share * float(torch.linalg.matrix_norm(whole, ord=2))
    step = _Layer(size, *how.values()).step(kernel, bound)
    energy = (whole - clipped(whole, bound)).square().sum()
    kept = matrix_of(step.change, size, *how.values()).square().sum()
    assert step.extrapolation == pytest.approx(float(energy / kept), rel=1e-6)
    assert step.extrapolation >= 1 - 1e-9 and step.norm == pytest.approx(bound / share, rel=1e-9)


def test_he_initialised_layer_pass_by_pass() -> None:
    """16 → 16, 3×3, n = 32, clipped to 1 again and again: 1.32, 1.17, 1.11, 1.09, 1.07."""
    reached = torch.zeros(5)
    for seed in range(6):
        kernel = he(16, 16, seed=seed)
        for k in range(5):
            found = project_conv(kernel, (32, 32), 1.0, how="clip")
            kernel, reached[k] = found.weight, reached[k] + found.after / 6
    assert torch.allclose(reached, torch.tensor([1.32, 1.17, 1.11, 1.09, 1.07]), rtol=0, atol=0.015)


@pytest.mark.parametrize("how", ["clip", "alternating"])
def test_kernel_as_large_as_the_image_is_projected_exactly(how: Any) -> None:
    kernel = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=gen(0))
    plain = (1, 1), (1, 1), 1
    found = project_conv(kernel, (4, 4), 3.0, how=how)
    truth = clipped(matrix_of(kernel, (4, 4), *plain), 3.0)
    assert found.before > 6
    assert torch.allclose(matrix_of(found.weight, (4, 4), *plain), truth, rtol=0, atol=1e-10)
    assert found.after == pytest.approx(3.0, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("c_out", "c_in", "n", "stride"), [(16, 16, 32, 1), (32, 16, 16, 2), (16, 3, 16, 1)])
def test_alternating_moves_less_than_rescaling(c_out: int, c_in: int, n: int, stride: int, dtype: torch.dtype) -> None:
    kernel = he(c_out, c_in, dtype=dtype)
    near = project_conv(kernel, (n, n), 1.0, how="alternating", stride=(stride, stride))
    far = project_conv(kernel, (n, n), 1.0, how="rescale", stride=(stride, stride))
    for found in (near, far):
        assert found.weight.dtype == dtype and found.before > 2
        assert 1 - 1e-6 <= found.after <= 1
        assert found.after == circular_conv_norm(found.weight, (n, n), stride=(stride, stride))
        again = project_conv(found.weight, (n, n), 1.0, stride=(stride, stride))
        assert torch.equal(again.weight, found.weight)
    assert float((near.weight - kernel).norm()) < 0.95 * float((far.weight - kernel).norm())
    assert torch.allclose(far.weight, kernel / far.before, rtol=1e-5)


@pytest.mark.parametrize("how", ["clip", "alternating", "rescale"])
def test_weights_within_the_bound_keep_their_bits(how: Any) -> None:
    kernel, matrix = he(4, 4, dtype=torch.float32), torch.randn(5, 3, generator=gen(1))
    norm = circular_conv_norm(kernel, (8, 8))
    assert torch.equal(project_conv(kernel, (8, 8), norm, how=how).weight, kernel)
    assert torch.equal(project_linear(matrix, 100.0, how=how).weight, matrix)
    assert not torch.equal(project_conv(kernel, (8, 8), norm * 0.999, how=how).weight, kernel)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_linear_layer_is_clipped_as_by_its_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=gen(2))
    found = project_linear(weight, 1.5)
    assert torch.allclose(found.weight, clipped(weight, 1.5), rtol=0, atol=1e-11)
    assert found.before == pytest.approx(float(torch.linalg.matrix_norm(weight, ord=2)), rel=1e-12)
    assert 1.5 * (1 - 1e-11) <= found.after <= 1.5
    scaled = project_linear(weight, 1.5, how="rescale").weight
    assert torch.allclose(scaled, weight * 1.5 / found.before, rtol=1e-11)


def test_excess_far_above_the_bound() -> None:
    """σ_max / c = 1e4: the Gram side loses (σ_max / c)² of 1e-16, no more."""
    u, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=gen(3)))
    v, _ = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64, generator=gen(4)))
    d = torch.tensor([1e4, 30.0, 1.5, 0.9, 1e-3, 0.0], dtype=torch.float64)
    found, norm = excess(u @ torch.diag(d) @ v.T, 1.0)
    truth = u @ torch.diag((d - 1).clamp(min=0)) @ v.T
    assert torch.allclose(found, truth, rtol=0, atol=1e-7) and norm == pytest.approx(1e4, rel=1e-12)
    nothing, bound = excess(u, 1.01)
    assert bool((nothing == 0).all()) and bound == 1.01


def test_larger_circle_bounds_the_zero_padded_layer() -> None:
    """[−1, 0, 1] on two pixels has circular norm 0 but stretches a line by 1; its larger circle certifies 2."""
    edge = torch.tensor([[[[-1.0, 0.0, 1.0]]]], dtype=torch.float64)
    assert torch.equal(project_conv(edge, (1, 2), 0.5).weight, edge)
    circle = padded_circle(edge, (1, 2))
    assert circle == (1, 4)
    found = project_conv(edge, circle, 0.5)
    assert zero_padded_norm_bound(found.weight, (1, 2)) == pytest.approx(0.5, rel=1e-9)
    kernel = he(4, 3)
    found = project_conv(kernel, padded_circle(kernel, (6, 5), stride=(2, 2)), 0.7, stride=(2, 2))
    basis = torch.eye(3 * 30, dtype=torch.float64).view(-1, 3, 6, 5)
    dense = F.conv2d(basis, found.weight, stride=2, padding=1).flatten(1)
    assert 0.5 < float(torch.linalg.matrix_norm(dense, ord=2)) <= 0.7
