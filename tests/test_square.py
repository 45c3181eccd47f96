"""Square Attack against a naive transcription, and on models whose worst case is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import gen
from torch import Generator, Tensor, nn

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.square import Square, _windows, hills
from robustlens.attacks.verify import craft, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.types import Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

BALLS = {"linf": 0.15, "l2": 0.8, "l1": 4.0}
every_norm = pytest.mark.parametrize("norm", BALLS)

SHAPE = (2, 6, 9)


def pictures(n: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Not square, two channels, float64, some pixels at the border of the box."""
    return torch.rand(n, *shape, generator=gen(1), dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)


def linear_pair(lead: float, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """Two classes, linear, class 0 ahead by about ``lead``."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).double()
    with torch.no_grad():
        model[1].weight.normal_(generator=gen(2))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1) + torch.tensor([lead, 0.0]))
    return model


def curved(shape: tuple[int, int, int] = SHAPE, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        d = math.prod(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(d, 20), nn.Tanh(), nn.Linear(20, classes)).double()


class Witness(nn.Module):
    """Keeps what a model was asked, and refuses to be differentiated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad and not torch.is_grad_enabled()
        self.asked.append(x.clone())
        return self.model(x)


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def naive_eta(h: int, w: int, q: int) -> Tensor:
    """A hill of k = ⌊h/2⌋ rows above a valley of the others; 1-based indices as in equation 2."""

    def hill(a: int, b: int) -> Tensor:
        n, out = max(a, b) // 2, torch.zeros(a, b, dtype=torch.float64)
        for r in range(1, a + 1):
            for s in range(1, b + 1):
                m = n - max(abs(r - a // 2 - 1), abs(s - b // 2 - 1))
                out[r - 1, s - 1] = sum(1 / (n + 1 - k) ** (2 * (3 - q)) for k in range(m + 1))
        return out / out.abs().pow(q).sum() ** (1 / q)

    eta = torch.cat([hill(h // 2, w), -hill(h - h // 2, w)])
    return eta / eta.abs().pow(q).sum() ** (1 / q)


def naive_side(query: int, h: int, w: int, norm: str) -> int:
    p = 0.8
    for after in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        p = p / 2 if query > after else p
    s = max(round(math.sqrt(p * h * w)), 1 if norm == "linf" else 3)
    return s + 1 if norm != "linf" and s % 2 == 0 else s


class Naive:
    """Algorithms 1 to 3 with Python loops over the images; it draws for all, in the attack's order."""

    def __init__(self, threat: Lp, x: Tensor, y: Tensor, model: nn.Module, draws: Generator) -> None:
        self.threat, self.x, self.y, self.model, self.draws = threat, x, y, model, draws
        self.q = {"linf": 0, "l2": 2, "l1": 1}[threat.norm]

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.draws)

    def margin(self, z: Tensor, i: int) -> float:
        with torch.no_grad():
            logits = self.model(z[None])[0]
        y = int(self.y[i])
        return float(logits[y] - max(float(v) for j, v in enumerate(logits) if j != y))

    def run(self, queries: int) -> Tensor:
        n, (c, h, w) = len(self.x), self.x.shape[1:]
        best = self.stripes(n, c, h, w) if self.q == 0 else self.tiling(n, c, h, w)
        loss = [self.margin(best[i], i) for i in range(n)]
        alive = list(range(n))
        for query in range(queries):
            if query <= 10 or query % 10 == 0:
                alive = [i for i in alive if loss[i] > 0]
            side = naive_side(query, h, w, self.threat.norm)
            a, b = min(side, h), min(side, w)
            propose = self.corner if self.q == 0 else self.moved
            for i, z in zip(alive, propose(alive, best, a, b), strict=True):
                new = self.margin(z, i)
                if new < loss[i]:
                    best[i], loss[i] = z, new
        return best

    def stripes(self, n: int, c: int, h: int, w: int) -> Tensor:
        up, best = self.ints(2, n, c, w), self.x.clone()
        for i in range(n):
            for k in range(c):
                for column in range(w):
                    best[i, k, :, column] += self.threat.eps if up[i, k, column] else -self.threat.eps
        return best.clamp(0, 1)

    def corner(self, alive: list[int], best: Tensor, a: int, b: int) -> list[Tensor]:
        n, (c, h, w), eps = len(self.x), self.x.shape[1:], self.threat.eps
        tops, lefts, up = self.ints(h - a + 1, n), self.ints(w - b + 1, n), self.ints(2, n, c)
        out = []
        for i in alive:
            delta = torch.zeros(c, h, w, dtype=torch.float64)
            for k in range(c):
                delta[k, tops[i] : tops[i] + a, lefts[i] : lefts[i] + b] = 2 * eps if up[i, k] else -2 * eps
            out.append((best[i] + delta).clamp(self.x[i] - eps, self.x[i] + eps).clamp(0, 1))
        return out

    def size(self, v: Tensor) -> Tensor:
        return v.abs().pow(self.q).sum() ** (1 / self.q)

    def etas(self, a: int, b: int) -> list[Tensor]:
        return [naive_eta(a, b, self.q), naive_eta(b, a, self.q).T]

    def tiling(self, n: int, c: int, h: int, w: int) -> Tensor:
        s = min(h, w) // 5
        rows, columns = h // s, w // s
        turned, up = self.ints(2, n, rows, columns), self.ints(2, n, c, rows, columns)
        etas, best = self.etas(s, s), []
        for i in range(n):
            delta = torch.zeros(c, h, w, dtype=torch.float64)
            for r in range(rows):
                for t in range(columns):
                    top, left = (h - rows * s) // 2 + r * s, (w - columns * s) // 2 + t * s
                    for k in range(c):
                        sign = 1 if up[i, k, r, t] else -1
                        delta[k, top : top + s, left : left + s] = sign * etas[turned[i, r, t]]
            best.append((self.x[i] + self.threat.eps * delta / self.size(delta)).clamp(0, 1))
        return torch.stack(best)

    def moved(self, alive: list[int], best: Tensor, a: int, b: int) -> list[Tensor]:
        n, (c, h, w), q = len(self.x), self.x.shape[1:], self.q
        corners = [(self.ints(h - a + 1, n), self.ints(w - b + 1, n)) for _ in range(2)]
        turned, up = self.ints(2, n), self.ints(2, n, c)
        etas, out = self.etas(a, b), []
        for i in alive:
            nu = best[i] - self.x[i]
            unused = self.threat.eps**q - self.size(nu) ** q
            w1, w2 = torch.zeros(2, h, w, dtype=torch.bool)
            for mask, (top, left) in zip((w1, w2), corners, strict=True):
                mask[top[i] : top[i] + a, left[i] : left[i] + b] = True
            new = nu.clone()
            for k in range(c):
                inside = nu[k][w1].view(a, b)
                temp = (1 if up[i, k] else -1) * etas[turned[i]]
                if self.size(inside) > 0:
                    temp = temp + inside / self.size(inside)
                available = (self.size(nu[k][w1 | w2]) ** q + unused / c).clamp_min(0) ** (1 / q)
                new[k][w2] = 0
                new[k][w1] = (temp / self.size(temp) * available).flatten()
            out.append((self.x[i] + new).clamp(0, 1))
        return out


@every_norm
@pytest.mark.parametrize("shape", [SHAPE, (1, 12, 10)])
def test_square_is_the_algorithm_of_the_paper(norm: str, shape: tuple[int, int, int]) -> None:
    """Fed with the same draws, image by image, also while images fall and leave."""
    model, x, threat = curved(shape), pictures(6, shape), Lp(norm, BALLS[norm])
    y = labels_of(model, x)
    found = Square(threat=threat, queries=70).perturb(model, x, y, gen=gen(3))
    naive = Naive(threat, x, y, model, gen(3)).run(70)
    margins = logit_margin(model(found), y).detach()
    assert 0 < (margins <= 0).sum() < 6, "some fall and some stand"
    assert torch.allclose(found, naive, atol=1e-9)
    assert (margins < logit_margin(model(x), y)).all()


@every_norm
def test_hills_are_those_of_equation_2(norm: str) -> None:
    q = 1 if norm == "l1" else 2
    for h, w in ((1, 1), (2, 2), (5, 5), (6, 6), (3, 7), (13, 13)):
        pair = hills(h, w, q)
        assert torch.allclose(pair[0], naive_eta(h, w, q)) and torch.allclose(pair[1], naive_eta(w, h, q).T)
        assert torch.allclose(pair.abs().pow(q).sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_square_reaches_the_best_corner_of_a_linear_model() -> None:
    """ℓ∞ with two classes: one window of one pixel after the other, every pixel gets to its best corner."""
    shape = (2, 3, 5)
    model, x, threat = linear_pair(50.0, shape), pictures(8, shape), Lp("linf", 0.15)
    y = torch.zeros(8, dtype=torch.int64)
    exact = craft(LinearExact(threat=threat), model, x, y, gen=gen())
    found = craft(Square(threat=threat, queries=1500), model, x, y, gen=gen())
    assert torch.allclose(found, exact, atol=1e-15)
    assert (logit_margin(model(found), y) > 0).all(), "nothing fell, so that all had to be found"


@pytest.mark.parametrize(("norm", "share"), [("l2", 0.5), ("l1", 0.3)])
def test_square_comes_near_the_worst_case_of_a_linear_model(norm: str, share: float) -> None:
    """The drop of the margin against the largest that there is, box included."""
    model, x, threat = linear_pair(50.0), pictures(8), Lp(norm, BALLS[norm])
    y = torch.zeros(8, dtype=torch.int64)
    before = logit_margin(model(x), y)
    exact = before - logit_margin(model(craft(LinearExact(threat=threat), model, x, y, gen=gen())), y)
    found = before - logit_margin(model(craft(Square(threat=threat, queries=400), model, x, y, gen=gen())), y)
    assert (found / exact).min() > share and (found / exact).max() < 1 + 1e-9


@every_norm
def test_every_query_is_in_the_threat_at_full_size_and_the_best_comes_back(norm: str) -> None:
    """With the box out of reach ‖z − x‖ is eps; with several restarts too, the lowest margin asked for is returned."""
    model, x = Witness(linear_pair(200.0)), pictures(1)
    threat, y = Lp(norm, BALLS[norm], low=-50.0, high=50.0), torch.zeros(1, dtype=torch.int64)
    attack = Square(threat=threat, queries=150, restarts=2)
    found = attack.perturb(model, x, y, gen=gen(5))
    asked = torch.cat(model.asked)
    assert 100 < len(asked) <= attack.passes.forward == 1 + 2 * 151
    sizes = threat.distance(asked[1:], x)
    assert torch.allclose(sizes, torch.full_like(sizes, threat.eps), rtol=1e-12, atol=0)
    if norm == "linf":
        assert torch.allclose((asked[1:] - x).abs(), torch.full_like(asked[1:], threat.eps))
    margins = logit_margin(model.model(asked), y.expand(len(asked)))
    assert logit_margin(model.model(found), y) == margins.min() < margins[0]
    inside = dataclasses.replace(attack, threat=Lp(norm, BALLS[norm]))
    model.asked.clear()
    inside.perturb(model, x, y, gen=gen(5))
    asked = torch.cat(model.asked)
    assert torch.equal(inside.threat.project(asked, x.expand_as(asked)), asked), "the choke point moves nothing"


@every_norm
def test_a_proposal_that_changes_nothing_asks_nothing(norm: str) -> None:
    model, x = Witness(linear_pair(200.0)), pictures(1)
    Square(threat=Lp(norm, BALLS[norm]), queries=200).perturb(model, x, torch.zeros(1, dtype=torch.int64), gen=gen(4))
    margins = logit_margin(model.model(torch.cat(model.asked)), torch.zeros(len(model.asked), dtype=torch.int64))
    best = 1
    for query in range(2, len(model.asked)):
        assert not torch.equal(model.asked[query], model.asked[best])
        best = query if margins[query] < margins[best] else best
    assert len(model.asked) < 202 or norm != "linf"


@every_norm
def test_float32_stays_inside_too(norm: str) -> None:
    model, x = Witness(linear_pair(200.0).float()), pictures(2).float()
    threat = Lp(norm, BALLS[norm], low=-5.0, high=5.0)
    Square(threat=threat, queries=300).perturb(model, x, torch.zeros(2, dtype=torch.int64), gen=gen())
    both = [z for z in model.asked[1:] if len(z) == 2]
    assert len(both) > 50
    sizes = torch.stack([threat.distance(z, x) for z in both])
    assert sizes.max() <= threat.eps * (1 + 1e-6) and sizes.min() >= threat.eps * (1 - 1e-5)


def test_windows_lie_inside_and_reach_every_place() -> None:
    x = torch.zeros(4000, 3, 6 * 9)
    for h, w in ((3, 3), (6, 9), (1, 1), (6, 7)):
        picked = _windows(x, torch.Size((6, 9)), (h, w), gen())
        rows, columns = picked // 9, picked % 9
        assert picked.shape == (4000, 3, h * w) and (picked == picked[:, :1]).all()
        assert (rows.amax(2) - rows.amin(2) == h - 1).all() and (columns.amax(2) - columns.amin(2) == w - 1).all()
        assert rows.min() == 0 and rows.max() == 5 and columns.min() == 0 and columns.max() == 8
        corners = torch.stack([rows.amin(2)[:, 0], columns.amin(2)[:, 0]], 1)
        places, counts = corners.unique(dim=0, return_counts=True)
        assert len(places) == (7 - h) * (10 - w), "every place, the last row and column too"
        assert (counts - 4000 / len(places)).abs().max() < 5 * math.sqrt(4000 / len(places)) + 1


def test_the_schedule_of_the_windows() -> None:
    """The numbers of the reference implementation for 28 × 28, and windows that fit where they would not."""
    at = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1001, 2001, 4001, 6001, 8001]
    linf, l2 = (Square(threat=Lp(norm, 0.3), queries=10_000) for norm in ("linf", "l2"))
    assert [linf.window(q, 28, 28)[0] for q in at] == [25, 25, 18, 18, 13, 13, 9, 9, 6, 4, 3, 2, 2, 1]
    assert [l2.window(q, 28, 28)[0] for q in at] == [25, 25, 19, 19, 13, 13, 9, 9, 7, 5, 3, 3, 3, 3]
    short = Square(threat=Lp("linf", 0.3), queries=1000, rescale_schedule=True)
    assert [short.window(q, 28, 28)[0] for q in (0, 1, 2, 21, 999)] == [25, 25, 18, 9, 1]
    assert linf.window(0, 4, 100) == (4, 18) and linf.window(0, 100, 4) == (18, 4) and l2.window(9999, 2, 2) == (1, 1)
    assert l2.window(9999, 4, 4) == (3, 3)


def test_fallen_images_leave_and_wrong_ones_stay_as_they_are() -> None:
    model, x = Witness(linear_pair(0.0)), pictures(40)
    y = labels_of(model.model, x)
    y[::4] = 1 - y[::4]
    model.asked.clear()
    attack = Square(threat=Lp("linf", 0.03), queries=60)
    found = attack.perturb(model, x, y, gen=gen(1))
    sizes = [len(z) for z in model.asked]
    assert sizes[:2] == [40, 30] and max(sizes[2:]) < 30
    assert torch.equal(found[::4], x[::4])
    wrong = logit_margin(model.model(found), y) <= 0
    assert 10 < wrong.sum() < 40 and sizes[-1] <= 40 - int(wrong.sum())
    wrong_soon = logit_margin(model.model(model.asked[1]), y[torch.arange(40) % 4 > 0]) <= 0
    assert sizes[2] <= 30 - int(wrong_soon.sum()), "those that fell to the stripes are asked nothing more"


@every_norm
def test_restarts_keep_the_lowest_margin_per_example(norm: str) -> None:
    model, x = linear_pair(30.0), pictures(8)
    y, threat = torch.zeros(8, dtype=torch.int64), Lp(norm, BALLS[norm])
    one, four = (
        logit_margin(model(Square(threat=threat, queries=15, restarts=r).perturb(model, x, y, gen=gen(1))), y)
        for r in (1, 4)
    )
    assert (four <= one).all() and (four < one).sum() >= 4


@every_norm
@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 1, 7), (1, 1, 1), (2, 16, 4)])
def test_any_shape_and_two_classes(norm: str, shape: tuple[int, int, int]) -> None:
    model, x = linear_pair(0.5, shape), pictures(5, shape)
    batch = Batch(x, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    seen = evaluate(Square(threat=Lp(norm, BALLS[norm]), queries=30), model, batch, gen=gen())
    assert torch.isfinite(seen.x_adv).all()
    one = Batch(x[:1], batch.y[:1], batch.index[:1])
    assert evaluate(Square(threat=Lp(norm, BALLS[norm]), queries=3), model, one, gen=gen()).x_adv.shape == (1, *shape)


@pytest.mark.parametrize(
    "settings", [{"queries": 0}, {"restarts": 0}, {"p_init": 0.0}, {"p_init": 1.1}, {"p_init": math.nan}]
)
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(InputError):
        Square(threat=Lp("l2", 1.0), **settings)
