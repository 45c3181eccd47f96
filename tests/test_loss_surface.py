"""What the penalties on the slope of the loss share: traceless passes, common dropout masks, refused networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustlens.attacks.fgsm import FGSM
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Batch, Crafted, Objective, Terms
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.regularizers.grad_align import GradAlign
from robustlens.regularizers.input_gradient import InputGradient
from robustlens.regularizers.jacobian import Jacobian
from robustlens.regularizers.local_linearity import LocalLinearity
from robustlens.regularizers.loss_surface import nearby_and_clean_logits, slope
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.updates.descend import Descend

THREAT = Lp("linf", 0.1)
REGULARIZERS = [
    InputGradient(),
    InputGradient(form="difference"),
    Jacobian(),
    GradAlign(threat=THREAT),
    LocalLinearity(threat=THREAT),
]


class OnceOnly(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class OnceNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(OnceOnly.apply(x.flatten(1)))


def state(net: nn.Module) -> list[Tensor]:
    return [*(t.clone() for t in net.state_dict().values()), torch.get_rng_state()]


def test_a_network_without_a_second_derivative_is_refused(images: Tensor) -> None:
    with pytest.raises(InputError, match=r"differentiated twice.*once_differentiable"):
        require_second_derivative(OnceNet(), images, "anything")


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda r: r.name)
def test_every_double_backward_refuses_it_before_training(regularizer: Any, images: Tensor) -> None:
    if regularizer == InputGradient(form="difference"):
        regularizer.check(OnceNet(), images)
    else:
        with pytest.raises(InputError, match=regularizer.name):
            regularizer.check(OnceNet(), images)


def test_the_gradient_of_such_a_network_would_be_wrong_without_a_word(images: Tensor) -> None:
    x = images[:2].clone().requires_grad_()
    net = OnceNet()
    (grad,) = torch.autograd.grad(net(x)[:, 0].sum(), x, create_graph=True)
    assert bool(grad.any())
    found = torch.autograd.grad(grad.square().sum(), list(net.parameters()), allow_unused=True)
    assert found == (None, None), "∂‖2x w₀‖²/∂w₀ is 8x²w₀"


def test_the_check_accepts_and_leaves_no_trace(net: nn.Module, images: Tensor) -> None:
    before = state(net)
    require_second_derivative(net, images, "anything")
    assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True))
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("objective", [Standard(), Adversarial(attack=FGSM(threat=THREAT))], ids=lambda o: o.name)
@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda r: f"{r.name}-{getattr(r, 'form', '')}")
def test_a_step_moves_statistics_and_draws_as_the_plain_one(
    regularizer: Any, objective: Objective, images: Tensor, labels: Tensor
) -> None:
    """On a network with BatchNorm and dropout, in train mode; with and without the objective's clean logits."""
    net = SmallNet()
    plain = copy.deepcopy(net)
    batch = Batch(images, labels, torch.arange(len(labels)))
    found = []
    for model, regularizers in ((net, (regularizer,)), (plain, ())):
        torch.manual_seed(9)
        terms = Descend().backward(model, objective, regularizers, batch, gen=gen())
        found.append([terms.logits.detach(), *model.buffers(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with_penalty, without = ([p.grad for p in model.parameters()] for model in (net, plain))
    assert all(bool(g.isfinite().all()) for g in with_penalty)
    assert not all(torch.equal(a, b) for a, b in zip(with_penalty, without, strict=True))
    assert not images.requires_grad and batch.x.grad is None


def test_neighbours_share_the_dropout_masks(images: Tensor, labels: Tensor) -> None:
    net = SmallNet()
    crafted = Crafted(Batch(images, labels, torch.arange(len(labels))), images)
    shared = net(images)
    near, clean = nearby_and_clean_logits(net, images, crafted, Terms(shared.sum(), shared, clean_logits=shared))
    assert torch.equal(near, clean), "at no distance there is no difference"
    assert not torch.equal(clean, shared), "the objective's pass drew other masks"
    net.drop.p = 0.0
    shared = net(images)
    _, clean = nearby_and_clean_logits(net, images, crafted, Terms(shared.sum(), shared, clean_logits=shared))
    assert clean is shared


def test_slope_is_that_of_each_loss_and_leaves_no_trace(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.eval()
    before = state(net)
    grad, height = slope(net, images, labels)
    for i in range(len(images)):
        x = images[i : i + 1].clone().requires_grad_()
        loss = -net(x).log_softmax(1)[0, labels[i]]
        (expected,) = torch.autograd.grad(loss, x)
        assert torch.allclose(grad[i], expected[0], atol=1e-6) and torch.allclose(height[i], loss, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True))
    assert all(p.grad is None for p in net.parameters()) and not grad.requires_grad
