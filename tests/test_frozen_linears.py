"""Linear layers through oneDNN: the same numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.linalg.frozen_linears import quick_linears
from robustlens.threats.lp import Lp

PRODUCT = "mkldnn::_linear_pointwise"

#: A torch without oneDNN multiplies as ever.
HERE = torch.backends.mkldnn.is_available()


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 60, bias=bias), nn.ReLU(), nn.Linear(60, 70), nn.Linear(70, 4))


def images(n: int = 9) -> Tensor:
    return torch.rand(n, 1, 10, 10, generator=gen(1))


def products(model: nn.Module, x: Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(x)
    return sum(event.count for event in seen.key_averages() if event.key == PRODUCT)


def derivatives(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), Jᵀu and Jv at fixed u and v."""
    point = x.detach().requires_grad_()
    y = model(point)
    u = torch.randn(y.shape, generator=gen(3)).requires_grad_()
    (pulled,) = torch.autograd.grad(y, point, u, create_graph=True)
    return y, pulled, torch.autograd.grad(pulled, u, torch.randn(x.shape, generator=gen(4)))[0]


@pytest.mark.parametrize("bias", [True, False])
def test_numbers_are_those_of_torch(bias: bool) -> None:
    model, x = network(bias=bias).requires_grad_(False), images()
    truth = derivatives(model, x)
    with quick_linears(model):
        assert products(model, x) == 2 * HERE, "the last layer is too small to gain"
        found = derivatives(model, x)
        (flat,) = torch.autograd.grad(model(point := x.clone().requires_grad_()).sum(), point)  # a gradient of stride 0
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    (plain,) = torch.autograd.grad(model(point := x.clone().requires_grad_()).sum(), point)
    assert torch.allclose(flat, plain, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="on purpose"), quick_linears(model), quick_linears(model):
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(module) for module in model.modules())
    assert products(model.requires_grad_(False), images()) == 0


def test_weights_that_learn_other_types_and_no_images_go_the_usual_way() -> None:
    model, x = network(), images()
    with quick_linears(model):
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.requires_grad_(False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16 and products(model, x) == 0
        assert model(x[:0]).shape == (0, 4)
        model.double()
        assert model(x.double()).dtype == torch.float64
        model.float()
        tokens = torch.rand(2, 3, 100, generator=gen(2))
        assert torch.allclose(model[1](tokens), nn.functional.linear(tokens, model[1].weight, model[1].bias), atol=1e-6)
        single = torch.rand(100, generator=gen(2))
        assert model[1](single).shape == (60,)


def test_layers_with_another_forward_keep_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(100, 60)).requires_grad_(False)
    x = torch.rand(3, 100, generator=gen(1))
    truth = model(x)
    with quick_linears(model):
        assert torch.equal(model(x), truth)


def test_attacks_have_them() -> None:
    model = network().eval()
    attack = PGD(threat=Lp("linf", 0.1), steps=1, random_start=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        craft(attack, model, images(), torch.zeros(9, dtype=torch.long), gen=gen(0))
    seen = sum(event.count for event in profiled.key_averages() if event.key == PRODUCT)
    assert seen >= 4 * HERE, "two layers, there and back"
    assert all(p.requires_grad for p in model.parameters())


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(1, 3, 3), nn.Linear(192, 60), nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.conv(x).relu().flatten(1)))


@pytest.mark.parametrize("how", ["the network", "the module itself", "a function in it"])
def test_compiled_networks_are_attacked_as_they_are(how: str) -> None:
    """With ``fullgraph``, torch refuses what it cannot trace; two attacks compile what one does."""
    model: nn.Module = Digits().eval()
    x, y = torch.rand(9, 1, 10, 10, generator=gen(1)), torch.zeros(9, dtype=torch.long)
    attack = PGD(threat=Lp("linf", 0.1), steps=2, random_start=False)
    wanted = craft(attack, model, x, y, gen=gen(0))
    times: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        times.append(1)
        return graph.forward

    if how == "the network":
        model = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "the module itself":
        model.compile(backend=backend, fullgraph=True)
    else:
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert torch.allclose(craft(attack, model, x, y, gen=gen(0)), wanted, atol=1e-6)
    before = len(times)
    assert torch.allclose(craft(attack, model, x, y, gen=gen(0)), wanted, atol=1e-6)
    assert before > 0 and (len(times) == before or how == "a function in it")
