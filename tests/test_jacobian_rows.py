"""Whole Jacobians, their decomposition and their regression, against matrices written down by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import double_net, gen
from torch import Tensor, nn

from robustlens.linalg import jacobian as module
from robustlens.linalg.jacobian import at_once, decompose, jacobian_rows, jvp, power_method, residual, vjp
from robustlens.linalg.regression import MOST, regressed_jacobian
from robustlens.results.errors import InputError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def chain(*weights: Tensor, bend: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, w in enumerate(weights):
        layers += [nn.ReLU()] if bend and i else []
        layers.append(nn.Linear(w.shape[1], w.shape[0]).double())
        layers[-1].weight.data.copy_(w)
    return nn.Sequential(*layers)


def masked_product(net: nn.Module, x: Tensor) -> Tensor:
    """J = W_L D_{L−1} … D_1 W_1 (B, K, n), D the 0/1 diagonals of the ReLUs that are on."""
    h, j = x.flatten(1), torch.eye(x[0].numel(), dtype=x.dtype).expand(len(x), -1, -1)
    for layer in list(net)[1:]:
        if isinstance(layer, nn.ReLU):
            h, j = h.relu(), (h > 0).double()[:, :, None] * j
        else:
            h, j = layer(h), layer.weight @ j
    return j.detach()


def test_rows_of_a_relu_network_are_the_masked_product_of_its_weights() -> None:
    net = chain(draw(20, 64), draw(15, 20, seed=1), draw(4, 15, seed=2), bend=True)
    x = draw(6, 1, 8, 8, seed=3)
    truth, found = masked_product(net, x), jacobian_rows(net, x)
    assert torch.allclose(found, truth, atol=1e-12) and not found.requires_grad
    assert (truth[0] - truth[1]).abs().max() > 1, "the same pieces everywhere show nothing"
    assert all(p.grad is None for p in net.parameters())


def test_rows_agree_with_both_products_and_these_with_each_other() -> None:
    """⟨u, Jv⟩ = ⟨Jᵀu, v⟩, and both are those of the rows."""
    net, x = double_net().eval(), draw(5, 1, 8, 8)
    u, v, j = draw(5, 4, seed=1), draw(5, 1, 8, 8, seed=2), jacobian_rows(net, x)
    forth, back = jvp(net, x, v), vjp(net, x, u)
    assert torch.allclose(torch.einsum("bkn,bn->bk", j, v.flatten(1)), forth, atol=1e-12)
    assert torch.allclose(torch.einsum("bkn,bk->bn", j, u), back.flatten(1), atol=1e-12)
    assert torch.allclose((u * forth).sum(1), (back * v).flatten(1).sum(1), atol=1e-12)


def test_norm_is_at_most_the_product_and_equals_it_for_orthogonal_layers() -> None:
    x = draw(8, 1, 4, 4)
    weights = [draw(12, 16), draw(9, 12, seed=1), draw(4, 9, seed=2)]
    bound = torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod()
    norms = decompose(jacobian_rows(chain(*weights, bend=True), x)).s[:, 0]
    assert (norms <= bound).all() and (norms > 0).all()
    squares = [2 * torch.linalg.qr(draw(16, 16, seed=s)).Q for s in (4, 5, 6)]
    assert torch.allclose(decompose(jacobian_rows(chain(*squares), x)).s, torch.full((8, 16), 8.0).double())


def test_jacobian_of_a_softmax_sends_nothing_along_the_ones() -> None:
    net = nn.Sequential(chain(draw(4, 16)), nn.Softmax(1))
    x = 0.1 * draw(3, 1, 4, 4)
    rows = jacobian_rows(net, x)
    assert rows.sum(1).abs().max() < 1e-15 and rows.abs().max() > 1e-3
    assert (decompose(rows).s[:, -1] < 1e-14).all()


@pytest.mark.parametrize("shape", [(3, 4, 64), (2, 9, 5), (2, 6, 6), (3, 1, 7)])
def test_decomposition_is_that_of_the_matrix(shape: tuple[int, int, int]) -> None:
    matrix = draw(*shape)
    u, s, v = decompose(matrix.float())
    assert s.dtype == torch.float64 and (s.diff(dim=1) <= 0).all()
    assert torch.allclose(s, torch.linalg.svdvals(matrix.float().double()), rtol=1e-12)
    assert torch.allclose(u @ torch.diag_embed(s) @ v, matrix.float().double(), atol=1e-12)
    eye = torch.eye(s.shape[1], dtype=torch.float64).expand(shape[0], -1, -1)
    assert torch.allclose(u.mT @ u, eye, atol=1e-12) and torch.allclose(v @ v.mT, eye, atol=1e-12)


def test_small_values_survive_next_to_large_ones() -> None:
    """A Gram matrix would lose what is below 1e-8."""
    left, right = torch.linalg.qr(draw(3, 3)).Q, torch.linalg.qr(draw(50, 3)).Q
    values = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    found = decompose((left @ torch.diag(values) @ right.T)[None]).s[0]
    assert torch.allclose(found, values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_a_singular_value_lies_within_the_residual(iterations: int) -> None:
    net, x = double_net().eval(), draw(40, 1, 8, 8)
    u, v, sigma = power_method(net, x, draw(40, 1, 8, 8, seed=1), iterations)
    left = residual(net, x, u, v, sigma)
    away = (sigma[:, None] - decompose(jacobian_rows(net, x)).s).abs().amin(1) / sigma
    assert (away <= left + 1e-12).all()
    j = jacobian_rows(net, x)
    forth = torch.einsum("bkn,bn->bk", j, v.flatten(1)) - sigma[:, None] * u
    assert torch.allclose(left, forth.norm(dim=1) / sigma, atol=1e-10)
    assert float(left.max()) > (0.1 if iterations == 1 else 0), "converged at once: shows nothing"


def test_residual_of_nothing_is_nothing() -> None:
    zero = chain(torch.zeros(3, 16).double())
    x = draw(2, 1, 4, 4)
    assert torch.equal(residual(zero, x, *power_method(zero, x, x, 2)), torch.zeros(2).double())


class Everything(nn.Module):
    """ReLUs as modules, functions and in place, pooling, and a leaky and a smooth layer."""

    def __init__(self, smooth: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.pool, self.leaky = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.LeakyReLU(0.2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 4 * 4, 3)
        self.bend = nn.Softplus() if smooth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.relu(self.norm(self.first(x))))
        return self.head(self.bend(self.leaky(self.second(h)).flatten(1)))


@pytest.mark.parametrize("smooth", [False, True])
def test_regression_finds_the_jacobian_also_on_kinks(smooth: bool) -> None:
    """An even background has ties in every window of the pooling, where answers bend however small a step is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Everything(smooth).eval()
    x = torch.zeros(2, 1, 8, 8)
    x[:, 0, 3:5, 3:6] = torch.rand(2, 2, 3, generator=gen())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    exact = jacobian_rows(net, x).double()
    found = regressed_jacobian(net, x, gen=gen(), batch_size=50)
    assert ((found - exact).norm() / exact.norm()) < (1e-4 if smooth else 3e-6)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    if not smooth:
        far = regressed_jacobian(net, x, gen=gen(), radius=1.0)
        assert ((far - exact).norm() / exact.norm()) < 3e-6, "held pieces are affine"


def test_regression_refuses_images_that_are_too_large() -> None:
    side = int(MOST**0.5) + 1
    with pytest.raises(InputError, match="pixels"):
        regressed_jacobian(nn.Flatten(), torch.zeros(1, 1, side, side), gen=gen())


def test_images_at_once_follow_the_bound_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1000)
    assert (at_once(10, 10), at_once(10, 40), at_once(100, 100)) == (10, 2, 1)
