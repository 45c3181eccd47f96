"""Golub and Kahan's method against dense matrices and closed forms, and BatchNorm folded into layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import gen
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustlens.linalg.golub_kahan import top_singular_value
from robustlens.linalg.layers import ConvOperator, LinearOperator, Operator, Skipped, operators


def measured(model: nn.Module, x: Tensor) -> dict[str, Operator]:
    return {layer.name: layer for layer in operators(model.eval(), x) if not isinstance(layer, Skipped)}


def matrix_of(apply: object, shape: tuple[int, ...]) -> Tensor:
    """The matrix of an affine map on images (C, H, W), column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return (apply(basis) - apply(torch.zeros_like(basis))).flatten(1).T  # type: ignore[operator]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    seed=st.integers(0, 2**16),
)
def test_norm_of_any_convolution_as_it_is_used(n, k, stride, dilation, padding, mode, groups, channels, seed) -> None:
    if mode == "reflect":
        assume(all(p < size for p, size in zip(padding, n, strict=True)))
    assume(all(size + 2 * p > d * (t - 1) for size, p, d, t in zip(n, padding, dilation, k, strict=True)))
    c_out, c_in = channels[0] * groups, channels[1] * groups
    layer = nn.Conv2d(
        c_in, c_out, k, stride=stride, dilation=dilation, padding=padding, padding_mode=mode, groups=groups
    ).double()
    nn.init.normal_(layer.weight, generator=gen(seed))
    found = measured(layer, torch.zeros(1, c_in, *n, dtype=torch.float64))[""]
    assert isinstance(found, ConvOperator)
    matrix = matrix_of(layer, (c_in, *n))
    y = torch.randn(1, c_out, *layer(torch.zeros(1, c_in, *n).double()).shape[2:], generator=gen(1)).double()
    assert torch.allclose(found.adjoint(y).flatten(), matrix.T @ y.flatten(), atol=1e-12)
    truth = float(torch.linalg.matrix_norm(matrix, ord=2))
    top = found.top(gen=gen(2), steps=matrix.shape[1])
    assert top.value <= truth * (1 + 1e-12)
    assert top.value == pytest.approx(truth, rel=1e-3, abs=1e-12)
    assert top.residual < 2e-3
    if (bound := found.norm_bound()) is not None:
        assert truth <= bound * (1 + 1e-12)
    if mode == "zeros" or padding == (0, 0) or found.wraps:
        assert torch.allclose(found.row_norms(), matrix.norm(dim=1), atol=1e-12)


@pytest.mark.parametrize(("a", "b", "n"), [(1.0, 2.0, 9), (0.5, -1.5, 6), (-1.0, 0.25, 12)])
def test_zero_padded_product_kernel(a: float, b: float, n: int) -> None:
    """K = kkᵀ with k = [a, b, a] is T ⊗ T, T tridiagonal with eigenvalues b + 2a cos(πj / (n + 1))."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    line = torch.tensor([a, b, a], dtype=torch.float64)
    layer.weight.data = (line[:, None] * line)[None, None]
    found = measured(layer, torch.zeros(1, 1, n, n, dtype=torch.float64))[""]
    assert isinstance(found, ConvOperator) and not found.exact
    truth = max(abs(b + 2 * a * math.cos(math.pi * j / (n + 1))) for j in range(1, n + 1)) ** 2
    start = torch.randn(1, 1, n, n, dtype=torch.float64, generator=gen(0))
    top = top_singular_value(found.apply, found.adjoint, start, steps=n * n, tolerance=1e-7)
    assert top.value == pytest.approx(truth, rel=1e-12) and top.residual < 1e-6
    rough = top_singular_value(found.apply, found.adjoint, start, steps=6)
    assert rough.value < truth and rough.residual > top.residual and rough.steps == 6
    assert truth - rough.value < 3 * rough.residual * rough.value


def test_single_precision_is_enough_for_the_value() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, 3, padding=1, bias=False)
    single = measured(layer, torch.zeros(1, 4, 8, 8))[""]
    truth = float(torch.linalg.matrix_norm(matrix_of(nn.Conv2d.double(layer), (4, 8, 8)), ord=2))
    assert isinstance(single, ConvOperator)
    start = torch.randn(1, 4, 8, 8, generator=gen(0))
    top = top_singular_value(single.apply, single.adjoint, start, steps=100, tolerance=1e-5)
    assert top.value == pytest.approx(truth, rel=1e-9) and top.residual < 5e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_scale_of_the_weights_does_not_matter(scale: float) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    nn.init.normal_(layer.weight, generator=gen(0))
    found = measured(layer, torch.zeros(1, 2, 6, 6))[""]
    assert isinstance(found, ConvOperator)
    one, other = (replace(found, weight=found.weight * s).top(gen=gen(1), steps=60) for s in (1.0, scale))
    assert other.value == pytest.approx(scale * one.value, rel=1e-5)
    assert replace(found, weight=found.weight * 0).top(gen=gen(1), steps=9).value == 0.0


def test_zero_map() -> None:
    top = top_singular_value(torch.zeros_like, torch.zeros_like, torch.ones(1, 2, 3), steps=9)
    assert (top.value, top.residual) == (0.0, 0.0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.wraps = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
        self.after = nn.BatchNorm2d(3)
        self.zeros = nn.Conv2d(3, 2, 3, padding=1)
        self.plain = nn.BatchNorm2d(2, affine=False)
        self.alone = nn.Conv2d(2, 2, 1)
        self.moving = nn.BatchNorm2d(2, track_running_stats=False)
        self.fc = nn.Linear(2 * 5 * 4, 3)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.zeros(self.after(self.wraps(self.first(x))).relu()))
        return self.last(self.fc(self.moving(self.alone(x)).flatten(1)))


def test_batch_norm_is_folded_into_the_layer_before_it() -> None:
    torch.manual_seed(0)
    model = Normed().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (module.weight, module.running_var):
                if values is not None:
                    nn.init.uniform_(values, 0.2, 3.0)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
    x = torch.rand(1, 2, 5, 4, dtype=torch.float64)
    found = measured(model, x)
    skipped = {layer.name for layer in operators(model, x) if isinstance(layer, Skipped)}
    assert skipped == {"first", "moving"}
    assert found["alone"].scale is None and found["alone"].folded() is found["alone"]

    wraps = matrix_of(lambda z: model.after(model.wraps(z)), (2, 5, 4))
    folded = found["wraps"].folded()
    assert folded.exact
    assert torch.allclose(folded.spectrum(), torch.linalg.svdvals(wraps), atol=1e-12)
    assert torch.allclose(folded.row_norms(), wraps.norm(dim=1), atol=1e-12)

    zeros = matrix_of(lambda z: model.plain(model.zeros(z)), (3, 5, 4))
    folded = found["zeros"].folded()
    assert isinstance(folded, ConvOperator)
    truth = float(torch.linalg.matrix_norm(zeros, ord=2))
    assert folded.top(gen=gen(0), steps=60).value == pytest.approx(truth, rel=1e-5)
    assert folded.norm_bound() >= truth
    assert torch.allclose(folded.row_norms(), zeros.norm(dim=1), atol=1e-12)

    head = found["fc"]
    assert isinstance(head, LinearOperator)
    matrix = matrix_of(lambda z: model.last(model.fc(z)), (40,))
    assert torch.allclose(head.folded().spectrum(), torch.linalg.svdvals(matrix), atol=1e-12)
