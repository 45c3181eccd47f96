"""A piecewise linear network along a line segment: where it bends, and the sum of its linear pieces.

With the bends 0 = s_1 < s_2 < … < 1 on x + t v and J_j the Jacobian of the network between s_j and s_{j+1} (Wen, Li
and Jia 2020, arXiv 2011.07478, Lemma 4.1),

    f(x + v) − f(x) = Σ_j (s_{j+1} − s_j) J_j v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.linalg.regions import bends, slopes_along

#: How far beyond a bend the next piece is looked at, in t.
BEYOND = 1e-11


class Walk(NamedTuple):
    """What was found on the way from x to x + ``reached`` · v.

    ``bends`` are the t where a piece ends; ``summed`` (K,) is the sum over the pieces and ``direct`` (K,) the
    difference of the logits at both ends.
    """

    bends: tuple[float, ...]
    reached: float
    summed: Tensor
    direct: Tensor

    @property
    def residual(self) -> float:
        """‖summed − direct‖ / ‖direct‖."""
        return float((self.summed - self.direct).norm() / self.direct.norm())


def walk(model: nn.Module, x: Tensor, v: Tensor, *, pieces: int) -> Walk:
    """Follow a network of ReLU, leaky ReLU and max pooling from image ``x`` (1, C, H, W) to x + ``v``.

    Stops after ``pieces`` pieces. Run it in float64. Each piece costs a forward pass and two backward passes of one
    image. A network that bends anywhere else shows a residual that is not rounding.
    """

    def heights(z: Tensor) -> list[Tensor]:
        """What bends, and the logits last."""
        found = bends(model, z)
        return [*found.relus, *found.windows, found.logits]

    t, ends = 0.0, []
    with untouched(model):
        start = model(x)[0].detach()
        summed = torch.zeros_like(start)
        for _ in range(pieces):
            probe = t + BEYOND
            values, slopes = slopes_along(heights, x + probe * v, v)
            ahead = min((_next(a, b) for a, b in zip(values[:-1], slopes[:-1], strict=True)), default=2.0)
            end = min(1.0, probe + ahead)
            summed = summed + (end - t) * slopes[-1].view_as(start)
            t = end
            if t == 1.0:
                break
            ends.append(t)
        with torch.no_grad():
            direct = model(x + t * v)[0] - start
    return Walk(tuple(ends), t, summed, direct)


def _next(a: Tensor, b: Tensor) -> float:
    """The smallest s > 0 at which an entry of a + s b crosses 0."""
    coming = a * b < 0
    return float((-a[coming] / b[coming]).amin()) if bool(coming.any()) else 2.0
