"""TRADES against its equations, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn

from robustlens.attacks.losses import attack_loss
from robustlens.core.types import Batch, Crafted
from robustlens.objectives.trades import TRADES
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of two probability vectors, class by class."""
    return sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))


def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    exponentials = model(x[None])[0].exp()
    return exponentials / exponentials.sum()


def printed_attack(model: nn.Module, x: Tensor, noise: Tensor, eps: float, steps: int, size: float) -> Tensor:
    """Algorithm 1, lines 5–9, on one image in the ℓ∞ ball: step along the sign, clip to the ball, clip to the box."""
    point = (x + 0.001 * noise).clamp(0, 1)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        value = divergence(probabilities(model, x).detach(), probabilities(model, point))
        (grad,) = torch.autograd.grad(value, point)
        point = (point + size * grad.sign()).detach()
        point = torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)
    return point


def test_the_attack_is_the_printed_algorithm(network: nn.Module, batch: Batch) -> None:
    method = TRADES(threat=Lp("linf", 0.05), steps=4, step_size=0.02)
    ours = method.craft(network, batch, gen=gen(7)).x_adv
    noise = torch.empty_like(batch.x).normal_(generator=gen(7))
    theirs = torch.stack([printed_attack(network, x, n, 0.05, 4, 0.02) for x, n in zip(batch.x, noise, strict=True)])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert float((ours - batch.x).abs().max()) == pytest.approx(0.05)


def test_the_l2_step_is_twice_eps_over_steps(network: nn.Module, batch: Batch) -> None:
    """One step of 2 · eps from next to x leaves the ball and ends on the sphere, in the direction of the gradient."""
    inner = Batch(batch.x.clamp(0.4, 0.6), batch.y, batch.index)
    ours = TRADES(threat=Lp("l2", 0.1), steps=1).craft(network, inner, gen=gen(7)).x_adv
    start = inner.x + 0.001 * torch.empty_like(inner.x).normal_(generator=gen(7))
    start.requires_grad_()
    value = sum(
        divergence(probabilities(network, x).detach(), probabilities(network, s))
        for x, s in zip(inner.x, start, strict=True)
    )
    (grad,) = torch.autograd.grad(value, start)
    moved = (start.detach() - inner.x + 0.2 * grad / grad.flatten(1).norm(dim=1)[:, None, None, None]).flatten(1)
    theirs = 0.1 * moved / moved.norm(dim=1, keepdim=True)
    assert torch.allclose((ours - inner.x).flatten(1), theirs, rtol=0, atol=1e-9)


def test_loss_and_weight_gradient_against_the_equation(network: nn.Module, batch: Batch) -> None:
    method = TRADES(threat=Lp("linf", 0.1), steps=2, beta=2.5)
    crafted = method.craft(network, batch, gen=gen())
    terms = method.loss(network, crafted)
    theirs = torch.zeros((), dtype=torch.float64)
    for x, x_adv, y in zip(batch.x, crafted.x_adv, batch.y, strict=True):
        p, q = probabilities(network, x), probabilities(network, x_adv)
        theirs = theirs + (-p[y].log() + 2.5 * divergence(p, q)) / len(batch)
    assert float(terms.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    a = torch.autograd.grad(terms.loss, list(network.parameters()))
    b = torch.autograd.grad(theirs, list(network.parameters()))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(a, b, strict=True))
    assert torch.equal(terms.logits, network(crafted.x_adv)) and torch.equal(terms.clean_logits, network(batch.x))


def test_the_gradient_flows_through_the_clean_prediction_too(network: nn.Module, batch: Batch) -> None:
    """Holding p(x) fixed in the divergence, as the attack does, gives another gradient."""
    method = TRADES(threat=Lp("linf", 0.1), steps=2)
    crafted = method.craft(network, batch, gen=gen())
    kl = method.loss(network, crafted).parts["kl"]
    held = attack_loss("kl", network(crafted.x_adv), batch.y, network(batch.x).detach()).mean()
    assert float(held.detach()) == pytest.approx(float(kl.detach()))
    a, b = (torch.autograd.grad(value, network[1].weight)[0] for value in (kl, held))
    assert float((a - b).norm()) > 0.1 * float(b.norm())


def test_the_divergence_has_no_gradient_at_the_clean_image(network: nn.Module, batch: Batch) -> None:
    """Why the ascent starts beside x: at x rounding is all there is, whose sign would be an arbitrary direction."""
    sizes = {}
    for noise in (0.0, 0.001):
        point = (batch.x + noise * torch.empty_like(batch.x).normal_(generator=gen())).requires_grad_()
        value = attack_loss("kl", network(point), batch.y, network(batch.x).detach()).sum()
        sizes[noise] = float(torch.autograd.grad(value, point)[0].abs().max())
    assert sizes[0.0] < 1e-15
    assert sizes[0.001] > 1e-5


def test_without_beta_nothing_is_crafted_and_the_images_pass_once(batch: Batch) -> None:
    model, seen = SmallNet(), []
    model.conv.register_forward_hook(lambda *_: seen.append(1))
    method = TRADES.neutral()
    crafted = method.craft(model, batch, gen=gen())
    assert crafted.x_adv is batch.x and not seen
    method.loss(model, Crafted(Batch(batch.x.float(), batch.y, batch.index), batch.x.float()))
    assert len(seen) == 1 and str(method.passes) == "1 weight"


def test_clean_and_adversarial_images_pass_apart_and_batchnorm_moves_with_both(
    net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    method = TRADES(threat=Lp("linf", 0.1), steps=2)
    batch = Batch(images, labels, torch.arange(len(labels)))
    net.train()
    twin = copy.deepcopy(net)
    crafted = method.craft(net, batch, gen=gen())
    method.loss(net, crafted)
    twin(crafted.batch.x)
    twin(crafted.x_adv)
    assert int(net.norm.num_batches_tracked) == 2
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)


def test_the_start_is_drawn_from_the_given_generator(network: nn.Module, batch: Batch) -> None:
    method = TRADES(threat=Lp("linf", 0.05), steps=1, step_size=1e-6)
    first, again, other = (method.craft(network, batch, gen=gen(s)).x_adv for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"steps": 0}, {"step_size": 0.0}, {"start_noise": 0.0}])
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"trades {next(iter(wrong))}: expected"):
        TRADES(threat=Lp("linf", 0.1), **wrong)
