"""The weight-loss landscape against closed forms of logistic regression, and what must not change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.losses import LossName
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.criterion import logit_margin
from robustlens.core.rng import generator
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.curve_shape import fitted, widths
from robustlens.lenses.displaced import Displaced
from robustlens.lenses.landscape import WeightLandscape
from robustlens.lenses.passes import draw_seed
from robustlens.linalg.directions import (
    Moved,
    batch_statistics,
    cosine,
    filter_normalised,
    gaussian,
    in_relative_ball,
    into_relative_ball,
    moved,
    moving_weights,
    orthogonal_to,
)
from robustlens.models.linear import LogisticNet
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

EPS = 0.05
QUICK = PGD(threat=Lp("l2", EPS), steps=2)
SMALL = WeightLandscape(alphas=(0.1, 0.2, 0.5), directions=2, draws=2, ascent_steps=2, attack=QUICK, batch_size=5)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject(model: nn.Module, n: int = 12, classes: int = 2, side: int = 2) -> Subject:
    """Images well inside the box, so that an ℓ2 attack of radius 0.05 never meets it."""
    x = 0.2 + 0.6 * torch.rand(n, 1, side, side, generator=gen(1), dtype=torch.float64)
    split = Split(x, torch.arange(n) % classes)
    return Subject(model, Splits("noise", split, split, split, tuple("abcd"[:classes])), Lp("l2", EPS))


def logistic() -> nn.Module:
    model = LogisticNet(4, bias=False).double()
    nn.init.normal_(model.fc.weight, generator=gen(2))
    return model


def relu_net(scale: float = 1.0) -> nn.Sequential:
    """(c W₁, c b₁, W₂ / c): the same function for every c."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale)
        model[3].weight.div_(scale)
    return model


def robust_loss(w: np.ndarray, x: np.ndarray, y: np.ndarray, eps: float = EPS) -> float:
    """mean softplus(−y w·x + ε‖w‖), y = ±1."""
    return float(np.logaddexp(0, -y * (x @ w) + eps * np.linalg.norm(w)).mean())


def numpy_of(where: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    test = where.splits.test
    w = where.model.fc.weight.detach().numpy()[0]
    return w, test.images.flatten(1).numpy(), 2.0 * test.labels.numpy() - 1


def directions_of(lens: WeightLandscape, w: np.ndarray, seed: int) -> list[np.ndarray]:
    """The lens's directions for one weight row, from their definition."""
    draws = [torch.randn(1, 4, generator=generator("cpu", draw_seed(gen(seed)), "direction", k), dtype=torch.float64)
             for k in range(lens.directions)]  # fmt: skip
    return [z.numpy()[0] / np.linalg.norm(z.numpy()) * np.linalg.norm(w) for z in draws]


def scene(where: Subject, lens: WeightLandscape = SMALL) -> Displaced:
    split = where.splits.test
    attack = lens.attack or QUICK
    return Displaced(where, split, torch.arange(len(split)), attack, lens.batch_size, 7, lens.batch_norm)


def test_oracles() -> None:
    for oracle in WeightLandscape.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_curves_of_logistic_regression_in_closed_form() -> None:
    """With the exact adversary g(α) = mean softplus(−y (w + αh)·x + ε‖w + αh‖), and g'' at 0 is hᵀHh."""
    where = subject(logistic())
    lens = WeightLandscape(alphas=(0.01, 0.02, 1.0), fit_within=0.02, attack=LinearExact(threat=Lp("l2", EPS)))
    reading = lens.look(where, gen=gen(3))
    w, x, y = numpy_of(where)
    hs = directions_of(lens, w, 3)
    grid = reading.panels[0].series[0].x
    assert grid.tolist() == [-1.0, -0.02, -0.01, 0.0, 0.01, 0.02, 1.0]
    robust, clean, kept = (s.y for s in reading.panels[0].series)
    for at, alpha in enumerate(grid):
        assert robust[at] == pytest.approx(np.mean([robust_loss(w + alpha * h, x, y) for h in hs]), abs=1e-9)
        assert clean[at] == pytest.approx(np.mean([robust_loss(w + alpha * h, x, y, 0.0) for h in hs]), abs=1e-12)
        assert clean[at] < robust[at] and kept[at] <= robust[at] + 1e-12
    assert kept[0] < robust[0] - 1e-3  # the adversary that does not answer is weaker

    def curvature(h: np.ndarray, eps: float) -> float:
        size = np.linalg.norm(w)
        s = 1 / (1 + np.exp(y * (x @ w) - eps * size))
        a = y[:, None] * x - eps * w / size
        bend = eps / size * (h @ h - (h @ w) ** 2 / size**2)
        return float((s * (1 - s) * (a @ h) ** 2 + s * bend).mean())

    for name, eps in (("curvature at 0", EPS), ("curvature at 0, clean", 0.0)):
        assert reading[name].value == pytest.approx(np.mean([curvature(h, eps) for h in hs]), rel=1e-3)
        assert reading[name].low < reading[name].value < reading[name].high
    table = reading.panels[1]
    assert [row[2] for row in table.rows] == pytest.approx([curvature(h, EPS) for h in hs], rel=1e-3)
    assert all(row[3] < 1e-2 * row[2] for row in table.rows)
    rise = np.mean([(robust_loss(w + s * h, x, y) - robust_loss(w, x, y)) for h in hs for s in (-1, 1)])
    assert reading["rise at ±1"].value == pytest.approx(rise, abs=1e-9)


def test_moving_scale_between_layers_changes_nothing() -> None:
    """(c W₁, c b₁, W₂ / c) reads the same, to the last bit for c = 4 and to rounding for 3; (c W₁, b₁, W₂) does not."""
    base, exact, rounded = (SMALL.look(subject(relu_net(c), classes=4, side=4), gen=gen(1)) for c in (1.0, 4.0, 3.0))
    assert base.quantities == exact.quantities
    for quantity in base.quantities:
        assert rounded[quantity.name].value == pytest.approx(quantity.value, rel=1e-7, abs=1e-12), quantity.name
    model = relu_net()
    with torch.no_grad():
        model[0].weight.mul_(4)
    assert SMALL.look(subject(model, classes=4, side=4), gen=gen(1))["curvature at 0"].value != pytest.approx(
        base["curvature at 0"].value, rel=0.1
    )


def test_at_zero_it_is_the_loss_and_without_a_radius_it_is_the_clean_one() -> None:
    where = subject(relu_net(), classes=4, side=4)
    test = where.splits.test
    with torch.no_grad():
        truth = float(F.cross_entropy(where.model(test.images), test.labels))
    reading = SMALL.look(where, gen=gen())
    assert reading["loss"].value == pytest.approx(truth, abs=1e-14)
    robust, clean, _ = (s.y for s in reading.panels[0].series)
    assert bool((robust > clean).all())
    still = dataclasses.replace(SMALL, attack=PGD(threat=Lp("l2", 0.0), steps=1)).look(where, gen=gen())
    robust, clean, kept = (s.y for s in still.panels[0].series)
    assert robust.tolist() == clean.tolist() == kept.tolist()
    assert still["curvature at 0"].value == still["curvature at 0, clean"].value != 0


class Stumbling(nn.Module):
    """Raises at its ``calls``-th forward pass."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return self.model(x)


def with_norm() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("calls", [1, 10, 100, 10_000])
def test_weights_are_bit_identical_also_after_an_exception(calls: int) -> None:
    model = Stumbling(with_norm().train(), calls)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    lens, where = dataclasses.replace(SMALL, batch_norm="re-estimated"), subject(model, classes=4, side=4)
    if calls < 10_000:
        with pytest.raises(RuntimeError, match="memory"):
            lens.look(where, gen=gen())
    else:
        assert lens.look(where, gen=gen()).outcome.status != "failed"
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(id(p) == ids[name] and p.requires_grad and p.grad is None for name, p in model.named_parameters())
    assert all(m.training for m in model.modules()) and model.model[1].momentum == 0.1


def test_every_filter_gets_its_own_norm_and_vectors_stay() -> None:
    model = with_norm()
    with torch.no_grad():
        model[0].weight[1] = 0
    weights = moving_weights(model)
    assert set(weights) == {"0.weight", "5.weight"}
    z = gaussian(weights, gen())
    h = filter_normalised(z, weights)
    for name, w in weights.items():
        for m in range(len(w)):
            assert float(h[name][m].norm()) == pytest.approx(float(w[m].norm()), rel=1e-12)
            align = float((h[name][m] * z[name][m]).sum())
            assert align == pytest.approx(float(w[m].norm() * z[name][m].norm()), rel=1e-12)
    assert not h["0.weight"][1].any()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    model.eval()
    assert torch.equal(Moved(model, moved(weights, (0.0, h)))(x), model(x))


def test_the_plane_is_almost_square_and_says_how_much() -> None:
    where = subject(relu_net(), classes=4, side=4)
    lens = dataclasses.replace(SMALL, plane=3)
    reading = lens.look(where, gen=gen())
    heatmap = reading.panels[2]
    assert heatmap.z.shape == (3, 3) and heatmap.x.tolist() == [-0.5, 0.0, 0.5]
    assert heatmap.z[1, 1] == pytest.approx(reading["robust loss"].value, abs=1e-14)
    assert heatmap.z[0, 1] != heatmap.z[1, 0]
    weights = moving_weights(where.model)
    a, b = gaussian(weights, gen(1)), gaussian(weights, gen(2))
    assert abs(cosine(a, b)) > 1e-3 and cosine(a, orthogonal_to(a, b)) == pytest.approx(0, abs=1e-14)
    one, other = (torch.cat([t.flatten() for t in d.values()]) for d in (a, b))
    assert cosine(a, b) == pytest.approx(float(one @ other / (one.norm() * other.norm())), rel=1e-12)
    assert 0 < abs(reading["cosine between the plane's directions"].value) < 0.3


def test_statistics_of_batchnorm_at_other_weights() -> None:
    """Means over equal batches of the batch means and unbiased variances; the module's own stay."""
    model = with_norm()
    x = torch.rand(2, 6, 1, 4, 4, dtype=torch.float64, generator=gen())
    w = 2 * moving_weights(model)["0.weight"]
    outputs = [F.conv2d(part, w, model[0].bias) for part in x]

    def images() -> Iterator[Tensor]:
        yield from x

    found = batch_statistics(model, {"0.weight": w}, images())
    assert torch.allclose(found["1.running_mean"], torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    assert torch.allclose(found["1.running_var"], torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    where = subject(model, classes=4, side=4)
    frozen, fresh = (
        dataclasses.replace(SMALL, batch_norm=k).look(where, gen=gen()) for k in ("frozen", "re-estimated")
    )
    assert frozen["loss"].value != fresh["loss"].value


def test_the_same_random_numbers_at_all_weights() -> None:
    where = subject(relu_net(), classes=4, side=4)
    weights = moving_weights(where.model)
    once, again = scene(where).at(weights), scene(where).at(weights)
    assert all(torch.equal(a, b) for a, b in zip(once.x_adv, again.x_adv, strict=True))
    assert not torch.equal(once.x_adv[0], where.splits.test.images[:5])


def test_worst_flatness_of_one_example_by_brute_force() -> None:
    """max over ‖ν‖ ≤ ξ‖w‖ of softplus(−y u·x + ε‖u‖), u = w + ν, lies in the plane of w and x: scan the circle."""
    xi, where = 0.3, subject(logistic(), n=1)
    w, x, y = numpy_of(where)
    size = np.linalg.norm(w)
    one = w / size
    two = x[0] - (x[0] @ one) * one
    two /= np.linalg.norm(two)
    angles = np.linspace(0, 2 * np.pi, 20_001)
    circle = w + xi * size * (np.cos(angles)[:, None] * one + np.sin(angles)[:, None] * two)
    best = max(robust_loss(u, x, y) for u in circle) - robust_loss(w, x, y)
    exact = LinearExact(threat=Lp("l2", EPS))
    lens = dataclasses.replace(SMALL, attack=exact, worst_radius=xi, ascent_steps=6)
    found = lens.look(where, gen=gen())["worst robust flatness"].value
    assert 0.99 * best < found <= best + 1e-9
    few = dataclasses.replace(lens, ascent_steps=1).look(where, gen=gen())["worst robust flatness"].value
    assert 0 < few <= best + 1e-9


def test_draws_fill_the_ball_and_projections_end_in_it() -> None:
    """(‖ν‖ / ξ‖w‖)^d is uniform: its mean over 2,000 draws is within 5 standard errors (0.0065) of a half."""
    weights = {"a": torch.rand(1, 3, dtype=torch.float64) + 1}
    draw = gen(4)
    balls = [in_relative_ball(gaussian(weights, draw), weights, 0.5, draw)["a"] for _ in range(2000)]
    share = torch.stack([b.norm() for b in balls]) / (0.5 * weights["a"].norm())
    assert float(share.max()) <= 1 and float((share**3).mean()) == pytest.approx(0.5, abs=0.033)
    far = into_relative_ball({"a": torch.ones(1, 3, dtype=torch.float64)}, weights, 0.1)["a"]
    assert float(far.norm()) == pytest.approx(0.1 * float(weights["a"].norm())) and len(far.unique()) == 1
    near = {"a": 1e-3 * weights["a"]}
    assert torch.equal(into_relative_ball(near, weights, 0.1)["a"], near["a"])


def test_parabolas_and_widths_by_hand() -> None:
    alphas = np.array([-0.4, -0.1, 0.0, 0.1, 0.4])
    noisy = 1 + 2 * alphas + 3 * alphas**2 + np.array([0.01, -0.02, 0.01, 0.02, -0.01])
    slope, bend, error = fitted(alphas, noisy[None])
    best, covariance = np.polyfit(alphas, noisy, 2, cov=True)
    assert (slope[0], bend[0]) == (pytest.approx(best[1]), pytest.approx(2 * best[0]))
    assert error[0] == pytest.approx(2 * np.sqrt(covariance[0, 0]))
    grid = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    curves = np.array([[5.2, 5.0, 5.0, 5.4, 9.0], [0.0, -1.0, 0.0, 0.05, 0.05]])
    length, whole = widths(grid, curves)
    assert length.tolist() == pytest.approx([0.75 + 0.125, 2.0]) and whole.tolist() == [True, False]


def test_flat_curves_give_a_lower_bound_of_the_width() -> None:
    model = logistic()
    with torch.no_grad():
        model.fc.weight.mul_(1e-3)
    width = SMALL.look(subject(model), gen=gen())["width"]
    assert (width.nature, width.value) == ("lower bound", pytest.approx(1.0))


def test_a_blind_attack_is_said() -> None:
    """Margins of 2,000 logits: the cross-entropy's gradient is exactly zero."""
    where = subject(logistic())
    with torch.no_grad():
        where.model.fc.weight.fill_(1000.0)
    confident = Split(where.splits.test.images, torch.ones(12, dtype=torch.int64))
    sure = Subject(where.model, dataclasses.replace(where.splits, test=confident), where.threat)
    reading = SMALL.look(sure, gen=gen())
    assert reading["share of vanishing gradients"].value == 1 and reading.outcome.status == "unreliable"
    assert SMALL.look(subject(logistic()), gen=gen())["share of vanishing gradients"].value == 0


class Louder(nn.Module):
    """Logits times ``scale``, on images and weights of single precision."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model.float(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


@pytest.mark.parametrize(("scale", "status"), [(1.0, "ok"), (40.0, "unreliable"), (1000.0, "unreliable")])
def test_an_attack_on_a_saturated_network_is_not_believed(scale: float, status: str) -> None:
    """Margins of about 1 that a factor of 40 takes to gradients of 1e-17, which are not zero, and 1,000 to zero.

    Truth: in the logits divided by the factor, how far the attack lowers the margins at w, beside one that climbs them.
    """
    x = 0.2 + 0.6 * torch.rand(12, 1, 4, 4, generator=gen(1))
    y = relu_net().float()(x).argmax(1)
    split = Split(x, y)
    splits = Splits("sure", split, split, split, tuple("abcd"))
    where = Subject(Louder(relu_net(), scale), splits, Lp("l2", EPS))
    with torch.no_grad():
        model = where.model.model
        model[3].weight.mul_(12)
        model[3].bias.mul_(12)

    def lowered(loss: LossName) -> float:
        x_adv = craft(PGD(threat=Lp("l2", EPS), steps=3, loss=loss), where.model, x, y, gen=gen())
        with torch.no_grad():
            return float((logit_margin(model(x), y) - logit_margin(model(x_adv), y)).mean())

    fall = {loss: lowered(loss) for loss in ("ce", "margin")}
    reading = SMALL.look(where, gen=gen())
    share = reading["share of vanishing gradients"].value
    assert reading.outcome.status == status and (share > 0.5) == (status == "unreliable")
    assert (fall["ce"] < 0.5 * fall["margin"]) == (status == "unreliable"), fall
    assert status == "ok" or "blind" in reading.outcome.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": (0.2, 0.1)}, "ascending"),
        ({"alphas": ()}, "> 0"),
        ({"fit_within": 0.1}, "two of the alphas"),
        ({"directions": 0}, "at least 1"),
        ({"plane": 1}, "at least 2"),
        ({"split": "all"}, "train, valid or test"),
    ],
)
def test_settings_that_cannot_be_used(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change)


def test_what_cannot_be_measured_says_so() -> None:
    assert SMALL.look(subject(nn.Flatten(), classes=4), gen=gen()).outcome.status == "failed"
    where = subject(relu_net(), classes=4, side=4)
    empty = Split(where.splits.test.images[:0], where.splits.test.labels[:0])
    none = Subject(where.model, dataclasses.replace(where.splits, test=empty), where.threat)
    assert SMALL.look(none, gen=gen()).outcome.status == "failed"
    with torch.no_grad():
        where.model[0].weight.fill_(torch.nan)
    assert SMALL.look(where, gen=gen()).outcome.status == "failed"
