"""A whole adversarial training step, against its crafting floor plus one plain training step."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Case, Row, compare, interleave, total
from benchmarks.workload import Bench, Plan, short

BAR = 1.10


def run(plan: Plan) -> list[Row]:
    """One row per network and threat."""
    rows = []
    for work in plan.workloads():
        bench = Bench(work, plan)
        cases = bench.floors()
        cases += [Case(threat, partial(bench.adversarial_step, threat), before=bench.thaw) for threat in work.threats]
        seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
        floor = total(seconds["craft floor"], seconds["plain step"])
        for threat, title in short(work.threats):
            found = compare(seconds[threat], floor)
            found["measured"] |= bench.describe()
            name = f"training step, PGD-{plan.steps} {title}"
            rows.append(Row(benchmark="step", model=work.model, case=name, bar=BAR, **found))
    return rows
