"""Local linearity regularization against a loop over examples, and where the distance from linearity is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import NOTHING, SmallNet, example_loss, gen, weight_gradient
from torch import Tensor, nn

from robustlens.core.types import Batch, Crafted
from robustlens.objectives.standard import Standard
from robustlens.regularizers.local_linearity import LocalLinearity
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

THREATS = [Lp("linf", 0.1), Lp("l2", 1.0)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_value_and_gradient_at_a_given_delta_are_the_printed_ones(
    threat: Lp, smooth: nn.Module, crafted: Crafted
) -> None:
    regularizer = LocalLinearity(threat=threat, weight=4.0, slope_weight=3.0)
    delta = regularizer.search(smooth, crafted, gen=gen())
    ours = regularizer.value(smooth, crafted, NOTHING, delta)
    terms = []
    for image, y, d in zip(crafted.batch.x.detach(), crafted.batch.y, delta, strict=True):
        x = image.clone().requires_grad_()
        loss = example_loss(smooth, x, y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        rise = (d * g).sum()
        terms.append(4 * (example_loss(smooth, image + d, y) - loss - rise).abs() + 3 * rise.abs())
    theirs = torch.stack(terms).mean()
    assert torch.allclose(ours, theirs, rtol=1e-9)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-9)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_search_is_projected_ascent_on_the_gap(threat: Lp, smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = LocalLinearity(threat=threat, steps=3, step_size=0.04)
    ours = regularizer.search(smooth, crafted, gen=gen(7))
    x, y = crafted.batch.x.detach(), crafted.batch.y
    start = threat.start(x, gen(7))
    for i in range(len(x)):
        clean = x[i].clone().requires_grad_()
        loss = example_loss(smooth, clean, y[i])
        (g,) = torch.autograd.grad(loss, clean)
        point = start[i]
        for _ in range(3):
            point = point.detach().requires_grad_()
            gap = (example_loss(smooth, point, y[i]) - loss.detach() - ((point - x[i]) * g).sum()).abs()
            (up,) = torch.autograd.grad(gap, point)
            step = up.sign() if threat.norm == "linf" else up / up.norm()
            point = threat.project((point + 0.04 * step).detach()[None], x[i : i + 1])[0]
        assert torch.allclose(ours[i], point - x[i], atol=1e-8)
    assert bool((threat.size(ours) <= threat.eps * (1 + 1e-9)).all())
    assert bool(((x + ours >= -1e-12) & (x + ours <= 1 + 1e-12)).all())


class LinearLoss(nn.Module):
    """Logits (−aᵀx, log(1 − exp(−aᵀx))), whose softmax is exp(−aᵀx): the cross-entropy of class 0 is aᵀx itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(64, dtype=torch.float64, generator=gen(3)) / 10 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        height = x.flatten(1) @ self.a
        return torch.stack([-height, torch.log(-torch.expm1(-height))], 1)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_linear_loss_has_no_gap(threat: Lp, crafted: Crafted) -> None:
    model = LinearLoss()
    x = crafted.batch.x
    zeros = Crafted(Batch(x, torch.zeros_like(crafted.batch.y), crafted.batch.index), x)
    gap = LocalLinearity(threat=threat, weight=1.0, slope_weight=0.0)
    found = gap.penalty(model, zeros, NOTHING, gen=gen())
    assert abs(float(found.detach())) < 1e-12
    delta = gap.search(model, zeros, gen=gen())
    slope = LocalLinearity(threat=threat, weight=0.0, slope_weight=2.0).value(model, zeros, NOTHING, delta)
    expected = 2 * (delta.flatten(1) @ model.a).abs().mean()
    assert torch.allclose(slope, expected, rtol=1e-9)
    assert torch.allclose(weight_gradient(slope, model), weight_gradient(expected, model), atol=1e-9)


def test_the_gap_of_logistic_regression_is_found() -> None:
    """The loss is convex and so is the gap: its maximum lies in a corner, and four pixels have sixteen of them."""
    threat = Lp("linf", 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
        nn.init.normal_(model[1].weight, std=3.0)
    x = torch.full((6, 1, 2, 2), 0.5, dtype=torch.float64)
    x = (x + 0.2 * torch.rand(x.shape, generator=gen(4), dtype=torch.float64)).requires_grad_()
    y = torch.arange(6) % 2
    crafted = Crafted(Batch(x, y, torch.arange(6)), x)
    regularizer = LocalLinearity(threat=threat, weight=1.0, slope_weight=0.0)
    corners = 0.2 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    gaps = []
    for corner in corners:
        delta = corner.view(1, 1, 2, 2).expand_as(x)
        per_example = []
        for i in range(6):
            clean = x[i].detach().requires_grad_()
            loss = example_loss(model, clean, y[i])
            (g,) = torch.autograd.grad(loss, clean)
            per_example.append((example_loss(model, clean + delta[i], y[i]) - loss - (delta[i] * g).sum()).abs())
        gaps.append(torch.stack(per_example).detach())
    best = torch.stack(gaps).amax(0)
    # One ascent may end in the smaller of the two local maxima ±sign(w); of several starts one finds the larger.
    found = []
    for seed in range(8):
        delta = regularizer.search(model, crafted, gen=gen(seed))
        each = [
            regularizer.value(model, Crafted(Batch(x_i, y_i, y_i), x_i), NOTHING, d_i)
            for x_i, y_i, d_i in (
                (x[i : i + 1].detach().requires_grad_(), y[i : i + 1], delta[i : i + 1]) for i in range(6)
            )
        ]
        found.append(torch.stack(each).detach())
    assert torch.allclose(torch.stack(found).amax(0), best, rtol=1e-9)
    assert all(bool((f <= best * (1 + 1e-9)).all()) for f in found)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_sharing_the_clean_logits_changes_nothing(threat: Lp, smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = LocalLinearity(threat=threat)
    own = regularizer.penalty(smooth, crafted, NOTHING, gen=gen())
    shared = regularizer.penalty(smooth, crafted, Standard().loss(smooth, crafted), gen=gen())
    assert torch.equal(own, shared)
    assert torch.allclose(weight_gradient(own, smooth), weight_gradient(shared, smooth), atol=1e-14)


def test_dropout_is_no_curvature(crafted: Crafted) -> None:
    """The gap vanishes with the square of the radius, which it would not with other masks at x + δ."""
    net = SmallNet().double()
    net.norm.eval()
    values = []
    for eps in (1e-3, 1e-4):
        torch.manual_seed(1)
        regularizer = LocalLinearity(threat=Lp("linf", eps), weight=1.0, slope_weight=0.0)
        values.append(float(regularizer.penalty(net, crafted, Standard().loss(net, crafted), gen=gen()).detach()))
    assert 0 < values[1] < values[0] / 5 and values[0] < 1e-2


def test_the_batch_is_a_mean_over_examples(smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = LocalLinearity(threat=THREATS[0])
    delta = regularizer.search(smooth, crafted, gen=gen())
    parts = []
    for i in range(len(crafted.batch)):
        x = crafted.batch.x[i : i + 1].detach().requires_grad_()
        one = Crafted(Batch(x, crafted.batch.y[i : i + 1], torch.zeros(1).long()), x)
        parts.append(regularizer.value(smooth, one, NOTHING, delta[i : i + 1]))
    whole = regularizer.value(smooth, crafted, NOTHING, delta)
    assert torch.allclose(whole, torch.stack(parts).mean(), rtol=1e-9)


@pytest.mark.parametrize("regularizer", [LocalLinearity(threat=Lp("linf", 0.0)), LocalLinearity.neutral()])
def test_no_ball_or_no_weight_costs_no_pass(regularizer: LocalLinearity, crafted: Crafted) -> None:
    found = regularizer.penalty(nn.Identity(), crafted, NOTHING, gen=gen())
    assert float(found) == 0 and not found.requires_grad


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"slope_weight": -1.0}, {"steps": 0}, {"step_size": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LocalLinearity(threat=THREATS[0], **wrong)
