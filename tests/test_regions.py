"""Hidden units and their gradients against dense derivatives, and networks that have other regions."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.linalg.regions import (
    DUAL,
    bends,
    gradient_norms,
    observed,
    other_pools,
    require_relu_regions,
    slopes_along,
)
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


def test_bends_are_the_inputs_of_relus_and_what_windows_lack_to_their_largest_entry(images: Tensor) -> None:
    x = images[:3].double()
    seen, logits = observed(net(pool=True), x)
    found = bends(net(pool=True), x)
    assert all(torch.equal(a, b) for a, b in zip(found.relus, seen, strict=True)) and torch.equal(found.logits, logits)
    (windows,) = found.windows
    pooled = seen[0].relu().view(3, 4, 4, 2, 4, 2).transpose(3, 4).flatten(4)  # image, channel, row, column, entry
    truth = pooled - pooled.amax(4, keepdim=True)
    assert torch.equal(windows.sort().values, truth.flatten(1).sort().values)
    assert bends(net(), x).windows == []


class Functions(nn.Module):
    """ReLUs and pooling as functions, the latter over windows that overlap and are padded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(F.max_pool2d(F.leaky_relu(x - 0.5, 0.1), (3, 2), stride=2, padding=1)).flatten(1)


def test_bends_of_functions_and_of_padded_windows(images: Tensor) -> None:
    """An entry's height reaches 0 where it takes over its window: the pooled value then has its slope."""
    x = images[:1].double() + 0.01 * torch.rand(1, 1, 8, 8, generator=gen(3), dtype=torch.float64)
    found = bends(Functions(), x)
    assert [h.shape for h in found.relus] == [(1, 64), (1, 20)] and found.windows[0].shape == (1, 6 * 20)
    heights = found.windows[0].view(6, 20)
    assert bool((heights <= 0).all()) and bool(((heights == 0).sum(0) == 1).all())
    assert bool(torch.isinf(heights).any()), "padding"
    padded = F.pad(F.leaky_relu(x - 0.5, 0.1), (1, 1, 1, 1), value=-torch.inf)[0, 0]
    for at in range(20):
        i, j = 2 * (at // 5), 2 * (at % 5)
        window = padded[i : i + 3, j : j + 2].flatten()
        assert torch.equal(heights[:, at], window - window.max())


def test_pools_that_bends_do_not_see(images: Tensor) -> None:
    x = images.double()
    others = nn.MaxPool2d(3, ceil_mode=True), nn.AdaptiveMaxPool2d(2)
    assert not other_pools(net(pool=True), x) and not other_pools(net(), x)
    assert all(other_pools(nn.Sequential(nn.ReLU(), pool, nn.Flatten()), x) for pool in others)


def test_refuses_what_has_other_regions(images: Tensor) -> None:
    require_relu_regions(net(), images.double(), "a test")
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(InputError, match="under a test: expected a piecewise linear network"):
        require_relu_regions(tanh, images, "a test")
    with pytest.raises(InputError, match="got none"):
        require_relu_regions(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), images, "a test")
