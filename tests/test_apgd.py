"""Auto-PGD against closed forms and a transcription of the paper, one image at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.apgd import APGD
from robustlens.attacks.apgd_targeted import APGDTargeted
from robustlens.attacks.ascent import Climbed, highest, look, momentum_ascent
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.losses import attack_loss, targeted_dlr
from robustlens.attacks.noise import UniformNoise
from robustlens.attacks.sparse_ascent import _largest
from robustlens.attacks.tries import room
from robustlens.attacks.verify import craft, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import build
from robustlens.core.types import Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def affine(classes: int = 2, dim: int = 64, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(dim, classes)).double()


def printed_apgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, threat: Lp, steps: int) -> Tensor:
    """Algorithm 1 for one image (1, C, H, W) without a box: every iterate's loss is kept, and nothing stops early."""

    def project(z: Tensor) -> Tensor:
        if threat.norm == "linf":
            return x + (z - x).clamp(-threat.eps, threat.eps)
        return x + (z - x) * min(1.0, threat.eps / max(float((z - x).norm()), 1e-300))

    def slope(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_()
        loss = F.cross_entropy(model(z), y)
        (g,) = torch.autograd.grad(loss, z)
        return float(loss.detach()), g.sign() if threat.norm == "linf" else g / g.norm()

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checkpoints = [round(steps * part) for part in p]
    eta = 2 * threat.eps
    points, losses = [start], [slope(start)[0]]
    best, best_loss = start, losses[0]
    halvings: list[bool] = [True]
    best_then = best_loss
    last, now = start, start
    for k in range(steps):
        u = project(now + eta * slope(now)[1])
        new = u if k == 0 else project(now + 0.75 * (u - now) + 0.25 * (now - last))
        last, now = now, new
        points.append(now)
        losses.append(slope(now)[0])
        if losses[-1] > best_loss:
            best, best_loss = now, losses[-1]
        if k + 1 in checkpoints:
            j = checkpoints.index(k + 1)
            window = losses[checkpoints[j - 1] : k + 2]
            rises = sum(b > a for a, b in pairwise(window))
            first = rises <= 0.75 * (checkpoints[j] - checkpoints[j - 1])
            second = not halvings[-1] and best_then == best_loss
            halvings.append(first or second)
            best_then = best_loss
            if halvings[-1]:
                eta /= 2
                now = best
    return best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ascent_is_algorithm_1(norm: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net = net.double().eval()
    threat = Lp(norm, 0.02 if norm == "linf" else 0.15, low=-9.0, high=9.0)
    x = images.double()
    y = net(x).argmax(1)
    start = threat.start(x, gen(3))
    found = momentum_ascent(net, threat, x, y[:, None], lambda z, t: attack_loss("ce", z, t[:, 0]), start, steps=100)
    held = ~found.broken
    assert held.sum() >= 5
    printed = torch.cat(
        [printed_apgd(net, x[i : i + 1], y[i : i + 1], start[i : i + 1], threat=threat, steps=100) for i in range(12)]
    )
    assert torch.allclose(found.point[held], printed[held], atol=1e-9)
    assert torch.allclose(found.height[held], F.cross_entropy(net(printed[held]), y[held], reduction="none"))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_reaches_the_exact_worst_case_of_a_linear_model(norm: str, loss: str) -> None:
    model, threat = affine(), Lp(norm, {"linf": 0.03, "l2": 0.3, "l1": 1.0}[norm])
    x = torch.rand(10, 1, 8, 8, generator=gen(), dtype=torch.float64)
    y = model(x).argmax(1)
    exact = logit_margin(model(craft(LinearExact(threat=threat), model, x, y, gen=gen())), y)
    found = logit_margin(model(craft(APGD(threat=threat, loss=loss), model, x, y, gen=gen())), y)
    held = exact > 0
    assert held.sum() >= 2 and (~held).sum() >= 2, "both kinds occur"
    assert torch.equal(found > 0, held)
    assert (found[held] >= exact[held] - 1e-9).all(), "nothing beats the exact worst case"
    if norm == "l1":  # steps never become shorter than a tenth of the radius
        clean = logit_margin(model(x), y)
        assert ((clean - found)[held] > 0.9 * (clean - exact)[held]).all()
    else:
        assert torch.allclose(found[held], exact[held], atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targets_find_the_worst_rival_of_a_linear_model(classes: int, norm: str) -> None:
    """LinearExact looks at every rival; with all targets so does this, whatever the number of classes."""
    model, threat = affine(classes), Lp(norm, {"linf": 0.02, "l2": 0.2}[norm])
    x = torch.rand(24, 1, 8, 8, generator=gen(), dtype=torch.float64)
    batch = Batch(x, model(x).argmax(1), torch.arange(24))
    exact = evaluate(LinearExact(threat=threat), model, batch, gen=gen())
    found = evaluate(APGDTargeted(threat=threat), model, batch, gen=gen())
    assert 2 <= int(exact.robust.sum()) <= 22
    assert torch.equal(found.robust, exact.robust)


def test_one_target_is_the_most_probable_wrong_class() -> None:
    model, threat = affine(5), Lp("l2", 0.5)
    x = torch.rand(6, 1, 8, 8, generator=gen(), dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(1)
    second = logits.topk(2, dim=1).indices[:, 1]
    found = APGDTargeted(threat=threat, targets=1).perturb(model, x, y, gen=gen())
    lead = lambda z: (z.gather(1, second[:, None]) - z.gather(1, y[:, None]))[:, 0]  # noqa: E731
    assert (lead(model(found)) > lead(logits)).all() and (logit_margin(model(found), y) <= 0).all()


def test_targeted_dlr_by_hand() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5, 1.0, -3.0]], dtype=torch.float64)
    y_and_t = torch.tensor([[0, 2]])
    assert float(targeted_dlr(z, y_and_t)) == pytest.approx(-(2 - 0.5) / (2 - (0.5 - 1) / 2))
    assert torch.allclose(targeted_dlr(7 * z + 3, y_and_t), targeted_dlr(z, y_and_t))
    assert float(targeted_dlr(z[:, :3], y_and_t)) == pytest.approx(-1.5 / (2 + 1))
    assert float(targeted_dlr(z[:, :2], torch.tensor([[0, 1]]))) == pytest.approx(-3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_example_ends_at_its_first_wrong_point(norm: str, net: nn.Module, images: Tensor) -> None:
    net.eval()
    y = net(images).argmax(1)
    attack = APGD(threat=Lp(norm, {"linf": 0.1, "l2": 1.0, "l1": 8.0}[norm]), steps=30)
    found = evaluate(attack, net, Batch(images, y, torch.arange(12)), gen=gen())
    noise = evaluate(UniformNoise(threat=attack.threat), net, Batch(images, y, torch.arange(12)), gen=gen())
    assert int(found.robust.sum()) < int(noise.robust.sum())
    alone = [craft(attack, net, images[i : i + 1], y[i : i + 1], gen=gen()) for i in range(12)]
    assert all(part.shape == (1, 1, 8, 8) for part in alone)


def test_restarts_keep_the_highest_and_leave_out_the_broken() -> None:
    """In the third and the fourth try, made together, an example that the third breaks keeps what it found."""
    values = torch.tensor([[3.0, 5.0, 1.0], [2.0, 9.0, 4.0], [1.0, 9.0, 5.0], [7.0, 9.0, 6.0]])
    breaks = torch.tensor([[False, True, False], [False, True, False], [False, True, True], [False, True, True]])
    asked: list[list[tuple[int, int]]] = []
    drawn = iter(range(10))

    def begin(left: Tensor) -> Tensor:
        return torch.full((len(left), 1, 1, 1), float(next(drawn)))

    def climb(rows: Tensor, number: Tensor, start: Tensor) -> Climbed:
        asked.append(list(zip(rows.tolist(), number.tolist(), strict=True)))
        assert torch.equal(start.flatten(), number.float())
        found = values[number, rows]
        return Climbed(found.view(-1, 1, 1, 1), breaks[number, rows], found)

    x = torch.zeros(3, 1, 1, 1)
    with room(5):
        kept = highest(begin, climb, 4, x)
    assert kept.flatten().tolist() == [7.0, 5.0, 5.0]
    assert asked == [[(0, 0), (1, 0), (2, 0)], [(0, 1), (2, 1), (0, 2), (2, 2)], [(0, 3)]]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ["apgd-targeted", "fab"])
def test_targets_that_share_a_batch_find_what_they_find_alone(
    kind: str, norm: str, net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = net.double().eval(), images.double()
    y = net(x).argmax(1)
    threat = {"linf": "linf:0.03", "l2": "l2:0.3", "l1": "l1:3"}[norm]
    attack = build("attack", {"name": kind, "threat": threat, "steps": 20, "targets": 3})
    counts: list[int] = []
    net.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    with room(20):
        shared = craft(attack, net, x, y, gen=gen())
    passes = len(counts)
    monkeypatch.setattr(f"robustlens.attacks.{'fab' if kind == 'fab' else 'ascent'}.together", lambda *_: 1)
    assert torch.allclose(craft(attack, net, x, y, gen=gen()), shared, atol=1e-12)
    assert passes < len(counts) - passes and 12 <= max(counts[:passes]) <= 20


def test_the_value_at_the_last_point_needs_no_gradient(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.eval()
    height = lambda z, t: attack_loss("ce", z, t[:, 0])  # noqa: E731
    value, grad, _ = look(net, images, labels[:, None], height, gradient=False)
    assert torch.allclose(value, look(net, images, labels[:, None], height)[0]) and not grad.any()


def test_sparse_steps_take_the_largest_components() -> None:
    g = torch.tensor([[4.0, -3.0, 2.0, -1.0]]).view(1, 1, 2, 2)
    assert _largest(g, torch.tensor([0.5])).flatten().tolist() == [4, -3, 0, 0]
    assert _largest(g, torch.tensor([1.0])).flatten().tolist() == [4, -3, 2, -1]
    assert _largest(g, torch.tensor([0.0])).flatten().tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("settings", [{"steps": 0}, {"restarts": 0}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        APGD(threat=Lp("l2", 1.0), **settings)
    if "steps" in settings:
        with pytest.raises(InputError, match="at least 1"):
            APGDTargeted(threat=Lp("l2", 1.0), **settings)
