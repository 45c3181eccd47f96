"""MMR against dense matrices, closed forms and the numbers of its authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.core.discovery import build
from robustlens.core.types import Batch, Crafted, Moment, Terms
from robustlens.linalg.receptive import receptive_fields
from robustlens.models.normalize import ImageStandardize
from robustlens.objectives.standard import Standard
from robustlens.regularizers import mmr as mmr_module
from robustlens.regularizers.mmr import MMR
from robustlens.results.errors import InputError

DUAL = {"l2": 2.0, "linf": 1.0, "l1": float("inf")}


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 15), nn.LeakyReLU(0.2), nn.Linear(15, 4)
        ).double()


def convolutional() -> nn.Sequential:
    """With BatchNorm, dropout, both poolings and a padded first layer, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(5, 4),
        ).double()  # fmt: skip
        net[1].running_mean.uniform_(-0.3, 0.3)
        net[1].running_var.uniform_(0.5, 2)
        return net.train()


def affine(net: nn.Sequential, image: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Of every hidden layer and of the logits: the linear map (n, units) on the region of ``image``, and the values.

    The map holds one image of a layer's shape for each pixel, and meets each layer as a matrix would.
    """
    n = image.numel()
    v, z = torch.eye(n, dtype=image.dtype).view(n, *image.shape), image[None]
    hidden = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            v, z = v @ layer.weight.T, z @ layer.weight.T + layer.bias
        elif isinstance(layer, nn.Conv2d):
            v = F.conv2d(v, layer.weight, stride=layer.stride, padding=layer.padding)
            z = F.conv2d(z, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, nn.BatchNorm2d):
            slope = (layer.weight / (layer.running_var + layer.eps).sqrt())[:, None, None]
            v, z = v * slope, (z - layer.running_mean[:, None, None]) * slope + layer.bias[:, None, None]
        elif isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
            hidden.append((v.flatten(1), z.flatten()))
            mask = torch.where(z > 0, torch.ones_like(z), getattr(layer, "negative_slope", 0.0))
            v, z = v * mask, z * mask
        elif isinstance(layer, nn.MaxPool2d):
            z, where = F.max_pool2d(z, 2, return_indices=True)
            v = v.flatten(2).gather(2, where.flatten(2).expand(n, -1, -1)).view(n, *z.shape[1:])
        elif not isinstance(layer, nn.Dropout):
            v, z = layer(v), layer(z)
    return hidden, (v, z[0])


def printed(net: nn.Sequential, batch: Batch, mmr: MMR, ramp: float, k_b: int) -> Tensor:
    """The regularizer as the paper writes it, image by image, unit by unit."""
    q, total = DUAL[mmr.norm], torch.zeros((), dtype=torch.float64)
    for image, label in zip(batch.x, batch.y.tolist(), strict=True):
        hidden, (v, f) = affine(net, image)
        d_b = [values[j].abs() / maps[:, j].norm(q) for maps, values in hidden for j in range(len(values))]
        d_d = [(f[label] - f[k]) / (v[:, label] - v[:, k]).norm(q) for k in range(len(f)) if k != label]
        near = sorted(d_b, key=lambda d: float(d.detach()))[:k_b]
        total = total + sum(F.relu(1 - d / mmr.gamma_b) for d in near) / k_b
        total = total + sum(F.relu(1 - d / mmr.gamma_d) for d in d_d) / len(f)
    return mmr.weight * ramp * total / len(batch)


def step(net: nn.Module, images: Tensor, labels: Tensor, moment: Moment | None = None) -> tuple[Crafted, Terms]:
    batch = Batch(images.double(), labels, torch.arange(len(labels)), moment or Moment())
    crafted = Crafted(batch, batch.x)
    return crafted, Terms(torch.zeros(()), torch.zeros(len(labels), 4))


@pytest.mark.parametrize("column", [0.0, float("inf")], ids=["by column", "by row"])
@pytest.mark.parametrize("make", [mlp, convolutional])
@pytest.mark.parametrize(("norm", "gamma"), [("l2", 0.3), ("linf", 0.02), ("l1", 1.0)])
def test_value_and_gradient_against_dense_matrices(
    make: Any, norm: Any, gamma: float, column: float, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustlens.regularizers.mmr.COLUMN", column)
    net = make()
    mmr = MMR(weight=0.7, gamma_b=gamma, gamma_d=2 * gamma, norm=norm, first=0.4, last=0.2, chunk=50)
    crafted, terms = step(net, images, labels, Moment(epoch=3.5, epochs=20))
    buffers = [b.clone() for b in net.buffers()]
    mmr.check(net, crafted.batch.x)
    ours = mmr.penalty(net, crafted, terms, gen=gen())
    assert net.training and all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    units = 35 if make is mlp else 4 * 64 + 5 * 4
    k_b = int(int(0.4 * units) + (int(0.2 * units) - int(0.4 * units)) * 4 / 20)
    theirs = printed(net, crafted.batch, mmr, 4 / 10, k_b)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10) and float(ours.detach()) > 0.01
    weights = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights, allow_unused=True), strict=True
    ):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-12)
        assert b is None or bool(a.any())


@pytest.mark.parametrize(("column", "by_column"), [(0.0, [2]), (3.0, [1]), (float("inf"), [])])
def test_every_layer_goes_the_cheaper_way(
    column: float, by_column: list[int], images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 colours serve the first layer's 48 units, 16 the second one's 16."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        first, second = nn.Conv2d(1, 3, 2, stride=2), nn.Conv2d(3, 4, 2, stride=2)
        net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).double()
    mmr, seen, by = MMR(gamma_b=3.0, gamma_d=0.6, first=0.9, last=0.9), [], MMR._by_column
    monkeypatch.setattr("robustlens.regularizers.mmr.COLUMN", column)
    monkeypatch.setattr(MMR, "_by_column", lambda *args: seen.append(args[-1].layers) or by(*args))
    crafted, terms = step(net, images, labels, Moment(epoch=9.5))
    ours = mmr.penalty(net, crafted, terms, gen=gen())
    theirs = printed(net, crafted.batch, mmr, 1.0, int(0.9 * 64))
    assert seen == by_column and float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    weights = list(net.parameters())
    pairs = zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) and bool(a.any()) for a, b in pairs)


@pytest.mark.parametrize("column", [0.0, float("inf")], ids=["by column", "by row"])
def test_layers_that_do_not_learn(
    column: float, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustlens.regularizers.mmr.COLUMN", column)
    mmr, found = MMR(gamma_b=0.5, first=0.5, last=0.5, chunk=50), []
    for frozen in (False, True):
        net = convolutional()
        net[0].requires_grad_(not frozen)
        net[1].requires_grad_(not frozen)
        penalty = mmr.penalty(net, *step(net, images, labels), gen=gen())
        found.append([penalty, *torch.autograd.grad(penalty, list(net[4:].parameters()))])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*found, strict=True))


def test_decision_distance_of_a_linear_model_is_the_exact_signed_one(images: Tensor, labels: Tensor) -> None:
    net = mlp()
    with torch.no_grad():  # every unit is on, and its boundary far away
        net[1].bias += 100
        net[3].weight.abs_()
    net = nn.Sequential(*net[:4], nn.ReLU(), net[5])
    with torch.no_grad():
        w = net[5].weight @ net[3].weight @ net[1].weight
        f = net(images.double())
        net[5].bias -= f.mean(0)
        f = net(images.double())
    mmr = MMR(gamma_b=1.0, gamma_d=3.0, warmup=0)
    hinges = 0.0
    for logits, y in zip(f, labels.tolist(), strict=True):
        for k in range(4):
            if k != y:
                hinges += max(0.0, 1 - float((logits[y] - logits[k]) / (w[y] - w[k]).norm()) / 3)
    ours = mmr.penalty(net, *step(net, images, labels), gen=gen())
    assert float(ours.detach()) == pytest.approx(hinges / 4 / 12, rel=1e-9)
    assert bool((f.argmax(1) != labels).any()), "a wrong example counts with a negative distance"
    assert float((f.argmax(1) == labels).sum()) > 0


def test_schedule_is_that_of_the_code() -> None:
    """Numbers computed by hand from train.py for lenet-small on MNIST: 4,804 units, 100 epochs counted from 1."""
    found = [MMR().schedule(Moment(epoch=e, epochs=100), 4804) for e in (0.0, 0.99, 4.5, 9.0, 49.0, 99.9)]
    assert [k for _, k in found] == [476, 476, 460, 441, 288, 96]
    assert [s for s, _ in found] == pytest.approx([0.1, 0.1, 0.5, 1, 1, 1])
    assert MMR(warmup=0).schedule(Moment(), 7) == (1.0, 1)


def test_number_of_hidden_units_of_lenet_small() -> None:
    net = build("model", "lenet-small").build((1, 28, 28), 10)
    crafted = Crafted(Batch(torch.rand(1, 1, 28, 28), torch.tensor([3]), torch.tensor([0])), torch.rand(1, 1, 28, 28))
    far = MMR(gamma_b=1e9, gamma_d=1e9, first=1.0, last=1.0, chunk=200)
    found = far.search(net, crafted, gen=gen())
    *hidden, classes = found
    assert [len(near.unit) for near in hidden] == [16 * 14 * 14, 32 * 7 * 7, 100] and 3136 + 1568 + 100 == 4804
    assert len(classes.unit) == 9, "all classes but the true one"
    assert classes.share == pytest.approx(0.1 / 10), "the divisor is K all the same"


def test_chunks_do_not_change_the_value(images: Tensor, labels: Tensor) -> None:
    net = mlp()
    results = []
    for chunk in (1, 7, 10_000):
        penalty = MMR(gamma_b=0.5, first=0.5, last=0.5, chunk=chunk).penalty(net, *step(net, images, labels), gen=gen())
        results.append([penalty.detach(), *torch.autograd.grad(penalty, list(net.parameters()))])
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(results[0], other, strict=True))


def test_columns_are_taken_where_they_are_fewer(
    images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, taken = build("model", "lenet-small").build((1, 8, 8), 4), []
    by_column = mmr_module.norms_by_column
    monkeypatch.setattr(mmr_module, "norms_by_column", lambda *a, **k: taken.append(1) or by_column(*a, **k))
    for share, expected in ((0.02, 0), (1.0, 1)):
        crafted, terms = step(net.double(), images, labels)
        MMR(gamma_b=9.0, first=share, last=share).penalty(net, crafted, terms, gen=gen())
        assert len(taken) == expected


def test_receptive_fields_are_looked_at_once_a_training(
    images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, looks = convolutional(), []

    def counted(*args: Any, **settings: Any) -> Any:
        looks.append(args)
        return receptive_fields(*args, **settings)

    monkeypatch.setattr("robustlens.regularizers.mmr.receptive_fields", counted)
    moment = Moment()
    values = [MMR(chunk=50).penalty(net, *step(net, images, labels, moment), gen=gen()) for _ in range(3)]
    assert len(looks) == 1 and torch.equal(values[0], values[2])
    assert torch.equal(values[0], MMR(chunk=50).penalty(net, *step(net, images, labels), gen=gen())) and len(looks) == 2


def test_a_unit_without_boundary_and_one_on_its_boundary(images: Tensor, labels: Tensor) -> None:
    net = mlp()
    with torch.no_grad():
        net[1].weight[0], net[1].bias[0] = 0, 0  # constant: nowhere a boundary
        net[1].weight[1], net[1].bias[1] = 0, 0
        net[1].weight[1, 0], net[1].bias[1] = 1, 0  # a black first pixel is on its boundary
        images = images.clone()
        images[:, 0, 0, 0] = 0
    mmr = MMR(gamma_b=0.5, gamma_d=1e-9, first=1.0, last=1.0, warmup=0)
    first = mmr.search(net, step(net, images, labels)[0], gen=gen())[0]
    assert not bool((first.unit == 0).any())
    assert int((first.unit == 1).sum()) == len(labels)
    penalty = mmr.penalty(net, *step(net, images, labels), gen=gen())
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(penalty, list(net.parameters())))


def test_far_boundaries_cost_nothing(images: Tensor, labels: Tensor) -> None:
    net = mlp()
    sure = net(images.double()).argmax(1)
    mmr = MMR(gamma_b=1e-9, gamma_d=1e-9)
    assert float(mmr.penalty(net, *step(net, images, sure), gen=gen()).detach()) == 0


def test_a_relu_module_that_is_used_twice_counts_twice(images: Tensor, labels: Tensor) -> None:
    once = mlp()
    once[4] = nn.ReLU()
    shared = nn.Sequential(*once[:4], once[2], once[5])
    a, b = (MMR(first=0.5, last=0.5).penalty(n, *step(n, images, labels), gen=gen()) for n in (once, shared))
    assert torch.equal(a, b) and float(a.detach()) > 0


class Mixed(nn.Module):
    """One activation is a module, the other a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.relu, self.second, self.head = nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.second(self.relu(self.first(x.flatten(1))))))


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (SmallNet(), "nn.ReLU or nn.LeakyReLU modules, got none"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "modules, got none"),
        (Mixed(torch.relu), "the 1 calls .* got 2 ReluBackward0"),
        (Mixed(torch.abs), "1 AbsBackward0"),
        (Mixed(F.relu6), "HardtanhBackward0"),
        (Mixed(torch.tanh), "piecewise linear"),
        (
            nn.Sequential(ImageStandardize(), nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 4)),
            "ClampBackward1|piecewise",
        ),
    ],
)
def test_refuses_what_has_other_regions(net: nn.Module, said: str, images: Tensor) -> None:
    with pytest.raises(InputError, match=said):
        MMR().check(net, images)


class Doubled(torch.autograd.Function):
    """Can be differentiated as often as one likes, but backward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0]


def test_refuses_layers_without_forward_mode(images: Tensor) -> None:
    class Backward(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = Doubled.apply(x)
            return doubled

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), Backward(), nn.Linear(9, 4))
    with pytest.raises(InputError, match=r"forward mode.*got.*jvp"):
        MMR().check(net, images)


@pytest.mark.parametrize("name", ["lenet-small", "lenet", "mlp", "mnist-cnn"])
def test_accepts_the_piecewise_linear_networks(name: str) -> None:
    x = torch.rand(4, 1, 28, 28, generator=gen(1))
    MMR().check(build("model", name).build((1, 28, 28), 10), x)


@pytest.mark.parametrize(
    "wrong", [{"weight": -1.0}, {"gamma_b": 0.0}, {"gamma_d": -1.0}, {"warmup": -1.0}, {"first": 1.5}, {"chunk": 0}]
)
def test_refuses_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"mmr {next(iter(wrong))}"):
        MMR(**wrong)


def test_the_penalty_moves_boundaries_away(images: Tensor, labels: Tensor) -> None:
    """Ten steps against the penalty alone lower it (its gradient is a descent direction)."""
    net, mmr = mlp(), MMR(gamma_b=0.5, gamma_d=0.5, first=1.0, last=1.0, warmup=0)
    crafted, _ = step(net, images, labels)
    values = []
    for _ in range(10):
        penalty = mmr.penalty(net, crafted, Standard().loss(net, crafted), gen=gen())
        values.append(float(penalty.detach()))
        for p, g in zip(net.parameters(), torch.autograd.grad(penalty, list(net.parameters())), strict=True):
            p.data -= 0.05 * g
    assert values[-1] < 0.8 * values[0]
