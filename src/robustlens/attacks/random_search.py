"""Random search: the adversary that sees the answers of a network and learns nothing from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.rng import for_part
from robustlens.core.types import Threat
from robustlens.results.errors import require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """min f_y(z) − max_{j≠y} f_j(z) over z ∈ {x, z_1, …, z_n}, z_i uniform in the ball and moved into the box.

    A floor under every attack: one that breaks fewer images with as many passes is not searching. Images that are
    wrong leave the batch; those wrong at x come back as they are. Forward passes only: 1 + ``points`` of them.

    Attributes:
        threat: norm, radius and box.
        points: n, draws for each image.

    Raises:
        InputError: no points.
    """

    name: ClassVar[str] = "random-search"
    reference: ClassVar[str] = "Athalye et al. 2018, arXiv 1802.00420, §3.1 (random sampling as a check)"

    threat: Threat
    points: int = 100

    def __post_init__(self) -> None:
        require_at_least(self, points=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1), points=10), cls(threat=Lp("l2", 1.0), points=5), cls(threat=Lp("l1", 5.0))]

    @property
    def passes(self) -> Passes:
        return Passes(forward=1 + self.points)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            best, lowest = x.clone(), logit_margin(model(x), y)
            standing = torch.arange(len(x), device=x.device)
            draws = for_part(gen, standing, len(x))
            for _ in range(self.points):
                still = lowest[standing] > 0
                standing = standing[still]
                draws.keep(still)
                if len(standing) == 0:
                    break
                point = self.threat.start(x[standing], draws)
                margin = logit_margin(model(point), y[standing])
                lower = margin < lowest[standing]
                won = standing[lower]
                best[won], lowest[won] = point[lower], margin[lower]
        return best
