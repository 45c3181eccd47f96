"""Every attack, found by discovery, against the strength that it claims."""

from __future__ import annotations

import pytest
import torch
from contracts.attack_strength import (
    CONTRACTS,
    EXEMPT,
    SMALLEST,
    WEAK,
    Contract,
    applies,
    breaks_what_is_near_on_an_affine_network,
    known,
    norms,
)
from exact_distances import bent, nearest_wrong, straight
from torch import nn

from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import discover

ATTACKS = discover("attack")
CLAIMS = [
    pytest.param(contract, cls, norm, id=f"{cls.name}-{norm}-{contract.__name__}")
    for cls in ATTACKS.values()
    for norm in norms(cls)
    for contract in CONTRACTS
    if applies(contract, cls, norm)
]


@pytest.mark.parametrize(("contract", "cls", "norm"), CLAIMS)
def test_keeps_its_contract(contract: Contract, cls: type, norm: str) -> None:
    contract(cls, norm)


def test_exceptions_name_attacks_that_there_are() -> None:
    named = set(WEAK) | SMALLEST | {name.split()[0] for reasons in EXEMPT.values() for name in reasons}
    assert named <= set(ATTACKS)
    for name, cls in ATTACKS.items():
        held = [contract for norm in norms(cls) for contract in CONTRACTS if applies(contract, cls, norm)]
        assert (not held) == (name in WEAK)


@pytest.mark.parametrize("name", WEAK)
def test_weak_attacks_are_weak(name: str) -> None:
    """The contracts are not ones that anything keeps."""
    with pytest.raises(AssertionError, match="misses"):
        breaks_what_is_near_on_an_affine_network(ATTACKS[name], "linf")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("network", [straight, bent])
def test_exact_distances_are_reached_and_never_undercut(network: type[nn.Sequential], norm: str) -> None:
    case = known(network, norm)
    model, x, y = case.model, case.batch.x, case.batch.y
    points, distance = nearest_wrong(model, x[:4], y[:4], norm)
    assert torch.equal(distance, case.distance[:4])
    assert points.min() > -1e-9 and points.max() < 1 + 1e-9
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert torch.allclose((points - x[:4]).flatten(1).norm(p=order, dim=1), distance)
    with torch.no_grad():
        assert torch.allclose(logit_margin(model(points), y[:4]), torch.zeros(4, dtype=torch.float64), atol=1e-7)
        aside = torch.randn(4, 20_000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        aside *= (0.999 * distance)[:, None, None] / aside.norm(p=order, dim=2, keepdim=True)
        near = (x[:4].flatten(1)[:, None] + aside).clamp(0, 1).view(-1, 1, 3, 3)
        assert (logit_margin(model(near), y[:4].repeat_interleave(20_000)) > 0).all()
