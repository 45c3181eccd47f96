"""Max-margin training against its algorithms, written out, and against distances known in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.core.types import Batch, Crafted, Moment
from robustlens.objectives.mma import MEMORY, MMA, soft_logit_margin
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def batch_of(x: Tensor, y: Tensor, moment: Moment | None = None) -> Batch:
    return Batch(x, y, torch.arange(len(y)), moment or Moment())


def network(sizes: tuple[int, ...] = (64, 9, 4)) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Softplus()]
        return nn.Sequential(*layers[:-1]).double()


def slm(z: Tensor, y: int) -> Tensor:
    return sum(z[k].exp() for k in range(len(z)) if k != y).log() - z[y]


def printed_search(
    model: nn.Module, x: Tensor, y: int, noise: Tensor, threat: Lp, radius: float, steps: int
) -> tuple[Tensor, float]:
    """AN-PGD on one right image: PGD on SLM in the ball of ``radius``, then bisection of the scale along it."""
    reach = 1.05 * threat.eps

    def size(delta: Tensor) -> float:
        return float(delta.abs().max() if threat.norm == "linf" else delta.norm())

    def value(point: Tensor) -> float:
        return float(slm(model(point[None])[0], y).detach())

    point = (x + radius * noise).clamp(0, 1)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(slm(model(point[None])[0], y), point)
        step = 2.5 * radius / steps
        delta = (point + step * (grad.sign() if threat.norm == "linf" else grad / grad.norm()) - x).detach()
        if threat.norm == "linf":
            delta = delta.clamp(-radius, radius)
        elif size(delta) > radius:
            delta = delta * radius / size(delta)
        point = (x + delta).clamp(0, 1)
    direction, scale = (point - x) / size(point - x), size(point - x)
    low, high = 0.0, reach
    for _ in range(10):
        if value((x + scale * direction).clamp(0, 1)) < 0:
            low = scale
        else:
            high = scale
        scale = (low + high) / 2
    return (x + scale * direction).clamp(0, 1), scale


def printed_loss(
    model: nn.Module, x: Tensor, y: Tensor, found: dict[int, tuple[Tensor, float]], d_max: float, c: float
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(y.tolist()):
        clean = -(model(x[i][None])[0].softmax(0)[label]).log()
        total = total + c * clean
        if i not in found:
            total = total + (1 - c) * clean
        elif found[i][1] < d_max:
            total = total - (1 - c) * model(found[i][0][None])[0].softmax(0)[label].log()
    return total / len(y)


@pytest.mark.parametrize(("norm", "d_max", "radius"), [("linf", 0.03, 0.01), ("l2", 0.2, 0.1)])
@pytest.mark.parametrize("c", [0.0, 1 / 3])
def test_search_loss_and_weight_gradient_against_the_algorithm(
    images: Tensor, norm: str, d_max: float, radius: float, c: float
) -> None:
    """On examples of every kind: wrong, right and near, right and far; each with its own last distance."""
    model, x = network(), images.double()
    with torch.no_grad():
        y = model(x).argmax(1)
        y[:3] = (y[:3] + 1) % 4
        model[1].weight *= 8
    wrong = [i for i in range(12) if float(slm(model(x[i][None])[0], int(y[i])).detach()) >= 0]
    right = [i for i in range(12) if i not in wrong]
    threat = Lp(norm, d_max)
    memory = torch.linspace(0.5, 1.5, 12, dtype=torch.float64) * radius
    method = MMA(threat=threat, min_eps=0.7 * radius, clean_weight=c)
    batch = batch_of(x, y, Moment(examples=12, memory={MEMORY: memory}))
    crafted = method.craft(model, batch, gen=gen(4))
    terms = method.loss(model, crafted)

    noise = Lp(norm, 1.0).noise(x, gen(4))
    found = {}
    for i in right:
        last = max(float(memory[i]), 0.7 * radius)
        found[i] = printed_search(model, x[i], int(y[i]), noise[i], threat, last, method.steps)
        assert float(crafted.notes["distance"][i]) == pytest.approx(found[i][1], abs=1e-9)
        assert torch.allclose(crafted.x_adv[i], found[i][0], rtol=0, atol=1e-9)
    near = [i for i in found if found[i][1] < d_max]
    assert len(wrong) >= 3 and 0 < len(near) < len(found), "every case occurs"
    assert torch.equal(crafted.x_adv[wrong], x[wrong]) and not crafted.notes["distance"][wrong].any()
    theirs = printed_loss(model, x, y, found, d_max, c)
    assert float(terms.loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-8)
    a = torch.autograd.grad(terms.loss, list(model.parameters()))
    b = torch.autograd.grad(theirs, list(model.parameters()))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-7) for p, q in zip(a, b, strict=True))


def linear_problem(pixels: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes, images far from the border of the box, their logits, and the normal of a boundary close to them."""
    side = int(pixels**0.5)
    model = network((pixels, 2))
    x = 0.5 + 0.1 * (torch.rand(40, 1, side, side, generator=gen(2), dtype=torch.float64) - 0.5)
    with torch.no_grad():
        normal = model[1].weight[0] - model[1].weight[1]
        model[1].bias.copy_(torch.stack([-0.45 * normal.sum(), torch.zeros_like(normal[0])]))
        return model, x, model(x), normal


@pytest.mark.parametrize(("norm", "pixels"), [("linf", 64), ("l2", 1)])
def test_a_linear_boundary_is_found_at_its_exact_distance(norm: str, pixels: int) -> None:
    """|z_0 − z_1| / ‖w_0 − w_1‖_q: for ℓ∞ PGD ends in the best corner, and in one dimension every ball has one."""
    model, x, z, normal = linear_problem(pixels)
    exact = (z[:, 0] - z[:, 1]).abs() / normal.norm(p=1 if norm == "linf" else 2)
    d_max = 1.2 * float(exact.max())
    method = MMA(threat=Lp(norm, d_max), min_eps=float(exact.median()))
    found = method.craft(model, batch_of(x, z.argmax(1)), gen=gen()).notes["distance"]
    assert float((found - exact).abs().max()) <= 1.05 * d_max / 2**10 + 1e-9


def test_in_l2_the_boundary_is_exact_along_a_direction_that_is_nearly_the_best() -> None:
    """distance × cos(angle to the normal) is the exact distance; ten steps from a random start leave an angle."""
    model, x, z, normal = linear_problem(64)
    exact = (z[:, 0] - z[:, 1]).abs() / normal.norm()
    d_max = 1.2 * float(exact.max())
    method = MMA(threat=Lp("l2", d_max), min_eps=float(exact.median()))
    crafted = method.craft(model, batch_of(x, z.argmax(1)), gen=gen())
    delta = (crafted.x_adv - x).flatten(1)
    cosine = (delta @ normal).abs() / (delta.norm(dim=1) * normal.norm())
    found = crafted.notes["distance"]
    assert torch.allclose(delta.norm(dim=1), found, rtol=1e-9)
    assert float((found * cosine - exact).abs().max()) <= 1.05 * d_max / 2**10
    assert float(cosine.min()) > 0.95


def test_the_soft_margin_is_the_log_odds_and_does_not_saturate() -> None:
    """SLM = log((1 − p_y) / p_y), so its sign says whether p_y > ½; CE = log(1 + e^SLM) climbs the same way."""
    z = torch.randn(50, 5, generator=gen(), dtype=torch.float64)
    y = torch.arange(50) % 5
    p = z.softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(soft_logit_margin(z, y), ((1 - p) / p).log(), atol=1e-12)
    ce = nn.functional.cross_entropy(z, y, reduction="none")
    assert torch.allclose(ce, torch.log1p(soft_logit_margin(z, y).exp()), atol=1e-12)
    huge = torch.tensor([[200.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(soft_logit_margin(huge, torch.tensor([0])).sum(), huge)
    assert slope.tolist() == [[-1.0, 1.0]]


def test_an_example_beyond_reach_leaves_the_sum() -> None:
    """Far from the boundary the bisection ends at 1.05 d_max, and the step learns from the clean images alone."""
    model, x, z, normal = linear_problem(64)
    exact = (z[:, 0] - z[:, 1]).abs() / normal.norm(p=1)
    d_max = 0.5 * float(exact.min())
    y = z.argmax(1)
    method = MMA(threat=Lp("linf", d_max), min_eps=0.5 * d_max)
    crafted = method.craft(model, batch_of(x, y), gen=gen())
    assert float(crafted.notes["distance"].min()) == pytest.approx(1.05 * d_max, rel=2e-3)
    assert float((crafted.x_adv - x).abs().max()) <= 1.05 * d_max * (1 + 1e-9)
    terms = method.loss(model, crafted)
    assert float(terms.parts["mma_loss"].detach()) == 0.0
    assert float(terms.loss.detach()) == pytest.approx(float(nn.functional.cross_entropy(z, y)) / 3)


def test_raising_the_loss_at_the_boundary_moves_the_boundary_away() -> None:
    """The paper's proposition: a step down the loss at the boundary point raises the distance."""
    model, x, z, normal = linear_problem(64)
    one = batch_of(x[:1], z.argmax(1)[:1])
    exact = float((z[0, 0] - z[0, 1]).abs() / normal.norm(p=1))
    method = MMA(threat=Lp("linf", 1.5 * exact), min_eps=exact, clean_weight=0.0)
    terms = method.loss(model, method.craft(model, one, gen=gen()))
    slopes = torch.autograd.grad(terms.loss, list(model.parameters()))
    with torch.no_grad():
        for p, slope in zip(model.parameters(), slopes, strict=True):
            p -= 1e-2 * slope
        z = model(one.x)[0]
        normal = model[1].weight[0] - model[1].weight[1]
    assert float((z[0] - z[1]).abs() / normal.norm(p=1)) > 1.0001 * exact


def test_memory_holds_each_examples_distance_and_feeds_the_next_search(images: Tensor) -> None:
    model, x = network(), images.double()
    with torch.no_grad():
        y = model(x).argmax(1)
        y[0] = (y[0] + 1) % 4
        model[1].weight *= 8
    method = MMA(threat=Lp("linf", 0.05), min_eps=0.01)
    moment = Moment(examples=30)
    index = torch.arange(12) * 2 + 1
    first = method.craft(model, Batch(x, y, index, moment), gen=gen())
    kept = moment.memory[MEMORY]
    assert kept.shape == (30,) and torch.equal(kept[index], first.notes["distance"])
    assert int((kept == 0).sum()) >= 19, "of those unseen, and of the wrong one"
    before = kept.clone()
    again = method.craft(model, Batch(x, y, index, moment), gen=gen())
    assert moment.memory[MEMORY] is not kept and torch.equal(kept, before), "replaced, never changed in place"
    assert not torch.equal(again.x_adv, first.x_adv), "the same draws, in balls of other radii"
    by_hand = Moment(examples=30, memory={MEMORY: before})
    assert torch.equal(method.craft(model, Batch(x, y, index, by_hand), gen=gen()).x_adv, again.x_adv)


def test_without_a_training_set_every_search_starts_from_the_least_radius(images: Tensor) -> None:
    model, x = network(), images.double()
    method, moment = MMA(threat=Lp("linf", 0.05), min_eps=0.01), Moment()
    batch = batch_of(x, model(x).argmax(1), moment)
    a, b = (method.craft(model, batch, gen=gen()) for _ in range(2))
    assert torch.equal(a.x_adv, b.x_adv) and not moment.memory


def test_wrong_examples_are_learnt_as_they_are(images: Tensor) -> None:
    """All wrong: (1 − c) · CE + c · CE is the cross-entropy of the clean images."""
    model, x = network(), images.double()
    y = model(x).argmin(1)
    method = MMA(threat=Lp("l2", 1.0), min_eps=0.1)
    crafted = method.craft(model, batch_of(x, y), gen=gen())
    assert torch.equal(crafted.x_adv, x)
    loss = method.loss(model, crafted).loss
    assert float(loss.detach()) == pytest.approx(float(nn.functional.cross_entropy(model(x), y).detach()))


def test_excluded_examples_give_no_gradient() -> None:
    """Weights that only an excluded example sees stay where they are."""
    model = network((64, 2))
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    x[0, 0, 0, 0], x[1, 0, 7, 7] = 1.0, 1.0
    y = torch.tensor([0, 0])
    distance = torch.tensor([0.5, 1.02], dtype=torch.float64)
    method = MMA(threat=Lp("l2", 1.0), clean_weight=0.0)
    loss = method.loss(model, Crafted(batch_of(x, y), x, {"distance": distance})).loss
    (slope,) = torch.autograd.grad(loss, model[1].weight)
    assert float(slope[0, 0].abs()) > 0 and float(slope[0, 63]) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"threat": Lp("l2", 0.0)},
        {"min_eps": 0.0},
        {"min_eps": 1.1},
        {"steps": 0},
        {"search_steps": 0},
        {"clean_weight": -0.1},
    ],
)
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"mma {next(iter(wrong))}: expected"):
        MMA(**{"threat": Lp("l2", 1.0), **wrong})
