"""Spectra of layers against dense matrices and closed forms."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.linalg import lapack, spectra
from robustlens.linalg.lapack import gram_eigenvalues
from robustlens.linalg.layers import ConvOperator, LinearOperator, Skipped, operators
from robustlens.linalg.spectra import (
    circular_conv_norm,
    circular_conv_spectrum,
    linear_spectrum,
    round_up,
    zero_padded_norm_bound,
)
from robustlens.linalg.tridiagonal import tridiagonal
from robustlens.results.errors import InputError


def dense(apply: object, c_in: int, size: tuple[int, int]) -> Tensor:
    """The matrix of a linear map on images, column by column."""
    basis = torch.eye(c_in * size[0] * size[1], dtype=torch.float64).view(-1, c_in, *size)
    return apply(basis).flatten(1).T  # type: ignore[operator]


def wrapped(x: Tensor, kernel: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """Circular convolution by repeating the image as often as the kernel reaches (any size of kernel)."""
    rows = torch.arange(x.shape[2] + dilation[0] * (kernel.shape[2] - 1)) % x.shape[2]
    cols = torch.arange(x.shape[3] + dilation[1] * (kernel.shape[3] - 1)) % x.shape[3]
    return F.conv2d(x[:, :, rows][:, :, :, cols], kernel, stride=stride, dilation=dilation, groups=groups)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    maps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    k=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**16),
)
def test_circular_spectrum_is_that_of_the_dense_matrix(maps, strides, k, dilation, groups, channels, seed) -> None:
    size = maps[0] * strides[0], maps[1] * strides[1]
    c_out, c_in = channels[0] * groups, channels[1]
    kernel = torch.randn(c_out, c_in, *k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = dense(lambda x: wrapped(x, kernel, strides, dilation, groups), c_in * groups, size)
    truth = torch.linalg.svdvals(matrix)
    how = {"stride": strides, "dilation": dilation, "groups": groups}
    found = circular_conv_spectrum(kernel, size, **how)
    assert found.shape == truth.shape and found.dtype == torch.float64
    assert torch.allclose(found, truth, rtol=0, atol=1e-10 * float(truth[0]))
    assert circular_conv_norm(kernel, size, **how) == pytest.approx(float(truth[0]), rel=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds_for_zero_padding(n, k, stride, padding, seed) -> None:
    if any(ni + 2 * p < ki for ni, p, ki in zip(n, padding, k, strict=True)):
        return
    kernel = torch.randn(2, 3, *k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = dense(lambda x: F.conv2d(x, kernel, stride=stride, padding=padding), 3, n)
    bound = zero_padded_norm_bound(kernel, n, stride=(stride, stride))
    assert float(torch.linalg.matrix_norm(matrix, ord=2)) <= bound * (1 + 1e-12)


def test_the_circular_norm_at_the_same_size_is_no_bound() -> None:
    """[−1, 0, 1] on two pixels: around the circle both neighbours are the same pixel and cancel, on a line not."""
    kernel = torch.tensor([[[[-1.0, 0.0, 1.0]]]], dtype=torch.float64)
    matrix = dense(lambda x: F.conv2d(x, kernel, padding=(0, 1)), 1, (1, 2))
    assert matrix.tolist() == [[0.0, 1.0], [-1.0, 0.0]]
    assert circular_conv_norm(kernel, (1, 2)) == pytest.approx(0.0, abs=1e-15)
    assert zero_padded_norm_bound(kernel, (1, 2)) == pytest.approx(2.0)  # 2 sin(2πj/4) at j = 1


def test_difference_kernel() -> None:
    """1-D [1, −1] on a circle of n: σ_j = 2 |sin(π j / n)|."""
    truth = np.sort(2 * np.abs(np.sin(np.pi * np.arange(7) / 7)))[::-1]
    found = circular_conv_spectrum(torch.tensor([[[[1.0, -1.0]]]]), (1, 7)).numpy()
    np.testing.assert_allclose(found, truth, atol=1e-14)


def test_delta_sum_and_energy() -> None:
    delta = torch.zeros(4, 4, 3, 3)
    delta[range(4), range(4), 1, 1] = 1
    assert torch.allclose(circular_conv_spectrum(delta, (5, 6)), torch.ones(4 * 30, dtype=torch.float64), atol=1e-14)
    positive = torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    assert circular_conv_norm(positive, (6, 7)) == pytest.approx(float(positive.double().sum()), rel=1e-12)
    kernel = torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(1))  # fits the 8 × 8 image
    energy = circular_conv_spectrum(kernel, (8, 8)).square().sum()
    assert float(energy) == pytest.approx(64 * float(kernel.double().square().sum()), rel=1e-12)


def test_patch_embedding_is_the_reshaped_kernel() -> None:
    kernel = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = linear_spectrum(kernel.flatten(1)).repeat_interleave(4)
    assert torch.allclose(circular_conv_spectrum(kernel, (8, 8), stride=(4, 4)), truth, atol=1e-12)


def test_small_values_are_not_lost() -> None:
    """[1, −1 + 1e-9] nearly annihilates constants: σ_min = 1e-9, which float32 or a Gram matrix would miss."""
    kernel = torch.tensor([[[[1.0, -1.0 + 1e-9]]]], dtype=torch.float64)
    assert float(circular_conv_spectrum(kernel, (1, 8))[-1]) == pytest.approx(1e-9, rel=1e-6)


def test_small_values_beside_large_ones_are_not_lost() -> None:
    """A rotated diag(1, 1e-3, 1e-6, 1e-12), whose Gram matrix knows the last two only to 1e-4 and not at all."""
    draws = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = torch.linalg.qr(draws).Q
    truth = torch.tensor([1.0, 1e-3, 1e-6, 1e-12], dtype=torch.float64)
    found = linear_spectrum(left @ torch.diag(truth) @ right)
    assert torch.allclose(found, truth, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("channels", [(3, 4), (26, 31), (31, 26)])
@pytest.mark.parametrize("size", [(4, 4), (5, 6), (7, 7), (1, 8), (6, 1)])
def test_every_frequency_counts_as_often_as_it_should(size: tuple[int, int], channels: tuple[int, int]) -> None:
    """Against the full transform of every frequency, as Sedghi, Gupta and Long compute it."""
    kernel = torch.randn(*channels, 1 if size[0] == 1 else 3, 1 if size[1] == 1 else 3, dtype=torch.float64)
    symbols = np.fft.fft2(kernel.permute(2, 3, 0, 1).numpy(), size, axes=(0, 1))
    truth = np.sort(np.linalg.svd(symbols, compute_uv=False).ravel())[::-1]
    np.testing.assert_allclose(circular_conv_spectrum(kernel, size).numpy(), truth, rtol=1e-9, atol=1e-14)


def test_frequencies_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers of large images have them. Most chunks hold no frequency that is its own mirror image."""
    kernel = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    together = circular_conv_spectrum(kernel, (8, 6)), circular_conv_norm(kernel, (8, 6))
    monkeypatch.setattr(spectra, "CHUNK", 3 * 12)
    apart = circular_conv_spectrum(kernel, (8, 6)), circular_conv_norm(kernel, (8, 6))
    assert torch.allclose(apart[0], together[0], rtol=1e-12) and apart[1] == pytest.approx(together[1], rel=1e-12)


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (7, 1), (30, 41), (64, 33), (70, 70)])
def test_eigenvalues_of_gram_matrices(
    rows: int, columns: int, compiled: bool, complex_numbers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy's singular values, also where numba cannot be imported."""
    if not compiled:
        monkeypatch.delitem(sys.modules, "robustlens.linalg.tridiagonal", raising=False)
        monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(lapack, "_tridiagonal", lapack._tridiagonal.__wrapped__)
    assert (lapack._tridiagonal() is not None) == compiled
    draw = np.random.default_rng(0).standard_normal
    matrices = draw((3, rows, columns)) + (1j * draw((3, rows, columns)) if complex_numbers else 0.0)
    truth = np.linalg.svd(matrices, compute_uv=False)[:, ::-1] ** 2
    np.testing.assert_allclose(gram_eigenvalues(matrices), truth, rtol=1e-9, atol=1e-13 * truth.max())
    for broken in (np.nan, np.inf):
        matrices[1, 0, 0] = broken
        with pytest.raises(np.linalg.LinAlgError):
            gram_eigenvalues(matrices)


@pytest.mark.parametrize("scale", [1e-70, 1.0, 1e70])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "rank one", "zero", "some rows zero"])
def test_tridiagonal_form(kind: str, scale: float) -> None:
    """Against NumPy's eigenvalues, of H at the end of a larger matrix."""
    draw, n, first = np.random.default_rng(0).standard_normal, 30, 2
    a = draw((n, n)) + 1j * draw((n, n))
    a *= {"some rows zero": (np.arange(n) % 3 > 0)[:, None], "zero": 0.0}.get(kind, 1.0)
    a = {"diagonal": np.diag(np.diag(a)), "rank one": a[:, :1] @ a[:1]}.get(kind, a)
    hermitian = (a + a.conj().T) * scale
    matrix, d, e = np.zeros((32, 32), complex), np.zeros(32), np.zeros(32)
    matrix[first:, first:] = np.triu(hermitian.T)
    tridiagonal(matrix.view(np.float64), first, d, e)
    found, truth = scipy.linalg.eigvalsh_tridiagonal(d[first:], e[first:-1]), np.linalg.eigvalsh(hermitian)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-14 * np.linalg.norm(hermitian))
    assert not d[:first].any() and not e[:first].any()


def test_compiled_where_nothing_can_be_kept() -> None:
    """As in a container whose file system is read-only."""
    code = "import numpy as np; from robustlens.linalg.tridiagonal import tridiagonal as t; a = np.zeros((4, 8)); "
    code += "a[:, ::2], d, e = np.eye(4), np.zeros(4), np.zeros(4); t(a, 0, d, e); print(d, t.stats.cache_path)"
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=True)
    assert done.stdout.split("]") == ["[1. 1. 1. 1.", " None\n"]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_of_layers_whose_frequencies_are_all_alike_or_tiny(scale: float) -> None:
    kernel = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    kernel[range(4), range(4), 1, 1] = torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    assert circular_conv_norm(kernel * scale, (6, 5)) == pytest.approx(3.0 * scale, rel=1e-12)
    assert circular_conv_norm(kernel * 0, (6, 5)) == 0.0


@pytest.mark.parametrize("channels", [(8, 6), (40, 36)])
def test_threads_change_nothing(channels: tuple[int, int]) -> None:
    kernel, before = torch.randn(*channels, 3, 3, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    alone = circular_conv_spectrum(kernel, (6, 6)), circular_conv_norm(kernel, (6, 6))
    torch.set_num_threads(2)
    pools = [pool["num_threads"] for pool in threadpool_info()]
    try:
        together = circular_conv_spectrum(kernel, (6, 6)), circular_conv_norm(kernel, (6, 6))
        assert torch.get_num_threads() == 2
        assert [pool["num_threads"] for pool in threadpool_info()] == pools
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0]) and alone[1] == pytest.approx(together[1], rel=1e-12)


def test_he_initialised_layer() -> None:
    """16 → 16, 3 × 3, n = 32: mean 1.21, spread 0.74, largest 2.80; reshaped 1.40, 0.24, 1.84."""
    kernel = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) * math.sqrt(2 / (16 * 9))
    values, reshaped = circular_conv_spectrum(kernel, (32, 32)), linear_spectrum(kernel.flatten(1))
    assert len(values) == 16 * 32 * 32
    assert (float(values.mean()), float(values.std())) == pytest.approx((1.21, 0.74), abs=0.03)
    assert float(values[0]) == pytest.approx(2.80, abs=0.3)
    assert (float(reshaped.mean()), float(reshaped.std())) == pytest.approx((1.40, 0.24), abs=0.06)


def test_size_must_fit_the_stride() -> None:
    with pytest.raises(InputError, match="multiple of the stride"):
        circular_conv_spectrum(torch.ones(1, 1, 3, 3), (7, 7), stride=(2, 2))
    assert round_up((7, 8), (2, 2)) == (8, 8)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.wraps = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.zeros = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
        self.mirrors = nn.Conv2d(6, 2, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(2)
        self.spare = nn.Linear(3, 3)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mirrors(self.zeros(self.wraps(self.patches(x))))
        return self.head(self.up(self.norm(x)).mean((2, 3)))


def test_every_layer_of_a_model_is_found_and_labelled() -> None:
    torch.manual_seed(0)
    model = Mixed().train()
    found = {layer.name: layer for layer in operators(model, torch.rand(1, 1, 14, 14))}
    assert list(found) == ["patches", "wraps", "zeros", "mirrors", "spare", "up", "head"]
    assert model.training and not model.wraps._forward_hooks
    assert isinstance(found["spare"], Skipped) and isinstance(found["up"], Skipped)
    assert isinstance(found["head"], LinearOperator)
    labels = {name: layer.label for name, layer in found.items() if not isinstance(layer, Skipped)}
    assert labels["patches"] == labels["wraps"] == labels["head"] == "exact"
    assert labels["zeros"] == "circular operator at 8×8"  # 7 is no multiple of 2
    assert labels["mirrors"] == "circular operator at 4×4"
    assert found["mirrors"].norm_bound() is None


def test_exact_layers_and_bounds_against_the_layers_themselves() -> None:
    torch.manual_seed(1)
    model = Mixed().double()
    for layer in operators(model, torch.rand(1, 1, 14, 14, dtype=torch.float64)):
        if isinstance(layer, ConvOperator) and layer.name != "mirrors":
            module = model.get_submodule(layer.name)
            c_in = layer.weight.shape[1] * layer.groups
            with torch.no_grad():
                matrix = dense(lambda x, m=module: m(x) - m(torch.zeros_like(x)), c_in, layer.size)
            truth = torch.linalg.svdvals(matrix)
            bound = layer.norm_bound()
            assert bound is not None and float(truth[0]) <= bound * (1 + 1e-12)
            assert torch.allclose(layer.row_norms(), matrix.norm(dim=1), atol=1e-12)
            if layer.exact:
                assert torch.allclose(layer.spectrum(), truth, atol=1e-12)
