"""The shortest step onto a hyperplane in the box, against linear programs, optimality conditions and all corners."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import gen
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from robustlens.linalg.hyperplane import step_to_hyperplane

each_norm = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def problem(seed: int, n: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two points for each of three planes: some pixels on the border of the box, some without slope."""
    t = torch.rand(2, 3, n, generator=gen(seed), dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1)
    w = torch.randn(3, n, generator=gen(seed + 1), dtype=torch.float64)
    w[torch.rand(3, n, generator=gen(seed + 2)) < 0.2] = 0
    height = spread * torch.randn(2, 3, generator=gen(seed + 3), dtype=torch.float64) * w.abs().sum(1)
    return t, w, height


def smallest_size(norm: str, t: np.ndarray, w: np.ndarray, height: float) -> float:
    """A linear program in δ and the size (ℓ∞), or in its positive and negative part (ℓ1)."""
    n = len(t)
    if norm == "l1":
        bounds = [(0, 1 - v) for v in t] + [(0, v) for v in t]
        return float(linprog(np.ones(2 * n), A_eq=[np.r_[w, -w]], b_eq=[-height], bounds=bounds).fun)
    below = np.concatenate([np.c_[np.eye(n), -np.ones(n)], np.c_[-np.eye(n), -np.ones(n)]])
    bounds = [(-v, 1 - v) for v in t] + [(0, None)]
    solved = linprog(
        np.r_[np.zeros(n), 1], A_ub=below, b_ub=np.zeros(2 * n), A_eq=[np.r_[w, 0]], b_eq=[-height], bounds=bounds
    )
    return float(solved.fun)


def assert_euclidean(t: Tensor, w: Tensor, height: Tensor, delta: Tensor) -> None:
    """There is one λ with δ_i = λ g_i where the box leaves room, and less where it does not: all conditions (KKT)."""
    toward = -w * height.sign()
    room = torch.where(toward > 0, 1 - t, t)
    free = (toward != 0) & (delta.abs() < room - 1e-12)
    stopped = (toward != 0) & ~free
    ratio = delta[free] / toward[free]
    level = ratio.mean() if len(ratio) else torch.tensor(torch.inf).to(t)
    assert torch.allclose(ratio, level, rtol=1e-9) and (ratio >= 0).all()
    assert (room[stopped] <= level * toward[stopped].abs() + 1e-9).all()


@each_norm
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), spread=st.sampled_from([0.01, 0.1, 0.3, 1.0]))
def test_it_is_the_shortest_step_or_leads_to_the_nearest_corner(norm: str, seed: int, n: int, spread: float) -> None:
    t, w, height = problem(seed, n, spread)
    delta = step_to_hyperplane(t, w, height, norm)
    assert (t + delta).min() >= -1e-15 and (t + delta).max() <= 1 + 1e-15
    assert (delta.masked_select((w == 0).expand_as(delta)) == 0).all()
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    for i, j in itertools.product(range(2), range(3)):
        reached = height[i, j] + w[j] @ delta[i, j]
        there = height[i, j] + (corners - t[i, j]) @ w[j]
        if there.min() > 0 or there.max() < 0:
            assert reached.abs() == pytest.approx(float(there.abs().min()), abs=1e-12)
            continue
        assert abs(reached) <= 1e-13 * (1 + height[i, j].abs())
        if norm == "l2":
            assert_euclidean(t[i, j], w[j], height[i, j], delta[i, j])
        else:
            size = delta[i, j].abs().max() if norm == "linf" else delta[i, j].abs().sum()
            exact = smallest_size(norm, t[i, j].numpy(), w[j].numpy(), float(height[i, j]))
            assert float(size) == pytest.approx(exact, abs=1e-8)


@each_norm
def test_many_pixels_in_float32(norm: str) -> None:
    t, w, height = problem(7, 3072, 0.05)
    exact = step_to_hyperplane(t, w, height, norm)
    single = step_to_hyperplane(t.float(), w.float(), height.float(), norm)
    assert single.dtype == torch.float32
    assert (height + (w * exact).sum(-1)).abs().max() < 1e-11
    assert (single - exact).abs().max() < (2e-3 if norm == "l1" else 1e-5)  # a rounding of 1e-6 Σ, on one last pixel
    assert ((height + (w * single).sum(-1)) / height).abs().max() < 1e-4


@each_norm
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_scale_of_the_slopes_changes_nothing(norm: str, scale: float) -> None:
    t, w, height = (v.float() for v in problem(9, 20, 0.1))
    expected = step_to_hyperplane(t, w, height, norm)
    assert expected.abs().max() > 0.01
    assert torch.equal(step_to_hyperplane(t, scale * w, scale * height, norm), expected)


@each_norm
def test_slopes_over_twenty_orders_of_magnitude(norm: str) -> None:
    """Every pass of Newton's method meets a few kinks more here; the last pixels decide."""
    w = 10.0 ** -torch.arange(0, 20, 0.25, dtype=torch.float64)[None]
    t = torch.full_like(w, 0.5)
    for share in (0.3, 0.999, 1 - 1e-9):
        height = -share * 0.5 * w.sum(1)
        delta = step_to_hyperplane(t, w, height, norm)
        assert ((height + (w * delta).sum(1)) / height).abs().max() < 1e-14
        assert_euclidean(t[0], w[0], height[0], delta[0]) if norm == "l2" else None


@each_norm
def test_another_box_a_flat_plane_and_no_points(norm: str) -> None:
    t, w, height = problem(3, 5, 0.1)
    delta = step_to_hyperplane(t, w, height, norm)
    wide = step_to_hyperplane(2 * t - 1, w, 2 * height, norm, low=-1.0, high=1.0)
    assert torch.allclose(wide, 2 * delta, atol=1e-12)
    assert (step_to_hyperplane(t, 0 * w, height, norm) == 0).all()
    assert (step_to_hyperplane(t, w, 0 * height, norm) == 0).all()
    assert step_to_hyperplane(t[:, :0], w[:0], height[:, :0], norm).shape == (2, 0, 5)
