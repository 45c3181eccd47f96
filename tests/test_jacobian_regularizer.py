"""Jacobian regularization against the dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from conftest import NOTHING, gen, weight_gradient
from torch import Tensor, nn

from robustlens.core.types import Batch, Crafted
from robustlens.objectives.standard import Standard
from robustlens.regularizers.jacobian import Jacobian
from robustlens.results.errors import InputError


def dense(model: nn.Module, image: Tensor) -> Tensor:
    """J (K, C·H·W), differentiable at the weights."""
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], image.detach(), create_graph=True)
    return jacobian.flatten(1)


def test_exact_norm_is_that_of_the_dense_jacobian(smooth: nn.Module, crafted: Crafted) -> None:
    ours = Jacobian(weight=0.3, projections=None).penalty(smooth, crafted, NOTHING, gen=gen())
    theirs = 0.3 / 2 * torch.stack([dense(smooth, x).square().sum() for x in crafted.batch.x]).mean()
    assert torch.allclose(ours, theirs, rtol=1e-10)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-12)


@pytest.mark.parametrize("projections", [1, 3])
def test_projections_are_the_printed_estimate(projections: int, smooth: nn.Module, crafted: Crafted) -> None:
    ours = Jacobian(weight=0.3, projections=projections).penalty(smooth, crafted, NOTHING, gen=gen(7))
    v = torch.empty((projections, len(crafted.batch), 4), dtype=torch.float64).normal_(generator=gen(7))
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(crafted.batch.x):
        jacobian = dense(smooth, x)
        for k in range(projections):
            along = v[k, i] / v[k, i].norm() @ jacobian
            total = total + 4 * along.square().sum() / (projections * len(crafted.batch))
    theirs = 0.3 / 2 * total
    assert torch.allclose(ours, theirs, rtol=1e-10)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-12)


def test_a_linear_model_has_half_its_squared_norm(linear: nn.Module, crafted: Crafted) -> None:
    model = linear.double()
    w = model[1].weight
    ours = Jacobian(weight=1.0, projections=None).penalty(model, crafted, NOTHING, gen=gen())
    assert torch.allclose(ours, w.square().sum() / 2, rtol=1e-12)
    (slope,) = torch.autograd.grad(ours, w)
    assert torch.allclose(slope, w, rtol=1e-12), "the ½ makes the gradient of a linear model λW"


@pytest.mark.parametrize("projections", [1, 2])
def test_random_directions_are_unbiased(projections: int, linear: nn.Module, crafted: Crafted) -> None:
    """Mean of 600 draws within 4 standard errors of ‖W‖²/2 (false alarm 6e-5), and narrow enough to see ±3 %."""
    model, source = linear.double(), gen(2)
    regularizer = Jacobian(weight=1.0, projections=projections)
    draws = torch.stack([regularizer.penalty(model, crafted, NOTHING, gen=source).detach() for _ in range(600)])
    exact = model[1].weight.detach().square().sum() / 2
    error = draws.std() / len(draws) ** 0.5
    assert float(error / exact) < 0.03 / 4 and float(draws.std()) > 0
    assert float((draws.mean() - exact).abs()) < 4 * float(error)


def test_sharing_the_clean_logits_changes_nothing(smooth: nn.Module, crafted: Crafted) -> None:
    own = Jacobian().penalty(smooth, crafted, NOTHING, gen=gen())
    shared = Jacobian().penalty(smooth, crafted, Standard().loss(smooth, crafted), gen=gen())
    assert torch.equal(own, shared)


def test_the_batch_is_a_mean_over_examples(smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = Jacobian(projections=None)
    whole = regularizer.penalty(smooth, crafted, NOTHING, gen=gen())
    parts = []
    for i in range(len(crafted.batch)):
        x = crafted.batch.x[i : i + 1].detach().requires_grad_()
        one = Crafted(Batch(x, crafted.batch.y[i : i + 1], torch.zeros(1).long()), x)
        parts.append(regularizer.penalty(smooth, one, NOTHING, gen=gen()))
    assert torch.allclose(whole, torch.stack(parts).mean(), rtol=1e-10)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"projections": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Jacobian(**wrong)
