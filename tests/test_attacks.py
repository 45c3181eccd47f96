"""Attacks against closed forms and naive transcriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import gen
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.losses import attack_loss
from robustlens.attacks.pgd import PGD, _wrong_class
from robustlens.attacks.verify import craft, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.types import Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def binary(dim: int = 64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(dim, 2)).double()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_reaches_the_closed_form_of_a_linear_model(norm: str, loss: str) -> None:
    """Without a box the smallest margin is z_y − z_j − eps · ‖w_y − w_j‖ in the dual norm."""
    model, threat = binary(), Lp(norm, 0.1, low=-100.0, high=100.0)
    x = torch.rand(10, 1, 8, 8, generator=gen(), dtype=torch.float64)
    y = torch.arange(10) % 2
    w = model[1].weight[1] - model[1].weight[0]
    exact = logit_margin(model(x), y) - 0.1 * torch.linalg.vector_norm(w, ord=DUAL[norm])
    attack = PGD(threat=threat, steps=60, step_size=0.02 if norm == "linf" else 2.0, loss=loss)
    found = logit_margin(model(craft(attack, model, x, y, gen=gen())), y)
    assert torch.allclose(found, exact, atol=1e-6)
    best = logit_margin(model(craft(LinearExact(threat=threat), model, x, y, gen=gen())), y)
    assert torch.allclose(best, exact, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_reaches_the_exact_worst_case_inside_the_box(norm: str, images: Tensor, labels: Tensor) -> None:
    model, threat = binary(), Lp(norm, {"linf": 0.1, "l2": 1.0, "l1": 5.0}[norm])
    x, y = images.double(), labels % 2
    exact = logit_margin(model(craft(LinearExact(threat=threat), model, x, y, gen=gen())), y)
    attack = PGD(threat=threat, steps=200, step_size=20.0, loss="margin")
    found = logit_margin(model(craft(attack, model, x, y, gen=gen())), y)
    assert torch.allclose(found, exact, atol=1e-6)
    assert (found >= exact - 1e-9).all(), "nothing beats the exact worst case"


def test_linear_exact_takes_the_worst_rival(linear: nn.Module, images: Tensor, labels: Tensor) -> None:
    threat = Lp("linf", 0.05)
    attack = LinearExact(threat=threat)
    found = logit_margin(linear(craft(attack, linear, images, labels, gen=gen())), labels).detach()
    w = linear[1].weight.detach()
    for i, y in enumerate(labels.tolist()):
        margins = []
        for j in range(4):
            if j != y:
                z = (images[i].flatten() + 0.05 * (w[j] - w[y]).sign()).clamp(0, 1)
                logits = linear(z.view(1, 1, 8, 8))[0].detach()
                margins.append(float((logits[y] - logits[j]).detach()))
        assert float(found[i]) == pytest.approx(min(margins), abs=1e-5)


def test_linear_exact_refuses_a_network(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(InputError, match="affine"):
        craft(LinearExact(threat=Lp("linf", 0.2)), net.eval(), images, labels, gen=gen())


def naive_pgd(model: nn.Module, x: Tensor, y: Tensor, threat: Lp, steps: int, alpha: float, start: Tensor) -> Tensor:
    """One example at a time, as the papers write it; the box is out of reach, so projecting is rescaling."""
    out = []
    for i in range(len(x)):
        z = start[i : i + 1]
        for _ in range(steps):
            z = z.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(z), y[i : i + 1]), z)
            if threat.norm == "linf":
                z = (z + alpha * g.sign()).clamp(x[i] - threat.eps, x[i] + threat.eps)
            else:
                delta = (z + alpha * g / g.norm() - x[i]).detach()
                z = x[i] + delta * min(1.0, threat.eps / float(delta.norm()))
        out.append(z.detach())
    return torch.cat(out)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_a_naive_transcription(norm: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net = net.double().eval()
    threat = Lp(norm, 0.3, low=-9.0, high=9.0)
    x = images.double()
    attack = PGD(threat=threat, steps=7, step_size=0.1)
    expected = naive_pgd(net, x, labels, threat, 7, 0.1, threat.start(x, gen(8)))
    assert torch.allclose(attack.perturb(net, x, labels, gen=gen(8)), expected, atol=1e-10)


def test_default_step_size(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    threat = Lp("linf", 0.1)
    a = craft(PGD(threat=threat, steps=5), net, images, labels, gen=gen())
    b = craft(PGD(threat=threat, steps=5, step_size=0.05), net, images, labels, gen=gen())
    assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_pgd_from_x(norm: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    threat = Lp(norm, 0.2)
    one = PGD(threat=threat, steps=1, step_size=0.2, random_start=False)
    a = craft(FGSM(threat=threat), net, images, labels, gen=gen())
    assert torch.equal(a, craft(one, net, images, labels, gen=gen()))


@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_keep_the_worst_per_example(early_stop: bool, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.eval()
    y = net(images).argmax(1)
    threat, steps = Lp("linf", 0.02), 2
    single = PGD(threat=threat, steps=steps, loss="margin", early_stop=early_stop)
    g, tries = gen(4), []
    for _ in range(6):
        tries.append(logit_margin(net(craft(single, net, images, y, gen=g)), y).detach())
    many = PGD(threat=threat, steps=steps, loss="margin", restarts=6, early_stop=early_stop)
    kept = logit_margin(net(craft(many, net, images, y, gen=gen(4))), y)
    stacked = torch.stack(tries)
    if early_stop:  # one that is broken is left alone, and changes nothing for the others
        assert ((kept <= 0) | (kept <= stacked[0] + 1e-6)).all()
        assert torch.equal(kept <= 0, stacked.amin(0) <= 0) and (kept <= 0).any()
        assert torch.allclose(kept[kept > 0], stacked.amin(0)[kept > 0], atol=1e-6)
    else:
        assert torch.allclose(kept, stacked.amin(0), atol=1e-6)
        assert (stacked[-1] > stacked.amin(0) + 1e-6).any(), "keeping the last restart would be seen"


def test_early_stop_keeps_broken_examples_broken(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.eval()
    y = net(images).argmax(1)
    batch = Batch(images, y, torch.arange(12))
    kwargs = {"threat": Lp("linf", 0.1), "steps": 20, "loss": "margin"}
    stopped = evaluate(PGD(**kwargs, early_stop=True), net, batch, gen=gen())
    whole = evaluate(PGD(**kwargs), net, batch, gen=gen())
    assert int((~stopped.robust).sum()) > 0
    assert torch.equal(stopped.robust, whole.robust)
    moved = stopped.distance[~stopped.robust] < whole.distance[~stopped.robust] + 1e-6
    assert moved.all()


def test_relative_losses_have_no_gradient_at_x(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Why TRADES starts from noise."""
    net.eval()
    clean = net(images).detach()
    for name in ("kl", "squared"):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(attack_loss(name, net(x), labels, clean).sum(), x)
        assert g.abs().max() < 1e-7
        with pytest.raises(InputError, match="random_start"):
            PGD(threat=Lp("l2", 1.0), loss=name, random_start=False)


def test_losses_by_hand() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5, 1.0]], dtype=torch.float64)
    y = torch.tensor([0])
    p = (z.exp() / z.exp().sum())[0]
    assert float(attack_loss("ce", z, y)) == pytest.approx(-float(p[0].log()))
    assert float(attack_loss("margin", z, y)) == pytest.approx(-1.0)
    assert float(attack_loss("dlr", z, y)) == pytest.approx(-(2 - 1) / (2 - 0.5))
    clean = torch.zeros(1, 4, dtype=torch.float64)
    assert float(attack_loss("kl", z, y, clean)) == pytest.approx(float((0.25 * (0.25 / p).log()).sum()))
    assert float(attack_loss("squared", z, y, clean)) == pytest.approx(0.5 * (4 + 1 + 0.25 + 1))
    with pytest.raises(InputError, match="at least 3 classes"):
        attack_loss("dlr", z[:, :2], y)


def test_dlr_ignores_scale_and_shift() -> None:
    z, y = torch.randn(5, 6, generator=gen(), dtype=torch.float64), torch.arange(5)
    assert torch.allclose(attack_loss("dlr", z, y), attack_loss("dlr", 40 * z - 7, y), atol=1e-9)


def test_float32_cross_entropy_saturates_and_the_margin_does_not() -> None:
    """Why an attack on cross-entropy with a gradient floor reports robustness that is not there."""

    def grad(name: str, margin: float) -> Tensor:
        z = torch.tensor([[margin, 0.0, -1e-3]], requires_grad=True)
        (g,) = torch.autograd.grad(attack_loss(name, z, torch.tensor([0])).sum(), z)
        return g[0]

    assert grad("ce", 16.0)[0] != 0 and grad("ce", 18.0)[0] == 0
    assert float(grad("ce", 40.0)[1]) == pytest.approx(4e-18, rel=0.1)
    assert 0 < float(grad("ce", 100.0)[1]) < 1e-42
    assert grad("ce", 105.0).abs().max() == 0
    for margin in (16.0, 100.0, 1000.0):
        assert grad("margin", margin)[0] == -1 and grad("margin", margin).max() == 1


def test_gradient_floor_freezes_a_saturated_attack(images: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    y = model(images).argmax(1)
    with torch.no_grad():
        model[1].weight *= 60 / logit_margin(model(images), y).amin()
    batch = Batch(images, y, torch.arange(12))
    common = {"threat": Lp("l2", 8.0), "steps": 50, "random_start": False}
    frozen = evaluate(PGD(**common, grad_floor=1e-6), model, batch, gen=gen())
    free = evaluate(PGD(**common, loss="margin"), model, batch, gen=gen())
    assert frozen.robust.all() and not free.robust.any()


@pytest.mark.parametrize(
    ("settings", "expects"),
    [
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
        ({"step_size": -1.0}, "a number > 0"),
        ({"restarts": 2, "random_start": False}, "random starts"),
    ],
)
def test_bad_settings(settings: dict[str, object], expects: str) -> None:
    with pytest.raises(InputError, match=expects):
        PGD(threat=Lp("l2", 1.0), **settings)


def logit_gradient(name: str, z: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(attack_loss(name, z, y, inverse_temperature=beta).sum(), z)[0]


def test_inverse_temperature_and_its_limits() -> None:
    """Roth et al., A.3: s_β − e_y, which turns into e_max − e_y; its direction does not vanish where y is on top."""
    rows = [[1.0, 0.95, -1.0, -2.0], [1.0, 0.95, -1.0, -2.0], [-1.0, 0.5, 2.0, 0.0]]
    z, y = torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 1, 3])
    one_hot = F.one_hot(y, 4).double()
    for beta in (0.1, 1.0, 7.0):
        expected = beta * ((beta * z).softmax(1) - one_hot)
        assert torch.allclose(logit_gradient("ce", z, y, beta), expected, atol=1e-14)
    flip = F.one_hot(z.argmax(1), 4) - one_hot
    assert torch.equal(logit_gradient("label-flip", z, y), flip) and not flip[0].any()
    assert attack_loss("label-flip", z, y).tolist() == pytest.approx([0.0, 0.05, 2.0])
    assert torch.allclose(logit_gradient("ce", z, y, 500.0) / 500, flip, atol=1e-9)
    direction = logit_gradient("ce", z, y, 100.0)
    direction = direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(direction, logit_gradient("margin", z, y) / 2**0.5, atol=1e-9)
    saturated = logit_gradient("ce", z.float(), y, 1e4)[0]
    assert not saturated.any(), "the limit has to be taken by name"


@pytest.mark.parametrize("loss", ["ce", "margin", "label-flip"])
def test_targeted_pgd_equals_a_naive_transcription(loss: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net, x = net.double().eval(), images.double()
    threat = Lp("l2", 0.5, low=-9.0, high=9.0)
    attack = PGD(threat=threat, steps=6, step_size=0.1, loss=loss, targeted=True, random_start=False)
    target = (labels + torch.randint(1, 4, (12,), generator=gen(8))) % 4
    point = x
    for _ in range(6):
        point = point.detach().requires_grad_()
        (g,) = torch.autograd.grad(-attack_loss(loss, net(point), target).sum(), point)
        size = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = point + 0.1 * torch.where(size > 0, g / size, g) - x
        point = x + delta * (0.5 / delta.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)
    assert torch.allclose(attack.perturb(net, x, labels, gen=gen(8)), point.detach(), atol=1e-10)


def test_targets_are_the_wrong_classes_alike(labels: Tensor) -> None:
    y = labels.repeat(1000)
    target = _wrong_class(torch.zeros(len(y), 4), y, gen())
    shares = torch.bincount((target - y) % 4, minlength=4) / len(y)
    assert shares[0] == 0 and (shares[1:] - 1 / 3).abs().max() < 4 * (2 / 9 / len(y)) ** 0.5


def test_targeted_restarts_are_judged_by_the_label(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.eval()
    y = net(images).argmax(1)
    common = {"threat": Lp("linf", 0.02), "steps": 3, "targeted": True}
    for loss in ("margin", "label-flip"):
        g, tries = gen(4), []
        for _ in range(5):
            tries.append(logit_margin(net(craft(PGD(**common, loss=loss), net, images, y, gen=g)), y).detach())
        many = PGD(**common, loss=loss, restarts=5)
        kept = logit_margin(net(craft(many, net, images, y, gen=gen(4))), y).detach()
        best = torch.stack(tries).amin(0)
        assert torch.equal(kept <= 0, best <= 0) and (loss == "label-flip" or torch.allclose(kept, best, atol=1e-6))
        assert many.passes == PGD(**{**common, "targeted": False}, restarts=5).passes
    assert len(craft(PGD(**common, early_stop=True), net, images, y, gen=gen())) == 12


def test_an_endless_step_lands_on_the_sphere_in_the_direction_of_the_gradient() -> None:
    """Roth et al., A.9: α → ∞ forgets where the last iterate was."""
    model = binary()
    x, y = torch.rand(10, 1, 8, 8, generator=gen(), dtype=torch.float64), torch.arange(10) % 2
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 8, 8)
    direction = (1 - 2 * y).view(-1, 1, 1, 1) * w / w.norm()
    for norm, best in (("l2", direction), ("linf", direction.sign())):
        threat = Lp(norm, 0.3, low=-100.0, high=100.0)
        attack = PGD(threat=threat, steps=2, step_size=1e8)
        found = craft(attack, model, x, y, gen=gen())
        assert torch.allclose(found, x + 0.3 * best, atol=1e-12)
        single = craft(attack, model.float(), x.float(), y, gen=gen())
        assert torch.allclose(single.double(), x + 0.3 * best, atol=1e-6)
        model.double()


@pytest.mark.parametrize(
    ("wrong", "expects"),
    [
        ({"loss": "label-flip"}, "targeted = true"),
        ({"loss": "squared", "targeted": True}, "targeted = false"),
        ({"inverse_temperature": 0.0}, "a finite number > 0"),
        ({"inverse_temperature": float("inf")}, 'loss = "margin"'),
        ({"inverse_temperature": 2.0, "loss": "margin"}, '1 for every loss but "ce"'),
    ],
)
def test_settings_that_do_not_go_together(wrong: dict[str, object], expects: str) -> None:
    with pytest.raises(InputError, match=expects):
        PGD(threat=Lp("l2", 1.0), **wrong)


def test_an_attack_may_use_transforms() -> None:
    """What makes frozen layers quick leaves torch.func alone."""

    @dataclass(frozen=True)
    class Ascent:
        threat: Lp
        name: ClassVar[str] = "ascent"

        def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
            slope = torch.func.grad(lambda z: model(z)[:, 0].sum())(x)
            rows = torch.func.vmap(torch.func.jacrev(model))(x[:, None])[:, 0, 0]
            point = x.clone().requires_grad_()
            logits = model(point)
            each = torch.eye(3)[:, None].expand(3, len(x), 3)
            (batched,) = torch.autograd.grad(logits, point, each, is_grads_batched=True)
            for other in (rows.view_as(x), batched[0]):
                assert torch.allclose(slope, other, rtol=1e-4, atol=1e-6)
            return x + self.threat.eps * slope.sign()

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 70), nn.Linear(70, 3)).eval()
    x = torch.rand(5, 1, 8, 8, generator=gen(0))
    threat = Lp("linf", 0.01)
    found = craft(Ascent(threat), model, x, torch.zeros(5, dtype=torch.long), gen=gen(0))
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    assert torch.allclose(found, threat.project(x + 0.01 * slope.sign(), x), atol=1e-6)
