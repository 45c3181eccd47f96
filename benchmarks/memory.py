"""Peak memory of an adversarial training step, against that of a plain training step.

CPU, two measures. "tensors": the peak of the bytes that torch's allocator hands out in a step, from the profiler's
record of every allocation and release; exact and repeatable, but blind to the workspaces of oneDNN. "resident": the
growth of the peak resident set of a fresh process over two steps, which sees everything; that process maps each block
above 64 KiB on its own, so that what is freed goes back to the system and the peak counts what is alive. CUDA:
``torch.cuda.max_memory_allocated``. Every measure leaves out the weights and the data and has the gradients in it;
"resident", which starts before the first step, has the optimizer's momentum too.

The peak does not depend on the number of PGD steps, each of which releases what the last one held: 3 are taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import ROOT, Row
from benchmarks.workload import Bench, Plan, Workload, short

BAR = 1.20
#: PGD steps of the measured training step.
STEPS = 3


def run(plan: Plan) -> list[Row]:
    """One row per network, threat and measure."""
    plan = dataclasses.replace(plan, steps=min(plan.steps, STEPS))
    if plan.device.type == "cuda":
        measures = {"tensors": by_allocator}
    else:  # what a tiny step needs is less than what importing torch needed for a moment
        measures = {"tensors": traced} if plan.tiny else {"tensors": traced, "resident": resident}
    rows = []
    for work in plan.workloads():
        for measure, peak in measures.items():
            plain = peak(work, plan, None)
            for threat, title in short(work.threats):
                found = peak(work, plan, threat)
                measured = {"bytes": found, "plain_bytes": plain, "batch": work.batch, "steps": plan.steps}
                ratio = found / plain
                rows.append(
                    Row(
                        benchmark="memory",
                        model=work.model,
                        case=f"training step, PGD {title}, {measure}",
                        ratio=ratio,
                        low=ratio,
                        high=ratio,
                        n=1,
                        bar=BAR,
                        measured=measured,
                        note=f"{found / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB",
                    )
                )
    return rows


def one_step(bench: Bench, threat: str | None) -> None:
    """A plain training step, or an adversarial one."""
    bench.thaw()
    if threat is None:
        bench.plain_step()
    else:
        bench.adversarial_step(threat)


def warmed_up(work: Workload, plan: Plan, threat: str | None) -> Bench:
    """After one step, so that momentum and compiled kernels exist; without gradients, as a step begins."""
    bench = Bench(work, plan)
    one_step(bench, threat)
    bench.optimizer.zero_grad(set_to_none=True)
    return bench


def by_allocator(work: Workload, plan: Plan, threat: str | None) -> int:
    """CUDA: peak of allocated bytes during a step, above what was allocated before it."""
    bench = warmed_up(work, plan, threat)
    torch.cuda.synchronize(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    before = torch.cuda.memory_allocated(plan.device)
    one_step(bench, threat)
    torch.cuda.synchronize(plan.device)
    return torch.cuda.max_memory_allocated(plan.device) - before


def traced(work: Workload, plan: Plan, threat: str | None) -> int:
    """CPU: peak of the bytes in tensors during a step, above those before it, from the profiler's memory events."""
    bench = warmed_up(work, plan, threat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, about cycles of a schedule that is not used
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            one_step(bench, threat)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "trace.json")
        record.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return peak_alive([(e["ts"], e["args"]["Addr"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"])


def peak_alive(events: Sequence[tuple[float, int, int]]) -> int:
    """Most bytes alive at once, of events (time, address, bytes; a release has bytes < 0).

    Counted here because the profiler's own total still holds the blocks that earlier recordings left alive. Releases
    of blocks that are older than the recording do not count.
    """
    alive: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            alive[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)
    return peak


def resident(work: Workload, plan: Plan, threat: str | None) -> int:
    """CPU: growth of the peak resident set of a fresh process over two steps."""
    request = {
        "work": dataclasses.asdict(work),
        "threat": threat,
        "steps": plan.steps,
        "channels_last": plan.channels_last,
        "threads": torch.get_num_threads(),
    }
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(request)],
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(answer.stdout)


def _child(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    work = Workload(**asked["work"] | {"shape": tuple(asked["work"]["shape"])})
    bench = Bench(work, Plan(steps=asked["steps"], channels_last=asked["channels_last"]))
    before = _peak_resident()
    for _ in range(2):
        one_step(bench, asked["threat"])
    print(_peak_resident() - before)


def _peak_resident() -> int:
    """Bytes. Linux: VmHWM, because getrusage's peak is inherited from the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    _child(sys.argv[1])
