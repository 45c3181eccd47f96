"""What is minimised and how: the parts of a method."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.types import Constraint, Objective, Regularizer, Update
from robustlens.updates.descend import Descend


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is minimised and how steps are taken: the parts of a method."""

    objective: Objective
    regularizers: tuple[Regularizer, ...] = ()
    update: Update = field(default_factory=Descend)
    constraints: tuple[Constraint, ...] = ()

    @property
    def passes(self) -> Passes:
        """What the steps on one batch cost."""
        return self.update.passes(self.objective.passes, sum((r.passes for r in self.regularizers), Passes()))

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Raise InputError if the network lacks something that a part needs; ``x`` are a few images."""
        if hasattr(self.update, "check_objective"):
            self.update.check_objective(self.objective)
        for part in (self.objective, *self.regularizers):
            if hasattr(part, "check"):
                part.check(model, x)
