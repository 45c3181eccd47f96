"""Distances to the boundary against exact ones of tiny networks, and what the lens does when something fails."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import gen
from scipy.optimize import linprog
from scipy.stats import spearmanr
from torch import Tensor, nn

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses import boundary
from robustlens.lenses.boundary import BoundaryDistance, crossed
from robustlens.lenses.distances import SHARES, Distances, estimate
from robustlens.lenses.oracle import linear_subject
from robustlens.results.correlation import bootstrap_spearman, spearman
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

NORMS = {"l2": Lp("l2", 0.3), "linf": Lp("linf", 0.2)}
both_norms = pytest.mark.parametrize("norm", NORMS)


def tiny() -> nn.Module:
    """Two pixels, five ReLUs, three classes; float64."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            model[1].weight.mul_(3)
            model[1].bias.copy_(-(model[1].weight * torch.rand(5, 2)).sum(1))
            model[3].bias.copy_(-model[3](model[2](model[1](torch.rand(400, 2).double()))).mean(0) + model[3].bias)
        return model.eval()


def points(n: int = 24) -> Tensor:
    return torch.rand(n, 1, 1, 2, generator=gen(4), dtype=torch.float64)


def subject(model: nn.Module, norm: str, x: Tensor | None = None) -> Subject:
    x = points() if x is None else x
    split = Split(x, torch.arange(len(x)) % 3)
    return Subject(model, Splits("points", split, split, split, ("a", "b", "c")), NORMS[norm])


def half_planes(model: nn.Module, pattern: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A z ≤ b of the box and of where ``pattern`` holds, and the logits W z + c there."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    on = np.array(pattern, dtype=float)
    sign = 1 - 2 * on  # active: −(w z + b) ≤ 0
    a = np.concatenate([sign[:, None] * w1, np.eye(2), -np.eye(2)])
    b = np.concatenate([-sign * b1, np.ones(2), np.zeros(2)])
    return a, b, (w2 * on) @ w1, (w2 * on) @ b1 + b2


def nearest(a: np.ndarray, b: np.ndarray, x: np.ndarray, norm: str) -> float:
    """min ‖z − x‖ over A z ≤ b in the plane: a linear program for ℓ∞; for ℓ2, x, its feet and the corners are tried."""
    if norm == "linf":
        wide = np.concatenate(
            [np.c_[a, np.zeros(len(a))], np.c_[np.eye(2), -np.ones(2)], np.c_[-np.eye(2), -np.ones(2)]]
        )
        found = linprog([0, 0, 1], A_ub=wide, b_ub=np.concatenate([b, x, -x]), bounds=[(None, None)] * 2 + [(0, None)])
        return float(found.fun) if found.success else math.inf
    feet = x - a * ((a @ x - b) / (a * a).sum(1))[:, None]
    tried = [x, *feet]
    for i, j in itertools.combinations(range(len(a)), 2):
        pair = a[[i, j]]
        if abs(np.linalg.det(pair)) > 1e-12:
            tried.append(np.linalg.solve(pair, b[[i, j]]))
    z = np.array(tried)
    inside = (z @ a.T <= b + 1e-10).all(1)
    return float(np.linalg.norm(z[inside] - x, axis=1).min()) if inside.any() else math.inf


def exact(model: nn.Module, x: Tensor, norm: str) -> np.ndarray:
    """The exact distance of every point to another answer: the nearest point of every linear region and rival."""
    with torch.no_grad():
        top = model(x).argmax(1).tolist()
    best = np.full(len(x), np.inf)
    for pattern in itertools.product((0, 1), repeat=5):
        a, b, w, c = half_planes(model, pattern)
        if linprog([0, 0], A_ub=a, b_ub=b, bounds=[(None, None)] * 2).status == 2:
            continue
        for i, (z, y) in enumerate(zip(x.flatten(1).numpy(), top, strict=True)):
            for k in set(range(3)) - {y}:
                rows, limits = np.vstack([a, w[y] - w[k]]), np.append(b, c[k] - c[y])
                best[i] = min(best[i], nearest(rows, limits, z, norm))
    return best


@both_norms
def test_tiny_networks_lie_between_the_bounds(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(), spy(monkeypatch)
    x = points(12)
    truth = exact(model, x, norm)
    reading = BoundaryDistance(steps=60, samples=64).look(subject(model, norm, x), gen=gen())
    d = seen[0]
    assert np.isfinite(truth).all() and len(np.unique(d.lead.round(6))) == 12
    assert (d.lower <= truth * (1 + 1e-9)).all() and (d.lower > 0).all()
    assert (truth <= d.upper * (1 + 1e-9)).all()
    ratio = d.upper / truth
    assert np.median(ratio) < 1.001 and (ratio < 1.05).mean() > 0.8
    assert (d.lower <= d.estimate * (1 + 1e-9)).all() and (d.estimate <= d.upper * (1 + 1e-9)).all()
    assert reading.outcome.status == "ok"
    assert reading["average margin, test"].value == pytest.approx(d.upper.mean())
    signed = np.where(d.right, truth, -truth)
    minimum = reading["minimum margin, test"]
    assert 0 < d.right.sum() < 12 and minimum.nature == "lower bound"
    assert minimum.low <= signed.min() * (1 + 1e-9) and signed.min() <= minimum.high


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Distances]:
    """The distances that the lens makes its numbers from, test first."""
    seen: list[Distances] = []
    real = boundary._quantities

    def keep(d: Distances, *args: object) -> object:
        seen.append(d)
        return real(d, *args)

    monkeypatch.setattr(boundary, "_quantities", keep)
    return seen


@both_norms
def test_of_a_linear_model_all_three_are_the_distance(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d_p = min_j (f_c − f_j) / ‖w_c − w_j‖_q, around a grey image that the box is far from."""
    seen = spy(monkeypatch)
    x = (0.5 + 0.05 * torch.randn(20, 1, 4, 4, generator=gen(1))).double()
    weight = torch.randn(5, 16, generator=gen(2)).double()
    split = Split(x, torch.arange(20) % 5)
    look_at = linear_subject(weight, -0.5 * weight.sum(1), train=split, test=split, threat=NORMS[norm])
    look_at.model.double()
    with torch.no_grad():
        look_at.model[1].weight.copy_(weight), look_at.model[1].bias.copy_(-0.5 * weight.sum(1))
        leads = look_at.model(x)
    top = leads.argmax(1)
    leads = leads.gather(1, top[:, None]) - leads
    sizes = (weight[top][:, None] - weight).norm(p=1 if norm == "linf" else 2, dim=2)
    truth = (leads / sizes).nan_to_num(nan=torch.inf).amin(1).numpy()
    kept = BoundaryDistance().look(look_at, gen=gen()).of_each("average margin, train")
    assert kept is not None and sorted(kept.places.tolist()) == list(range(20))
    assert np.allclose(kept.values, truth[kept.places], rtol=1e-4)
    for values, tolerance in ((seen[0].lower, 1e-9), (seen[0].upper, 1e-4), (seen[0].estimate, 1e-4)):
        assert np.allclose(values, truth, rtol=tolerance, atol=1e-7)


@both_norms
def test_the_scale_of_the_logits_changes_nothing(norm: str) -> None:
    model, scaled = tiny(), copy.deepcopy(tiny())
    with torch.no_grad():
        for p in scaled[3].parameters():
            p *= 2.0**9
    lens = BoundaryDistance(steps=15, samples=8)
    one, other = (lens.look(subject(m, norm), gen=gen(1)) for m in (model, scaled))
    assert one.quantities == other.quantities and len(one.quantities) > 15


class Bowl(nn.Module):
    """Two logits that differ by ½ − bᵀz − s/2 ‖z‖² around grey, z = x − ½: its slope at z is b + s z."""

    def __init__(self, b: Tensor, s: float) -> None:
        super().__init__()
        self.b, self.s = nn.Parameter(b), s

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) - 0.5
        lead = 0.5 - z @ self.b - self.s / 2 * z.square().sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def test_sampled_slopes_of_a_quadratic_fall_short_by_little_and_less_with_more_samples() -> None:
    """In 20 dimensions the steepest point of a ball is hard to hit: the estimate lies above that of the true slope."""
    b = torch.randn(20, generator=gen(4), dtype=torch.float64)
    b /= b.norm()
    model, x, radius = Bowl(b, 1.0), torch.full((1, 1, 4, 5), 0.5, dtype=torch.float64), 0.5
    # L(R) = 1 + R: the largest of min(½ / (1 + R), R) over the four balls is where R = ¾ · ½.
    true = max(min(0.5 / (1 + share * radius), share * radius) for share in SHARES)
    many = [
        float(estimate(model, x, torch.zeros(1).long(), Lp("l2", 1.0), torch.tensor([radius]).double(), 1, n, gen()))
        for n in (64, 16384)
    ]
    assert true == pytest.approx(0.5 / 1.375) and true <= many[1] < many[0] < 1.15 * true and many[1] < 1.08 * true
    lead = Bowl(b, 1.0)(x + (radius * b).view_as(x))[0, 0]
    assert float(lead.detach()) < 0, "the boundary lies within the radius"


def test_what_is_not_certified_is_left_out_and_said() -> None:
    model = nn.Sequential(*tiny(), nn.GELU())
    reading = BoundaryDistance(steps=10).look(subject(model, "l2"), gen=gen())
    assert not any(q.nature == "lower bound" and "certified" in q.name for q in reading.quantities)
    assert "nothing is certified, because no constant is known for a layer GELU" in reading.says
    assert reading["minimum margin, test"].low is None
    assert "certified" not in reading.panels[1].counts


class Island(nn.Module):
    """Class 1 on the left of x₁ = ½; on the right always class 0, with slope zero."""

    def forward(self, x: Tensor) -> Tensor:
        left = (0.5 - x.flatten(1)[:, 0]).clamp_min(0)
        return torch.stack([torch.full_like(left, 0.1), left], 1)


def test_failed_attacks_are_counted_and_never_zero() -> None:
    first = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 0.95])
    x = torch.full((7, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] = first
    reading = BoundaryDistance().look(subject(Island(), "l2", x), gen=gen())
    assert reading["failed attacks, test"].value == 4 and reading["failed attacks, test"].n == 7
    average = reading["average margin, test"]
    assert average.n == 3 and average.value == pytest.approx((0.3 + 0.2 + 0.1) / 3, abs=1e-4)
    assert reading.of_each(average.name) is None, "not of the same images as another network's"
    assert reading.of_each("estimated average margin, test") is not None
    assert reading.outcome.status == "unreliable" and "57%" in reading.outcome.why
    assert reading.panels[0].counts["test"].sum() == 3
    curve = reading.panels[2].series[0]
    assert curve.y[-1] == pytest.approx(2 / 7)  # two of the unbroken are right

    nothing = BoundaryDistance().look(subject(Island(), "l2", x[3:]), gen=gen())
    assert nothing.outcome.status == "failed" and not nothing.quantities


def test_crossed_bounds_are_counted_and_make_a_reading_unreliable(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Distances(np.array([True] * 3), np.ones(3), np.array([1.0, 1.0, 2.0]), np.ones(3), np.array([1.0, np.nan, 1.9]))
    assert crossed(d) == 1
    monkeypatch.setattr(boundary, "certificate", lambda *_: torch.full((3, 3), 1e-3, dtype=torch.float64))
    reading = BoundaryDistance(steps=10).look(subject(tiny(), "l2"), gen=gen())
    assert reading["crossed bounds, test"].value == 24 and reading["crossed bounds, test"].nature == "exact"
    assert reading.outcome.status == "unreliable" and "nearer than the certified" in reading.outcome.why


def test_pictures_are_the_nearest_right_ones() -> None:
    reading = BoundaryDistance(pictures=3, batch_size=5).look(subject(tiny(), "linf"), gen=gen())
    gallery = reading.panels[-1]
    assert gallery.images.shape == (3, 3, 1, 2, 1)
    shown = [float(caption.rpartition(" ")[2]) for caption in gallery.captions]
    assert shown == sorted(shown) and shown[0] >= reading["minimum margin, test"].value


def test_distances_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    for size in (24, 7):
        BoundaryDistance(batch_size=size, steps=20).look(subject(tiny(), "l2"), gen=gen())
    assert np.allclose(seen[0].upper, seen[2].upper, rtol=1e-9) and np.allclose(seen[0].lower, seen[2].lower)


def test_other_norms_and_settings_are_refused() -> None:
    l1 = subject(tiny(), "l2")
    reading = BoundaryDistance().look(Subject(l1.model, l1.splits, Lp("l1", 1.0)), gen=gen())
    assert reading.outcome.status == "failed" and "ℓ2 or ℓ∞" in reading.outcome.why
    for field in ("steps", "samples", "rivals"):
        with pytest.raises(InputError):
            BoundaryDistance(**{field: 0})


def test_spearman_with_ties_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 60).astype(float)
    b = a + rng.normal(0, 2, 60)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(a, np.exp(a)) == pytest.approx(1) and math.isnan(spearman(a, np.ones(60)))
    with pytest.raises(InputError):
        spearman(a[:1], b[:1])
    cover = 0
    truth = 6 / math.pi * math.asin(0.5 / 2)  # of a normal pair with correlation ½
    for seed in range(60):
        pair = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 80).T
        low, high = bootstrap_spearman(*pair, seed=seed, resamples=300)
        cover += low <= truth <= high
    assert cover >= 51  # 95 % of 60 is 57; fewer than 51 has probability below 0.1 %
