"""What every constraint must hold: it changes weight matrices, in place, and nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn

from robustlens.core.discovery import build, describe, discover
from robustlens.core.types import Constraint


def examples() -> list[Constraint]:
    return [example for cls in discover("constraint").values() for example in cls.examples()]


def small_net() -> nn.Module:
    """Convolution, BatchNorm, dropout and a linear layer in float32 and channels-last; one parameter is frozen."""
    model = SmallNet()
    model.fc.bias.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def deep_net() -> nn.Module:
    """Linear layers in float64."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Softplus(), nn.Linear(7, 4)).double()


MODELS = {"small": small_net, "deep": deep_net}


@pytest.fixture(params=MODELS)
def stretched(request: Any) -> nn.Module:
    """A network in training whose weights are four times as large as at its start, with gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[request.param]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    for p in model.parameters():
        p.grad = torch.rand(p.shape, generator=gen(0)).to(p) if p.requires_grad else None
    list(model.children())[-1].eval()  # modules need not all be in the same mode
    return model


def image(model: nn.Module) -> Tensor:
    return torch.rand(1, 1, 8, 8, generator=gen(1)).to(next(model.parameters()))


@pytest.mark.parametrize("constraint", examples(), ids=lambda c: c.name)
def test_settings_round_trip(constraint: Constraint) -> None:
    assert isinstance(constraint, Constraint)
    assert build("constraint", describe(constraint)) == constraint
    assert constraint.every in ("step", "epoch")


@pytest.mark.parametrize("constraint", examples(), ids=lambda c: c.name)
def test_only_weight_matrices_change_and_in_place(constraint: Constraint, stretched: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in stretched.named_parameters()}
    stored = {name: (p, p.data_ptr(), p.dtype, p.shape, p.stride()) for name, p in stretched.named_parameters()}
    constraint.apply(stretched, image(stretched))
    for name, p in stretched.named_parameters():
        assert (p, p.data_ptr(), p.dtype, p.shape, p.stride()) == stored[name], name
        assert bool(p.isfinite().all()), name
        assert p.ndim >= 2 or torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in stretched.named_parameters())


@pytest.mark.parametrize("constraint", examples(), ids=lambda c: c.name)
def test_everything_else_is_left_as_it_was(constraint: Constraint, stretched: nn.Module) -> None:
    modes = [module.training for module in stretched.modules()]
    wanted = [p.requires_grad for p in stretched.parameters()]
    grads = [copy.deepcopy(p.grad) for p in stretched.parameters()]
    buffers = [b.clone() for b in stretched.buffers()]
    random, x = torch.get_rng_state(), image(stretched)
    shown = x.clone()
    constraint.apply(stretched, x)
    assert [module.training for module in stretched.modules()] == modes
    assert [p.requires_grad for p in stretched.parameters()] == wanted
    for p, grad in zip(stretched.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))
    assert all(torch.equal(a, b) for a, b in zip(stretched.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, shown)
    assert not any(module._forward_hooks for module in stretched.modules())


@pytest.mark.parametrize("constraint", examples(), ids=lambda c: c.name)
def test_facts_are_plain_numbers_and_the_same_again(constraint: Constraint, stretched: nn.Module) -> None:
    twin = copy.deepcopy(stretched)
    facts = constraint.apply(stretched, image(stretched))
    assert facts and all(type(value) is float and math.isfinite(value) for value in facts.values())
    assert all(key.isidentifier() for key in facts)
    assert constraint.apply(twin, image(twin)) == facts
    assert all(torch.equal(a, b) for a, b in zip(stretched.parameters(), twin.parameters(), strict=True))
