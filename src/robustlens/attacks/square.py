"""Square Attack: random search over the images of a ball, one square at a time, without any gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.rng import SharedGenerator, drawn, for_part
from robustlens.core.types import Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp

#: The share p of the image that a window covers is halved after each of these queries, of 10,000.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square:
    """min_z f_y(z) − max_{j≠y} f_j(z) over the threat, by random search: what lowers the margin is kept.

    Every query proposes a change of x̂ in a random window of h × h pixels, h² ≈ p · height · width:

        ℓ∞ (algorithm 2)  each channel of the window moves by ± 2 eps and back into ball and box, that is to its upper
                          or lower corner; x̂ begins as vertical stripes of ± eps.
        ℓ2 (algorithm 3)  ν = x̂ − x. In each of the c channels, the size of ν in two windows W1 ∪ W2 and its share of
                          what the box took away are moved into W1, along ± η + ν_W1 / ‖ν_W1‖:
                          ν_W2 ← 0,  ν_W1 ← (± η + ν_W1 / ‖ν_W1‖)/‖·‖ · (‖ν_{W1 ∪ W2}‖² + (eps² − ‖ν‖²) / c)^½.
                          η (equation 2) is a hill beside a valley; x̂ begins as a 5 × 5 tiling with them.
        ℓ1                the same with sums of absolute values and steeper hills, 1/k⁴ instead of 1/k².

    ‖ν‖ is eps up to what the box cuts off. Images that are wrong leave the batch, looked for after each of the first
    ten queries and then after every tenth, which spares an accelerator the waiting; those wrong at x come back as they
    are. Forward passes only: at most 1 + ``restarts`` × (1 + ``queries``) of them. In ℓ∞ a proposal that changes
    nothing asks the model nothing.

    Windows, signs and the orientation of η are drawn for each image, as the paper has it; the authors' code shares the
    window and the orientation in a batch, and its windows never reach the last row and column. As in that code, p is
    also halved after 500 queries and the two halves of η are of equal size. Unlike it, a window on an image that is not
    square is cut to its height and its width, and the ℓ1 change of an image with c channels is not blown up by c before
    it is projected.

    Attributes:
        threat: norm, radius and box.
        queries: proposals for each image and restart.
        p_init: share p of the image that the first windows cover.
        rescale_schedule: the schedule of p is made for 10,000 queries. False keeps it in absolute numbers of queries,
            as AutoAttack does; True stretches it to ``queries``.
        restarts: independent searches; the lowest margin is kept per example.

    Raises:
        InputError: no queries, no restarts, or p_init outside (0, 1].
    """

    name: ClassVar[str] = "square"
    reference: ClassVar[str] = (
        "Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; in AutoAttack: Croce & Hein 2020, "
        "arXiv 2003.01690; ℓ1: Croce & Hein 2021, arXiv 2103.01208"
    )

    threat: Threat
    queries: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, queries=1, restarts=1)
        if not 0 < self.p_init <= 1:
            raise InputError(
                "square p_init", expected="a share in (0, 1]", got=str(self.p_init), fix="Leave it out for 0.8."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 0.1), queries=30),
            cls(threat=Lp("l2", 1.0), queries=30, restarts=2),
            cls(threat=Lp("l1", 5.0), queries=30, rescale_schedule=True),
        ]

    @property
    def passes(self) -> Passes:
        return Passes(forward=1 + self.restarts * (1 + self.queries))

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            best, lowest = x.clone(), logit_margin(model(x), y)
            for _ in range(self.restarts):
                standing = (lowest > 0).nonzero()[:, 0]
                if len(standing) == 0:
                    break
                found, margin = self._search(model, x[standing], y[standing], for_part(gen, standing, len(x)))
                lower = margin < lowest[standing]
                won = standing[lower]
                best[won], lowest[won] = found[lower], margin[lower]
        return best

    def window(self, query: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of the windows of a query (from 0), cut to the image.

        For ℓ2 and ℓ1 their side is odd and at least 3, but on an image of at most 3 rows or columns, where every window
        would be the whole image.
        """
        assert isinstance(self.threat, Lp)
        at = int(query / self.queries * 10_000) if self.rescale_schedule else query
        p = self.p_init / 2 ** sum(at > halved for halved in HALVED_AFTER)
        side = max(round(math.sqrt(p * height * width)), 1)
        if self.threat.norm != "linf":
            side = max(side, 3 if min(height, width) > 3 else 1) | 1
        return min(side, height), min(side, width)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor, gen: SharedGenerator) -> tuple[Tensor, Tensor]:
        """The images of lowest margin (B, C, H, W) that one search finds, and their margins (B,)."""
        threat, shape = self.threat, x.shape[1:]
        assert isinstance(threat, Lp)
        proposals = _Corners(threat, x) if threat.norm == "linf" else _Hills(threat, x)
        point = proposals.start(gen)
        margin = logit_margin(model(point.view(len(x), *shape)), y)
        found, lowest = torch.empty_like(x).flatten(2), torch.empty_like(margin)
        alive = torch.arange(len(x), device=x.device)
        for query in range(self.queries):
            if query <= 10 or query % 10 == 0:
                standing = margin > 0
                if not bool(standing.all()):
                    fallen = alive[~standing]
                    found[fallen], lowest[fallen] = point[~standing], margin[~standing]
                    alive, point, margin, y = alive[standing], point[standing], margin[standing], y[standing]
                    proposals.keep(standing)
                    gen.keep(standing)
                    if len(alive) == 0:
                        break
            rows, asked = proposals.propose(point, self.window(query, *shape[1:]), gen)
            if len(rows) == 0:
                continue
            reached = logit_margin(model(asked.view(len(rows), *shape)), y.index_select(0, rows))
            better = (reached < margin.index_select(0, rows)).nonzero()[:, 0]
            won = rows.index_select(0, better)
            point.index_copy_(0, won, asked.index_select(0, better))
            margin.index_copy_(0, won, reached.index_select(0, better))
        found[alive], lowest[alive] = point, margin
        return found.view_as(x), lowest


class _Corners:
    """Algorithm 2: windows at the corners of the ℓ∞ ball and the box. Images are (B, C, H · W)."""

    def __init__(self, threat: Lp, x: Tensor) -> None:
        self.size = x.shape[2:]
        lower, upper = (x - threat.eps).clamp_min_(threat.low), (x + threat.eps).clamp_max_(threat.high)
        self.corners = torch.cat([lower.flatten(2), upper.flatten(2)], 2)  # (B, C, 2 · H · W), the lower ones first

    def keep(self, standing: Tensor) -> None:
        self.corners = self.corners[standing]

    def start(self, gen: Generator) -> Tensor:
        n, channels, _ = self.corners.shape
        up = _coins((n, channels, self.size[1]), self.corners, gen).repeat(1, 1, self.size[0])
        lower, upper = self.corners.chunk(2, 2)
        return torch.where(up, upper, lower)

    def propose(self, point: Tensor, window: tuple[int, int], gen: Generator) -> tuple[Tensor, Tensor]:
        """Which rows (A,) change, and to what (A, C, H · W)."""
        inside = _windows(point, self.size, window, gen)
        up = _below(2, (*point.shape[:2], 1), point, gen)
        corner = self.corners.gather(2, inside + up * point.shape[2])
        rows = (corner != point.gather(2, inside)).flatten(1).any(1).nonzero()[:, 0]
        inside, corner = inside.index_select(0, rows), corner.index_select(0, rows)
        return rows, point.index_select(0, rows).scatter_(2, inside, corner)


class _Hills:
    """Algorithm 3: windows of hills and valleys whose size is moved about, p = 1 or 2. Images are (B, C, H · W)."""

    def __init__(self, threat: Lp, x: Tensor) -> None:
        self.size, self.origin = x.shape[2:], x.flatten(2)
        self.low, self.high, self.p = threat.low, threat.high, 1 if threat.norm == "l1" else 2
        self.eps = threat.eps * (1 - 8 * torch.finfo(x.dtype).eps)  # so that rounding leaves it inside
        self.window, self.shapes = (0, 0), self.origin[0]

    def keep(self, standing: Tensor) -> None:
        self.origin = self.origin[standing]

    def start(self, gen: Generator) -> Tensor:
        (height, width), (n, channels, _) = self.size, self.origin.shape
        side = max(min(height, width) // 5, 1)
        rows, columns = height // side, width // side
        turned = _coins((n, 1, rows, columns), self.origin, gen).long()
        sign = self._signs((n, channels, rows, columns, 1, 1), gen)
        tiles = sign * hills(side, side, self.p).to(self.origin)[turned]  # (B, C, rows, columns, side, side)
        picture = tiles.transpose(3, 4).reshape(n, channels, rows * side, columns * side)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        bottom, right = height - rows * side - top, width - columns * side - left
        change = F.pad(picture, (left, right, top, bottom)).flatten(1)
        change = self.eps * self._unit(change)
        return (self.origin + change.view_as(self.origin)).clamp_(self.low, self.high)

    def propose(self, point: Tensor, window: tuple[int, int], gen: Generator) -> tuple[Tensor, Tensor]:
        """Which rows (A,) change, and to what (A, C, H · W)."""
        if window != self.window:
            self.window, self.shapes = window, hills(*window, self.p).to(point).flatten(1)
        first, second = (_windows(point, self.size, window, gen) for _ in range(2))
        turned = _coins((len(point), 1), point, gen).long()
        hill = self._signs((*point.shape[:2], 1), gen) * self.shapes[turned]
        here, there = self.origin.gather(2, first), self.origin.gather(2, second)
        change = point.gather(2, first) - here
        cleared = point.scatter(2, first, here)
        unused = self.eps**self.p - self._size((point - self.origin).flatten(1)) ** self.p
        available = self._size(change) ** self.p + self._size(cleared.gather(2, second) - there) ** self.p
        available = (available + unused[:, :, None] / point.shape[1]).clamp_min_(0) ** (1 / self.p)
        change = available * self._unit(hill + self._unit(change))
        asked = cleared.scatter_(2, second, there).scatter_(2, first, (here + change).clamp_(self.low, self.high))
        return torch.arange(len(point), device=point.device), asked

    def _size(self, change: Tensor) -> Tensor:
        """‖change‖_p along the last dimension, which is kept."""
        size: Tensor = torch.linalg.vector_norm(change, self.p, dim=-1, keepdim=True)
        return size

    def _unit(self, change: Tensor) -> Tensor:
        return change / self._size(change).clamp_min_(torch.finfo(change.dtype).tiny)

    def _signs(self, shape: tuple[int, ...], gen: Generator) -> Tensor:
        return 2 * _coins(shape, self.origin, gen).to(self.origin.dtype) - 1


def hills(height: int, width: int, p: int) -> Tensor:
    """η of size 1 in ℓp (2, height, width), float64: a hill above a valley, and a hill to the left of one."""
    above = _hill_and_valley(height, width, p)
    return torch.stack([above, _hill_and_valley(width, height, p).T])


def _hill_and_valley(height: int, width: int, p: int) -> Tensor:
    half = height // 2
    hill, valley = _hill(half, width, p), _hill(height - half, width, p)
    both = torch.cat([hill, -valley])
    return _scaled(both, p)


def _hill(height: int, width: int, p: int) -> Tensor:
    """Equation 2, at size 1: Σ_{k=m+1}^{n+1} 1/k^(2 or 4) at Chebyshev distance m from the middle, n the largest."""
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    ring = torch.maximum(rows.abs()[:, None], columns.abs())
    k = torch.arange(max(height, width) // 2 + 1, 0, -1, dtype=torch.float64)
    value = (k ** (-4 if p == 1 else -2)).cumsum(0).flip(0)[ring]
    return _scaled(value, p)


def _scaled(picture: Tensor, p: int) -> Tensor:
    return picture / picture.abs().pow(p).sum() ** (1 / p)


def _windows(point: Tensor, image: torch.Size, window: tuple[int, int], gen: Generator) -> Tensor:
    """Pixels (B, C, h · w) of a window for each image, the same in all channels, uniformly among those that fit."""
    (height, width), (h, w), (n, channels, _) = image, window, point.shape
    top, left = (_below(end + 1, (n, 1, 1), point, gen) for end in (height - h, width - w))
    return (top * width + left + _first_window(width, window, point.device)).expand(n, channels, h * w)


@lru_cache(maxsize=8)
def _first_window(width: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Pixels (h · w) of the window in the upper left corner of an image of ``width``."""
    rows, columns = (torch.arange(end, device=device) for end in window)
    return (rows[:, None] * width + columns).flatten()


def _coins(shape: tuple[int, ...], like: Tensor, gen: Generator) -> Tensor:
    return _below(2, shape, like, gen).bool()


def _below(end: int, shape: tuple[int, ...], like: Tensor, gen: Generator) -> Tensor:
    """Whole numbers from 0 to ``end`` − 1, int64; the first dimension of ``shape`` counts images."""
    return drawn(like.new_empty(shape, dtype=torch.int64), lambda t: t.random_(0, end, generator=gen), gen)
