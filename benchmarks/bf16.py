"""Crafting in bfloat16 and learning in float32: the time of a step, and the robustness that it learns."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Case, Row, compare, interleave, native_bf16, total
from benchmarks.workload import Bench, Plan, short
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.core import discovery
from robustlens.core.modes import Precision
from robustlens.core.rng import derive, generator
from robustlens.core.types import Splits
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.objectives.adversarial import Adversarial
from robustlens.results.intervals import bootstrap_mean, wilson
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe

BAR = 0.65
NETWORK = "lenet-small"
#: Of the trainings whose robust accuracies are compared. At ε = 0.2 this network stays at chance within 20 epochs,
#: where any two precisions agree; at 0.1 it learns.
THREAT = Lp("linf", 0.1)


def run(plan: Plan) -> list[Row]:
    """One row per network and threat, and one for the robust accuracies."""
    native = native_bf16(plan.device)
    lacking = "" if native else "no bfloat16 units here (avx512_bf16, amx_bf16): it is emulated, the bar does not apply"
    rows = []
    for work in plan.workloads():
        bench = Bench(work, plan)
        cases = bench.floors()
        for threat in work.threats:
            cases.append(Case(threat, partial(bench.adversarial_step, threat, "bf16-craft"), before=bench.thaw))
        seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
        floor = total(seconds["craft floor"], seconds["plain step"])
        for threat, title in short(work.threats):
            found = compare(seconds[threat], floor)
            found["measured"] |= bench.describe()
            rows.append(
                Row(
                    benchmark="bf16",
                    model=work.model,
                    case=f"training step, PGD-{plan.steps} {title}, to the float32 floor",
                    bar=BAR if native else None,
                    note=lacking,
                    **found,
                )
            )
    return [*rows, accuracies(plan)]


def accuracies(plan: Plan) -> Row:
    """Robust accuracy on the test digits after training with each precision from the same seeds.

    Both are evaluated in float32 by a longer attack. The difference is within noise when the Wilson intervals of
    the pooled shares overlap; the bootstrap interval of the paired difference is given beside it. There is no verdict
    (``within_noise`` is None) unless float32 learned something: its interval must lie above twice chance.
    """
    splits = load(DataConfig(source="mnist5k", train=plan.examples, test=plan.examples)).to(plan.device)
    robust = {
        precision: [robust_examples(plan, splits, precision, seed) for seed in range(plan.seeds)]
        for precision in ("float32", "bf16-craft")
    }
    pooled = {name: np.concatenate(runs) for name, runs in robust.items()}
    intervals = {name: wilson(int(right.sum()), len(right)) for name, right in pooled.items()}
    exact, half = intervals["float32"], intervals["bf16-craft"]
    change = pooled["bf16-craft"].astype(float) - pooled["float32"]
    learned = exact[0] > 2 / len(splits.classes)
    within = exact[0] <= half[1] and half[0] <= exact[1] if learned else None
    verdict = {True: "within noise", False: "NOT within noise", None: "no verdict, float32 did not learn"}[within]
    shares = {name: float(right.mean()) for name, right in pooled.items()}
    told = ", ".join(f"{name} {shares[name]:.1%} [{low:.1%}, {high:.1%}]" for name, (low, high) in intervals.items())
    return Row(
        benchmark="bf16",
        model=NETWORK,
        case=f"robust accuracy on mnist5k, {THREAT}",
        measured={
            "robust_accuracy": shares,
            "wilson": intervals,
            "per_seed": {name: [float(right.mean()) for right in runs] for name, runs in robust.items()},
            "difference": float(change.mean()),
            "difference_interval": bootstrap_mean(change, seed=0),
            "within_noise": within,
            "examples": len(change),
            "seeds": plan.seeds,
            "epochs": plan.epochs,
        },
        note=f"{told}, n = {len(change)}: {verdict}",
    )


def robust_examples(plan: Plan, splits: Splits, precision: Precision, seed: int) -> np.ndarray:
    """Train from ``seed`` and say which test examples (N,) the float32 evaluation leaves right."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "weights"))
        model = discovery.build("model", NETWORK).build(splits.shape, len(splits.classes)).to(plan.device)
    objective = Adversarial(attack=PGD(threat=THREAT, steps=plan.steps), precision=precision)
    validation = PGD(threat=THREAT, steps=1)
    config = TrainingConfig(epochs=plan.epochs, validate_every=plan.epochs, validation_examples=1)
    with tempfile.TemporaryDirectory() as place:
        run = RunDirectory(Path(place))
        train(model, splits, Recipe(objective=objective), config, seed=seed, run=run, validation=validation)
    attack = PGD(threat=THREAT, steps=4 * plan.steps, loss="margin")
    gen = generator(plan.device, seed, "evaluation")
    found = [evaluate(attack, model, batch, gen=gen).robust.cpu().numpy() for batch in splits.test.batches(500)]
    return np.concatenate(found)
