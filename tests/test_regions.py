"""Hidden units and their gradients against dense derivatives, and networks that have other regions."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.linalg.regions import DUAL, gradient_norms, observed, pools, require_relu_regions, slopes_along
from robustlens.results.errors import InputError


def net(pool: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *([nn.MaxPool2d(2)] if pool else [nn.AvgPool2d(2)]),
            *(nn.Conv2d(4, 5, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(20, 4)),
        ).double().eval()  # fmt: skip


def dense(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """All heights (B, U) and their gradients (B, U, n), one image at a time."""

    def flat(image: Tensor) -> Tensor:
        return torch.cat(observed(model, image[None])[0], 1)[0]

    rows = torch.stack([torch.autograd.functional.jacobian(flat, image).flatten(1) for image in x])
    return torch.cat(observed(model, x)[0], 1).detach(), rows


@pytest.mark.parametrize("pool", [False, True])
def test_heights_slopes_and_norms_against_dense_derivatives(pool: bool, images: Tensor) -> None:
    model, x = net(pool), images[:3].double()
    values, rows = dense(model, x)
    assert values.shape == (3, 4 * 64 + 5 * 4)
    v = torch.randn(x.shape, generator=gen(2), dtype=torch.float64)
    layers, changes = slopes_along(lambda z: observed(model, z)[0], x, v)
    assert torch.equal(torch.cat(layers, 1), values)
    assert torch.allclose(torch.cat(changes, 1), torch.einsum("bun,bn->bu", rows, v.flatten(1)), atol=1e-12)
    for q in DUAL.values():
        for chunk in (2, 100):
            sizes = torch.cat(gradient_norms(lambda z: observed(model, z)[0], x, q, chunk=chunk), 1)
            assert torch.allclose(sizes, rows.norm(q, dim=2), rtol=1e-10)


def test_pools_are_seen(images: Tensor) -> None:
    assert pools(net(pool=True), images.double()) and not pools(net(), images.double())


def test_refuses_what_has_other_regions(images: Tensor) -> None:
    require_relu_regions(net(), images.double(), "a test")
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(InputError, match="under a test: expected a piecewise linear network"):
        require_relu_regions(tanh, images, "a test")
    with pytest.raises(InputError, match="got none"):
        require_relu_regions(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), images, "a test")
