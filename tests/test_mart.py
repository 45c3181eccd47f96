"""MART against its equations, written out."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.core.types import Batch, Crafted
from robustlens.objectives.mart import MART
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

ATTACK = PGD(threat=Lp("linf", 0.1), steps=3)
NO_ATTACK = PGD(threat=Lp("linf", 0.0))


def network(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, classes)).double()


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def boosted(p: Tensor, y: int) -> Tensor:
    others = [p[k] for k in range(len(p)) if k != y]
    return -p[y].log() - (1.0001 - max(others)).log()


def printed(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, weight: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, one_adv, label in zip(x, x_adv, y.tolist(), strict=True):
        p, q = softmax(model(one[None])[0]), softmax(model(one_adv[None])[0])
        kl = sum(p[k] * (p[k] / q[k]).log() for k in range(len(p)))
        total = total + boosted(q, label) + weight * kl * (1 - p[label])
    return total / len(x)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_loss_and_weight_gradient_against_the_equation(batch: Batch, weight: float) -> None:
    model = network()
    method = MART(attack=ATTACK, weight=weight)
    crafted = method.craft(model, batch, gen=gen())
    terms = method.loss(model, crafted)
    theirs = printed(model, batch.x, crafted.x_adv, batch.y, weight)
    assert float(terms.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    a = torch.autograd.grad(terms.loss, list(model.parameters()))
    b = torch.autograd.grad(theirs, list(model.parameters()))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(a, b, strict=True))
    assert torch.equal(terms.logits, model(crafted.x_adv))


def test_without_attack_and_weight_the_boosted_cross_entropy_of_the_clean_images_is_left(batch: Batch) -> None:
    """For two classes it is −log p_y − log(p_y + 0.0001): about twice the cross-entropy, never the cross-entropy."""
    model, y = network(classes=2), batch.y % 2
    method = MART(attack=NO_ATTACK, weight=0.0)
    two = Batch(batch.x, y, batch.index)
    loss = method.loss(model, method.craft(model, two, gen=gen())).loss
    p = torch.stack([softmax(z)[label] for z, label in zip(model(batch.x), y, strict=True)])
    assert float(loss.detach()) == pytest.approx(float((-p.log() - (p + 1e-4).log()).mean().detach()), abs=1e-12)
    assert float(loss.detach()) == pytest.approx(float(-2 * p.log().mean().detach()), rel=1e-3)


def test_without_attack_the_divergence_is_zero(batch: Batch) -> None:
    model = network()
    with_, without = (MART(attack=NO_ATTACK, weight=w) for w in (5.0, 0.0))
    crafted = with_.craft(model, batch, gen=gen())
    a, b = with_.loss(model, crafted), without.loss(model, crafted)
    assert float(a.parts["weighted_kl"].detach()) == 0.0 and torch.equal(a.loss, b.loss)


def test_a_certain_example_has_no_weight_and_a_wrong_one_has_all_of_it() -> None:
    """Logits (margin, 0) at the clean image, (0, 0) at the other: KL ≈ log 2 for both, times 1 − p_y."""
    model = nn.Flatten()
    x = torch.tensor([[30.0, 0.0], [30.0, 0.0]], dtype=torch.float64).view(2, 1, 1, 2)
    y = torch.tensor([0, 1])
    terms = MART(attack=ATTACK, weight=1.0).loss(model, Crafted(Batch(x, y, y), torch.zeros_like(x)))
    assert float(terms.parts["weighted_kl"]) == pytest.approx(torch.tensor(2.0).log().item() / 2, abs=1e-9)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_saturated_logits_give_finite_values_and_gradients_in_float32(scale: float) -> None:
    """Probabilities of exactly 0 and 1, on the right and on the wrong class."""
    z = scale * torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    z_adv = scale * torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    x, x_adv = (t.view(3, 1, 1, 3).requires_grad_() for t in (z, z_adv))
    y = torch.tensor([0, 2, 0])
    loss = MART(attack=ATTACK).loss(nn.Flatten(), Crafted(Batch(x, y, y), x_adv)).loss
    grads = torch.autograd.grad(loss, [x, x_adv])
    assert torch.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in grads)
    bound = -torch.tensor(1e-4).log().item()  # of the second logarithm
    # Cross-entropies 2 s, 2 s, s; second logarithms at their bound; KL 2 s, 0, ⅔ s − log 3 with weights 0, 1, ⅔.
    expected = (5 * scale / 3 + bound) + 5.0 * (2 / 3) * (2 * scale / 3 - torch.tensor(3.0).log().item()) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3)


def test_refusal() -> None:
    with pytest.raises(InputError, match="mart weight: expected a number ≥ 0, got -1"):
        MART(attack=ATTACK, weight=-1.0)
