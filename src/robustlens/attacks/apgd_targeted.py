"""Targeted Auto-PGD: towards each of the most probable wrong classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.apgd import ascend, beginning, require_ball
from robustlens.attacks.ascent import Climbed, highest
from robustlens.attacks.losses import targeted_dlr
from robustlens.core.passes import Passes
from robustlens.core.rng import for_part
from robustlens.core.types import Threat
from robustlens.results.errors import require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class APGDTargeted:
    """max_z −(f_y(z) − f_t(z)) / (f_(1)(z) − ½ (f_(3)(z) + f_(4)(z))) over the threat, t each probable wrong class.

    The targets t are the wrong classes of highest logit at x, one after the other, by the ascent of ``apgd``; f_(i) is
    the i-th largest logit. An example leaves once any class but y is on top. Where few are left, several targets share
    a batch (``attacks.tries``). With 3 classes the divisor is f_(1) − f_(3), with 2 it is 1, where the paper's is
    undefined (``attacks.losses.targeted_dlr``).

    Costs (``steps`` input passes + 1 forward pass) × ``targets``, and a forward pass.

    Attributes:
        threat: norm, radius and box.
        targets: how many wrong classes, at most; all of them where there are fewer.
        steps: of each ascent.

    Raises:
        InputError: no steps or no targets.
    """

    name: ClassVar[str] = "apgd-targeted"
    reference: ClassVar[str] = "Croce and Hein 2020, arXiv 2003.01690, §4.2 (equation 7)"

    threat: Threat
    targets: int = 9
    steps: int = 100

    def __post_init__(self) -> None:
        require_ball(self.threat, self.name)
        require_at_least(self, steps=1, targets=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 0.1), steps=15),
            cls(threat=Lp("l2", 1.0), steps=15, targets=2),
            cls(threat=Lp("l1", 5.0), steps=20, targets=1),
        ]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1) * self.targets + Passes(forward=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            wrong = model(x).scatter(1, y[:, None], -torch.inf)
        likely = wrong.topk(min(self.targets, wrong.shape[1] - 1), dim=1).indices

        def begin(left: Tensor) -> Tensor:
            return beginning(self.threat, x[left], for_part(gen, left, len(x)))

        def climb(rows: Tensor, rank: Tensor, start: Tensor) -> Climbed:
            labels = torch.stack([y[rows], likely[rows, rank]], 1)
            return ascend(model, self.threat, x[rows], labels, targeted_dlr, start, steps=self.steps)

        return highest(begin, climb, likely.shape[1], x)
