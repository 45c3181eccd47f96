"""GradAlign against a loop over examples, and where the loss is straight."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import NOTHING, gen, weight_gradient
from torch import Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.core.types import Batch, Crafted
from robustlens.objectives.adversarial import Adversarial
from robustlens.regularizers.grad_align import GradAlign
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.descend import Descend

THREATS = [Lp("linf", 0.3), Lp("l2", 2.0)]


def example_slope(model: nn.Module, image: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    x = image.detach().requires_grad_()
    loss = -model(x[None]).log_softmax(1)[0, y]
    (g,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    return g.flatten()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_value_and_gradient_are_the_printed_ones(threat: Lp, smooth: nn.Module, crafted: Crafted) -> None:
    x, y = crafted.batch.x, crafted.batch.y
    ours = GradAlign(threat=threat, weight=0.7).penalty(smooth, crafted, NOTHING, gen=gen(7))
    if threat.norm == "linf":
        eta = torch.empty_like(x).uniform_(-0.3, 0.3, generator=gen(7))
    else:
        eta = threat.noise(x, gen(7))
        assert bool((eta.flatten(1).norm(dim=1) <= 2).all())
    terms = []
    for i in range(len(x)):
        here = example_slope(smooth, x[i], y[i], create_graph=False)
        there = example_slope(smooth, x[i] + eta[i], y[i], create_graph=True)
        terms.append(1 - here @ there / (here.norm() * there.norm()))
    theirs = 0.7 * torch.stack(terms).mean()
    assert float(theirs.detach()) > 1e-3
    assert torch.allclose(ours, theirs, rtol=1e-9)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-10)


def test_a_linear_model_with_two_classes_is_aligned(crafted: Crafted) -> None:
    """Its slope is (p − y)₁ (w₁ − w₀): the length changes along η, the direction cannot."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    two = Crafted(Batch(crafted.batch.x, crafted.batch.y % 2, crafted.batch.index), crafted.x_adv)
    for threat in THREATS:
        found = GradAlign(threat=threat, weight=1.0).penalty(model, two, NOTHING, gen=gen())
        assert abs(float(found.detach())) < 1e-12


def test_zero_gradients_are_left_out(crafted: Crafted) -> None:
    """Some examples behind a dead ReLU: value and gradient are those of the others, over the whole batch."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x = crafted.batch.x.clone()
    x[:5] = 0
    x[:, 0, 0, 0] = (torch.arange(12) < 5).double()
    with torch.no_grad():
        model[1].weight[:, 0] = -20.0
    y = crafted.batch.y
    regularizer = GradAlign(threat=Lp("linf", 0.05), weight=1.0)
    batch = Crafted(Batch(x, y, crafted.batch.index), x)
    near, here = regularizer.search(model, batch, gen=gen())
    dead = ~here.flatten(1).any(1)
    assert bool(dead[:5].all()) and not bool(dead[5:].all())
    ours = regularizer.value(model, batch, NOTHING, (near, here))
    alive = (~dead).nonzero()[:, 0]
    rest = Crafted(Batch(x[alive], y[alive], alive), x[alive])
    theirs = regularizer.value(model, rest, NOTHING, (near[alive], here[alive])) * len(alive) / len(x)
    assert float(ours.detach()) > 0 and torch.allclose(ours, theirs, rtol=1e-12)
    gradient = weight_gradient(ours, model)
    assert bool(gradient.isfinite().all()) and torch.allclose(gradient, weight_gradient(theirs, model), atol=1e-12)


def test_gradients_below_the_square_root_of_float32_count(crafted: Crafted) -> None:
    """Squares of 1e-30 are zero in float32; the angle between such gradients is not."""
    near, here = torch.randn(2, 12, 1, 8, 8, generator=gen(1)).clamp(-1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    two = Crafted(Batch(near, crafted.batch.y % 2, crafted.batch.index), near)
    values = []
    for scale in (1.0, 1e-30):
        found = GradAlign(threat=THREATS[0], weight=1.0).value(model, two, NOTHING, (near, here * scale))
        values.append(float(found.detach()))
    assert values[1] == pytest.approx(values[0], rel=1e-5) and values[0] > 0.5


def test_the_weight_at_eight_is_the_papers_rule() -> None:
    assert GradAlign(threat=Lp("linf", 8 / 255)).weight == pytest.approx(0.02 * 10 ** (8 / 8))
    assert math.exp(math.log(2.5**2 / 4) + math.log(1.6)) == pytest.approx(2.5)  # the script's rule for SVHN at 8


def test_it_is_a_part_of_fgsm_training(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    threat = Lp("linf", 0.1)
    batch = Batch(images, labels, torch.arange(len(labels)))
    terms = Descend().backward(
        net, Adversarial(attack=FGSM(threat=threat)), (GradAlign(threat=threat),), batch, gen=gen()
    )
    part = float(terms.parts["grad-align"].detach())
    assert 0 < part < 0.4


@pytest.mark.parametrize("regularizer", [GradAlign(threat=Lp("linf", 0.0)), GradAlign.neutral()])
def test_no_ball_or_no_weight_costs_no_pass(regularizer: GradAlign, crafted: Crafted) -> None:
    found = regularizer.penalty(nn.Identity(), crafted, NOTHING, gen=gen())
    assert float(found) == 0 and not found.requires_grad


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError):
        GradAlign(threat=THREATS[0], weight=-1.0)
