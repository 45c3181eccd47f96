"""A training step of every method, against the passes that its documentation counts.

The floor of a method is what its passes cost without it: so many forward passes, passes to the images, passes to the
weights (see ``robustlens.core.passes``), each timed alone in the same round, plus the optimizer's steps. The ratio
shows what the method's own arithmetic adds, and whether its passes are counted truly. MMR is left out: its cost depends
on the number of hidden units, and a step of this size takes minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.workload import Bench, Plan
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Moment
from robustlens.studies.config import MethodConfig
from robustlens.studies.plan import make_recipe
from robustlens.train.recipe import Recipe

BAR = 1.15

PGD = {"name": "pgd", "threat": "l2:1.5"}
PGD_AT = {"name": "adversarial", "attack": PGD}

#: One row each, with the settings of a study's method.
METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "noise": {"objective": {"name": "noise", "threat": "l2:1.5"}},
    "PGD-10": {"objective": PGD_AT},
    "PGD-10, half clean": {"objective": PGD_AT | {"clean_weight": 0.5}},
    "FGSM": {"objective": {"name": "adversarial", "attack": {"name": "fgsm", "threat": "linf:0.3"}}},
    "FGSM-RS (Fast)": {
        "objective": {
            "name": "adversarial",
            "attack": {"name": "fgsm", "threat": "linf:0.3", "random_start": True, "step_size": 0.375},
        }
    },
    "Free, 4 replays": {"update": {"name": "free", "threat": "linf:0.3", "replays": 4}},
    "TRADES": {"objective": {"name": "trades", "threat": "l2:1.5"}},
    "MART": {"objective": {"name": "mart", "attack": PGD}},
    "MMA": {"objective": {"name": "mma", "threat": "l2:2.0"}},
    "logit pairing": {"objective": {"name": "logit-pairing", "attack": PGD}},
    "AWP + PGD-10": {"objective": PGD_AT, "update": "awp"},
    "SAM": {"update": "sam"},
    "ASAM": {"update": {"name": "sam", "adaptive": True}},
    "orthogonality (LCR)": {"regularizers": ["orthogonality"]},
    "average margin": {"regularizers": ["average-margin", "orthogonality"]},
    # On fresh weights perturbations are huge: a small d keeps the exponential finite, at the same cost.
    "Deep Defense": {"regularizers": [{"name": "deep-defense", "d": 1e-3}]},
    "data-dependent spectral norm": {"regularizers": [{"name": "data-spectral-norm", "eps": 1.0}]},
    "data-dependent spectral norm, Jacobian": {
        "regularizers": [{"name": "data-spectral-norm", "eps": 1.0, "form": "jacobian"}]
    },
    "global spectral norm": {"regularizers": ["global-spectral-norm"]},
    "global spectral norm, operators": {"regularizers": [{"name": "global-spectral-norm", "operator": "true"}]},
    "input gradient": {"regularizers": ["input-gradient"]},
    "input gradient, differences": {"regularizers": [{"name": "input-gradient", "form": "difference"}]},
    "Jacobian": {"regularizers": ["jacobian"]},
    "GradAlign + FGSM": {
        "objective": {"name": "adversarial", "attack": {"name": "fgsm", "threat": "linf:0.3"}},
        "regularizers": [{"name": "grad-align", "threat": "linf:0.3"}],
    },
    "local linearity": {"regularizers": [{"name": "local-linearity", "threat": "linf:0.3"}]},
    "Parseval": {"constraints": ["parseval"]},
}


class Timed:
    """One method at work on a network: whole steps, with the state that they carry."""

    def __init__(self, bench: Bench, recipe: Recipe) -> None:
        self.bench, self.recipe = bench, recipe
        moment = Moment(epoch=5.0, epochs=20.0, examples=len(bench.batch))
        self.batch: Batch = dataclasses.replace(bench.batch, moment=moment)

    def __call__(self) -> None:
        bench, recipe = self.bench, self.recipe
        for _ in range(recipe.update.replays):
            bench.optimizer.zero_grad(set_to_none=True)
            recipe.update.backward(bench.model, recipe.objective, recipe.regularizers, self.batch, gen=bench.gen)
            bench.optimizer.step()
            for constraint in recipe.constraints:
                constraint.apply(bench.model, self.batch.x[:1])


def units(bench: Bench) -> dict[str, Case]:
    """Each kind of pass, written plainly."""
    model, x, y = bench.model, bench.batch.x, bench.batch.y

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def inputs() -> None:
        point = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)

    def weights() -> None:
        bench.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    def double() -> None:
        bench.optimizer.zero_grad(set_to_none=True)
        point = x.detach().requires_grad_()
        loss = F.cross_entropy(model(point), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, point, create_graph=True)
        (loss + grad.square().sum()).backward(inputs=list(model.parameters()))

    def tangent() -> None:
        with torch.no_grad():
            torch.func.jvp(model, (x,), (x,))

    plain: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "forward": (forward, bench.freeze),
        "inputs": (inputs, bench.freeze),
        "weights": (weights, bench.thaw),
        "double": (double, bench.thaw),
        "tangent": (tangent, bench.freeze),
        "optimizer": (bench.optimizer.step, bench.thaw),
    }
    return {name: Case(name, run, before=before) for name, (run, before) in plain.items()}


def floor(passes: Passes, steps: int, seconds: dict[str, list[float]]) -> list[float]:
    """Seconds of ``passes`` in each round, with ``steps`` steps of the optimizer."""
    found = []
    for number in range(len(seconds["weights"])):
        unit = {name: values[number] for name, values in seconds.items()}
        unit["double"] -= unit["weights"]
        counted = {field.name: getattr(passes, field.name) for field in dataclasses.fields(passes)}
        found.append(sum(count * unit[name] for name, count in counted.items()) + steps * unit["optimizer"])
    return found


def run(plan: Plan) -> list[Row]:
    """One row per network and method."""
    rows = []
    for work in plan.workloads():
        bench = Bench(work, plan)
        bench.thaw()
        bench.plain_step()  # the optimizer has its momentum
        recipes = {
            label: make_recipe(MethodConfig.model_validate({"label": label} | m)) for label, m in METHODS.items()
        }
        bases = list(units(bench).values())
        steps = [Case(label, partial(Timed(bench, recipe)), before=bench.thaw) for label, recipe in recipes.items()]
        seconds = interleave(bases + steps, rounds=plan.rounds, device=plan.device)
        for label, recipe in recipes.items():
            base = floor(recipe.passes, recipe.update.replays, seconds)
            found = compare(seconds[label], base)
            found["measured"] |= bench.describe() | {"passes": str(recipe.passes)}
            note = str(recipe.passes)
            rows.append(Row(benchmark="methods", model=work.model, case=label, bar=BAR, note=note, **found))
    return rows
