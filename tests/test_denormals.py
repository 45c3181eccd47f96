"""Gradients that are too small to matter go no further backward; all others are as they were, to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from small_runs import fresh
from torch import nn
from torch.nn import functional as F

from robustlens.attacks.pgd import PGD
from robustlens.core.denormals import NEGLIGIBLE, drop_denormals
from robustlens.core.types import Batch, Crafted
from robustlens.objectives.standard import Standard
from robustlens.threats.lp import Lp
from robustlens.updates.descend import backward_to_weights, whole

TINY = torch.finfo(torch.float32).tiny


def network(scale: float) -> nn.Module:
    """A convolution whose logits are ``scale`` times as large."""
    layers = fresh(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)))
    with torch.no_grad():
        layers[3].weight *= scale
    return layers


def batch(model: nn.Module) -> Batch:
    """Images with the labels that the network gives them."""
    x = torch.rand(16, 1, 8, 8, generator=gen(1))
    return Batch(x, model(x).argmax(1), torch.arange(16))


def slopes(model: nn.Module, here: Batch, *, dropped: bool) -> list[torch.Tensor]:
    model.zero_grad()
    if dropped:
        backward_to_weights(model, whole(model, Standard(), (), Crafted(here, here.x), gen=gen()))
    else:
        F.cross_entropy(model(here.x), here.y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def denormals(tensors: list[torch.Tensor]) -> int:
    return sum(int(((t != 0) & (t.abs() < TINY)).sum()) for t in tensors)


def test_ordinary_gradients_are_the_same_bits() -> None:
    model = network(1.0)
    here = batch(model)
    pairs = zip(slopes(model, here, dropped=True), slopes(model, here, dropped=False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_of_a_network_that_is_sure_only_what_matters_is_left() -> None:
    model = network(4000.0)
    here = batch(model)
    plain, dropped = (slopes(model, here, dropped=each) for each in (False, True))
    assert denormals(plain) > 100 and denormals(dropped) == 0
    for one, other in zip(plain, dropped, strict=True):
        size = float(one.abs().max())
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * size + 1e4 * NEGLIGIBLE)


def test_float64_keeps_everything() -> None:
    logits = torch.tensor([[0.0, 95.0]], dtype=torch.float64, requires_grad=True)
    drop_denormals(logits)
    F.cross_entropy(logits, torch.tensor([1])).backward()
    assert logits.grad is not None and 0 < float(logits.grad[0, 0]) < NEGLIGIBLE


@pytest.mark.parametrize("scale", [1.0, 4000.0])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_pgd_goes_where_it_went(norm: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(scale).eval()
    here = batch(model)
    attack = PGD(threat=Lp(norm, 0.5), steps=5)
    found = attack.perturb(model, here.x, here.y, gen=gen(2))
    monkeypatch.setattr("robustlens.attacks.pgd.drop_denormals", lambda logits: None)
    torch.testing.assert_close(found, attack.perturb(model, here.x, here.y, gen=gen(2)), rtol=0, atol=1e-6)
