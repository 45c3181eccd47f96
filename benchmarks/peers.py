"""The same PGD from other libraries, where they are installed: its time, and how many of 1,000 digits it leaves right.

robustlens does not depend on them. The budget is the same: radius, steps, step size, random start, no early stop. What
differs is what each adds: none of them freezes the weights or checks the result, and their ℓ2 step scales to the ball
first and clips then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.crafting import crafting
from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.methods import learnt
from benchmarks.workload import Bench, Plan, short
from robustlens.attacks.verify import evaluate
from robustlens.claims.statistics import paired_error
from robustlens.core.rng import generator
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.threats.lp import Lp

PEERS = ("torchattacks", "foolbox")
#: Radii at which a lenet-small after two epochs keeps some of its digits.
RADII = ("linf:0.1", "l2:1.5")
STARTS = range(3)


def run(plan: Plan) -> list[Row]:
    """Per network and threat one row for robustlens and each peer, to the same floor; then the rows of ``strength``."""
    here = [name for name in PEERS if installed(name)]
    rows = [
        Row(benchmark="peers", model="", case=name, note="not installed: pip install " + name)
        for name in PEERS
        if name not in here
    ]
    for work in plan.workloads() if here else []:
        bench = Bench(work, plan)
        for threat, title in short(work.threats):
            cases = [
                Case("floor", bench.craft_floor, before=bench.freeze),
                Case("robustlens", crafting(bench, threat), before=bench.thaw),
            ]
            for name in here:
                # Their attacks are written for a model in eval mode whose weights are left trainable.
                cases.append(Case(name, MAKERS[name](bench, threat), before=lambda b=bench: (b.thaw(), b.model.eval())))
            seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
            for name in ("robustlens", *here):
                found = compare(seconds[name], seconds["floor"])
                found["measured"] |= bench.describe()
                case = f"PGD-{plan.steps} {title}, {name}"
                rows.append(Row(benchmark="peers", model=work.model, case=case, **found))
    return [*rows, *(strength(plan, here) if here else [])]


def strength(plan: Plan, here: Sequence[str]) -> Iterator[Row]:
    """Robust accuracy after our attack over that after a peer's, means over ``STARTS``; 95 % interval over images.

    Random starts decide about a hundredth of the images, so that equal attacks lie within 1 % of each other.
    """
    bench = learnt("lenet-small", plan)
    digits = load(DataConfig(source="mnist5k")).to(plan.device).test
    bench.batch = digits.batch(torch.arange(min(len(digits), 8 if plan.tiny else 1000)))
    for threat, title in short(RADII):
        for steps in (plan.steps, 5 * plan.steps):
            bench.plan = replace(plan, steps=steps)
            bench.thaw()
            gen = generator(plan.device, 0, "strength")
            attack = bench.attack(threat)
            ours = _share([evaluate(attack, bench.model, bench.batch, gen=gen).robust for _ in STARTS])
            for name in here:
                theirs = MAKERS[name](bench, threat)
                beside = _share([_stands(bench, theirs()) for _ in STARTS])
                left, peer = float(ours.mean()), float(beside.mean())
                whole = max(peer, 1 / len(beside))
                half = 1.96 * paired_error([1, -1], [ours, beside])
                yield Row(
                    benchmark="peers",
                    model=bench.work.model,
                    case=f"PGD-{steps} {title}, left right, to {name}",
                    ratio=left / whole,
                    low=(left - half) / whole,
                    high=(left + half) / whole,
                    n=len(ours),
                    bar=1.01,
                    note=f"{left:.2%} left right, {name} {peer:.2%}; {len(STARTS)} starts",
                )


def _share(stands: list[Tensor]) -> NDArray[np.float64]:
    """Of each image (B,) the share of the starts that left it right."""
    return torch.stack(stands).double().mean(0).cpu().numpy()


def _stands(bench: Bench, x_adv: Tensor) -> Tensor:
    """Which images (B,) are right before and after."""
    with torch.no_grad():
        before, after = (bench.model.eval()(x).argmax(1) == bench.batch.y for x in (bench.batch.x, x_adv))
    return before & after


def installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def torchattacks_pgd(bench: Bench, threat: str) -> Callable[[], Tensor]:
    import torchattacks

    ball, steps = Lp.parse(threat), bench.plan.steps
    kind = torchattacks.PGD if ball.norm == "linf" else torchattacks.PGDL2
    bench.model.eval()
    attack = kind(bench.model, eps=ball.eps, alpha=2.5 * ball.eps / steps, steps=steps, random_start=True)
    return lambda: attack(bench.batch.x, bench.batch.y)


def foolbox_pgd(bench: Bench, threat: str) -> Callable[[], Tensor]:
    import foolbox

    ball, steps = Lp.parse(threat), bench.plan.steps
    kind = foolbox.attacks.LinfPGD if ball.norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=2.5 * ball.eps / steps, steps=steps, random_start=True)
    bench.model.eval()
    model = foolbox.PyTorchModel(bench.model, bounds=(0, 1), device=bench.device)
    goal = foolbox.criteria.Misclassification(bench.batch.y)
    return lambda: attack.run(model, bench.batch.x, goal, epsilon=ball.eps)


MAKERS: dict[str, Callable[[Bench, str], Callable[[], Tensor]]] = {
    "torchattacks": torchattacks_pgd,
    "foolbox": foolbox_pgd,
}
