"""Jacobian products and operator norms against dense Jacobians, their SVD and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.linalg.jacobian import Linearization, dual, jvp, krylov_method, power_method, residual, vjp


def everything() -> nn.Module:
    """Every kind of layer that the networks of the papers have, with biases and moved BatchNorm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 3, 3), nn.Softplus(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4)),
        ).double()
        net(torch.rand(20, 1, 8, 8, dtype=torch.float64))
        return net.eval()


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian (B, K, n), one image and one logit at a time."""
    rows = []
    for image in x:
        z = image[None].clone().requires_grad_()
        logits = model(z)[0]
        rows.append(torch.stack([torch.autograd.grad(t, z, retain_graph=True)[0].flatten() for t in logits]))
    return torch.stack(rows)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def matrix_net(w: Tensor) -> nn.Module:
    """A linear network with the Jacobian ``w`` everywhere, and a bias that must not matter."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(w.shape[1], w.shape[0])).double()
    with torch.no_grad():
        net[1].weight.copy_(w)
        net[1].bias.fill_(7.0)
    return net


def test_products_equal_the_dense_jacobian(images: Tensor) -> None:
    model, x = everything(), images.double()
    v, u = draw(*x.shape), draw(len(x), 4)
    j = dense(model, x)
    forward = torch.einsum("bkn,bn->bk", j, v.flatten(1))
    pulled = torch.einsum("bkn,bk->bn", j, u).view_as(x)
    assert torch.allclose(jvp(model, x, v), forward, atol=1e-13)
    assert torch.allclose(vjp(model, x, u), pulled, atol=1e-13)
    both = Linearization(model, x)
    assert torch.equal(both.jvp(v), jvp(model, x, v)) and torch.allclose(both.vjp(u), pulled, atol=1e-13)
    assert not both.jvp(v).requires_grad and not both.vjp(u).requires_grad
    assert torch.equal(jvp(model, x, 0 * v), torch.zeros(len(x), 4, dtype=torch.float64))


def test_forwarding_v_through_the_masked_network_is_not_a_jacobian_product() -> None:
    """Trap: the biases and BatchNorm's shifts come along."""
    model = matrix_net(draw(4, 6))
    x, v = draw(3, 1, 2, 3), draw(3, 1, 2, 3, seed=1)
    assert torch.allclose(jvp(model, x, v), v.flatten(1) @ model[1].weight.T, atol=1e-14)
    assert (model(v) - jvp(model, x, v) - 7).abs().max() < 1e-13


def test_power_method_finds_the_largest_singular_value_of_every_image(images: Tensor) -> None:
    model, x = everything(), images.double()
    with untouched(model):
        u, v, sigma = power_method(model, x, draw(*x.shape), 400)
    left, values, right = torch.linalg.svd(dense(model, x), full_matrices=False)
    assert (values[:, 1] / values[:, 0]).max() < 0.98
    assert torch.allclose(sigma, values[:, 0], rtol=1e-6, atol=0)
    assert torch.allclose((v.flatten(1) * right[:, 0]).sum(1).abs(), torch.ones(12).double(), atol=1e-6)
    assert torch.allclose((u * left[:, :, 0]).sum(1).abs(), torch.ones(12).double(), atol=1e-6)
    few = power_method(model, x, draw(*x.shape), 3)[2]
    assert ((few < sigma + 1e-9) & (few > 0)).all()


def test_one_step_is_exact_for_a_jacobian_of_rank_one() -> None:
    a, b = draw(4), draw(6, seed=1)
    u, v, sigma = power_method(matrix_net(torch.outer(a, b)), draw(5, 1, 2, 3), draw(5, 1, 2, 3, seed=2), 1)
    assert torch.allclose(sigma, (a.norm() * b.norm()).expand(5), rtol=1e-12)
    assert torch.allclose(torch.einsum("bk,bn->bkn", u, v.flatten(1)), torch.outer(a, b) / sigma[0], atol=1e-12)


def test_the_krylov_method_is_exact_once_it_has_as_many_steps_as_classes(images: Tensor) -> None:
    model, x = everything(), images.double()
    left, values, right = torch.linalg.svd(dense(model, x), full_matrices=False)
    with untouched(model):
        for steps in (4, 9):
            u, v, sigma = krylov_method(model, x, draw(*x.shape), steps)
            assert torch.allclose(sigma, values[:, 0], rtol=1e-12, atol=0)
            assert torch.allclose((v.flatten(1) * right[:, 0]).sum(1).abs(), torch.ones(12).double(), atol=1e-12)
            assert torch.allclose((u * left[:, :, 0]).sum(1).abs(), torch.ones(12).double(), atol=1e-12)
            assert float(residual(model, x, u, v, sigma).max()) < 1e-12
        single = krylov_method(model.float(), x.float(), draw(*x.shape).float(), 10)[2]
    assert torch.allclose(single.double(), values[:, 0], rtol=1e-5, atol=0)


def test_the_krylov_method_beats_the_power_method_at_the_same_products() -> None:
    """60 classes whose singular values fall like 0.9^k: powers hardly tell the first two apart."""
    left, right = torch.linalg.qr(draw(60, 60)).Q, torch.linalg.qr(draw(80, 60, seed=1)).Q
    w = left @ torch.diag(0.9 ** torch.arange(60).double()) @ right.T
    x, start = draw(3, 1, 8, 10), draw(3, 1, 8, 10, seed=2)
    for steps, worst in ((10, 1e-3), (20, 1e-10)):
        found = {f: f(matrix_net(w), x, start, steps) for f in (krylov_method, power_method)}
        off = {f: float(residual(matrix_net(w), x, *triplet).max()) for f, triplet in found.items()}
        assert off[krylov_method] < worst and off[power_method] > 3 * off[krylov_method]
        assert bool((found[krylov_method][2] <= 1 + 1e-12).all())
        assert bool((found[krylov_method][2] > found[power_method][2]).all())


def test_the_krylov_method_where_its_space_runs_out() -> None:
    """Rank 2 of 8 classes, and no Jacobian at all for one of the images."""
    low = draw(8, 2) @ draw(2, 12, seed=1)
    u, v, sigma = krylov_method(matrix_net(low), draw(4, 1, 3, 4), draw(4, 1, 3, 4, seed=2), 8)
    assert torch.allclose(sigma, torch.linalg.matrix_norm(low, 2).expand(4), rtol=1e-12)
    assert float(residual(matrix_net(low), draw(4, 1, 3, 4), u, v, sigma).max()) < 1e-12
    gate = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.stack([torch.ones(1, 3, 4), -torch.ones(1, 3, 4)]).double()
    with torch.no_grad():
        gate[1].weight.abs_()
        gate[1].bias.zero_()
    u, v, sigma = krylov_method(gate, x, draw(2, 1, 3, 4), 5)
    assert float(sigma[0]) > 0 and float(v[0].norm()) == pytest.approx(1)
    assert float(sigma[1]) == 0.0 and not u[1].any() and not v[1].any()


@pytest.mark.parametrize("q", [1, 2, 3])
def test_norms_from_linf_against_all_corners_of_the_cube(q: float) -> None:
    """The method may stop at a local maximum: never above the true one, and the best of many starts is it."""
    w = draw(4, 6, seed=3)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    exact = torch.linalg.vector_norm(corners @ w.T, ord=q, dim=1).max()
    starts = draw(60, 1, 2, 3, seed=4)
    u, v, sigma = power_method(matrix_net(w), torch.zeros_like(starts), starts, 50, p=math.inf, q=q)
    assert (v.abs() == 1).all()
    conjugate = math.inf if q == 1 else q / (q - 1)
    assert torch.allclose(torch.linalg.vector_norm(u, ord=conjugate, dim=1), torch.ones(60).double())
    assert torch.allclose(sigma, torch.linalg.vector_norm(v.flatten(1) @ w.T, ord=q, dim=1))
    assert (sigma <= exact + 1e-12).all() and sigma.max() == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(("p", "q"), [(2, 2), (math.inf, 2), (3, 1.5), (4, 3)])
def test_the_value_never_falls_and_stops_at_a_stationary_point(p: float, q: float) -> None:
    w, x, start = draw(4, 6, seed=6), torch.zeros(8, 1, 2, 3).double(), draw(8, 1, 2, 3, seed=7)
    values = torch.stack([power_method(matrix_net(w), x, start, k, p=p, q=q)[2] for k in (1, 2, 4, 8, 300)])
    assert (values.diff(dim=0) >= -1e-12).all()
    u, v, _ = power_method(matrix_net(w), x, start, 300, p=p, q=q)
    again = power_method(matrix_net(w), x, v, 1, p=p, q=q)
    assert torch.allclose(again[0], u, atol=1e-6) and torch.allclose(again[1], v, atol=1e-6)


@pytest.mark.parametrize("s", [1, 1.5, 2, 4])
def test_dual_attains_the_norm_at_unit_size(s: float) -> None:
    t = draw(5, 2, 3)
    w = dual(t, s)
    conjugate = math.inf if s == 1 else s / (s - 1)
    assert torch.allclose((w * t).flatten(1).sum(1), torch.linalg.vector_norm(t.flatten(1), ord=s, dim=1))
    assert torch.allclose(torch.linalg.vector_norm(w.flatten(1), ord=conjugate, dim=1), torch.ones(5).double())
    assert torch.allclose(dual((t * 1e-30).float(), s).double(), w, atol=1e-6), "squares would underflow"
    assert torch.equal(dual(0 * t, s), 0 * t)


def test_a_network_without_slope_gives_zeros() -> None:
    found = power_method(matrix_net(torch.zeros(4, 6).double()), draw(2, 1, 2, 3), draw(2, 1, 2, 3, seed=1), 3)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found)
