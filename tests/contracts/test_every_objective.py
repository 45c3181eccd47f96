"""What every objective, regularizer and update must hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn

from robustlens.core.discovery import build, describe, discover
from robustlens.core.types import Batch, Objective, Regularizer, Update
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError
from robustlens.updates.descend import Descend


def examples(kind: str) -> list[Any]:
    return [example for cls in discover(kind).values() for example in cls.examples()]


def neutrals(kind: str) -> list[Any]:
    return [cls.neutral() for cls in discover(kind).values() if hasattr(cls, "neutral")]


def names(plugin: Any) -> str:
    return plugin.name


@pytest.fixture
def batch(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, torch.arange(len(labels)))


def smooth_net() -> nn.Module:
    """A smooth network in float64, so that finite differences have no kinks to step over."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = nn.Flatten(), nn.Linear(64, 7), nn.Softplus(), nn.Linear(7, 4)
        return nn.Sequential(*layers).double()


def fitting_net(plugin: Any, batch: Batch) -> nn.Module:
    """The smooth network, or the same with ReLU for what needs a piecewise linear one."""
    model = smooth_net()
    if hasattr(plugin, "check"):
        try:
            plugin.check(model, batch.x.double())
        except InputError:
            model[2] = nn.ReLU()
            plugin.check(model, batch.x.double())
    return model


def gradient(
    model: nn.Module, update: Update, objective: Objective, regs: tuple[Any, ...], batch: Batch
) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(9)
    update.backward(model, objective, regs, batch, gen=gen(3))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("objective", examples("objective"), ids=names)
def test_gradient_by_finite_differences(objective: Objective, batch: Batch) -> None:
    model = smooth_net()
    double = Batch(batch.x.double(), batch.y, batch.index)
    crafted = objective.craft(model, double, gen=gen())
    model.zero_grad()
    objective.loss(model, crafted).loss.backward()
    for p in model.parameters():
        direction = torch.randn(p.shape, generator=gen(1), dtype=torch.float64)
        slope = float((p.grad * direction).sum())
        values = []
        for side in (1e-5, -1e-5):
            with torch.no_grad():
                p += side * direction
                values.append(float(objective.loss(model, crafted).loss))
                p -= side * direction
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("regularizer", examples("regularizer"), ids=names)
def test_penalty_gradient_by_finite_differences(regularizer: Regularizer, batch: Batch) -> None:
    """Directions that were searched for without gradient stay what they are."""
    model = fitting_net(regularizer, batch)
    x = batch.x.double().requires_grad_()
    crafted = Standard().craft(model, Batch(x, batch.y, batch.index), gen=gen())
    found = regularizer.search(model, crafted, gen=gen()) if hasattr(regularizer, "search") else None

    def penalty() -> Tensor:
        terms = Standard().loss(model, crafted)
        if found is not None:
            return regularizer.value(model, crafted, terms, found)
        return regularizer.penalty(model, crafted, terms, gen=gen())

    weights = list(model.parameters())
    slopes = torch.autograd.grad(penalty(), weights, allow_unused=True)
    assert any(slope is not None and bool(slope.any()) for slope in slopes)
    for p, slope in zip(weights, slopes, strict=True):
        direction = torch.randn(p.shape, generator=gen(1), dtype=torch.float64)
        values = []
        for side in (1e-5, -1e-5):
            with torch.no_grad():
                p += side * direction
            values.append(float(penalty().detach()))
            with torch.no_grad():
                p -= side * direction
        ours = 0.0 if slope is None else float((slope * direction).sum())
        assert ours == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("objective", neutrals("objective"), ids=names)
def test_neutral_objective_is_standard_training_bit_for_bit(objective: Objective, batch: Batch) -> None:
    ours, theirs = SmallNet(), SmallNet()
    theirs.load_state_dict(ours.state_dict())
    a = gradient(ours, Descend(), objective, (), batch)
    b = gradient(theirs, Descend(), Standard(), (), batch)
    assert len(a) == len(b) > 0
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize("regularizer", neutrals("regularizer"), ids=names)
def test_neutral_regularizer_is_standard_training_bit_for_bit(
    regularizer: Regularizer, net: nn.Module, batch: Batch
) -> None:
    plain = copy.deepcopy(net)
    a = gradient(net, Descend(), Standard(), (regularizer,), batch)
    b = gradient(plain, Descend(), Standard(), (), batch)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("objective", examples("objective"), ids=names)
def test_crafting_touches_nothing(objective: Objective, net: nn.Module, batch: Batch) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    crafted = objective.craft(net, batch, gen=gen())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training and torch.equal(random, torch.get_rng_state())
    assert not crafted.x_adv.requires_grad and crafted.batch is batch


def test_the_plain_step_leaves_the_gradient_of_the_whole_loss(net: nn.Module, batch: Batch) -> None:
    net.eval()
    found = gradient(net, Descend(), Standard(), (), batch)
    net.zero_grad()
    nn.functional.cross_entropy(net(batch.x), batch.y).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(found, net.parameters(), strict=True))


@pytest.mark.parametrize("update", examples("update"), ids=names)
def test_update_keeps_weights_and_random_state(update: Update, net: nn.Module, batch: Batch) -> None:
    """Weights are what they were; BatchNorm statistics and random draws move as in one plain step."""
    plain = copy.deepcopy(net)
    before = [p.detach().clone() for p in net.parameters()]
    gradient(net, update, Standard(), (), batch)
    random = torch.get_rng_state()
    gradient(plain, Descend(), Standard(), (), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.requires_grad for p in net.parameters()) and net.training
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("update", neutrals("update"), ids=names)
def test_neutral_update_is_the_plain_step_bit_for_bit(update: Update, net: nn.Module, batch: Batch) -> None:
    plain = copy.deepcopy(net)
    a = gradient(net, update, Standard(), (), batch)
    b = gradient(plain, Descend(), Standard(), (), batch)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["objective", "regularizer", "update", "constraint"])
def test_settings_round_trip(kind: str) -> None:
    for plugin in examples(kind):
        assert build(kind, describe(plugin)) == plugin
