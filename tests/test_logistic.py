"""Binary logistic regression: its closed-form adversary, its Hessian, and where its training ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import gen
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.discovery import build
from robustlens.core.types import Batch, Split
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.linalg.hard_margin import hard_margin_svm
from robustlens.methods.preset import Preset
from robustlens.methods.yamada_2021 import PRESETS
from robustlens.models.linear import LogisticNet
from robustlens.objectives.logistic_adversary import LogisticAdversary
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.linear_limits import logistic_optimum

THREATS = [("l2", 0.7), ("linf", 0.1), ("l1", 2.0)]


@pytest.fixture
def model() -> LogisticNet:
    net = LogisticNet(64, bias=False).double()
    nn.init.normal_(net.fc.weight, std=0.3, generator=gen(7))
    return net


@pytest.fixture
def batch(images: Tensor) -> Batch:
    return Batch(images.double(), torch.arange(len(images)) % 2, torch.arange(len(images)))


def zeros_and_ones(source: str) -> Split:
    """Every 0 and 1 of an installed data set."""
    found = load(DataConfig(source=source, classes=(0, 1)))
    parts = found.train, found.valid, found.test
    return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


@pytest.fixture(scope="module")
def digits() -> Split:
    return zeros_and_ones("digits")


@pytest.fixture(scope="module")
def mnist() -> Split:
    return zeros_and_ones("mnist5k")


def pixels(split: Split) -> tuple[np.ndarray, np.ndarray]:
    batch = split.batch(torch.arange(len(split)))
    return batch.x.flatten(1).double().numpy(), (2 * batch.y - 1).numpy()


def loss_at(w: Tensor, split: Split, threat: Lp, l2: float) -> Tensor:
    """The objective of this package at ``w``, over the whole split, with the optimizer's ℓ2 term."""
    net = LogisticNet(len(w), bias=False).double()
    batch = split.batch(torch.arange(len(split)))
    objective = LogisticAdversary(threat=threat)
    crafted = objective.craft(net, Batch(batch.x.double(), batch.y, batch.index), gen=gen())
    del net.fc.weight
    net.fc.weight = w[None]
    return objective.loss(net, crafted).loss + l2 / 2 * w @ w


# The closed-form adversary


@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_loss_and_gradient_against_the_equation(norm: str, eps: float, model: LogisticNet, batch: Batch) -> None:
    objective = LogisticAdversary(threat=Lp(norm, eps))
    terms = objective.loss(model, objective.craft(model, batch, gen=gen()))
    w = model.fc.weight[0]
    dual = {"l2": w.square().sum().sqrt(), "linf": w.abs().sum(), "l1": w.abs().max()}[norm]
    total = 0.0
    for x, y in zip(batch.x.flatten(1), batch.y.tolist(), strict=True):
        sign = 1 if y == 1 else -1
        total = total + torch.log(1 + torch.exp(-sign * (w @ x) + eps * dual)) / len(batch)
    assert float(terms.loss.detach()) == pytest.approx(float(total.detach()), abs=1e-12)
    a, b = (torch.autograd.grad(value, model.fc.weight)[0] for value in (terms.loss, total))
    assert torch.allclose(a, b, atol=1e-12)
    assert torch.equal(terms.clean_logits, model(batch.x))


@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_it_is_the_exact_adversary_of_an_endless_box(norm: str, eps: float, model: LogisticNet, batch: Batch) -> None:
    """Same loss as the support point and as PGD without clipping; same gradient as at that fixed point (Danskin)."""
    free = Lp(norm, eps, low=-100.0, high=100.0)
    objective = LogisticAdversary(threat=Lp(norm, eps))
    terms = objective.loss(model, objective.craft(model, batch, gen=gen()))
    x_exact = craft(LinearExact(threat=free), model, batch.x, batch.y, gen=gen())
    logits = model(x_exact)
    assert torch.allclose(terms.logits, logits, atol=1e-10)
    at_fixed = F.cross_entropy(logits, batch.y)
    a, b = (torch.autograd.grad(value, model.fc.weight)[0] for value in (terms.loss, at_fixed))
    assert torch.allclose(a, b, atol=1e-10)
    if norm != "l1":
        x_pgd = craft(PGD(threat=free, steps=60, step_size=eps / 4), model, batch.x, batch.y, gen=gen())
        found = F.cross_entropy(model(x_pgd), batch.y)
        assert float(found.detach()) == pytest.approx(float(terms.loss.detach()), abs=1e-6)
    inside = craft(LinearExact(threat=Lp(norm, eps)), model, batch.x, batch.y, gen=gen())
    assert float(F.cross_entropy(model(inside), batch.y).detach()) < float(terms.loss.detach()) - 1e-3


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.5])
def test_hessian(eps: float, model: LogisticNet, batch: Batch) -> None:
    """H = mean s(1 − s) a aᵀ + s (ε/‖w‖)(I − w wᵀ/‖w‖²), of which a fixed δ leaves the first term."""
    w = model.fc.weight[0].detach()
    x, y = batch.x.flatten(1), 2.0 * batch.y - 1
    objective = LogisticAdversary(threat=Lp("l2", eps))
    crafted = objective.craft(model, batch, gen=gen())
    del model.fc.weight

    def ours(v: Tensor) -> Tensor:
        model.fc.weight = v[None]
        return objective.loss(model, crafted).loss

    found = torch.autograd.functional.hessian(ours, w)
    size = w.norm()
    first, second = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.float64)
    for x_n, y_n in zip(x, y, strict=True):
        s = torch.sigmoid(-(y_n * (w @ x_n) - eps * size))
        a = y_n * x_n - eps * w / size
        first += s * (1 - s) * torch.outer(a, a) / len(x)
        second += s * (eps / size) * (torch.eye(64) - torch.outer(w, w) / size**2) / len(x)
    assert torch.allclose(found, first + second, atol=1e-8)
    fixed = x - eps * y[:, None] * w / size
    held = torch.autograd.functional.hessian(lambda v: F.softplus(-y * (fixed @ v)).mean(), w)
    assert torch.allclose(held, first, atol=1e-8)


def test_radius_zero_is_standard_training(model: LogisticNet, batch: Batch) -> None:
    values = []
    for objective in (LogisticAdversary(threat=Lp("linf", 0.0)), Standard()):
        terms = objective.loss(model, objective.craft(model, batch, gen=gen()))
        values.append((terms.loss, torch.autograd.grad(terms.loss, model.fc.weight)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_check(model: LogisticNet, net: nn.Module, batch: Batch) -> None:
    objective = LogisticAdversary(threat=Lp("l2", 1.0))
    objective.check(model, batch.x)
    with pytest.raises(InputError, match=r'expected the model "logistic", .* got SmallNet'):
        objective.check(net, batch.x)
    assert build("objective", {"name": "logistic-adversary", "threat": "linf:4/255"}).threat == Lp("linf", 4 / 255)


# The minimiser


@pytest.mark.parametrize(("threat", "l2"), [("l2:1.0", 1e-3), ("l2:0", 1e-3), ("linf:0.3", 1e-2), ("linf:0.2", 0.0)])
def test_optimum_has_no_gradient_and_nothing_below_it(threat: str, l2: float, digits: Split) -> None:
    lp = Lp.parse(threat)
    found = logistic_optimum(digits, lp, l2=l2)
    assert found.residual < 1e-7 and found.iterations > 0
    assert float(loss_at(found.w, digits, lp, l2)) == pytest.approx(found.loss, abs=1e-12)
    w = found.w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_at(w, digits, lp, l2), w)  # takes 0 as the slope of |w_i| at 0
    assert float(grad[w.detach() != 0].abs().max()) < 1e-7
    for scale in (1e-3, 1e-1, 1.0):
        for seed in range(20):
            step = scale * torch.randn(len(w), generator=gen(seed), dtype=torch.float64) * (seed % 2 or found.w.abs())
            assert float(loss_at(found.w + step, digits, lp, l2)) > found.loss


def test_optimum_is_where_long_gradient_descent_ends(digits: Split) -> None:
    threat, l2 = Lp("l2", 1.0), 0.2
    found = logistic_optimum(digits, threat, l2=l2)
    w = torch.full((64,), 0.01, dtype=torch.float64, requires_grad=True)
    for _ in range(600):
        (grad,) = torch.autograd.grad(loss_at(w, digits, threat, l2), w)
        with torch.no_grad():
            w -= 0.3 * grad
    assert torch.allclose(w.detach(), found.w, atol=1e-7)


def test_optimum_without_adversary_is_that_of_scikit_learn(mnist: Split) -> None:
    l2 = 1e-2
    x, y = pixels(mnist)
    theirs = LogisticRegression(C=1 / (len(y) * l2), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y)
    ours = logistic_optimum(mnist, l2=l2)
    assert np.allclose(ours.w.numpy(), theirs.coef_[0], atol=1e-6)


def test_optimum_in_the_sup_norm_is_sparse(digits: Split) -> None:
    """At w_i = 0 the slopes of the data stay below that of ε |w_i|: the condition of a minimum at a kink."""
    eps = 0.2
    found = logistic_optimum(digits, Lp("linf", eps))
    x, y = pixels(digits)
    w = found.w.numpy()
    s = 1 / (1 + np.exp(y * (x @ w) - eps * abs(w).sum()))
    slopes = -(s * y) @ x / len(y)
    assert 0 < (w == 0).sum() < len(w)
    assert (abs(slopes[w == 0]) <= eps * s.mean() + 1e-9).all()
    assert np.allclose(slopes[w != 0], -eps * s.mean() * np.sign(w[w != 0]), atol=1e-7)


def test_a_strong_adversary_leaves_nothing_to_learn(digits: Split) -> None:
    """w = 0 is the minimiser as soon as ε reaches the dual norm of mean y x; a little below, it is not."""
    x, y = pixels(digits)
    mean = (y[:, None] * x).mean(0)
    for norm, reach in (("l2", np.linalg.norm(mean)), ("linf", abs(mean).max())):
        beyond = logistic_optimum(digits, Lp(norm, float(reach) * 1.0001))
        assert not beyond.w.any() and (beyond.loss, beyond.residual) == (math.log(2), 0.0)
        below = logistic_optimum(digits, Lp(norm, float(reach) * 0.99))
        assert below.w.any() and below.loss < math.log(2) and below.residual < 1e-6


def test_separable_data_have_no_minimiser_until_the_adversary_passes_their_margin(digits: Split) -> None:
    margin = hard_margin_svm(digits).margin
    for threat in (None, Lp("l2", 0.0), Lp("l2", 0.9 * margin)):
        with pytest.raises(InputError, match="worst margin under the adversary"):
            logistic_optimum(digits, threat)
    assert logistic_optimum(digits, Lp("l2", 1.1 * margin)).residual < 1e-6
    with pytest.raises(InputError, match="expected l2 or linf, got l1"):
        logistic_optimum(digits, Lp("l1", 1.0))


# The largest minimum margin


def plane(points: list[tuple[float, float]], labels: list[int]) -> Split:
    return Split(torch.tensor(points).view(-1, 1, 1, 2), torch.tensor(labels))


def test_hard_margin_by_hand() -> None:
    """Of (1, 0) and −(0, ½) the nearest point of the segment to the origin is (1, −2)/5, at 1/√5."""
    split = plane([(1.0, 0.0), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0)], [1, 0, 0, 0])
    found = hard_margin_svm(split)
    assert found.direction.tolist() == pytest.approx([1 / math.sqrt(5), -2 / math.sqrt(5)], abs=1e-12)
    assert found.margin == pytest.approx(1 / math.sqrt(5), abs=1e-12) and found.bias == 0
    assert found.bound == pytest.approx(1 / math.sqrt(5), abs=1e-12)
    assert found.support.tolist() == [0, 1]


def test_hard_margin_with_bias_by_hand() -> None:
    """The classes lie beyond x₁ = 0.8 and below x₁ = 0.2."""
    split = plane([(0.8, 0.2), (1.0, 0.6), (0.2, 0.2), (0.0, 0.9)], [1, 1, 0, 0])
    found = hard_margin_svm(split, bias=True)
    assert found.direction.tolist() == pytest.approx([1, 0], abs=1e-5)
    assert (found.margin, found.bias) == (pytest.approx(0.3, abs=1e-6), pytest.approx(-0.5, abs=1e-5))
    assert found.gap < 1e-5


@pytest.mark.parametrize("source", ["digits", "mnist"])
@pytest.mark.parametrize("bias", [False, True])
def test_hard_margin_of_digits(source: str, bias: bool, request: pytest.FixtureRequest) -> None:
    split = request.getfixturevalue(source)
    found = hard_margin_svm(split, bias=bias)
    x, y = pixels(split)
    attained = (y * (x @ found.direction.numpy() + found.bias)).min()
    assert found.margin == pytest.approx(attained, abs=1e-12)
    assert -1e-12 < found.gap < (1e-6 if bias else 1e-10)
    assert float(found.direction.norm()) == pytest.approx(1, abs=1e-12)
    assert 1 < len(found.support) < 65
    if bias:
        svm = SVC(kernel="linear", C=1e8, tol=1e-6).fit(x, y)
    else:
        svm = LinearSVC(loss="hinge", C=1e4, fit_intercept=False, tol=1e-6, max_iter=1_000_000).fit(x, y)
    w = svm.coef_[0]
    theirs = (y * (x @ w + svm.intercept_)).min() / np.linalg.norm(w)
    assert theirs <= found.bound + 1e-12, "no hyperplane exceeds the bound"
    assert theirs == pytest.approx(found.margin, rel=1e-3)
    assert w @ found.direction.numpy() / np.linalg.norm(w) > 0.999


def test_the_regularization_path_of_logistic_regression_ends_at_the_hard_margin(digits: Split) -> None:
    """Two solvers that share no code: as l2 falls, the minimum margin of w / ‖w‖ rises to that of the SVM."""
    svm = hard_margin_svm(digits)
    x, y = pixels(digits)
    margins = []
    for l2 in (1e-1, 1e-3, 1e-5, 1e-7):
        w = logistic_optimum(digits, l2=l2).w.numpy()
        margins.append((y * (x @ w)).min() / np.linalg.norm(w))
    assert margins == sorted(margins)
    assert 0.9 * svm.margin < margins[-1] < svm.bound


def test_what_cannot_be_separated() -> None:
    mixed = plane([(0.1, 0.5), (0.9, 0.5), (0.5, 0.5), (0.5, 0.4)], [1, 1, 0, 0])
    with pytest.raises(InputError, match="through the origin"):
        hard_margin_svm(mixed)
    with pytest.raises(InputError, match="Take other classes"):
        hard_margin_svm(mixed, bias=True)
    with pytest.raises(InputError, match=r"expected the labels 0 and 1, got \[0, 2\]"):
        hard_margin_svm(plane([(0.0, 1.0), (1.0, 0.0)], [0, 2]))


# Presets


@pytest.mark.parametrize("preset", PRESETS, ids=lambda each: each.name)
@pytest.mark.parametrize("protocol", ["paper", "sound"])
def test_presets_can_be_built(preset: Preset, protocol: str) -> None:
    settings = preset.settings(protocol)
    TrainingConfig(**settings["training"])
    objective = build("objective", settings["objective"])
    shape = (1, 28, 28) if preset.data == "mnist" else (3, 32, 32)
    with torch.device("meta"):
        net = build("model", preset.model).build(shape, 2 if preset.model == "logistic" else 10)
    if hasattr(objective, "check"):
        objective.check(net, torch.zeros(1, *shape))
    assert bool(preset.sound) is bool(preset.differs)


def test_presets_of_deep_networks_differ_in_the_step() -> None:
    known = {preset.name: preset for preset in PRESETS}
    assert len(known) == len(PRESETS)
    for name, step in (("adversarial/cifar10-resnet18", 2 / 255), ("adversarial/svhn-preact-resnet18", 1 / 255)):
        weak, sound = (build("objective", known[name].settings(p)["objective"]).attack for p in ("paper", "sound"))
        assert (weak.steps, weak.step_size, sound.steps, sound.step_size) == (7, step, 7, None)
        assert weak.steps * weak.step_size < 2 * weak.threat.eps, "does not cross the ball"
