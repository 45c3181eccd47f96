"""Certified Lipschitz constants against dense matrices, and against what networks do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.linalg.lipschitz import Uncertified, pairwise_constants
from robustlens.models.linear import LogisticNet
from robustlens.models.normalize import ChannelStandardize

DUAL = {1: math.inf, 2: 2.0, math.inf: 1.0}
every_p = pytest.mark.parametrize("p", [1, 2, math.inf])


def seeded(build: type | object, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()


def dense(layer: nn.Module, channels: int) -> np.ndarray:
    """The matrix of a linear map on (channels, 6, 6) images, column by column."""
    eye = torch.eye(channels * 36, dtype=torch.float64).view(-1, channels, 6, 6)
    with torch.no_grad():
        return (layer(eye) - layer(torch.zeros_like(eye[:1]))).flatten(1).T.numpy()


def row_differences(weight: Tensor, p: float) -> np.ndarray:
    w = weight.detach().numpy()
    return np.linalg.norm(w[:, None] - w[None], ord=DUAL[p], axis=2)


@every_p
def test_a_linear_model_has_the_dual_norms_of_its_row_differences(p: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)))
    found = pairwise_constants(model, torch.rand(1, 1, 6, 6).double(), p)
    assert np.allclose(found.numpy(), row_differences(model[1].weight, p), rtol=1e-12)


@every_p
def test_a_chain_is_the_product_of_its_norms(p: float) -> None:
    """Standardisation by ½, a circular convolution, BatchNorm with scale 3 / √(4 + eps), and the rows."""
    model = seeded(
        lambda: nn.Sequential(
            ChannelStandardize((0.3,), (0.5,)),
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="zeros" if p == 1 else "circular"),
            nn.BatchNorm2d(2),
            nn.LeakyReLU(2.0),
            nn.MaxPool2d(3, 2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2, 3),
        )
    )
    nn.init.constant_(model[2].weight, -3.0)
    model[2].running_var.fill_(4.0)
    found = pairwise_constants(model, torch.rand(1, 1, 6, 6).double(), p)
    convolution = np.linalg.norm(dense(model[1], 1), ord={1: 1, 2: 2, math.inf: np.inf}[p])
    pools = {1: 4 * 0.25, 2: 2 * 0.5, math.inf: 1}[p]  # a pixel is in up to 4 windows; means of 4 pixels
    scale = 2 * convolution * 3 / math.sqrt(4 + model[2].eps) * 2 * pools
    assert np.allclose(found.numpy(), scale * row_differences(model[7].weight, p), rtol=1e-9)


class Branches(nn.Module):
    """A residual sum, a zero-padded strided shortcut, concatenation, a mean, constants and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.norm, self.shift, self.fc = nn.BatchNorm2d(2), nn.Parameter(torch.ones(1)), nn.Linear(4, 3)
        self.norm.running_var.fill_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x + self.shift
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.down.out_channels - x.shape[1]))
        out = F.relu(self.norm(self.down(x)) + short) / 3
        wide = torch.relu(self.conv(x) - 1)
        return self.fc(torch.cat([out.mean((2, 3)), wide.mean((2, 3))], dim=1))


@every_p
def test_branches_add_up_and_hold_on_random_pairs(p: float) -> None:
    model = seeded(Branches)
    state = copy.deepcopy(model.state_dict())
    model.train()
    x = torch.rand(1, 1, 6, 6).double()
    found = pairwise_constants(model, x, p)
    assert model.training and model.norm.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    norms = [
        np.linalg.norm(dense(layer, 1), ord={1: 1, 2: 2, math.inf: np.inf}[p]) for layer in (model.conv, model.down)
    ]
    least = max(2 * norms[0], 2 / 3 * (norms[1] / math.sqrt(0.3 + 1e-5) + 1))
    most = (2 * norms[0]) + 2 / 3 * (norms[1] / math.sqrt(0.3 + 1e-5) + 1)
    rows = row_differences(model.fc.weight, p)
    assert (found.numpy() >= least * rows * (1 - 1e-9)).all()
    assert (found.numpy() <= 1.5 * most * rows).all()  # zero-padded layers are bounded on a larger circle
    a, b = torch.randn(2, 400, 1, 6, 6, generator=gen()).double()
    b = a + 0.1 * b
    with torch.no_grad():
        change = model(a) - model(b)
    size = (a - b).flatten(1).norm(p=p, dim=1)
    ratio = ((change[:, :, None] - change[:, None]).abs() / size[:, None, None]).amax(0)
    assert (ratio <= found).all()


@every_p
def test_logistic_regression_is_exact(p: float) -> None:
    """Its logits are (0, z), joined: the difference is z."""
    model = seeded(lambda: LogisticNet(36, bias=True))
    found = pairwise_constants(model, torch.rand(1, 1, 6, 6).double(), p)
    exact = float(model.fc.weight.detach().norm(p=DUAL[p]))
    assert found.tolist() == [[0, pytest.approx(exact)], [pytest.approx(exact), 0]]


@every_p
def test_without_a_last_linear_layer_two_logits_move_at_most_so_far(p: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    nn.init.eye_(model[0].weight)
    found = pairwise_constants(nn.Sequential(nn.Flatten(), model), torch.rand(1, 1, 1, 3), p)
    assert found[0, 1] == pytest.approx(2 ** (1 / DUAL[p])) and found[1, 1] == 0


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).flatten(1)


class Spread(nn.Module):
    """Broadcasting copies one channel to three, which the constant of a sum does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift).flatten(1)


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Around(nn.Module):
    """A layer, and how it meets what came before."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.meet = nn.Linear(36, 36), meet

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.meet(x, self.layer(x))


def _times_ten(x: Tensor, h: Tensor) -> Tensor:
    h.mul_(10.0)
    return h


def _under_another_name(x: Tensor, h: Tensor) -> Tensor:
    same = h
    same += x
    return h


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Around(lambda x, h: torch.add(x, h, alpha=10.0)), "alpha"),
        (Around(lambda x, h: x + torch.add(input=h, other=h)), "input, other"),
        (Around(lambda x, h: h.add_(x)), "'add_'"),
        (Around(_times_ten), "'mul_'"),
        (Around(_under_another_name), "another answer"),
        (Squares(), "'mul'"),
        (Spread(), "'add'"),
        (Asks(), "symbolically"),
        (nn.Sequential(nn.GELU(), nn.Flatten()), "GELU"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten()), "layer 0"),
    ],
)
def test_what_is_not_known_is_not_certified(model: nn.Module, why: str) -> None:
    found = pairwise_constants(model, torch.rand(1, 1, 6, 6), 2)
    assert isinstance(found, Uncertified) and why in found.why
