"""Threats against independent truth: optimality conditions, brute-force bisection, linear programming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import gen
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from robustlens.results.errors import InputError
from robustlens.threats.lp import NORMS, Lp

RADII = {"linf": 0.1, "l2": 1.2, "l1": 5.0}


def nearest_by_bisection(threat: Lp, p: Tensor, x: Tensor) -> Tensor:
    """The projection from its optimality conditions, one example at a time, by bisecting the multiplier."""
    result = torch.empty_like(p)
    for i in range(len(p)):
        d = p[i] - x[i]

        def candidate(t: float, d: Tensor = d, i: int = i) -> Tensor:
            if threat.norm == "linf":
                step = d.clamp(-threat.eps, threat.eps)
            elif threat.norm == "l2":
                step = d / (1 + t)
            else:
                step = d.sign() * (d.abs() - t).clamp_min(0)
            return (x[i] + step).clamp(0, 1)

        low, high = 0.0, 1e4
        if threat.distance(candidate(0.0)[None], x[i][None]) <= threat.eps:
            high = 0.0
        for _ in range(200 if high else 0):
            mid = (low + high) / 2
            inside = threat.distance(candidate(mid)[None], x[i][None]) <= threat.eps
            low, high = (low, mid) if inside else (mid, high)
        result[i] = candidate(high)
    return result


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.01, 3), share=st.floats(0.01, 2))
def test_projection_is_the_nearest_point(norm: str, seed: int, spread: float, share: float) -> None:
    threat = Lp(norm, min(RADII[norm] * share, 1.0) if norm == "linf" else RADII[norm] * share)
    x = torch.rand(5, 1, 6, 6, generator=gen(seed), dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1)
    p = x + spread * torch.randn(x.shape, generator=gen(seed + 1), dtype=torch.float64)
    z = threat.project(p, x)
    assert (threat.distance(z, x) <= threat.eps * (1 + 1e-9)).all()
    assert z.min() >= 0 and z.max() <= 1
    assert torch.allclose(z, nearest_by_bisection(threat, p, x), atol=1e-6)
    assert torch.allclose(threat.project(z, x), z, atol=1e-9), "projecting twice changes nothing"


@pytest.mark.parametrize("norm", NORMS)
def test_support_maximises_a_linear_function(norm: str) -> None:
    threat = Lp(norm, RADII[norm])
    x = torch.rand(6, 1, 6, 6, generator=gen(5), dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1)
    g = torch.randn(x.shape, generator=gen(6), dtype=torch.float64)
    z = threat.support(g, x)
    value = (g * (z - x)).flatten(1).sum(1)
    assert (threat.distance(z, x) <= threat.eps * (1 + 1e-9)).all()
    assert z.min() >= 0 and z.max() <= 1
    if norm == "l2":  # projecting a point far out along g tends to the maximiser
        far = threat.project(x + 1e7 * g, x)
        assert torch.allclose(value, (g * (far - x)).flatten(1).sum(1), atol=1e-5)
        return
    for i in range(len(x)):  # a linear program in δ = a − b, a, b ≥ 0
        c, xi = g[i].flatten().numpy(), x[i].flatten().numpy()
        limit = threat.eps if norm == "linf" else 1.0
        bounds = [(0, min(limit, 1 - v)) for v in xi] + [(0, min(limit, v)) for v in xi]
        total = np.ones((1, 72)) if norm == "l1" else None
        solved = linprog(-np.r_[c, -c], A_ub=total, b_ub=[threat.eps] if norm == "l1" else None, bounds=bounds)
        assert value[i].item() == pytest.approx(-solved.fun, abs=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_is_uniform_in_the_ball(norm: str) -> None:
    """With d dimensions, (size / eps)^d of a uniform draw is uniform: mean ½ ± 5 standard errors."""
    threat, n = Lp(norm, 0.4), 20_000
    noise = threat.noise(torch.zeros(n, 1, 1, 3, dtype=torch.float64), gen(7))
    level = (threat.size(noise) / threat.eps) ** 3
    assert (level <= 1 + 1e-9).all()
    assert level.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / n) ** 0.5)
    mean = noise.flatten(1).mean(0)
    assert (mean.abs() < 5 * noise.flatten(1).std(0) / n**0.5).all(), "symmetric around zero"


@pytest.mark.parametrize("norm", NORMS)
def test_start_is_allowed_and_replayable(norm: str, images: Tensor) -> None:
    threat = Lp(norm, RADII[norm])
    start = threat.start(images, gen(1))
    assert torch.equal(start, threat.start(images, gen(1)))
    assert not torch.equal(start, threat.start(images, gen(2)))
    assert (threat.distance(start, images) <= threat.eps * (1 + 1e-5)).all()
    assert start.min() >= 0 and start.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_ascend_survives_gradients_whose_squares_underflow(norm: str) -> None:
    g = torch.randn(3, 1, 8, 8, generator=gen(1))
    expected = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    tiny = g * 1e-30
    assert tiny.square().sum() == 0, "float32 cannot hold the squares"
    assert torch.allclose(Lp(norm, 1.0).ascend(tiny, floor=0), expected, atol=1e-6)
    assert torch.allclose(Lp(norm, 1.0).ascend(g), expected, atol=1e-6)
    assert Lp(norm, 1.0).ascend(g * 0, floor=1e-12).abs().max() == 0
    stalled = Lp(norm, 1.0).ascend(g * 1e-9, floor=1e-6).flatten(1).norm(dim=1)
    assert torch.allclose(stalled, g.flatten(1).norm(dim=1) * 1e-3, rtol=1e-4)


def test_ascend_sign_keeps_dead_pixels_still() -> None:
    assert Lp("linf", 0.1).ascend(torch.tensor([[[[-2.0, 0.0, 1e-40]]]])).tolist() == [[[[-1, 0, 1]]]]


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("linf:8/255", "linf", 8 / 255),
        ("linf:25.5/255", "linf", 25.5 / 255),
        ("l2:1.5", "l2", 1.5),
        ("L1: 12", "l1", 12.0),
        ("l2:0", "l2", 0.0),
    ],
)
def test_parse(text: str, norm: str, eps: float) -> None:
    threat = Lp.parse(text)
    assert (threat.norm, threat.eps) == (norm, eps)
    assert Lp.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "expects"),
    [
        ("linf:8", "linf:8/255"),
        ("l2:-1", "≥ 0"),
        ("l2:nan", "a finite number"),
        ("l2:9999", "0–255"),
        ("lnf:0.1", "Did you mean 'linf'"),
        ("0.1", "such as"),
        ("l2:", "a number or a fraction"),
        ("l2:1/0", "a number or a fraction"),
        ("l2:1/2/3", "a number or a fraction"),
        ("l2:1e400", "a finite number"),
    ],
)
def test_bad_threats_say_what_to_do(text: str, expects: str) -> None:
    with pytest.raises(InputError, match="expected") as error:
        Lp.parse(text)
    assert expects in str(error.value)


def test_radii_beyond_the_corners_of_the_box_are_refused() -> None:
    """Two corners of 64 pixels are 1 apart in ℓ∞, 8 in ℓ2 and 64 in ℓ1."""
    for norm, farthest in (("linf", 1.0), ("l2", 8.0), ("l1", 64.0)):
        Lp(norm, farthest).require_fits((1, 8, 8))  # type: ignore[arg-type]
    for text in ("l2:8.001", "l2:128", "l1:65"):
        norm, _, radius = text.partition(":")
        with pytest.raises(InputError, match=f'at most .* got .* write "{norm}:{radius}/255"') as caught:
            Lp.parse(text).require_fits((1, 8, 8))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"expected a number, got '8/255'. Lp.parse\(\"linf:8/255\"\)"):
        Lp("linf", "8/255")  # type: ignore[arg-type]
