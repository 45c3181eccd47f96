"""DeepFool, DDN and Carlini–Wagner against the papers' algorithms, written down for one image in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.carlini_wagner import CarliniWagner
from robustlens.attacks.ddn import DDN
from robustlens.attacks.deepfool import DeepFool
from robustlens.core.types import Attack
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def gradient(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(f(z), z)
    return slope


def deepfool(model: nn.Module, x: Tensor, y: int, norm: str, steps: int) -> Tensor:
    """Algorithm 2, all classes, no box; the sum of the steps is stretched by 1.02 before the class is looked at."""
    total = torch.zeros_like(x)
    for _ in range(steps):
        z = x + 1.02 * total
        logits = model(z[None])[0].detach()
        if int(logits.argmax()) != y:
            break
        nearest, step = math.inf, total
        for k in range(len(logits)):
            if k != y:
                w = gradient(lambda z, k=k: model(z[None])[0, k] - model(z[None])[0, y], z)
                lead = float(logits[y] - logits[k])
                size = float(w.abs().sum() if norm == "linf" else w.norm())
                if lead / size < nearest:
                    nearest = lead / size
                    step = nearest * (w.sign() if norm == "linf" else w / w.norm())
        total = total + step
    return x + 1.02 * total


def ddn(model: nn.Module, x: Tensor, y: int, steps: int) -> Tensor:
    """Algorithm 1 with δ renewed from the clipped image, as in the authors' program; not rounded to levels."""
    delta, eps, best, smallest = torch.zeros_like(x), 1.0, None, math.inf
    label = torch.tensor([y])
    for k in range(steps + 1):
        wrong = int(model((x + delta)[None]).argmax()) != y
        if wrong and float(delta.norm()) < smallest:
            best, smallest = x + delta, float(delta.norm())
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2
        g = gradient(lambda z: F.cross_entropy(model(z[None]), label), x + delta)
        delta = delta + alpha * g / g.norm()
        eps = eps * (0.95 if wrong else 1.05)
        delta = (x + eps * delta / delta.norm()).clamp(0, 1) - x
    assert best is not None
    return best


def carlini_wagner(model: nn.Module, x: Tensor, y: int, c: float, steps: int, searches: int, pace: float) -> Tensor:
    """§V with torch's Adam; the loss is compared after every tenth of the steps, as in the authors' program."""
    best, smallest, lower, upper = x, math.inf, 0.0, math.inf
    for _ in range(searches):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam, before, success = torch.optim.Adam([w], lr=pace), math.inf, False
        for step in range(steps):
            z = (torch.tanh(w) + 1) / 2
            logits = model(z[None])[0]
            others = torch.cat([logits[:y], logits[y + 1 :]])
            loss = (z - x).pow(2).sum() + c * F.relu(logits[y] - others.max())
            if int(logits.argmax()) != y:
                success = True
                size = float((z - x).detach().norm())
                if size < smallest:
                    best, smallest = z.detach(), size
            if step % (steps // 10) == 0:
                if float(loss.detach()) > 0.9999 * before:
                    break
                before = float(loss.detach())
            adam.zero_grad()
            loss.backward()
            adam.step()
        lower, upper = (lower, c) if success else (c, upper)
        c = (lower + upper) / 2 if math.isfinite(upper) else 10 * c
    return best


def right(model: nn.Module, n: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 1, 8, 8, generator=gen(1), dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    with torch.no_grad():
        return x, model(x).argmax(1)


def agree(attack: Attack, model: nn.Module, naive: Callable[[Tensor, int], Tensor]) -> None:
    x, y = right(model)
    found = attack.perturb(model, x, y, gen=gen())
    for image, label, answer in zip(x, y.tolist(), found, strict=True):
        assert torch.allclose(answer, naive(image, label), atol=1e-9)
    with torch.no_grad():
        assert (model(found).argmax(1) != y).all(), "all of them ended behind the boundary"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_is_algorithm_2(norm: str, network: nn.Module, smooth: nn.Module) -> None:
    attack = DeepFool(threat=Lp(norm, 1.0, low=-99.0, high=99.0))
    for model in (network, smooth):
        agree(attack, model, lambda x, y, model=model: deepfool(model, x, y, norm, 50))


def test_ddn_is_algorithm_1(network: nn.Module, smooth: nn.Module) -> None:
    for model in (network, smooth):
        agree(DDN(threat=Lp("l2", 8.0), steps=40), model, lambda x, y, model=model: ddn(model, x, y, 40))


def test_carlini_wagner_is_section_5(network: nn.Module, smooth: nn.Module) -> None:
    for model in (network, smooth):

        def naive(x: Tensor, y: int, model: nn.Module = model) -> Tensor:
            def lead(z: Tensor) -> Tensor:
                logits = model(z[None])[0]
                return logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).max()

            c = 2 * float(lead(x).detach()) / float(gradient(lead, x).norm()) ** 2
            return carlini_wagner(model, x, y, c / 20, 20, 5, 0.1)

        attack = CarliniWagner(threat=Lp("l2", 8.0), steps=20, searches=5, step_size=0.1, first_c=1 / 20)
        agree(attack, model, naive)


def test_carlini_wagner_reaches_its_confidence(network: nn.Module) -> None:
    x, y = right(network)
    leads = []
    for confidence in (0.0, 0.15):
        attack = CarliniWagner(threat=Lp("l2", 8.0), steps=80, searches=5, step_size=0.05, confidence=confidence)
        logits = network(attack.perturb(network, x, y, gen=gen())).detach()
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        leads.append(others - logits.gather(1, y[:, None])[:, 0])
    assert (leads[0] >= 0).all() and leads[0].median() < 0.05
    assert (leads[1] >= 0.15).all() and leads[1].median() < 0.2


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (DeepFool, {"threat": Lp("l1", 5.0)}),
        (DeepFool, {"steps": 0}),
        (DeepFool, {"rivals": 0}),
        (DeepFool, {"overshoot": -0.1}),
        (DDN, {"threat": Lp("linf", 0.1)}),
        (DDN, {"steps": 0}),
        (DDN, {"step_size": 0.0}),
        (DDN, {"gamma": 1.0}),
        (DDN, {"init_norm": 0.0}),
        (CarliniWagner, {"threat": Lp("linf", 0.1)}),
        (CarliniWagner, {"steps": 9}),
        (CarliniWagner, {"searches": 0}),
        (CarliniWagner, {"step_size": 0.0}),
        (CarliniWagner, {"first_c": 0.0}),
        (CarliniWagner, {"confidence": -1.0}),
    ],
)
def test_settings_that_cannot_work_are_refused(cls: type, settings: dict) -> None:
    with pytest.raises(InputError):
        cls(**{"threat": Lp("l2", 1.0), **settings})
