"""AutoAttack-standard: the line-up that the field compares by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.apgd import APGD, require_ball
from robustlens.attacks.apgd_targeted import APGDTargeted
from robustlens.attacks.fab import FAB
from robustlens.attacks.square import Square
from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.rng import for_part
from robustlens.core.types import Attack, Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class AutoAttackStandard:
    """APGD on cross-entropy, targeted APGD on DLR, targeted FAB and Square, each on what still stands.

        APGD-CE   100 steps, 1 run (ℓ1: 5 runs)
        APGD-T    100 steps towards each of 9 targets (ℓ1: 5)
        FAB-T     100 steps towards each of 9 targets
        Square    5,000 queries

    It has no parameters, which is what makes numbers comparable. With K classes there are K − 1 targets at most. The
    targeted DLR loss is undefined for K < 4: with 3 classes its divisor is f_(1) − f_(3), with 2 it is 1, so that the
    loss is the logit margin. ``attacks.worst_case`` runs ``line_up`` over whole data sets, with a state to resume from.

    Costs for ℓ2 and ℓ∞ 1,900 input passes and some 5,000 forward passes per example that nothing breaks.

    Attributes:
        threat: norm, radius and box.
        effort: share of the standard's steps and queries. Only 1 is AutoAttack-standard.

    Raises:
        InputError: a threat that is no ball of a norm, or an effort outside (0, 1].
    """

    name: ClassVar[str] = "autoattack-standard"
    reference: ClassVar[str] = "Croce and Hein 2020, arXiv 2003.01690, §6 (AutoAttack)"

    threat: Threat
    effort: float = 1.0

    def __post_init__(self) -> None:
        require_ball(self.threat, self.name)
        if not 0 < self.effort <= 1:
            raise InputError(
                "autoattack-standard effort", expected="a share in (0, 1]", got=str(self.effort), fix="Leave it out."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1), effort=0.04), cls(threat=Lp("l2", 1.0), effort=0.02)]

    @property
    def line_up(self) -> tuple[Attack, ...]:
        """The attacks in their order."""
        assert isinstance(self.threat, Lp)
        sparse = self.threat.norm == "l1"
        steps = max(round(100 * self.effort), 1)
        return (
            APGD(threat=self.threat, steps=steps, restarts=5 if sparse else 1),
            APGDTargeted(threat=self.threat, steps=steps, targets=5 if sparse else 9),
            FAB(threat=self.threat, steps=steps, targets=9),
            Square(threat=self.threat, queries=max(round(5000 * self.effort), 1)),
        )

    @property
    def passes(self) -> Passes:
        total = Passes()
        for attack in self.line_up:
            total = total + attack.passes + Passes(forward=1)
        return total

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        result, left = x.clone(), torch.arange(len(x), device=x.device)
        least = torch.full_like(x[:, 0, 0, 0], torch.inf)
        for attack in self.line_up:
            if len(left) == 0:
                break
            draws = for_part(gen, left, len(x))
            found = attack.threat.project(attack.perturb(model, x[left], y[left], gen=draws), x[left])
            with torch.no_grad():
                margin = logit_margin(model(found), y[left]).to(least)
            lower = margin < least[left]
            result[left[lower]], least[left[lower]] = found[lower], margin[lower]
            left = left[margin > 0]
        return result
