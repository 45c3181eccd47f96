"""Lanczos, quadrature and trace against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import gen
from torch import Tensor

from robustlens.linalg.lanczos import density, eigenpairs, orthogonality, trace
from robustlens.results.errors import InputError


def matrix(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=gen(seed), dtype=torch.float64))
    return q @ torch.diag(values) @ q.T


def find(h: Tensor, k: int, **settings: object):
    return eigenpairs(lambda v: h @ v, h[0], k, gen=gen(1), **settings)


@pytest.mark.parametrize("which", ["algebraic", "magnitude"])
def test_against_a_dense_matrix(which: str) -> None:
    h = matrix(torch.randn(200, generator=gen(2), dtype=torch.float64) ** 3)
    found = find(h, 4, which=which, tolerance=1e-9, restarts=100)
    truth = torch.linalg.eigvalsh(h)
    truth = truth[truth.argsort(descending=True) if which == "algebraic" else truth.abs().argsort(descending=True)][:4]
    assert which == "algebraic" or bool((truth < 0).any()), "the two orders must differ"
    assert found.converged and torch.allclose(found.values, truth, rtol=1e-9)
    assert found.orthogonality < 1e-12 and found.missed == 0
    again = (h @ found.vectors.T - found.vectors.T * found.values).norm(dim=0) / found.values.abs()
    assert torch.allclose(again, found.residuals, atol=1e-12) and bool((again < 1e-9).all())


def test_restarts_reach_close_eigenvalues() -> None:
    h = matrix(torch.linspace(0, 1, 400, dtype=torch.float64))
    early, late = find(h, 3, restarts=0), find(h, 3, tolerance=1e-6, restarts=200)
    assert not early.converged and float(early.residuals.max()) > 1e-3
    assert late.converged and late.values.tolist() == pytest.approx([1, 398 / 399, 397 / 399], abs=1e-9)
    assert late.products > 100 and late.orthogonality < 1e-12
    error = (early.values[:, None] - torch.linalg.eigvalsh(h)).abs().amin(1)
    assert bool((error <= early.residuals * early.values.abs() + 1e-12).all()), "a residual bounds the error"


def naive(h: Tensor, steps: int) -> Tensor:
    """Ritz values of Lanczos' three-term recurrence, without reorthogonalisation."""
    v = torch.randn(len(h), generator=gen(1), dtype=h.dtype)
    v, before, beta = v / v.norm(), torch.zeros_like(v), 0.0
    small = torch.zeros(steps, steps, dtype=h.dtype)
    for j in range(steps):
        w = h @ v - beta * before
        small[j, j] = w @ v
        w = w - small[j, j] * v
        beta = float(w.norm())
        if j + 1 < steps:
            small[j, j + 1] = small[j + 1, j] = beta
        before, v = v, w / beta
    return torch.linalg.eigvalsh(small)


def test_no_ghosts() -> None:
    """At m = 30 the recurrence alone has the largest eigenvalue twice; the matrix has it once."""
    values = torch.cat([torch.tensor([1e4, 1e3, 100.0], dtype=torch.float64), torch.linspace(0, 1, 197).double()])
    h = matrix(values)
    assert int(((naive(h, 30) - 1e4).abs() < 1e-3).sum()) >= 2
    found = find(h, 5, steps=30, tolerance=1e-6, restarts=50)
    assert found.values.tolist() == pytest.approx([1e4, 1e3, 100, 1, 195 / 196], abs=1e-6)
    assert found.converged and found.missed == 0 and found.orthogonality < 1e-13


def test_a_tie_of_plus_and_minus_one() -> None:
    h = matrix([1.0, -1.0, *torch.linspace(-0.5, 0.5, 60).tolist()])
    found = find(h, 2, which="magnitude", tolerance=1e-8)
    assert sorted(found.values.tolist()) == pytest.approx([-1, 1], abs=1e-10)
    assert find(h, 2, tolerance=1e-8).values.tolist() == pytest.approx([1, 0.5], abs=1e-10)


def test_copies_of_a_multiple_eigenvalue() -> None:
    h = matrix([5.0, 5.0, 5.0, 4.0, *torch.linspace(0, 3, 100).tolist()])
    found = find(h, 4)
    assert found.values.tolist() == pytest.approx([5, 5, 5, 4], abs=1e-5)
    assert found.converged and found.missed >= 1 and orthogonality(found.vectors) < 1e-10
    assert found.second is not None and found.second <= 3 + 1e-9


@pytest.mark.parametrize("d", [1, 2, 3, 30])
def test_small_and_degenerate_matrices(d: int) -> None:
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    assert find(2 * eye, 3).values.tolist() == pytest.approx([2.0] * min(3, d))
    found = find(zero, 3)
    assert found.values.tolist() == [0.0] * min(3, d) and found.converged
    rank_one = zero.clone()
    rank_one[0, 0] = 7.0
    values = find(rank_one, 3)
    assert values.values.tolist() == pytest.approx([7.0, 0.0, 0.0][:d], abs=1e-9) and values.converged


def test_single_precision() -> None:
    h = matrix([30.0, 10.0, 5.0, *torch.linspace(-1, 1, 500).tolist()]).float()
    found = find(h, 3)
    assert found.vectors.dtype == torch.float32 and found.values.dtype == torch.float64
    assert found.converged and found.values.tolist() == pytest.approx([30, 10, 5], rel=1e-5)
    assert found.orthogonality < 1e-5


def test_requests_that_make_no_sense() -> None:
    h = matrix([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="at least 1"):
        find(h, 0)
    with pytest.raises(InputError, match="at least 26"):
        find(h, 3, steps=25)
    with pytest.raises(InputError, match="at least 2"):
        trace(lambda v: h @ v, h[0], probes=1, gen=gen())


# Density


def test_density_of_three_eigenvalues() -> None:
    """The nodes are the eigenvalues; the masses are Dirichlet means, within 4 standard deviations of the shares."""
    h = matrix([1.0] * 50 + [2.0] * 30 + [4.0] * 20)
    found = density(lambda v: h @ v, h[0], probes=100, steps=3, gen=gen(3))
    assert float(found.masses.sum()) == pytest.approx(1)
    for value, share in ((1.0, 0.5), (2.0, 0.3), (4.0, 0.2)):
        mass = float(found.masses[(found.nodes - value).abs() < 1e-8].sum())
        deviation = math.sqrt(share * (1 - share) / (100 / 2 + 1) / 100)
        assert abs(mass - share) < 4 * deviation, (value, mass)


def test_density_integrates_to_one_and_keeps_known_eigenvalues() -> None:
    h = matrix([50.0, 40.0, *torch.linspace(0, 1, 98).tolist()])
    found = find(h, 2).density
    assert float(found.masses.sum()) == pytest.approx(1) and len(found.nodes) == 24
    assert found.masses[:2].tolist() == [0.01, 0.01] and found.nodes[:2].tolist() == pytest.approx([50, 40])
    assert float(found.nodes[2:].max()) < 1.001
    grid = torch.linspace(-5, 60, 5000, dtype=torch.float64)
    y = found.smooth(grid, 0.5)
    assert float(torch.trapezoid(y, grid)) == pytest.approx(1, abs=1e-6)
    assert float(torch.trapezoid(y[grid > 20], grid[grid > 20])) == pytest.approx(0.02, abs=1e-6)


def test_quadrature_is_exact_for_moments() -> None:
    """m = 4 steps give the moments 0 … 2m − 1 = 7 of the start's spectral measure, and not the next one."""
    h = matrix(torch.randn(40, generator=gen(5), dtype=torch.float64))
    start = torch.randn(40, generator=gen(6))
    v = start.double() / start.double().norm()
    found = density(lambda u: h @ u, h[0], probes=1, steps=4, gen=gen(6))
    for n in range(8):
        truth = float(v @ torch.linalg.matrix_power(h, n) @ v)
        assert float((found.masses * found.nodes**n).sum()) == pytest.approx(truth, rel=1e-9), n
    wrong = float((found.masses * found.nodes**8).sum())
    assert wrong != pytest.approx(float(v @ torch.linalg.matrix_power(h, 8) @ v), rel=1e-6)


# Trace


def test_trace_of_low_rank_is_exact() -> None:
    h = matrix([9.0, -4.0, 2.0, *[0.0] * 60])
    found = trace(lambda v: h @ v, h[0], probes=5, gen=gen())
    assert found.value == pytest.approx(7, abs=1e-9) and found.error < 1e-9 and found.probes == 5
    assert trace(lambda v: h[:3, :3] @ v, h[0, :3], probes=4, gen=gen()).error == 0.0


@pytest.mark.parametrize("with_basis", [False, True])
def test_trace_is_unbiased_and_knows_its_error(with_basis: bool) -> None:
    """150 estimates: their mean within 4 of its standard errors, their spread as stated within 30 %."""
    h = matrix([100.0, 50.0, *torch.linspace(-2, 3, 80).tolist()])
    pairs = find(h, 2) if with_basis else None
    found = [trace(lambda v: h @ v, h[0], probes=8, gen=gen(100 + i), known=pairs) for i in range(150)]
    values = torch.tensor([t.value for t in found], dtype=torch.float64)
    stated = math.sqrt(sum(t.error**2 for t in found) / len(found))
    assert abs(float(values.mean()) - float(h.trace())) < 4 * stated / math.sqrt(150)
    assert float(values.std()) == pytest.approx(stated, rel=0.3)
    plain = math.sqrt(2 / 8) * float((h - torch.diag(h.diagonal())).norm())
    assert stated < plain / 5, "far better than random signs alone"
