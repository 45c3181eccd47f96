"""Hessians of losses in the weights: closed forms, dense matrices, and an adversary that follows."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import gen, needs_data
from test_loss_surface import OnceOnly
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.types import Split, Splits, Subject
from robustlens.data.arrays import from_arrays
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.lenses.hessian import CLEAN, FROZEN, FULL, Hessian
from robustlens.lenses.inner_maximum import FollowingHessian, reattacked_product
from robustlens.lenses.robust_logistic import logistic_row, robust_logistic_hessian
from robustlens.linalg.hessian import LossHessian, filter_norms, flat, require_curvature, weights
from robustlens.linalg.lanczos import Operator, eigenpairs
from robustlens.models.linear import LogisticNet
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp
from robustlens.train.linear_limits import logistic_optimum

ENDLESS = {"low": -100.0, "high": 100.0}


def dense(apply: Operator, d: int) -> Tensor:
    return torch.stack([apply(row) for row in torch.eye(d, dtype=torch.float64)], 1)


def some(apply: Operator, d: int) -> tuple[Tensor, Tensor]:
    """Five random directions as columns (d, 5), and their products."""
    v = torch.randn(5, d, generator=gen(8), dtype=torch.float64)
    return v.T, torch.stack([apply(row) for row in v], 1)


@pytest.fixture
def row() -> LogisticNet:
    net = LogisticNet(64, bias=False).double()
    nn.init.normal_(net.fc.weight, std=0.3, generator=gen(7))
    return net


@pytest.fixture
def x(images: Tensor) -> Tensor:
    return images.double()


@pytest.fixture
def sides() -> Tensor:
    return torch.arange(12) % 2


# Products against closed forms; 12 examples in chunks of 5, 5 and 2


def test_squared_error(x: Tensor) -> None:
    """(1/N) Σ ‖w·x_i − y_i‖² has the Hessian (2/N) XᵀX; the mean of batch means has another."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False)).double()
    y = torch.randn(12, 1, generator=gen(2), dtype=torch.float64)
    at, points = weights(model), x.flatten(1)

    def squares(z: Tensor, target: Tensor) -> Tensor:
        return (z - target).square().sum()

    whole = LossHessian(model, at, x, y, chunk=5, loss=squares)
    assert torch.allclose(dense(whole, 64), 2 / 12 * points.T @ points, atol=1e-12)
    assert whole.value() == pytest.approx(float((model(x) - y).detach().square().mean()), abs=1e-12)
    means = sum(2 / len(p) * p.T @ p for p in points.split(5)) / 3
    assert not torch.allclose(dense(whole, 64), means, atol=1e-2)


def test_logistic_regression(x: Tensor, sides: Tensor, row: LogisticNet) -> None:
    """XᵀDX/N with D = diag σ(z)(1 − σ(z))."""
    points = x.flatten(1)
    p = torch.sigmoid(points @ row.fc.weight[0].detach())
    found = dense(LossHessian(row, weights(row), x, sides, chunk=5), 64)
    assert torch.allclose(found, points.T @ torch.diag(p * (1 - p)) @ points / 12, atol=1e-12)


def test_softmax_regression(x: Tensor, labels: Tensor) -> None:
    """mean (diag p − p pᵀ) ⊗ x xᵀ."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False)).double()
    truth = torch.zeros(256, 256, dtype=torch.float64)
    for point in x.flatten(1):
        p = (model[1].weight.detach() @ point).softmax(0)
        truth += torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(point, point)) / 12
    assert torch.allclose(dense(LossHessian(model, weights(model), x, labels, chunk=5), 256), truth, atol=1e-12)


def test_a_network_against_autograd(x: Tensor, labels: Tensor, network: nn.Module) -> None:
    """Only parameters that require a gradient count, and the gradient is that of the mean loss."""
    network[1].bias.requires_grad_(False)
    at = weights(network)
    assert "1.bias" not in at and len(at) == 3
    hessian = LossHessian(network, at, x, labels, chunk=5)

    def mean_loss(w: Tensor) -> Tensor:
        parts = w.split([576, 36, 4])
        hidden = (x.flatten(1) @ parts[0].view(9, 64).T + network[1].bias).relu()
        return F.cross_entropy(hidden @ parts[1].view(4, 9).T + parts[2], labels)

    w = flat(at.values())
    assert torch.allclose(hessian.gradient(), torch.autograd.functional.jacobian(mean_loss, w), atol=1e-12)
    truth = torch.autograd.functional.hessian(mean_loss, w)
    v = torch.randn(616, generator=gen(1), dtype=torch.float64)
    assert torch.allclose(hessian(v), truth @ v, atol=1e-12)
    found = eigenpairs(hessian, w, 3, gen=gen(), tolerance=1e-8, restarts=20)
    assert torch.allclose(found.values, torch.linalg.eigvalsh(truth).flip(0)[:3], rtol=1e-8) and found.converged


# The adversary that follows the weights


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.7), ("linf", 0.1)])
def test_robust_logistic_regression(norm: str, eps: float, x: Tensor, sides: Tensor, row: LogisticNet) -> None:
    """Closed form = autograd on the closed-form loss = what the solver finds at the exact maximisers."""
    w, threat = row.fc.weight[0].detach(), Lp(norm, eps, **ENDLESS)
    truth, s = robust_logistic_hessian(w, x, sides, threat)

    def loss(v: Tensor) -> Tensor:
        size = v.norm() if norm == "l2" else v.abs().sum()
        return F.softplus(-(2.0 * sides - 1) * (x.flatten(1) @ v) + eps * size).mean()

    assert torch.allclose(torch.autograd.functional.hessian(loss, w), truth, atol=1e-12)
    x_adv = craft(LinearExact(threat=threat), row, x, sides, gen=gen())
    following = FollowingHessian(row, weights(row), x, x_adv, sides, threat, chunk=5)
    v, found = some(following, 64)
    assert torch.allclose(found, truth @ v, atol=1e-9) and following.loose == 0
    frozen = dense(LossHessian(row, weights(row), x_adv, sides, chunk=12), 64)
    a, b = float(torch.linalg.eigvalsh(frozen)[-1]), float(torch.linalg.eigvalsh(truth)[-1])
    if norm == "linf":
        assert torch.allclose(frozen, truth, atol=1e-12)
    else:
        unit = w / w.norm()
        bend = s.mean() * eps / w.norm() * (torch.eye(64) - torch.outer(unit, unit))
        assert torch.allclose(frozen + bend, truth, atol=1e-12) and b > a + 1e-2


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.7), ("linf", 0.1)])
def test_inside_the_box_against_attacking_again(
    norm: str, eps: float, x: Tensor, sides: Tensor, row: LogisticNet
) -> None:
    """Pixels at 0 or 1 are held: the finite difference of the gradient at the exact adversary agrees."""
    attack, at = LinearExact(threat=Lp(norm, eps)), weights(row)
    x_adv = craft(attack, row, x, sides, gen=gen())
    assert float(((x_adv == 0) | (x_adv == 1)).double().mean()) > 0.1
    v, following = some(FollowingHessian(row, at, x, x_adv, sides, attack.threat, chunk=12), 64)
    again = some(lambda v: reattacked_product(row, at, x, sides, attack, v, chunk=12, seed=1), 64)[1]
    assert torch.allclose(following, again, atol=1e-4)
    endless, _ = robust_logistic_hessian(row.fc.weight[0].detach(), x, sides, attack.threat)
    assert not torch.allclose(following, endless @ v, atol=1e-2), "the box matters here"


def test_curved_network_against_attacking_again(x: Tensor, labels: Tensor, smooth: nn.Module) -> None:
    """A converged attack on a network with ℓ_δδ ≠ 0, ball met and box not: the solver sees what δ does."""
    x, labels = 0.3 + 0.4 * x[:5], labels[:5]
    attack, at = PGD(threat=Lp("l2", 0.2), steps=200, step_size=0.1, random_start=False), weights(smooth)
    x_adv = craft(attack, smooth, x, labels, gen=gen())
    full = FollowingHessian(smooth, at, x, x_adv, labels, attack.threat, chunk=5)
    frozen = LossHessian(smooth, at, x_adv, labels, chunk=5)
    v = torch.randn(len(flat(at.values())), generator=gen(3), dtype=torch.float64)
    v /= v.norm()
    again = reattacked_product(smooth, at, x, labels, attack, v, chunk=5, seed=1)
    answer = float((again - frozen(v)).norm())
    assert float((full(v) - again).norm()) < 1e-3 * answer and full.loose == 0
    assert answer > 1e-2 * float(again.norm())


# The lens


def subject(model: nn.Module, x: Tensor, y: Tensor, threat: Lp) -> Subject:
    split = Split(x, y)
    return Subject(model.eval(), Splits("test", split, split, split, tuple("0123"[: int(y.max()) + 1])), threat)


def test_oracles() -> None:
    for oracle in Hessian.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        assert reading.outcome.status == "ok"
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_the_lens_on_logistic_regression(x: Tensor, sides: Tensor, row: LogisticNet) -> None:
    """Frozen and full differ for ℓ2 and agree for ℓ∞; the closed form and equation 9 stand beside them."""
    readings = {}
    for norm, eps in (("l2", 0.7), ("linf", 0.1)):
        threat = Lp(norm, eps, **ENDLESS)
        readings[norm] = reading = Hessian(tolerance=1e-6).look(subject(row, x, sides, threat), gen=gen(1))
        matrix, s = robust_logistic_hessian(row.fc.weight[0].detach(), x, sides, threat)
        truth = torch.linalg.eigvalsh(matrix).flip(0)
        names = [f"leading eigenvalue, {FULL}", f"eigenvalue 2, {FULL}", f"eigenvalue 3, {FULL}"]
        assert [reading[name].value for name in names] == pytest.approx(truth[:3].tolist(), rel=1e-8)
        assert max(reading[name].residual for name in names) < 1e-6 and reading[names[0]].n == 12
        assert reading["leading eigenvalue, closed form without the box"].value == pytest.approx(float(truth[0]))
        assert reading["mean s, adversary without the box"].value == pytest.approx(float(s.mean()))
        again = reading[f"curvature along the leading direction ({FULL}), attacking again"].value
        assert again == pytest.approx(float(truth[0]), rel=1e-5)
        low, high = reading[f"trace, {FULL}"].low, reading[f"trace, {FULL}"].high
        assert low - 1e-9 <= float(truth.sum()) <= high + 1e-9
        size = float(row.fc.weight.detach().norm())
        scaled = reading[f"leading eigenvalue, {FULL}, filter-normalised"].value
        assert scaled == pytest.approx(size**2 * float(truth[0]), rel=1e-8)
    frozen, full = (f"leading eigenvalue, {label}" for label in (FROZEN, FULL))
    assert readings["l2"][full].value > readings["l2"][frozen].value + 1e-2
    assert readings["linf"][full].value == pytest.approx(readings["linf"][frozen].value, rel=1e-9)
    assert readings["l2"]["ε / (2‖w‖), equation 9"].value == pytest.approx(0.35 / size)
    with pytest.raises(KeyError):
        readings["linf"]["ε / (2‖w‖), equation 9"]


def test_filter_normalised_eigenvalues_do_not_see_the_scale(x: Tensor, labels: Tensor, network: nn.Module) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[1].weight.mul_(4)
        other[1].bias.mul_(4)
        other[3].weight.div_(4)
    assert torch.allclose(network(x), other(x))
    lens = Hessian(full="off", tolerance=1e-6, restarts=20)
    a, b = (lens.look(subject(net, x, labels, Lp("linf", 0.05)), gen=gen()) for net in (network, other))
    for label in (CLEAN, FROZEN):
        for name in (f"leading eigenvalue, {label}", f"eigenvalue 3, {label}"):
            normalised = f"{name}, filter-normalised"
            assert a[normalised].value == pytest.approx(b[normalised].value, rel=1e-6)
            assert a[name].value != pytest.approx(b[name].value, rel=0.1)
    norms = filter_norms(weights(network))
    assert norms[:64].tolist() == pytest.approx([float(network[1].weight[0].detach().norm())] * 64)
    assert not norms[576:585].any(), "biases stay"


def test_evidence_and_panels(x: Tensor, labels: Tensor, network: nn.Module) -> None:
    reading = Hessian().look(subject(network, x, labels, Lp("l2", 0.3)), gen=gen())
    assert [p.kind for p in reading.panels] == ["curve", "table", "table"]
    curve, table, evidence = reading.panels
    assert [s.name for s in curve.series] == [CLEAN, FROZEN, FULL] and "1% of the range" in curve.y_label
    assert len(table.rows) == 9 and all(row[3] <= 1e-3 for row in table.rows)
    rows = {row[0]: row[1:] for row in evidence.rows}
    assert max(rows["basis: ‖VᵀV − I‖"]) < 1e-12
    thirds = [row[2] for row in table.rows if row[1] == 3]
    beside = rows["leading value of a second start beside them"]
    assert all(second <= third * 1.001 for second, third in zip(beside, thirds, strict=True))


def test_magnitude_sees_directions_of_descent(x: Tensor, labels: Tensor, smooth: nn.Module) -> None:
    labels = (smooth(x).argmin(1) + labels % 2) % 4  # wrong answers, so that the loss bends downwards too
    found, like = LossHessian(smooth, weights(smooth), x, labels, chunk=12), flat(weights(smooth).values())
    ends = [eigenpairs(h, like, 9, gen=gen(), tolerance=1e-6).values for h in (found, lambda v: -found(v))]
    both = torch.cat([ends[0], -ends[1]])
    truth = both[both.abs().argsort(descending=True)][:9]
    assert bool((truth < 0).any()) and bool((truth > 0).any())
    lens = Hessian(which="magnitude", k=9, full="off", tolerance=1e-6, restarts=30, probes=2)
    reading = lens.look(subject(smooth, x, labels, Lp("l2", 0.1)), gen=gen())
    assert [row[2] for row in reading.panels[1].rows[:9]] == pytest.approx(truth.tolist(), rel=1e-6)


def test_unsettled_eigenvalues_are_unreliable(x: Tensor, labels: Tensor, network: nn.Module) -> None:
    lens = Hessian(full="off", tolerance=1e-12, restarts=0)
    reading = lens.look(subject(network, x, labels, Lp("l2", 0.1)), gen=gen())
    assert reading.outcome.status == "unreliable" and "residuals" in reading.outcome.why


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(OnceOnly.apply(self.first(x.flatten(1))))


def test_what_is_refused(images: Tensor, labels: Tensor, linear: nn.Module) -> None:
    once = Once()
    with pytest.raises(InputError, match=r"differentiated twice.*once_differentiable.*leave this out"):
        Hessian(full="off").look(subject(once, images, labels, Lp("l2", 0.1)), gen=gen())
    require_curvature(linear, weights(linear), images, labels, "anything", image=True)
    assert all(p.grad is None for p in [*once.parameters(), *linear.parameters()])
    with pytest.raises(InputError, match="difference"):
        Hessian(full="implicit").look(subject(linear, images, labels, Lp("l1", 0.1)), gen=gen())
    linear.requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad_"):
        Hessian().look(subject(linear, images, labels, Lp("l2", 0.1)), gen=gen())
    for wrong in ({"k": 0}, {"probes": 1}, {"tolerance": 0.0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="hessian"):
            Hessian(**wrong)


def test_test_images_where_there_are_no_training_images(images: Tensor, labels: Tensor, linear: nn.Module) -> None:
    alone = Subject(linear.eval(), from_arrays(test=(images, labels)), Lp("l1", 0.5))
    reading = Hessian(n_examples=10).look(alone, gen=gen())
    assert reading[f"leading eigenvalue, {CLEAN}"].n == 10 and reading.settings["full used"] == "difference"
    assert logistic_row(linear, weights(linear), images) is None


# The paper's data


@pytest.fixture(scope="module")
def digits01() -> Split:
    """All 12,665 training images of the digits 0 and 1."""
    found = load(DataConfig(source="mnist", classes=(0, 1), valid_fraction=0.04))
    images = torch.cat([found.train.images, found.valid.images])
    return Split(images, torch.cat([found.train.labels, found.valid.labels]))


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("eps", "value", "size"), [(0.4, 0.0429, 13.85), (0.6, 0.0705, 6.11), (0.8, 0.1037, 5.12), (1.0, 0.1515, 4.68)]
)
def test_mnist_0_vs_1(eps: float, value: float, size: float, digits01: Split) -> None:
    """Top eigenvalue at the minimiser on all 12,665 images, adversary without the box: lens, solver and spec."""
    train = digits01
    assert len(train) == 12_665
    threat, net = Lp("l2", eps, **ENDLESS), LogisticNet(784, bias=False).double()
    optimum = logistic_optimum(train, threat).w
    with torch.no_grad():
        net.fc.weight.copy_(optimum[None])
    assert float(optimum.norm()) == pytest.approx(size, abs=6e-3)
    at = Subject(net.eval(), Splits("mnist", train, train, train, ("0", "1")), threat)
    reading = Hessian(k=1, n_examples=None, full="difference", batch_size=13_000).look(at, gen=gen())
    exact = reading["leading eigenvalue, closed form without the box"].value
    assert reading.outcome.status == "ok" and exact == pytest.approx(value, abs=6e-5)
    assert reading[f"leading eigenvalue, {FROZEN}"].value < exact
    assert reading["ε / (2‖w‖), equation 9"].value == pytest.approx(eps / 2 / size, rel=1e-3)
    assert 0.002 < reading["mean s, adversary without the box"].value < 0.0125

    x, y = train.batch(torch.arange(len(train))).x.double(), train.labels
    x_adv = craft(LinearExact(threat=threat), net, x, y, gen=gen())
    matrix, _ = robust_logistic_hessian(optimum, x, y, threat)
    v = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    bent = FollowingHessian(net, weights(net), x, x_adv, y, threat, chunk=2000)(v)
    assert float((bent - exact * v).norm()) < 1e-6 * exact
