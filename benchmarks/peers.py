"""The same PGD from other libraries, where they are installed; robustlens does not depend on them.

The budget is the same: radius, steps, step size, random start, no early stop. What differs is what each adds: none
of them freezes the weights or checks the result, and their ℓ2 step scales to the ball first and clips then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from benchmarks.crafting import crafting
from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.workload import Bench, Plan, short
from robustlens.threats.lp import Lp

PEERS = ("torchattacks", "foolbox")


def run(plan: Plan) -> list[Row]:
    """Per network and threat one row for robustlens and each peer, to the same floor."""
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
    return rows


def installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def torchattacks_pgd(bench: Bench, threat: str) -> Callable[[], object]:
    import torchattacks

    ball, steps = Lp.parse(threat), bench.plan.steps
    kind = torchattacks.PGD if ball.norm == "linf" else torchattacks.PGDL2
    bench.model.eval()
    attack = kind(bench.model, eps=ball.eps, alpha=2.5 * ball.eps / steps, steps=steps, random_start=True)
    return lambda: attack(bench.batch.x, bench.batch.y)


def foolbox_pgd(bench: Bench, threat: str) -> Callable[[], object]:
    import foolbox

    ball, steps = Lp.parse(threat), bench.plan.steps
    kind = foolbox.attacks.LinfPGD if ball.norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=2.5 * ball.eps / steps, steps=steps, random_start=True)
    bench.model.eval()
    model = foolbox.PyTorchModel(bench.model, bounds=(0, 1), device=bench.device)
    goal = foolbox.criteria.Misclassification(bench.batch.y)
    return lambda: attack.run(model, bench.batch.x, goal, epsilon=ball.eps)


MAKERS: dict[str, Callable[[Bench, str], Callable[[], object]]] = {
    "torchattacks": torchattacks_pgd,
    "foolbox": foolbox_pgd,
}
