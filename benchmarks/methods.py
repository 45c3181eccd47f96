"""A training step of every method, against the passes that its documentation counts.

The floor of a method is what its passes cost without it: so many forward passes, passes to the images, passes to the
weights (see ``robustlens.core.passes``), each timed alone in the same round, plus the optimizer's steps. The ratio
shows what the method's own arithmetic adds, and whether its passes are counted truly. The network has learnt mnist5k
for two epochs: MMA and Deep Defense have nothing to do on one that classifies nothing. MMR's passes are counted for
lenet-small, and are timed there.
"""

from __future__ import annotations

import copy
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
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
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
    "Deep Defense": {"regularizers": ["deep-defense"]},
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
    "unit rows": {"constraints": ["unit-rows"]},
    "spectral clip, each epoch": {"constraints": [{"name": "spectral-clip", "norm": 1.0, "every": "epoch"}]},
    "logistic adversary": {"objective": {"name": "logistic-adversary", "threat": "linf:0.1"}},
    "MMR": {"regularizers": [{"name": "mmr", "gamma_b": 0.45, "gamma_d": 0.45}]},
}

#: The network of a method whose passes are counted for one, or that works on one alone.
NETWORKS = {"MMR": "lenet-small", "logistic adversary": "logistic"}

#: Steps of an epoch of MNIST, over which a constraint at an epoch's end is spread.
EPOCH = 469


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
            self.constrain("step")

    def constrain(self, moment: str) -> None:
        for constraint in self.recipe.constraints:
            if constraint.every == moment:
                constraint.apply(self.bench.model, self.batch.x[:1])


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
    counted = {field.name: getattr(passes, field.name) for field in dataclasses.fields(passes)}
    counted["weights"] -= counted["double"]  # a double pass is timed with the weight pass that it belongs to
    for number in range(len(seconds["weights"])):
        unit = {name: values[number] for name, values in seconds.items()}
        found.append(sum(count * unit[name] for name, count in counted.items() if count) + steps * unit["optimizer"])
    return found


def learnt(model: str, plan: Plan) -> Bench:
    """A network after two epochs of plain training on mnist5k (none for other images)."""
    bench = Bench(plan.workload(model), plan)
    if bench.work.shape == (1, 28, 28) and bench.work.classes == 10 and not plan.tiny:
        quick = torch.optim.Adam(bench.model.parameters(), lr=2e-3)
        data = load(DataConfig(source="mnist5k")).to(plan.device).train
        for batch in (*data.batches(64), *data.batches(64)):
            quick.zero_grad()
            F.cross_entropy(bench.model(batch.x), batch.y).backward()
            quick.step()
    return bench


def run(plan: Plan) -> list[Row]:
    """One row per network and method; a method is timed together with its passes, apart from the other methods."""
    rows = []
    for work in plan.workloads():
        benches = {model: learnt(model, plan) for model in {work.model, *NETWORKS.values()}}
        starts = {model: copy.deepcopy(bench.model.state_dict()) for model, bench in benches.items()}
        for label, settings in METHODS.items():
            bench = benches[NETWORKS.get(label, work.model)]
            bench.model.load_state_dict(starts[bench.work.model])
            bench.optimizer.state.clear()
            bench.thaw()
            bench.plain_step()  # the optimizer has its momentum
            recipe = make_recipe(MethodConfig.model_validate({"label": label} | settings))
            wanted = {field.name for field in dataclasses.fields(Passes) if getattr(recipe.passes, field.name)}
            bases = [case for name, case in units(bench).items() if name in wanted | {"weights", "optimizer"}]
            timed = Timed(bench, recipe)
            step = Case(label, timed, before=bench.thaw)
            ending = Case("epoch", partial(timed.constrain, "epoch"))
            seconds = interleave([*bases, step, ending], rounds=plan.rounds, device=plan.device)
            whole = [one + end / EPOCH for one, end in zip(seconds[label], seconds["epoch"], strict=True)]
            found = compare(whole, floor(recipe.passes, recipe.update.replays, seconds))
            note = str(recipe.passes)
            found["measured"] |= bench.describe() | {"passes": note}
            rows.append(Row(benchmark="methods", model=bench.work.model, case=label, bar=BAR, note=note, **found))
    return rows
