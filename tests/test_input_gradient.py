"""Input-gradient regularization against loops over examples, and against the slope of softmax regression."""

from __future__ import annotations

import pytest
import torch
from conftest import NOTHING, SmallNet, example_loss, gen, weight_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.core.types import Batch, Crafted
from robustlens.objectives.standard import Standard
from robustlens.regularizers.input_gradient import InputGradient
from robustlens.results.errors import InputError


def printed(model: nn.Module, images: Tensor, labels: Tensor, weight: float, norm: str) -> Tensor:
    """λ/2 · mean ‖∇ℓ‖², one example at a time."""
    squares = []
    for image, y in zip(images, labels, strict=True):
        x = image.detach().requires_grad_()
        (g,) = torch.autograd.grad(example_loss(model, x, y), x, create_graph=True)
        if norm == "l2":
            squares.append((g * g).sum())
        elif norm == "l1":
            squares.append(g.abs().sum() ** 2 / g.numel())
        else:
            squares.append(g.abs().max() ** 2)
    return weight / 2 * torch.stack(squares).mean()


def printed_difference(model: nn.Module, images: Tensor, labels: Tensor, weight: float, norm: str, h: float) -> Tensor:
    """λ/2 · mean ((ℓ(x + hd) − ℓ(x)) / h)², one example at a time."""
    squares = []
    for image, y in zip(images.detach(), labels, strict=True):
        x = image.clone().requires_grad_()
        (g,) = torch.autograd.grad(example_loss(model, x, y), x)
        if norm == "l2":
            d = g / g.norm()
        elif norm == "l1":
            d = g.sign() / g.numel() ** 0.5
        else:
            d = torch.zeros_like(g)
            place = int(g.abs().argmax())
            d.view(-1)[place] = g.view(-1)[place].sign()
        rise = example_loss(model, image + h * d, y) - example_loss(model, image, y)
        squares.append((rise / h) ** 2)
    return weight / 2 * torch.stack(squares).mean()


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_double_backward_is_the_printed_term(norm: str, smooth: nn.Module, crafted: Crafted) -> None:
    ours = InputGradient(weight=0.7, norm=norm).penalty(smooth, crafted, NOTHING, gen=gen())
    theirs = printed(smooth, crafted.batch.x, crafted.batch.y, 0.7, norm)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_difference_is_the_printed_one(norm: str, smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = InputGradient(weight=0.7, form="difference", norm=norm, h=0.05)
    assert not regularizer.differentiates_input
    ours = regularizer.penalty(smooth, crafted, NOTHING, gen=gen())
    theirs = printed_difference(smooth, crafted.batch.x, crafted.batch.y, 0.7, norm, 0.05)
    assert torch.allclose(ours, theirs, rtol=1e-9)
    assert torch.allclose(weight_gradient(ours, smooth), weight_gradient(theirs, smooth), atol=1e-10)


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_difference_tends_to_double_backward_at_first_order(norm: str, smooth: nn.Module, crafted: Crafted) -> None:
    exact = InputGradient(norm=norm).penalty(smooth, crafted, NOTHING, gen=gen())
    slope = weight_gradient(exact, smooth)
    off_value, off_slope = [], []
    for h in (1e-3, 1e-4, 1e-5):
        near = InputGradient(norm=norm, form="difference", h=h).penalty(smooth, crafted, NOTHING, gen=gen())
        off_value.append(float((near - exact).detach().abs()))
        off_slope.append(float((weight_gradient(near, smooth) - slope).norm() / slope.norm()))
    for off in (off_value, off_slope):
        assert off[1] == pytest.approx(off[0] / 10, rel=0.05) and off[2] == pytest.approx(off[0] / 100, rel=0.05)
    assert off_slope[2] < 1e-4


def test_softmax_regression_has_slope_p_minus_y_times_w(linear: nn.Module, crafted: Crafted) -> None:
    model, x = linear.double(), crafted.batch.x.detach()
    w = model[1].weight
    p = model(x).softmax(1)
    closed = 0.1 / 2 * ((p - F.one_hot(crafted.batch.y, 4)) @ w).square().sum(1).mean()
    ours = InputGradient().penalty(model, crafted, NOTHING, gen=gen())
    assert torch.allclose(ours, closed, rtol=1e-12)
    assert torch.allclose(weight_gradient(ours, model), weight_gradient(closed, model), atol=1e-12)


@pytest.mark.parametrize("form", ["double-backward", "difference"])
def test_sharing_the_clean_logits_changes_nothing(form: str, smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = InputGradient(form=form)
    own = regularizer.penalty(smooth, crafted, NOTHING, gen=gen())
    shared = regularizer.penalty(smooth, crafted, Standard().loss(smooth, crafted), gen=gen())
    assert torch.equal(own, shared)
    assert torch.equal(weight_gradient(own, smooth), weight_gradient(shared, smooth))


@pytest.mark.parametrize("form", ["double-backward", "difference"])
def test_the_batch_is_a_mean_over_examples(form: str, smooth: nn.Module, crafted: Crafted) -> None:
    regularizer = InputGradient(form=form)
    whole = regularizer.penalty(smooth, crafted, NOTHING, gen=gen())
    parts = []
    for i in range(len(crafted.batch)):
        x = crafted.batch.x[i : i + 1].detach().requires_grad_()
        one = Crafted(Batch(x, crafted.batch.y[i : i + 1], torch.zeros(1).long()), x)
        parts.append(regularizer.penalty(smooth, one, NOTHING, gen=gen()))
    assert torch.allclose(whole, torch.stack(parts).mean(), rtol=1e-9)


def test_dropout_does_not_enter_the_difference(crafted: Crafted) -> None:
    """Other masks at x + hd than at x would add a difference of order 1/h."""
    net = SmallNet().double()
    net.norm.eval()
    values = []
    for regularizer in (InputGradient(), InputGradient(form="difference", h=1e-6)):
        torch.manual_seed(1)
        values.append(regularizer.penalty(net, crafted, NOTHING, gen=gen()))
    assert torch.allclose(values[0], values[1], rtol=1e-4)


@pytest.mark.parametrize("form", ["double-backward", "difference"])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_flat_loss_costs_nothing(form: str, norm: str, linear: nn.Module, crafted: Crafted) -> None:
    model = linear.double()
    nn.init.zeros_(model[1].weight)
    found = InputGradient(form=form, norm=norm).penalty(model, crafted, NOTHING, gen=gen())
    assert float(found.detach()) == 0 and not bool(weight_gradient(found, model).any())


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"h": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        InputGradient(**wrong)
