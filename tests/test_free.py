"""Free adversarial training against its algorithm, one example at a time, and its stale perturbation by hand."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import double_net, gen
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.verify import craft
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Moment
from robustlens.objectives.standard import Standard
from robustlens.regularizers.orthogonality import Orthogonality
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.free import DELTA, Free


def batches(low: float = 0.0, high: float = 1.0, sizes: tuple[int, ...] = (6, 6, 4, 6)) -> list[Batch]:
    """Consecutive batches of one run, of which the third is short."""
    moment, found = Moment(), []
    for i, n in enumerate(sizes):
        x = torch.rand(n, 1, 8, 8, generator=gen(i), dtype=torch.float64).mul(high - low).add(low)
        found.append(Batch(x, (torch.arange(n) + i) % 4, torch.arange(n), moment))
    return found


def run(model: nn.Module, update: Free, data: list[Batch]) -> list[Tensor]:
    """Train as the loop does; the perturbation after every step."""
    optimizer, deltas = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for number, batch in enumerate(data):
        for replay in range(update.replays):
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(10 * number + replay)
            update.backward(model, Standard(), (), batch, gen=gen())
            optimizer.step()
            deltas.append(batch.moment.memory[DELTA])
    return deltas


def algorithm(model: nn.Module, threat: Lp, m: int, data: list[Batch], *, boxed: bool) -> list[Tensor]:
    """Algorithm 1 of the paper; ``boxed`` also cuts the stored δ to the box, as Wong et al.'s code does."""
    optimizer, deltas = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    delta = torch.zeros_like(data[0].x)
    for number, batch in enumerate(data):
        for replay in range(m):
            n = len(batch)
            x_adv = (batch.x + delta[:n]).clamp(0, 1) if boxed else batch.x + delta[:n]
            x_adv = x_adv.detach().requires_grad_()
            optimizer.zero_grad()
            torch.manual_seed(10 * number + replay)
            F.cross_entropy(model(x_adv), batch.y).backward()
            g = x_adv.grad
            delta = delta.clone()
            for i in range(n):
                if threat.norm == "linf":
                    d = (x_adv.detach()[i] - batch.x[i] + threat.eps * g[i].sign()).clamp(-threat.eps, threat.eps)
                else:
                    d = x_adv.detach()[i] - batch.x[i] + threat.eps * g[i] / g[i].norm()
                    d = d * min(1.0, threat.eps / float(d.norm()))
                delta[i] = (batch.x[i] + d).clamp(0, 1) - batch.x[i] if boxed else d
            optimizer.step()
            deltas.append(delta)
    return deltas


@pytest.mark.parametrize(("norm", "eps", "m"), [("linf", 0.1, 3), ("linf", 0.1, 1), ("l2", 1.0, 2)])
def test_the_algorithm_of_the_paper_where_the_box_is_far(norm: str, eps: float, m: int) -> None:
    threat = Lp(norm, eps, low=-9.0, high=9.0)
    ours = double_net()
    theirs = copy.deepcopy(ours)
    a = run(ours, Free(threat=threat, replays=m), batches())
    b = algorithm(theirs, threat, m, batches(), boxed=False)
    assert len(a) == len(b) == 4 * m
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(a, b, strict=True))
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(p.double(), q.double(), atol=1e-10)


def test_the_boxed_algorithm_and_the_short_batch() -> None:
    """Every pixel is within reach of the box; rows that the short batch lacks stay what they were."""
    threat = Lp("linf", 0.3)
    ours = double_net()
    theirs = copy.deepcopy(ours)
    data = batches()
    a = run(ours, Free(threat=threat, replays=2), data)
    b = algorithm(theirs, threat, 2, batches(), boxed=True)
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(a, b, strict=True))
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    before, after = a[3], a[5]
    assert torch.equal(before[4:], after[4:]) and not torch.equal(before[:4], after[:4])
    assert (before[4:] != 0).any() and a[7].shape == data[0].x.shape


def test_one_replay_is_not_fgsm_because_the_perturbation_is_stale() -> None:
    """On a linear model with the labels swapped from one batch to the next, the stale δ *lowers* the loss."""
    threat = Lp("linf", 0.1, low=-9.0, high=9.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    w = model[1].weight.detach()
    x, y = batches()[0].x, torch.zeros(6, dtype=torch.int64)
    moment, update = Moment(), Free(threat=threat, replays=1)
    first = update.backward(model, Standard(), (), Batch(x, y, torch.arange(6), moment), gen=gen())
    assert torch.allclose(first.loss, F.cross_entropy(model(x), y)), "δ starts at 0"
    stale = 0.1 * (w[1] - w[0]).sign().view(1, 8, 8)
    assert torch.allclose(moment.memory[DELTA], stale.expand(6, 1, 8, 8), atol=1e-12)
    second = update.backward(model, Standard(), (), Batch(x, 1 - y, torch.arange(6), moment), gen=gen())
    assert torch.allclose(second.loss, F.cross_entropy(model(x + stale), 1 - y))
    fresh = [
        F.cross_entropy(model(craft(attack, model, x, 1 - y, gen=gen())), 1 - y)
        for attack in (FGSM(threat=threat), FGSM(threat=threat, random_start=True, step_size=0.125))
    ]
    assert second.loss < F.cross_entropy(model(x), 1 - y) < min(fresh)


def test_two_runs_from_a_copied_memory_agree_bit_for_bit() -> None:
    update, data = Free(threat=Lp("linf", 0.2), replays=2), batches()
    one = double_net()
    run(one, update, data[:2])
    two, three, kept = copy.deepcopy(one), copy.deepcopy(one), dict(data[0].moment.memory)
    frozen = {name: tensor.clone() for name, tensor in kept.items()}
    again = [dataclasses.replace(batch, moment=Moment(memory=kept)) for batch in data[2:]]
    a, b = run(one, update, data[2:]), run(two, update, again)
    assert list(frozen) == [DELTA]
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    forgotten = [dataclasses.replace(batch, moment=Moment()) for batch in data[2:]]
    assert not torch.equal(run(three, update, forgotten)[0][:4], a[0][:4]), "there is a state to keep"
    data[0].moment.memory[DELTA] = held = frozen[DELTA].clone()
    update.backward(one, Standard(), (), data[0], gen=gen())
    assert torch.equal(held, frozen[DELTA]), "a tensor in memory is replaced, never written to"


class Watched(Standard):
    """Refuses to craft, and keeps what it is asked to learn from."""

    seen: Tensor

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        raise AssertionError("free adversarial training crafts nothing")

    def loss(self, model: nn.Module, crafted: Crafted) -> object:
        object.__setattr__(self, "seen", crafted.x_adv.detach())
        return super().loss(model, crafted)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_pass_a_step_and_allowed_inputs(norm: str, images: Tensor, labels: Tensor) -> None:
    threat = Lp(norm, {"linf": 0.2, "l2": 1.0, "l1": 5.0}[norm])
    model, forwards = double_net().float(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    objective, update, moment = Watched(), Free(threat=threat, replays=2), Moment()
    for _ in range(3):
        batch = Batch(images.roll(len(forwards), 0), labels, torch.arange(12), moment)
        update.backward(model, objective, (), batch, gen=gen())
        assert objective.seen.min() >= 0 and objective.seen.max() <= 1
        assert (threat.distance(objective.seen, batch.x) <= threat.eps * (1 + 1e-5)).all()
    assert len(forwards) == 3 and (threat.distance(objective.seen, batch.x) > 0.1 * threat.eps).all()


def test_penalties_join_the_gradient() -> None:
    model, batch, penalty = double_net().eval(), batches()[0], Orthogonality(beta=0.1)
    terms = Free(threat=Lp("linf", 0.1)).backward(model, Standard(), (penalty,), batch, gen=gen())
    weights = list(model.parameters())
    crafted = Crafted(batch, batch.x)
    loss = F.cross_entropy(model(batch.x), batch.y) + penalty.penalty(model, crafted, terms, gen=gen())
    expected = torch.autograd.grad(loss, weights)
    assert all(torch.allclose(p.grad, g, atol=1e-12) for p, g in zip(weights, expected, strict=True))


def test_objectives_that_need_their_own_attack_are_refused() -> None:
    update, objective = Free(threat=Lp("linf", 0.1)), Watched()
    update.check_objective(objective)
    object.__setattr__(objective, "needs_craft", True)
    with pytest.raises(InputError, match="standard"):
        update.check_objective(objective)


def test_replays() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Free(threat=Lp("linf", 0.1), replays=0)
    assert str(Free(threat=Lp("linf", 0.1)).passes(Passes(inputs=10, weights=1), Passes())) == "8 weight"
