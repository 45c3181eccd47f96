"""Auto-PGD: projected gradient ascent that finds its own step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Generator, Tensor, nn

from robustlens.attacks.ascent import Climbed, Height, highest, momentum_ascent
from robustlens.attacks.losses import attack_loss
from robustlens.attacks.sparse_ascent import sparse_ascent
from robustlens.core.passes import Passes
from robustlens.core.rng import drawn, for_part
from robustlens.core.types import Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class APGD:
    """max_z loss(f(z), y) over the threat by PGD with momentum, whose step size is halved where progress ends.

    With η = 2 eps at first, d the threat's direction of steepest ascent and Π its projection:

        u       = Π(x_k + η d(∇loss(x_k)))
        x_{k+1} = Π(x_k + 0.75 (u − x_k) + 0.25 (x_k − x_{k−1}))

    At checkpoints (after 22 % of the steps, then at ever shorter gaps of 19, 16, …, 6 %) η is halved for an example,
    and it goes back to its highest point, if fewer than 75 % of the steps since the last checkpoint went up, or if
    neither η nor the highest value changed since then.

    For ℓ1 steps are sparse, and three radii follow each other: ``attacks.sparse_ascent`` has the rule.

    The paper projects on the ball and clips to the box, which leaves a part of an ℓ2 radius unused; here Π is the
    nearest point of both. An example leaves the batch once it is wrong. Costs ``steps`` input passes and a forward
    pass per restart.

    Attributes:
        threat: norm, radius and box.
        loss: "ce", "dlr" or "margin". Where dlr is undefined (2 classes) take margin.
        steps: of each restart.
        restarts: independent runs on the examples that are still right; the highest point is kept.

    Raises:
        InputError: no steps or no restarts.
    """

    name: ClassVar[str] = "apgd"
    reference: ClassVar[str] = "Croce and Hein 2020, arXiv 2003.01690, algorithm 1; ℓ1: 2021, arXiv 2103.01208"

    threat: Threat
    loss: Literal["ce", "dlr", "margin"] = "ce"
    steps: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        require_ball(self.threat, self.name)
        require_at_least(self, steps=1, restarts=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 0.1), steps=20),
            cls(threat=Lp("l2", 1.0), steps=20, loss="dlr", restarts=2),
            cls(threat=Lp("l1", 5.0), steps=20, loss="margin"),
        ]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1) * self.restarts

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        def height(logits: Tensor, labels: Tensor) -> Tensor:
            return attack_loss(self.loss, logits, labels[:, 0])

        def begin(left: Tensor) -> Tensor:
            return beginning(self.threat, x[left], for_part(gen, left, len(x)))

        def climb(rows: Tensor, number: Tensor, start: Tensor) -> Climbed:
            return ascend(model, self.threat, x[rows], y[rows, None], height, start, steps=self.steps)

        return highest(begin, climb, self.restarts, x)


def beginning(threat: Threat, x: Tensor, gen: Generator) -> Tensor:
    """A random point (B, C, H, W) to ascend from: of the threat, or for ℓ1 a normal draw around x."""
    assert isinstance(threat, Lp)
    if threat.norm == "l1":
        return x + drawn(x, lambda t: t.normal_(generator=gen), gen)
    return threat.start(x, gen)


def ascend(
    model: nn.Module, threat: Threat, x: Tensor, labels: Tensor, height: Height, start: Tensor, *, steps: int
) -> Climbed:
    """One run from ``start``, by the rule of the threat's norm; ``labels`` (B, L), y in the first column."""
    assert isinstance(threat, Lp)
    rule = sparse_ascent if threat.norm == "l1" else momentum_ascent
    return rule(model, threat, x, labels, height, start, steps=steps)


def require_ball(threat: Threat, who: str) -> None:
    """Refuse a threat that is no ball of a norm."""
    if not isinstance(threat, Lp):
        raise InputError(f"{who} threat", expected="linf, l2 or l1", got=repr(threat), fix='Write "linf:8/255".')
