"""Frozen convolutions: the same derivatives as torch's, and no work for frozen weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from robustlens.linalg.frozen_convolutions import FrozenConvolutions, quick_gradients


def derivatives(layer: nn.Module, x: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), Jᵀu and Jv at fixed u and v."""
    point = x.detach().requires_grad_()
    if frozen:
        with FrozenConvolutions():
            y = layer(point)
    else:
        y = layer(point)
    u = torch.randn(y.shape, generator=gen(3), dtype=y.dtype).requires_grad_()
    v = torch.randn(x.shape, generator=gen(4), dtype=x.dtype)
    (pulled,) = torch.autograd.grad(y, point, u, create_graph=True)
    return y, pulled, torch.autograd.grad(pulled, u, v)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": 1},
        {"stride": 2},
        {"stride": 3, "padding": 2},
        {"stride": (2, 1), "padding": (0, 2)},
        {"dilation": 2, "padding": 1, "stride": 2},
        {"groups": 2, "bias": False},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 4, "stride": 4, "padding": 2},
        {"kernel_size": (4, 2), "stride": 2, "padding": (0, 1), "bias": False},
        {"kernel_size": (6, 4), "stride": (3, 2), "padding": (4, 3)},
        {"kernel_size": (2, 3), "stride": (2, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [2, 6])
def test_derivatives_are_those_of_torch(channels: int, settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(channels, 6, **{"kernel_size": 3, **settings}).double().requires_grad_(False)
    x = torch.randn(3, channels, 11, 8, generator=gen(1), dtype=torch.float64)
    ours, theirs = (derivatives(layer, x, frozen=frozen) for frozen in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def convolutions(*, frozen: bool) -> int:
    """How many convolutions Jv takes beyond Jᵀu."""
    layer = nn.Conv2d(6, 6, 3).requires_grad_(False)
    x = torch.randn(3, 6, 8, 8, generator=gen(1)).requires_grad_()
    if frozen:
        with FrozenConvolutions():
            y = layer(x)
    else:
        y = layer(x)
    u = torch.ones_like(y).requires_grad_()
    (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.autograd.grad(pulled, u, torch.ones_like(x))
    return sum(event.count for event in seen.key_averages() if event.key == "aten::_convolution")


def test_frozen_weights_cost_nothing() -> None:
    assert convolutions(frozen=True) <= 1 < convolutions(frozen=False)


def test_weights_that_learn_keep_their_gradient() -> None:
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5, generator=gen(1))
    with FrozenConvolutions():
        y = layer(x)
    y.sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


class Doubled(nn.Conv2d):
    """A layer that is no convolution any more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_quick_gradients_take_the_quick_way_inside_and_leave_nothing_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Doubled(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    model.requires_grad_(False)
    x = torch.rand(1, 1, 5, 5, generator=gen(1)).requires_grad_()

    def ways() -> list[str]:
        """What the backward pass of each layer is called."""
        inputs = [x, *(torch.rand(1, 2, 5, 5, generator=gen(2)).requires_grad_() for _ in range(2))]
        ends = [layer(image).grad_fn for layer, image in zip(model, inputs, strict=True)]
        return [end.name() for end in ends]

    plain, (slope,) = ways(), torch.autograd.grad(model(x).sum(), x)
    with quick_gradients(model):
        quick = ways()
        assert torch.allclose(torch.autograd.grad(model(x).sum(), x)[0], slope, rtol=1e-6)
        with torch.no_grad():
            assert model(x).grad_fn is None
    assert quick == ["_ConvolutionBackward", *plain[1:]] and plain[0] != quick[0]
    with pytest.raises(RuntimeError, match="on purpose"), quick_gradients(model), quick_gradients(model):
        raise RuntimeError("on purpose")
    assert ways() == plain and not any("forward" in vars(layer) for layer in model)
