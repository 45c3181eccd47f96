"""Regularizers against their printed equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustlens.core import discovery
from robustlens.core.types import Batch, Crafted, Terms
from robustlens.regularizers.orthogonality import Orthogonality

NOTHING = Crafted(Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), torch.zeros(1).long()), torch.zeros(1, 1, 1, 1))
NO_TERMS = Terms(torch.zeros(()), torch.zeros(1, 2))


def printed(w: Tensor) -> Tensor:
    """‖W Wᵀ − I‖_F², as the paper writes it."""
    return (w @ w.T - torch.eye(len(w))).square().sum()


@pytest.mark.parametrize(
    ("model", "shape", "layer", "floor"),
    [
        ("mnist-cnn", (1, 28, 28), "conv1", 32 - 9),
        ("cifar-cnn", (3, 32, 32), "conv1", 64 - 27),
        ("mlp", (1, 28, 28), "fc1", 1024 - 784),
    ],
)
def test_tall_layers_have_a_floor_that_the_smaller_gram_matrix_lacks(
    model: str, shape: tuple[int, int, int], layer: str, floor: int
) -> None:
    net = discovery.build("model", model).build(shape, 10)
    weight = dict(net.named_parameters())[f"{layer}.weight"]
    before = float(Orthogonality(beta=1.0).penalty(net, NOTHING, NO_TERMS, gen=torch.Generator()).detach())
    old = float(printed(weight.detach().flatten(1)))
    with torch.no_grad():
        flat = torch.empty(weight.shape[0], weight[0].numel())
        weight.copy_(torch.nn.init.orthogonal_(flat).view_as(weight))
    assert float(printed(weight.detach().flatten(1))) == pytest.approx(floor, abs=1e-3)
    after = float(Orthogonality(beta=1.0).penalty(net, NOTHING, NO_TERMS, gen=torch.Generator()).detach())
    assert before - after == pytest.approx(old - floor, rel=1e-4), "the layer's own term falls to zero"


def test_value_and_gradient_against_the_printed_equation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(5, 9))
    conv, fc = net[0].weight, net[2].weight
    ours = Orthogonality(beta=0.3).penalty(net, NOTHING, NO_TERMS, gen=torch.Generator())
    theirs = 0.3 * (printed(conv.flatten(1)) + printed(fc))
    assert float((theirs - ours).detach()) == pytest.approx(0.3 * (9 - 5), rel=1e-5)
    a = torch.autograd.grad(ours, [conv, fc])
    b = torch.autograd.grad(theirs, [conv, fc])
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a, b, strict=True))
