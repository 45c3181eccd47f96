"""FAB on linear models, on small ReLU networks with all linear regions enumerated, and against algorithm 1 by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import gen
from exact_distances import bent, nearest_wrong
from torch import Tensor, nn

from robustlens.attacks.fab import FAB
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.verify import AttackBroken, craft, evaluate
from robustlens.core.types import Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

WHOLE = {"linf": Lp("linf", 1.0), "l2": Lp("l2", 8.0), "l1": Lp("l1", 64.0)}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
each_norm = pytest.mark.parametrize("norm", WHOLE)


def predicted(model: nn.Module, x: Tensor) -> Batch:
    with torch.no_grad():
        return Batch(x, model(x).argmax(1), torch.arange(len(x)))


def digits(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=gen(1), dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1)


@each_norm
def test_towards_every_class_it_is_exact_on_a_linear_model(norm: str, linear: nn.Module) -> None:
    """The exact worst case of a linear model says whether anything wrong lies nearer than what was found."""
    linear = linear.double()
    batch = predicted(linear, digits())
    for attack in (
        FAB(threat=WHOLE[norm], steps=20, targets=3, minimal=True, bisections=14),
        FAB(threat=WHOLE[norm], steps=20, minimal=True, bisections=14),
    ):
        seen = evaluate(attack, linear, batch, gen=gen())
        assert not seen.robust.any()
        short = 0
        for i, radius in enumerate((seen.distance / 1.002).tolist()):
            one = Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.index[i : i + 1])
            exact = LinearExact(threat=WHOLE[norm].with_eps(radius))
            short += bool(evaluate(exact, linear, one, gen=gen()).robust)
        assert short == 12 if attack.targets else short >= 11  # which plane is the nearest is judged without the box


@each_norm
def test_it_is_near_on_networks_whose_regions_can_be_counted(norm: str) -> None:
    model = bent()
    batch = predicted(model, torch.rand(8, 1, 3, 3, generator=gen(5), dtype=torch.float64))
    assert len(batch.y.unique()) > 1
    attack = FAB(threat=WHOLE[norm], steps=30, targets=2, restarts=3, minimal=True)
    seen = evaluate(attack, model, batch, gen=gen())
    ratio = seen.distance / nearest_wrong(model, batch.x, batch.y, norm)[1]
    assert not seen.robust.any()
    assert ratio.min() > 1 - 1e-7 and ratio.median() < 1.01 and (ratio < 1.1).sum() >= 6


def onto(t: np.ndarray, w: np.ndarray, b: float, norm: str) -> np.ndarray:
    """The nearest point of ⟨w, z⟩ + b = 0 in the box, by bisection of its multiplier; greedily for ℓ1."""
    height = w @ t + b
    room = np.where(w * height < 0, 1 - t, t)

    def moved(step: np.ndarray) -> np.ndarray:
        return t - np.sign(w * height) * step

    if norm == "l1":
        step, left = np.zeros_like(t), abs(height)
        for i in np.argsort(-abs(w)):
            step[i] = min(room[i], left / abs(w[i]))
            left -= step[i] * abs(w[i])
        return moved(step)
    pace = abs(w) if norm == "l2" else np.ones_like(w)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        short = (abs(w) * np.minimum(middle * pace, room)).sum() < abs(height)
        low, high = (middle, high) if short else (low, middle)
    return moved(np.minimum(high * pace, room))


def algorithm_1(
    model: nn.Module, image: Tensor, y: int, norm: str, *, steps: int, targets: list[int], plane_at_v: bool
) -> tuple[np.ndarray, float]:
    """One run from x towards the nearest of ``targets``, one image, as the paper writes it; or with the plane at z."""
    x = image.flatten().numpy()
    z, best, u = x, x, np.inf

    def planes(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def logits(flat: Tensor) -> Tensor:
            return model(flat.view(1, *image.shape))[0]

        flat = torch.from_numpy(at)
        f, rows = logits(flat).detach().numpy(), torch.autograd.functional.jacobian(logits, flat).numpy()
        return f, f - f[y], rows - rows[y]

    def wrong(at: np.ndarray) -> bool:
        return int(planes(at)[0].argmax()) != y

    def size(step: np.ndarray) -> float:
        return float(np.linalg.norm(step, ord=ORDER[norm]))

    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    for _ in range(steps):
        v = x + 0.9 * (z - x) if wrong(z) else z
        at = v if plane_at_v else z
        _, ahead, slopes = planes(at)
        s = min(targets, key=lambda k: abs(ahead[k]) / np.linalg.norm(slopes[k], ord=dual))
        w, b = slopes[s], ahead[s] - slopes[s] @ at
        delta, delta_x = onto(v, w, b, norm) - v, onto(x, w, b, norm) - x
        alpha = min(size(delta) / (size(delta) + size(delta_x)), 0.1)
        z = np.clip((1 - alpha) * (v + 1.05 * delta) + alpha * (x + 1.05 * delta_x), 0, 1)
        if wrong(z) and size(z - x) < u:
            best, u = z, size(z - x)
    return (best if u < np.inf else z), u


@each_norm
@pytest.mark.parametrize("targeted", [False, True])
def test_it_equals_a_naive_transcription(norm: str, targeted: bool, smooth: nn.Module, linear: nn.Module) -> None:
    """On the linear model the plane is the paper's, on the curved one it is the one at z."""
    for model, plane_at_v in ((smooth, False), (linear.double(), True)):
        batch = predicted(model, digits(4))
        with torch.no_grad():
            order = model(batch.x).argsort(1, descending=True)
        attack = FAB(threat=WHOLE[norm], steps=9, targets=1 if targeted else None, minimal=True, bisections=0)
        found = craft(attack, model, batch.x, batch.y, gen=gen())
        for i, (x, y) in enumerate(zip(batch.x, batch.y.tolist(), strict=True)):
            targets = [int(order[i, 1])] if targeted else [k for k in range(4) if k != y]
            best, u = algorithm_1(model, x, y, norm, steps=9, targets=targets, plane_at_v=plane_at_v)
            assert u < np.inf
            assert np.allclose(found[i].flatten().numpy(), best, atol=1e-9)


class Counting(nn.Module):
    """Adds up the images that it sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.model(x)


@each_norm
def test_images_broken_within_eps_leave(norm: str, network: nn.Module) -> None:
    batch = predicted(network, digits())
    minimal = FAB(threat=WHOLE[norm], steps=15, targets=3, minimal=True)
    distance = evaluate(minimal, network, batch, gen=gen()).distance
    threat = WHOLE[norm].with_eps(float(distance.median()))
    counting = Counting(network)
    x_adv = craft(FAB(threat=threat, steps=15, targets=3), counting, batch.x, batch.y, gen=gen())
    broken = predicted(network, x_adv).y != batch.y
    assert torch.equal(broken, distance <= threat.eps)
    assert counting.seen < 12 + 6 * (3 * 16 + 11) + 6 * 16 * 2, "half of the images leave early"
    counting.seen = 0
    craft(minimal, counting, batch.x, batch.y, gen=gen())
    assert counting.seen == 12 * (1 + 3 * 16 + 11) == 12 * (minimal.passes.inputs + minimal.passes.forward)


@each_norm
def test_wrong_images_stay_and_each_image_is_on_its_own(norm: str, network: nn.Module) -> None:
    batch = predicted(network, digits())
    mixed = Batch(batch.x, torch.where(batch.index % 3 == 0, (batch.y + 1) % 4, batch.y), batch.index)
    for minimal in (False, True):
        attack = FAB(threat=WHOLE[norm], steps=8, targets=3, minimal=minimal)
        seen = evaluate(attack, network, mixed, gen=gen())
        assert (seen.distance[::3] == 0).all() and not seen.robust.any()
        alone = craft(attack, network, batch.x[1:2], batch.y[1:2], gen=gen())
        assert torch.allclose(alone[0], seen.x_adv[1], atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("targets", [None, 9])
def test_any_number_of_classes(classes: int, targets: int | None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        model[1].weight.normal_(generator=gen(classes))
    batch = predicted(model, digits().float())
    seen = evaluate(FAB(threat=WHOLE["linf"], steps=5, targets=targets), model, batch, gen=gen())
    assert not seen.robust.any()


@each_norm
def test_restarts_begin_in_the_ball_and_never_hurt(norm: str, network: nn.Module) -> None:
    batch = predicted(network, digits())
    once = evaluate(FAB(threat=WHOLE[norm], steps=4, minimal=True, bisections=0), network, batch, gen=gen())
    more = FAB(threat=WHOLE[norm], steps=4, restarts=4, minimal=True, bisections=0)
    often = evaluate(more, network, batch, gen=gen())
    assert (often.distance <= once.distance).all() and (often.distance < once.distance).any()


@each_norm
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
@pytest.mark.parametrize("targets", [None, 3])
def test_the_scale_of_the_logits_changes_nothing(
    norm: str, scale: float, targets: int | None, linear: nn.Module
) -> None:
    attack = FAB(threat=WHOLE[norm], steps=6, targets=targets)
    batch = predicted(linear, digits().float())
    before = evaluate(attack, linear, batch, gen=gen())
    with torch.no_grad():
        for p in linear[1].parameters():
            p *= scale
    after = evaluate(attack, linear, batch, gen=gen())
    assert torch.equal(before.x_adv, after.x_adv) and not before.robust.any()


class Flat(nn.Module):
    """Always class 0, with slope ``slope``."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).to(x) + self.slope * x.flatten(1)[:, :3]


@pytest.mark.parametrize("targets", [None, 2])
def test_failure_is_a_right_answer_and_nan_is_seen(targets: int | None) -> None:
    x, y = digits(4).float(), torch.zeros(4, dtype=torch.int64)
    attack = FAB(threat=WHOLE["l2"], steps=4, targets=targets)
    assert evaluate(attack, Flat(0.0), Batch(x, y, y), gen=gen()).robust.all()
    with pytest.raises(AttackBroken):
        craft(attack, Flat(torch.nan), x, y, gen=gen())


@pytest.mark.parametrize(
    "field", [{"steps": 0}, {"restarts": 0}, {"targets": 0}, {"eta": 0.9}, {"beta": 1.1}, {"alpha_max": -0.1}]
)
def test_settings_that_cannot_work_are_refused(field: dict) -> None:
    with pytest.raises(InputError, match=next(iter(field))):
        FAB(threat=WHOLE["l2"], **field)
