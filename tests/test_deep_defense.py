"""Deep Defense against DeepFool written out, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustlens.core.types import Batch, Crafted, Terms
from robustlens.regularizers.deep_defense import DeepDefense
from robustlens.results.errors import InputError

NO_TERMS = Terms(torch.zeros(()), torch.zeros(1, 4))


def network(activation: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), activation, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(48, 16), activation, nn.Linear(16, 4),
        ).double()  # fmt: skip
        for p in net.parameters():
            p.data *= 2
        return net.train()


def crafted_for(net: nn.Module, images: Tensor, labels: Tensor | None = None) -> Crafted:
    """Every other example is labelled as the network says, the rest as ``labels`` do."""
    x = images.double()
    net.eval()
    said = net(x).argmax(1)
    net.train()
    y = torch.where(torch.arange(len(x)) % 2 == 0, said, said.roll(1) if labels is None else labels)
    return Crafted(Batch(x, y, torch.arange(len(x))), x)


def rows(net: nn.Module, point: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = net(point[None])[0]
    return f, [torch.autograd.grad(f[k], point, create_graph=True)[0] for k in range(len(f))]


def deepfool(
    net: nn.Module, image: Tensor, y: int, dd: DeepDefense, *, through: bool = True
) -> tuple[Tensor, bool, int]:
    """Σ r_i as a function of the weights, whether the example was right, and the number of steps."""
    label = int(net(image[None]).argmax())
    right = label == y
    total = torch.zeros_like(image, requires_grad=True)
    steps = 0
    while steps < dd.iterations:
        steps += 1
        f, grad = rows(net, image + total if through else (image + total).detach().requires_grad_())
        away = label if right else int(f.argmax())
        targets = [k for k in range(len(f)) if k != label] if right else [y]
        options = []
        for k in targets:
            w = grad[k] - grad[away]
            norm = (w + dd.guard).square().sum().sqrt()
            options.append(((f[k] - f[away]).abs() / norm, w / norm))
        length, direction = min(options, key=lambda each: float(each[0].detach()))
        total = total + length * direction
        said = int(net((image + (1 + dd.overshoot) * total)[None]).argmax())
        if (said != label) if right else (said == y):
            break
    return total, right, steps


def printed(net: nn.Module, crafted: Crafted, dd: DeepDefense, *, through: bool = True) -> tuple[Tensor, list[int]]:
    total, counts = torch.zeros((), dtype=torch.float64), []
    for image, y in zip(crafted.batch.x, crafted.batch.y.tolist(), strict=True):
        delta, right, n = deepfool(net, image, y, dd, through=through)
        ratio = (1 + dd.overshoot) * delta.norm() / image.norm()
        total = total + torch.exp(-dd.c * ratio if right else dd.d * ratio)
        counts.append(n)
    return dd.weight * total / len(crafted.batch), counts


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus(beta=5)], ids=["relu", "softplus"])
def test_value_and_gradient_against_deepfool_written_out(activation: nn.Module, images: Tensor) -> None:
    net, dd = network(activation), DeepDefense(weight=2.0, c=4.0, d=1.0)
    crafted = crafted_for(net, images)
    ours = dd.penalty(net, crafted, NO_TERMS, gen=gen())
    assert net.training and all(m.training for m in net.modules())
    net.eval()
    theirs, counts = printed(net, crafted, dd)
    assert max(counts) > 1 and len(set(counts)) > 1, "some stop before others"
    found = dd.search(net, crafted, gen=gen())
    assert found.moving.sum(0).tolist() == counts
    assert 0 < int(found.right.sum()) < 12
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    weights = list(net.parameters())
    a, b = torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights, allow_unused=True)
    for mine, naive in zip(a, b, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if naive is None else naive, rtol=1e-7, atol=1e-9)
    cut = torch.autograd.grad(printed(net, crafted, dd, through=False)[0], weights, allow_unused=True)
    gap = max(float((mine - c).abs().max()) for mine, c in zip(a, cut, strict=True) if c is not None)
    assert gap > 1e-3, "the gradient also goes through the points of later iterations"


def test_one_step_is_exact_on_a_linear_model(linear: nn.Module, images: Tensor, labels: Tensor) -> None:
    """min_k |(w_y − w_k)·x + b_y − b_k| / ‖w_y − w_k‖, and for wrong examples the distance to the true class."""
    net, dd = linear.double(), DeepDefense(guard=1e-15)
    crafted = crafted_for(net, images, labels)
    x, y = crafted.batch.x, crafted.batch.y
    found = dd.search(net, crafted, gen=gen())
    delta = dd.perturbation(net, x, found).detach().flatten(1)
    w, f = net[1].weight.detach(), net(x).detach()
    expected = 0.0
    for i in range(len(x)):
        label = int(f[i].argmax())
        others = {k: float((f[i, label] - f[i, k]) / (w[label] - w[k]).norm()) for k in range(4) if k != label}
        right = label == int(y[i])
        first = w[int(found.toward[0, i])] - w[label]
        if right:
            k = min(others, key=others.__getitem__)
            assert torch.allclose(delta[i], others[k] * (w[k] - w[label]) / (w[k] - w[label]).norm(), rtol=1e-9)
            assert int(found.moving[:, i].sum()) == 1, "the overshoot crosses a linear boundary at once"
            expected += math.exp(-25 * 1.02 * others[k] / float(x[i].norm()))
        else:
            assert int(found.toward[0, i]) == int(y[i]) and torch.equal(first, w[int(y[i])] - w[label])
            if int(found.moving[:, i].sum()) == 1:
                assert float(delta[i].norm()) == pytest.approx(others[int(y[i])], rel=1e-9)
            expected += math.exp(5 * 1.02 * float(delta[i].norm() / x[i].norm()))
    value = dd.value(net, crafted, NO_TERMS, found)
    assert float(value.detach()) == pytest.approx(15 * expected / len(x), rel=1e-9)


def test_examples_stop_where_they_crossed(images: Tensor) -> None:
    net = network(nn.ReLU())
    crafted, dd = crafted_for(net, images), DeepDefense(iterations=20)
    found = dd.search(net, crafted, gen=gen())
    assert bool((found.moving[1:] <= found.moving[:-1]).all()), "who stopped does not move again"
    net.eval()
    x, y = crafted.batch.x, crafted.batch.y
    ended = net(x + 1.02 * dd.perturbation(net, x, found)).argmax(1)
    done = found.moving.sum(0) < 20
    assert bool(done.any()) and bool(((ended == y) != found.right)[done].all())


def test_the_penalty_leaves_batchnorm_and_random_state(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    crafted = Crafted(Batch(images, labels, torch.arange(12)), images)
    before, random = [b.clone() for b in net.buffers()], torch.get_rng_state()
    net.train()
    DeepDefense(d=0.1).penalty(net, crafted, NO_TERMS, gen=gen()).backward()
    assert net.training and all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Rigid(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


def test_refuses_a_network_that_cannot_be_differentiated_twice(images: Tensor) -> None:
    DeepDefense().check(SmallNet(), images)
    with pytest.raises(InputError, match="deep-defense: expected layers that can be differentiated twice"):
        DeepDefense().check(Rigid(), images)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"c": -1.0}, {"iterations": 0}, {"guard": 0.0}])
def test_refuses_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"deep-defense {next(iter(wrong))}"):
        DeepDefense(**wrong)
