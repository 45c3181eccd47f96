"""AWP against its authors' procedure, a closed form, and what a step may leave behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import close, double_net, gen, grads
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.pgd import PGD
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Moment, Terms
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.regularizers.orthogonality import Orthogonality
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.awp import AWP
from robustlens.updates.descend import Descend

AT = Adversarial(attack=PGD(threat=Lp("linf", 0.1), steps=3))


def authors_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x_adv: Tensor, y: Tensor, gamma: float, seed: int
) -> dict[str, Tensor]:
    """As their code does it: a proxy that ascends by SGD, v added, a step at θ + v, and v subtracted again."""
    proxy = copy.deepcopy(model)
    ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
    torch.manual_seed(seed)
    ascent.zero_grad()
    (-F.cross_entropy(proxy(x_adv), y)).backward()
    ascent.step()
    v = {}
    for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if old.ndim > 1:
            difference = (new - old).detach()
            v[name] = gamma * old.detach().norm() / (difference.norm() + 1e-20) * difference
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(v.get(name, torch.zeros(())))
    torch.manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimizer.step()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(v.get(name, torch.zeros(())))
    return v


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_three_steps_with_batchnorm_and_dropout_are_the_authors(gamma: float, batch: Batch) -> None:
    ours = double_net()
    theirs = copy.deepcopy(ours)
    plain = copy.deepcopy(ours)
    trained = {"ours": ours, "theirs": theirs, "plain": plain}
    optimizers = {k: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for k, m in trained.items()}
    for step in range(3):
        x_adv = AT.craft(theirs, batch, gen=gen(step)).x_adv
        authors_step(theirs, optimizers["theirs"], x_adv, batch.y, gamma, seed=step)
        for name, update in (("ours", AWP(gamma=gamma)), ("plain", Descend())):
            optimizers[name].zero_grad()
            torch.manual_seed(step)
            update.backward(trained[name], AT, (), batch, gen=gen(step))
            optimizers[name].step()
    assert close(list(ours.parameters()), list(theirs.parameters()))
    assert close([b.double() for b in ours.buffers()], [b.double() for b in theirs.buffers()])
    assert not close(list(ours.parameters()), list(plain.parameters()), tol=1e-5)


def test_the_authors_weight_decay_also_acts_on_v(batch: Batch) -> None:
    ours = double_net()
    theirs = copy.deepcopy(ours)
    torch.manual_seed(0)
    AWP(gamma=0.1).backward(ours, Standard(), (), batch, gen=gen())
    torch.optim.SGD(ours.parameters(), lr=0.1, weight_decay=0.01).step()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.01)
    v = authors_step(theirs, optimizer, batch.x, batch.y, 0.1, seed=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a - b, 0.1 * 0.01 * v.get(name, torch.zeros_like(a)), atol=1e-12)


@dataclasses.dataclass
class Quadratic:
    """½ ⟨W, A W⟩ + ⟨b, b⟩ / 2 of the weights W (n, 1) and bias b of a linear layer; writes down where it was asked."""

    matrix: Tensor
    asked: list[Tensor] = dataclasses.field(default_factory=list)
    name = "quadratic"
    passes = Passes(weights=1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        return Crafted(batch, batch.x)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        w, memory = model.weight, crafted.batch.moment.memory
        self.asked.append(w.detach().clone())
        memory["quadratic/asked"] = memory.get("quadratic/asked", torch.zeros(())) + w.detach().sum()
        return Terms(0.5 * (w * (self.matrix @ w)).sum() + 0.5 * model.bias.square().sum(), torch.zeros(1, 2))


@pytest.fixture
def bowl() -> tuple[nn.Module, Quadratic, Tensor]:
    root = torch.randn(5, 5, generator=gen(1), dtype=torch.float64)
    model = nn.Linear(1, 5).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(5, 1, generator=gen(2), dtype=torch.float64))
        model.bias.fill_(0.5)
    return model, Quadratic(root @ root.T), model.weight.detach().clone()


def test_closed_form_on_a_quadratic(bowl: tuple[nn.Module, Quadratic, Tensor], batch: Batch) -> None:
    """∇L(w + v) = A (w + γ ‖w‖ Aw / ‖Aw‖); the bias is not moved."""
    model, objective, w = bowl
    terms = AWP(gamma=0.2).backward(model, objective, (), batch, gen=gen())
    slope = objective.matrix @ w
    moved = w + 0.2 * w.norm() * slope / slope.norm()
    assert torch.allclose(model.weight.grad, objective.matrix @ moved, atol=1e-12)
    assert torch.equal(model.bias.grad, model.bias.detach())
    assert torch.equal(model.weight.detach(), w), "the weights come back to the bit"
    assert float(terms.loss) == pytest.approx(float(0.5 * (w * slope).sum() + 0.5 * 5 * 0.25))


def test_only_the_pass_at_the_moved_weights_writes_to_memory(
    bowl: tuple[nn.Module, Quadratic, Tensor], batch: Batch
) -> None:
    model, objective, _ = bowl
    AWP(gamma=0.2).backward(model, objective, (), batch, gen=gen())
    assert len(objective.asked) == 2
    assert torch.equal(batch.moment.memory["quadratic/asked"], objective.asked[1].sum())


def test_the_ascent_ignores_the_penalty_and_the_step_does_not(batch: Batch) -> None:
    model, gamma, penalty = double_net().eval(), 0.2, Orthogonality(beta=0.05)
    moved = copy.deepcopy(model)
    clean = F.cross_entropy(model(batch.x), batch.y)
    for p, q, g in zip(
        model.parameters(), moved.parameters(), torch.autograd.grad(clean, list(model.parameters())), strict=True
    ):
        if p.ndim > 1:
            q.data += gamma * p.detach().norm() * g / g.norm()
    crafted = Crafted(batch, batch.x)
    there = Standard().loss(moved, crafted)
    extra = penalty.penalty(moved, crafted, there, gen=gen())
    (there.loss + extra).backward()
    terms = AWP(gamma=gamma).backward(model, Standard(), (penalty,), batch, gen=gen())
    assert close(grads(model), grads(moved))
    assert float(terms.loss) == pytest.approx(float((clean + extra).detach()), abs=1e-12)
    assert float(terms.parts["orthogonality"]) == pytest.approx(float(extra.detach()), abs=1e-12)
    assert torch.allclose(terms.logits.detach(), model(batch.x).detach(), atol=1e-12)


def test_plain_steps_until_the_end_of_the_warm_up(batch: Batch) -> None:
    model = double_net().eval()
    for epoch, same in ((1.99, True), (2.0, False)):
        now = dataclasses.replace(batch, moment=Moment(epoch=epoch, epochs=5))
        model.zero_grad()
        AWP(gamma=0.2, warmup=2).backward(model, Standard(), (), now, gen=gen())
        found = [g.clone() for g in grads(model)]
        model.zero_grad()
        Descend().backward(model, Standard(), (), now, gen=gen())
        assert close(found, grads(model), tol=1e-6) is same


def test_a_flat_loss_moves_nothing(batch: Batch) -> None:
    model = double_net().eval()
    with torch.no_grad():
        model.fc.weight.zero_()  # the gradient with respect to the convolution is exactly zero
    AWP(gamma=0.2).backward(model, Standard(), (), batch, gen=gen())
    assert all(torch.isfinite(g).all() for g in grads(model))


def test_weights_come_back_after_an_exception(batch: Batch) -> None:
    model = double_net()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(model.conv.weight.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("the fuse has burnt")

    model.register_forward_pre_hook(fuse)
    with pytest.raises(RuntimeError, match="fuse"):
        AWP(gamma=0.2).backward(model, Standard(), (), batch, gen=gen())
    assert not torch.equal(calls[1], before["conv.weight"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"gamma": -0.1}, {"warmup": -1.0}])
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="≥ 0"):
        AWP(**settings)


def test_cost() -> None:
    assert str(AWP().passes(AT.passes, Passes(double=1))) == "3 input + 2 weight + 1 double"
