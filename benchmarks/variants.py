"""What lowers the floor: layout, precision, compilation. Every variant's step, against the float32 floor.

A ratio below 1 is a gain; the floor is that of contiguous float32 weights with TF32 off.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Row, compare, interleave, total
from benchmarks.workload import Bench, Plan, short
from robustlens.core.modes import Precision


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the same step."""

    name: str
    channels_last: bool = False
    precision: Precision = "float32"
    tf32: bool = False
    compiled: bool = False


CPU = (
    Variant(name="float32"),
    Variant(name="channels_last", channels_last=True),
    Variant(name="bf16-craft", precision="bf16-craft"),
    Variant(name="bf16-craft, channels_last", precision="bf16-craft", channels_last=True),
)
CUDA = (
    *CPU,
    Variant(name="TF32", tf32=True),
    Variant(name="TF32, channels_last", tf32=True, channels_last=True),
    Variant(name="TF32, channels_last, compiled", tf32=True, channels_last=True, compiled=True),
    Variant(
        name="bf16-craft, TF32, channels_last, compiled",
        precision="bf16-craft",
        tf32=True,
        channels_last=True,
        compiled=True,
    ),
)


def allow_tf32(allowed: bool) -> None:
    """TensorFloat-32 in matrix products and convolutions; no effect on CPUs."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def run(plan: Plan) -> list[Row]:
    """One row per network and variant, at the first of the network's threats."""
    variants = CUDA if plan.device.type == "cuda" else CPU
    rows = []
    for work in plan.workloads():
        threat, title = short(work.threats)[0]
        base = Bench(work, replace(plan, channels_last=False))
        flops = step_flops(base)
        cases, notes = [without_tf32(case) for case in base.floors()], {}
        for variant in variants:
            case = prepared(Bench(work, replace(plan, channels_last=variant.channels_last)), variant, threat)
            try:
                case.before()
                case.run()
            except Exception as error:  # a compiler may be missing; the other variants are still worth having
                notes[variant.name] = f"cannot run here: {type(error).__name__}"
            else:
                cases.append(case)
        seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
        floor = total(seconds["craft floor"], seconds["plain step"])
        for variant in variants:
            name = f"training step, PGD-{plan.steps} {title}, {variant.name}"
            if variant.name in notes:
                rows.append(Row(benchmark="variants", model=work.model, case=name, note=notes[variant.name]))
                continue
            found = compare(seconds[variant.name], floor)
            rate = flops / statistics.median(seconds[variant.name]) / 1e12
            found["measured"] |= {**base.describe(), "tflops": rate}
            note = f"{rate:.3g} TFLOP/s"
            rows.append(Row(benchmark="variants", model=work.model, case=name, note=note, **found))
    allow_tf32(False)
    return rows


def step_flops(bench: Bench) -> int:
    """Of one training step: F for a forward pass, F for a backward pass to the input, 2 F for one to everything."""
    bench.freeze()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.model(bench.batch.x)
    return (2 * bench.plan.steps + 3) * counter.get_total_flops()


def without_tf32(case: Case) -> Case:
    """The same case with TF32 off."""
    return replace(case, before=lambda: (allow_tf32(False), case.before()))


def prepared(bench: Bench, variant: Variant, threat: str) -> Case:
    """A training step of ``bench`` as ``variant`` runs it."""
    if variant.compiled:
        bench.model.compile()
    step: Callable[[], object] = lambda: bench.adversarial_step(threat, variant.precision)  # noqa: E731
    return Case(variant.name, step, before=lambda: (allow_tf32(variant.tf32), bench.thaw()))
