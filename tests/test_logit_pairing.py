"""Adversarial logit pairing against its equation, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.core.types import Batch
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.logit_pairing import LogitPairing
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

ATTACK = PGD(threat=Lp("linf", 0.1), steps=3)


def printed(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, c: float, weight: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, one_adv, label in zip(x, x_adv, y.tolist(), strict=True):
        z, z_adv = model(one[None])[0], model(one_adv[None])[0]
        clean, adversarial = (-(t.exp() / t.exp().sum())[label].log() for t in (z, z_adv))
        pairing = sum((z[k] - z_adv[k]) ** 2 for k in range(4)) / 4
        total = total + (1 - c) * adversarial + c * clean + weight * pairing
    return total / len(x)


@pytest.mark.parametrize(("c", "weight"), [(0.5, 0.5), (0.0, 2.0), (0.3, 0.0)])
def test_loss_and_weight_gradient_against_the_equation(
    network: nn.Module, batch: Batch, c: float, weight: float
) -> None:
    method = LogitPairing(attack=ATTACK, clean_weight=c, weight=weight)
    crafted = method.craft(network, batch, gen=gen())
    terms = method.loss(network, crafted)
    theirs = printed(network, batch.x, crafted.x_adv, batch.y, c, weight)
    assert float(terms.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    a = torch.autograd.grad(terms.loss, list(network.parameters()))
    b = torch.autograd.grad(theirs, list(network.parameters()))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("c", [0.0, 0.5])
def test_without_weight_it_is_adversarial_training_bit_for_bit(net: nn.Module, images: Tensor, c: float) -> None:
    batch = Batch(images, torch.arange(12) % 4, torch.arange(12))
    losses, gradients = [], []
    for method in (LogitPairing(attack=ATTACK, weight=0.0, clean_weight=c), Adversarial(attack=ATTACK, clean_weight=c)):
        model = copy.deepcopy(net).train()
        torch.manual_seed(3)
        losses.append(method.loss(model, method.craft(model, batch, gen=gen())).loss)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
        assert str(method.passes) == ("3 input + 1 weight" if c == 0 else "3 input + 2 weight")
    assert torch.equal(*losses) and all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_a_linear_network_pays_the_squared_shift_of_its_logits(batch: Batch) -> None:
    """f(x') − f(x) = W δ, whatever the image: a closed form, and the bias has no part in it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    method = LogitPairing(attack=ATTACK)
    crafted = method.craft(model, batch, gen=gen())
    pairing = method.loss(model, crafted).parts["pairing"]
    delta = (crafted.x_adv - batch.x).flatten(1)
    gram = delta.T @ delta / (4 * len(batch))
    w = model[1].weight
    assert float(pairing.detach()) == pytest.approx(float((w @ gram @ w.T).trace().detach()), abs=1e-12)
    slope, bias = torch.autograd.grad(pairing, [w, model[1].bias])
    assert torch.allclose(slope, 2 * w @ gram, atol=1e-12) and float(bias.abs().max()) < 1e-15


@pytest.mark.parametrize("wrong", [{"weight": -0.5}, {"clean_weight": 1.5}, {"clean_weight": -0.1}])
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"logit-pairing {next(iter(wrong))}: expected"):
        LogitPairing(attack=ATTACK, **wrong)
