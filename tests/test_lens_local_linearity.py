"""Local linearity against dense Jacobians, sign patterns of ReLUs, and closed forms."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustlens.attacks.pgd import PGD
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.local_linearity import LocalLinearity
from robustlens.linalg.regions import DUAL, bends, observed
from robustlens.models.classifier import Chain
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

QUICK = {"n_norms": 2, "n_facets": 0, "iterations": 4}


def seeded(*layers: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(*(layer() for layer in layers)).eval()


def relu_net() -> nn.Module:
    """A network with features and a head, in float32."""
    net = seeded(
        nn.Flatten, lambda: nn.Linear(64, 12), nn.ReLU, lambda: nn.Linear(12, 7), nn.ReLU, lambda: nn.Linear(7, 4)
    )
    return Chain(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(net))).eval()


def smooth_net() -> nn.Module:
    return seeded(nn.Flatten, lambda: nn.Linear(64, 12), nn.Softplus, lambda: nn.Linear(12, 4))


def subject(model: nn.Module, threat: Lp | None = None, images: Tensor | None = None) -> Subject:
    x = torch.rand(10, 1, 8, 8, generator=gen(1)) if images is None else images
    split = Split(x, torch.arange(len(x)) % 4)
    return Subject(model, Splits("some", split, split, split, tuple("abcd")), threat or Lp("l2", 0.5))


@pytest.mark.parametrize("number", range(len(LocalLinearity.oracles())))
def test_oracles(number: int) -> None:
    oracle = LocalLinearity.oracles()[number]
    reading = oracle.lens.look(oracle.subject, gen=gen())
    for name, (value, tolerance) in oracle.expected.items():
        assert reading[name].value == pytest.approx(value, abs=tolerance or 1e-15, rel=0), name


def random_directions(threat: Lp, x: Tensor) -> Tensor:
    """As the lens draws them first from ``gen(0)``."""
    v = torch.empty_like(x).normal_(generator=gen(0))
    if threat.norm == "linf":
        return v.sign().double()
    return v.double() / v.double().flatten(1).norm(1 if threat.norm == "l1" else 2, dim=1)[:, None, None, None]


@pytest.mark.parametrize("threat", [Lp("l2", 0.5), Lp("linf", 0.1), Lp("l1", 2.0)], ids=str)
@pytest.mark.parametrize("make", [relu_net, smooth_net])
def test_random_deviations_as_the_equation_is_written(make: Any, threat: Lp) -> None:
    look_at = subject(make(), threat)
    reading = LocalLinearity(distances=(0.3 * threat.eps, 6 * threat.eps), **QUICK).look(look_at, gen=gen())
    model, x = make().double(), look_at.splits.test.images.double()
    v = random_directions(threat, look_at.splits.test.images)
    functions = {"logits": model} | ({"features": model.features} if make is relu_net else {})
    for part, phi in functions.items():
        for t in (0.3 * threat.eps, threat.eps, 6 * threat.eps):
            found, linear = [], []
            for image, way in zip(x, v, strict=True):
                j = torch.autograd.functional.jacobian(lambda z, phi=phi: phi(z[None])[0], image).flatten(1)
                jz = j @ (t * way).flatten()
                gap = phi((image + t * way)[None])[0] - (phi(image[None])[0] + jz)
                found.append(float(gap.detach().norm()))
                linear.append(float(jz.norm()))
            row = next(r for r in table(reading) if r[:2] == ("random", part) and math.isclose(r[2], t))
            assert row[3] == pytest.approx(np.mean(found), rel=1e-5, abs=1e-12) and row[3] > 1e-7 * (t > threat.eps)
            assert row[6] == pytest.approx(np.sum(found) / np.sum(linear), rel=1e-5, abs=1e-12)
            if t == threat.eps:
                assert reading[f"deviation, {part}, random"].value == row[3]
                quantity = reading[f"relative deviation, {part}, random"]
                assert quantity.value == row[6] and quantity.low <= quantity.value <= quantity.high and quantity.n == 10
    assert any(q.name.endswith("features, random") for q in reading.quantities) == (make is relu_net)


def table(reading: Any) -> Any:
    return next(p for p in reading.panels if p.title == "Local linearity by distance").rows


@pytest.mark.parametrize("threat", [Lp("l2", 0.5), Lp("linf", 0.1)], ids=str)
def test_a_smooth_network_has_order_two_down_to_float64_rounding_and_float32_would_not(threat: Lp) -> None:
    model = smooth_net()
    look_at = subject(model, threat)
    tiny = tuple(threat.eps * 10.0**-k for k in range(1, 6))
    reading = LocalLinearity(distances=tiny, **QUICK).look(look_at, gen=gen())
    for way in ("random", "adversarial"):
        assert reading[f"order, logits, {way}"].value == pytest.approx(2.0, abs=2e-3)
        assert reading[f"share exactly linear, logits, {way}"].value == 0.0
    small = min(r[3] for r in table(reading) if r[0] == "random")
    assert 1e-14 < small < 1e-10, "the smallest deviation is far below what float32 can see"
    x, v, t = look_at.splits.test.images, random_directions(threat, look_at.splits.test.images).float(), min(tiny)
    j = torch.stack([torch.autograd.functional.jacobian(lambda z: model(z[None])[0], i).flatten(1) for i in x])
    single = (model(x + t * v) - (model(x) + torch.einsum("bkn,bn->bk", j, t * v.flatten(1)))).norm(dim=1).mean()
    floor = reading["float32 rounding, logits"].value
    assert floor / 10 < float(single.detach()) < 10 * floor and floor > 1000 * small
    assert reading["float64 rounding, logits"].value < small


@pytest.mark.parametrize("threat", [Lp("l2", 0.5), Lp("linf", 0.1)], ids=str)
def test_a_relu_network_is_exactly_linear_up_to_the_first_kink_and_not_beyond(threat: Lp) -> None:
    model = relu_net()
    image = subject(model).splits.test.images[:1]
    one = subject(model, threat, image)
    v = random_directions(threat, image)

    double = relu_net().double()

    def switched(t: Tensor) -> Tensor:
        """Whether any unit has another sign than at the image, for distances (T,)."""
        with torch.no_grad():
            signs = torch.cat(observed(double, image.double() + t[:, None, None, None] * v)[0], 1) > 0
            return (signs != (torch.cat(observed(double, image.double())[0], 1) > 0)).any(1)

    low, high = 0.0, 1.0
    for _ in range(4):  # the first of 2,000 steps, then of 2,000 steps within it, …
        steps = torch.linspace(low, high, 2001, dtype=torch.float64)
        first = int(switched(steps).nonzero()[0])
        low, high = float(steps[first - 1]), float(steps[first])
    lens = LocalLinearity(distances=(0.5 * high, 0.999 * high, 1.01 * high), **QUICK)
    reading = lens.look(one, gen=gen())
    kink = reading["first kink, random"]
    assert kink.value == pytest.approx(high, rel=1e-6) and kink.nature == "exact" and kink.n == 1
    rows = {round(r[2] / high, 3): r for r in table(reading) if r[:2] == ("random", "logits")}
    assert rows[0.5][7] == rows[0.999][7] == 1.0 and rows[0.999][3] < 1e-13
    assert rows[1.01][7] == 0.0 and rows[1.01][3] > 1e-8
    assert not any(q.name == "order, logits, random" for q in reading.quantities)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_facet_radius_is_where_the_nearest_unit_switches(norm: Any) -> None:
    model, threat = relu_net(), Lp(norm, 0.5)
    look_at = subject(model, threat, subject(model).splits.test.images[:3])
    reading = LocalLinearity(n_norms=1, n_facets=3).look(look_at, gen=gen())
    radii = []
    for image in look_at.splits.test.images.double():
        double = relu_net().double()

        def flat(z: Tensor, double: nn.Module = double) -> Tensor:
            return torch.cat(observed(double, z[None])[0], 1)[0]

        rows = torch.autograd.functional.jacobian(flat, image).flatten(1)
        radii.append(float((flat(image).detach().abs() / rows.norm(DUAL[norm], dim=1)).nan_to_num(torch.inf).min()))
    assert reading["facet radius"].value == pytest.approx(np.median(radii), rel=1e-5)
    assert reading["facet radius"].n == 3 and reading["facet radius"].nature == "exact"
    for way in ("random", "adversarial"):
        assert reading[f"first kink, {way}"].value >= np.min(radii), "no direction is shorter than the shortest"


@pytest.mark.parametrize("scale", [0.01, 8.0])
def test_scaling_the_logits_scales_deviations_and_leaves_the_rest(scale: float) -> None:
    lens = LocalLinearity(attack=PGD(threat=Lp("l2", 0.5), steps=5, loss="margin"), n_norms=3, n_facets=2)
    model, other = relu_net(), relu_net()
    with torch.no_grad():
        other.head.weight.mul_(scale), other.head.bias.mul_(scale)
    one, two = (lens.look(subject(m), gen=gen()) for m in (model, other))
    for way in ("random", "adversarial"):
        for name, factor in (
            (f"deviation, logits, {way}", scale),
            (f"deviation, features, {way}", 1.0),
            (f"relative deviation, logits, {way}", 1.0),
            (f"first kink, {way}", 1.0),
            ("facet radius", 1.0),
            (f"largest singular value, {way}", scale),
        ):
            assert two[name].value == pytest.approx(factor * one[name].value, rel=1e-3) and one[name].value > 0, name


def pooled_net() -> nn.Module:
    """ReLUs, and max-pooling before any of them, so that windows switch between entries of every sign."""
    return seeded(
        *(lambda: nn.Conv2d(1, 3, 3, padding=1), lambda: nn.MaxPool2d(2), nn.ReLU, lambda: nn.Conv2d(3, 4, 3)),
        *(nn.ReLU, lambda: nn.MaxPool2d(2, stride=1, padding=1), nn.Flatten, lambda: nn.Linear(36, 4)),
    )


def pooled_heights(model: nn.Module, z: Tensor) -> Tensor:
    """What bends ``pooled_net`` at one image (C, H, W): its ReLUs, then every window's entries less each other."""
    first = model[0](z[None])
    second = model[1](first)
    third = model[3](second.relu())
    parts = [second.flatten(), third.flatten()]
    padded = nn.functional.pad(third.relu(), (1, 1, 1, 1), value=-1.0)  # below what a ReLU gives
    for image, size, stride in ((first, 2, 2), (padded, 2, 1)):
        windows = nn.functional.unfold(image, size, stride=stride).view(image.shape[1], 4, -1)
        top = windows.amax(1, keepdim=True)
        parts.append((windows - top).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_max_pooling_ends_regions_too(norm: Any) -> None:
    """Facet radius and first kink against dense derivatives of every ReLU and every pair in a window."""
    threat = Lp(norm, 0.5)
    look_at = subject(pooled_net(), threat, subject(pooled_net()).splits.test.images[:3])
    reading = LocalLinearity(n_norms=1, n_facets=3).look(look_at, gen=gen())
    model, q = pooled_net().double(), DUAL[norm]
    v = random_directions(threat, look_at.splits.test.images)
    radii, relus, kinks = [], [], []
    for image, way in zip(look_at.splits.test.images.double(), v, strict=True):
        height = pooled_heights(model, image).detach()
        rows = torch.autograd.functional.jacobian(lambda z: pooled_heights(model, z), image).flatten(1)
        size, change = rows.norm(q, dim=1), rows @ way.flatten()
        away = torch.where(size > 1e-12, height.abs() / size, torch.inf)
        radii.append(float(away.min()))
        relus.append(float(away[: 48 + 16].min()))
        t = torch.where(change.abs() > 1e-12, -height / change, torch.inf)
        kinks.append(float(torch.where(t >= 0, t, torch.inf).min()))
    assert np.median(radii) < np.median(relus), "pooling ends some regions first"
    assert reading["facet radius"].value == pytest.approx(np.median(radii), rel=1e-4)
    assert reading["facet radius, ReLUs alone"].value == pytest.approx(np.median(relus), rel=1e-4)
    assert reading["first kink, random"].value == pytest.approx(np.median(kinks), rel=1e-6)
    natures = {name: reading[name].nature for name in ("facet radius", "facet radius, ReLUs alone")}
    assert natures == {"facet radius": "exact", "facet radius, ReLUs alone": "upper bound"}
    assert len(bends(model, look_at.splits.test.images.double()).windows) == 2


def test_adaptive_pooling_leaves_an_upper_bound() -> None:
    net = seeded(
        lambda: nn.Conv2d(1, 3, 3), nn.ReLU, lambda: nn.AdaptiveMaxPool2d(3), nn.Flatten, lambda: nn.Linear(27, 4)
    )
    reading = LocalLinearity(n_norms=1, n_facets=2).look(subject(net), gen=gen())
    assert reading["facet radius"].nature == reading["first kink, random"].nature == "upper bound"


def test_ten_classes_have_exact_singular_values_and_a_hundred_nearly_so() -> None:
    """Residual, and distance from the norm of the dense Jacobian, of a spectrum as flat as that of random weights."""
    for classes, lens in ((10, LocalLinearity(n_norms=5)), (100, LocalLinearity(n_norms=5, iterations=30))):
        layers = nn.Flatten, lambda: nn.Linear(64, 300), nn.ReLU, lambda k=classes: nn.Linear(300, k)
        model = seeded(*layers)
        reading = lens.look(subject(model), gen=gen())
        at = subject(model).splits.test.images[:5]
        rows = [torch.autograd.functional.jacobian(lambda z, f=model: f(z[None])[0], x).flatten(1) for x in at]
        truth = float(torch.stack([torch.linalg.matrix_norm(j, 2) for j in rows]).mean())
        for name in ("largest singular value at the image", "largest singular value, adversarial"):
            assert reading[name].residual < 1e-5
        assert reading["largest singular value at the image"].value == pytest.approx(truth, rel=1e-6)


def test_singular_values_along_the_way_against_the_dense_jacobian() -> None:
    model = smooth_net()
    look_at = subject(model)
    reading = LocalLinearity(n_norms=10, iterations=60, n_facets=0).look(look_at, gen=gen())
    x = look_at.splits.test.images
    at = [torch.autograd.functional.jacobian(lambda z: model(z[None])[0], image).flatten(1) for image in x]
    truth = float(torch.stack([torch.linalg.matrix_norm(j, 2) for j in at]).mean())
    here = reading["largest singular value at the image"]
    assert here.value == pytest.approx(truth, rel=1e-4) and here.nature == "lower bound" and here.residual < 1e-2
    curve = next(p for p in reading.panels if p.title.startswith("Largest singular value"))
    assert [s.name for s in curve.series] == ["random", "adversarial"]
    for line in curve.series:
        assert line.x.tolist() == [0.0, 0.25, 0.5, 1.0, 2.0] and line.y[0] == pytest.approx(truth, rel=1e-4)
        assert (line.low <= line.y).all() and (line.y <= line.high).all()


def test_pooling_windows_that_tie_on_black_have_no_derivative() -> None:
    net = seeded(lambda: nn.Conv2d(1, 3, 3), nn.ReLU, lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(27, 4))
    with torch.no_grad():
        net[0].bias.fill_(0.1)
    black = torch.zeros(10, 1, 8, 8)
    reading = LocalLinearity(**QUICK).look(subject(net, images=black), gen=gen())
    assert reading["order, logits, random"].value == pytest.approx(1.0, abs=0.02)
    kink = reading["first kink, random"]
    assert kink.value == 0.0 and kink.nature == "exact"


@pytest.mark.parametrize("make", [smooth_net, lambda: seeded(nn.Flatten, lambda: nn.Linear(64, 4))])
def test_other_networks_have_no_kinks_and_say_why(make: Any) -> None:
    reading = LocalLinearity(n_norms=2).look(subject(make()), gen=gen())
    assert not any("kink" in q.name or "facet" in q.name for q in reading.quantities)
    assert "not measured" in next(p for p in reading.panels if p.title == "Linear regions").rows[0][0]


def test_without_a_gradient_there_is_no_adversarial_direction() -> None:
    model = smooth_net()
    with torch.no_grad():
        model[3].weight.zero_()
    reading = LocalLinearity(attack=PGD(threat=Lp("l2", 0.5), random_start=False), **QUICK).look(
        subject(model), gen=gen()
    )
    assert reading.outcome.status == "unreliable" and reading.headline == ("deviation, logits, random",)
    assert reading["deviation, logits, random"].value == 0.0
    assert not any("adversarial" in q.name for q in reading.quantities)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Through(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.net = function, smooth_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.function(x))


@pytest.mark.parametrize(
    ("function", "said"), [(Once.apply, "differentiable twice"), (lambda x: x.float(), "must run in float64")]
)
def test_networks_that_cannot_be_measured_fail_with_a_reason(function: Any, said: str) -> None:
    outcome = LocalLinearity(**QUICK).look(subject(Through(function)), gen=gen()).outcome
    assert outcome.status == "failed" and said in outcome.why


@pytest.mark.parametrize(
    "wrong",
    [{"distances": ()}, {"distances": (0.0,)}, {"n_examples": 0}, {"n_norms": 0}, {"iterations": 0}, {"n_facets": -1}],
)
def test_refuses_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"local-linearity {next(iter(wrong))}"):
        LocalLinearity(**wrong)
    with pytest.raises(InputError, match="a radius > 0"):
        LocalLinearity().look(subject(smooth_net(), Lp("l2", 0.0)), gen=gen())
