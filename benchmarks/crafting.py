"""Crafting: PGD through the choke point, against k forward and backward passes to the input."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.workload import Bench, Plan, short
from robustlens.attacks.verify import craft

BAR = 1.05


def run(plan: Plan) -> list[Row]:
    """One row per network and threat: random start, steps, projections, guards and checks are all in the time."""
    rows = []
    for work in plan.workloads():
        bench = Bench(work, plan)
        cases = [Case("floor", bench.craft_floor, before=bench.freeze)]
        cases += [Case(threat, crafting(bench, threat), before=bench.thaw) for threat in work.threats]
        seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
        for threat, title in short(work.threats):
            found = compare(seconds[threat], seconds["floor"])
            found["measured"] |= bench.describe()
            name = f"PGD-{plan.steps} {title}"
            rows.append(Row(benchmark="crafting", model=work.model, case=name, bar=BAR, **found))
    return rows


def crafting(bench: Bench, threat: str) -> Callable[[], Tensor]:
    """What crafts one batch, as training does."""
    attack = bench.attack(threat)
    return lambda: craft(attack, bench.model, bench.batch.x, bench.batch.y, gen=bench.gen)
