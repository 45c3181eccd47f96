"""SAM and ASAM against naive transcriptions and closed forms."""

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
from robustlens.core.types import Batch, Crafted, Terms
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.regularizers.orthogonality import Orthogonality
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.sam import SAM

AT = Adversarial(attack=PGD(threat=Lp("linf", 0.1), steps=3))


def climb(model: nn.Module, rho: float, adaptive: bool) -> None:
    """Move the weights by e, one number at a time in the sums."""
    square = 0.0
    for p in model.parameters():
        for w, g in zip(p.detach().flatten().tolist(), p.grad.flatten().tolist(), strict=True):
            square += (w * g) ** 2 if adaptive else g**2
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rho * (p.square() if adaptive else 1) * p.grad / square**0.5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("recraft", [False, True])
def test_naive_transcription_with_batchnorm_and_dropout(adaptive: bool, recraft: bool, batch: Batch) -> None:
    """BatchNorm's statistics are those of the first pass alone; both passes drop the same units."""
    rho, penalty = 0.5, Orthogonality(beta=0.01)
    ours, first = double_net(), double_net()
    torch.manual_seed(7)
    terms = SAM(rho=rho, adaptive=adaptive, recraft=recraft).backward(ours, AT, (penalty,), batch, gen=gen(5))
    random = torch.get_rng_state()

    def loss(model: nn.Module, x_adv: Tensor) -> Tensor:
        torch.manual_seed(7)
        terms = AT.loss(model, Crafted(batch, x_adv))
        return terms.loss + penalty.penalty(model, Crafted(batch, x_adv), terms, gen=gen())

    x_adv = AT.craft(first, batch, gen=gen(5)).x_adv
    value = loss(first, x_adv)
    assert torch.equal(random, torch.get_rng_state()), "random draws move as in one pass"
    value.backward()
    moved = copy.deepcopy(first)
    moved.load_state_dict(first.state_dict())
    for p, q in zip(first.parameters(), moved.parameters(), strict=True):
        q.grad = p.grad.clone()
    climb(moved, rho, adaptive)
    moved.zero_grad()
    if recraft:
        old, x_adv = x_adv, AT.craft(moved, batch, gen=gen(5)).x_adv
        assert not torch.equal(old, x_adv)
    loss(moved, x_adv).backward()
    assert close(grads(ours), grads(moved))
    assert not close(grads(ours), grads(first), tol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), first.state_dict().values(), strict=True))
    assert float(terms.loss.detach()) == pytest.approx(float(value.detach()), abs=1e-12)


@dataclasses.dataclass
class Quadratic:
    """½ wᵀ A w of the bias of a linear layer; writes down where it was asked, and what it found in memory."""

    matrix: Tensor
    asked: list[Tensor] = dataclasses.field(default_factory=list)
    found: list[bool] = dataclasses.field(default_factory=list)
    name = "quadratic"
    passes = Passes(weights=1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        return Crafted(batch, batch.x)

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        w, memory = model.bias, crafted.batch.moment.memory
        self.asked.append(w.detach().clone())
        self.found.append("quadratic/w" in memory)
        memory["quadratic/w"] = w.detach().clone()
        return Terms(0.5 * w @ self.matrix @ w, torch.zeros(1, 2))


@pytest.fixture
def bowl() -> tuple[nn.Module, Quadratic, Tensor]:
    root = torch.randn(5, 5, generator=gen(1), dtype=torch.float64)
    model = nn.Linear(1, 5).double()
    model.weight.requires_grad_(False)
    with torch.no_grad():
        model.bias.copy_(torch.randn(5, generator=gen(2), dtype=torch.float64))
    return model, Quadratic(root @ root.T), model.bias.detach().clone()


@pytest.mark.parametrize("adaptive", [False, True])
def test_closed_form_on_a_quadratic(adaptive: bool, bowl: tuple[nn.Module, Quadratic, Tensor], batch: Batch) -> None:
    """∇L(w + e) = A (w + e) with g = Aw, e = ρ g / ‖g‖ or ρ w² g / ‖w g‖; frozen weights get no gradient."""
    model, objective, w = bowl
    SAM(rho=0.3, adaptive=adaptive).backward(model, objective, (), batch, gen=gen())
    g = objective.matrix @ w
    e = 0.3 * (w**2 * g / (w * g).norm() if adaptive else g / g.norm())
    assert torch.allclose(model.bias.grad, objective.matrix @ (w + e), atol=1e-12)
    assert model.weight.grad is None
    assert torch.equal(model.bias.detach(), w)


def test_memory_is_that_of_the_first_pass_and_both_start_alike(
    bowl: tuple[nn.Module, Quadratic, Tensor], batch: Batch
) -> None:
    model, objective, w = bowl
    SAM(rho=0.3).backward(model, objective, (), batch, gen=gen())
    assert objective.found == [False, False] and not torch.equal(objective.asked[1], w)
    assert torch.equal(batch.moment.memory["quadratic/w"], w)


@pytest.mark.parametrize("adaptive", [True, False])
def test_only_asam_ignores_how_scale_is_shared_between_layers(adaptive: bool, batch: Batch) -> None:
    """f = W₂ W₁ x is the same for (a W₁, W₂ / a); so is the loss at the weights that ASAM asks for."""
    heights = []
    for scale in (1.0, 3.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6, bias=False), nn.Linear(6, 4, bias=False)).double()
        with torch.no_grad():
            model[1].weight *= scale
            model[2].weight /= scale
        seen: list[Tensor] = []
        model.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.detach()))
        SAM(rho=0.5, adaptive=adaptive).backward(model, Standard(), (), batch, gen=gen())
        heights.append(float(F.cross_entropy(seen[1], batch.y)))
        assert heights[-1] > float(F.cross_entropy(seen[0], batch.y)), "e climbs"
    assert (abs(heights[0] - heights[1]) < 1e-12) is adaptive


def test_a_small_radius_adds_the_curvature_along_the_gradient(batch: Batch) -> None:
    """(∇L(θ + e) − g) / ρ → H g / ‖g‖, by a Hessian-vector product; ReLU's kinks are not met at ρ = 1e-6."""
    model = double_net().eval()
    weights = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), weights, create_graph=True)
    length = torch.cat([each.flatten() for each in g]).norm()
    curvature = torch.autograd.grad(g, weights, [(each / length).detach() for each in g])
    SAM(rho=1e-6).backward(model, Standard(), (), batch, gen=gen())
    found = [(p.grad - each.detach()) / 1e-6 for p, each in zip(weights, g, strict=True)]
    assert close(found, list(curvature), tol=1e-4)
    assert max(float(each.abs().max()) for each in curvature) > 0.1


@dataclasses.dataclass
class Draw:
    """A penalty that is random and weightless, and remembers its draws."""

    seen: list[float] = dataclasses.field(default_factory=list)
    name = "draw"
    passes = Passes()

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        self.seen.append(float(torch.rand((), generator=gen)))
        return terms.loss * self.seen[-1]


@pytest.mark.parametrize("recraft", [False, True])
def test_both_passes_draw_alike_and_the_generator_moves_once(recraft: bool, batch: Batch) -> None:
    draw, ours, plain = Draw(), gen(4), gen(4)
    SAM(recraft=recraft).backward(double_net(), AT, (draw,), batch, gen=ours)
    assert draw.seen[0] == draw.seen[1] and len(draw.seen) == 2
    AT.craft(double_net(), batch, gen=plain)
    torch.rand((), generator=plain)
    assert torch.equal(ours.get_state(), plain.get_state())


def test_weights_and_statistics_come_back_after_an_exception(batch: Batch) -> None:
    model, calls = double_net(), []
    weights = [p.detach().clone() for p in model.parameters()]

    def fuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append([b.clone() for b in model.buffers()])
        if len(calls) == 2:
            raise RuntimeError("the fuse has burnt")

    model.register_forward_pre_hook(fuse)
    with pytest.raises(RuntimeError, match="fuse"):
        SAM().backward(model, Standard(), (), batch, gen=gen())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(calls[1], model.buffers(), strict=True))


def test_a_flat_loss_moves_nothing(batch: Batch) -> None:
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.bias.zero_()
    SAM(adaptive=True).backward(model, Quadratic(torch.eye(2, dtype=torch.float64)), (), batch, gen=gen())
    assert model.bias.grad.tolist() == [0, 0]


def test_bad_radius() -> None:
    with pytest.raises(InputError, match="≥ 0"):
        SAM(rho=-1.0)


def test_cost() -> None:
    assert str(SAM().passes(AT.passes, Passes(tangent=1))) == "3 input + 2 weight + 2 tangent"
    assert str(SAM(recraft=True).passes(AT.passes, Passes())) == "6 input + 2 weight"
