"""Interleaved timing, the rows that benchmarks return, and the facts that a number is worthless without."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import robustlens

ROOT = Path(__file__).parents[1]

#: CPU flags that decide which of the kernels run.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "svebf16")


def nothing() -> None:
    return None


@dataclass(frozen=True)
class Case:
    """Something to time; ``before`` is called first, and is not timed."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = nothing


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        benchmark, model, case: what was measured.
        ratio: median over the rounds of (this case / its floor); None where there is nothing to divide.
        low, high: the smallest and the largest ratio of a round.
        n: rounds.
        bar: what ``ratio`` may be at most; None sets no bar.
        measured: everything else, as plain JSON values (seconds, bytes, accuracies).
        note: one line for the reader.
    """

    benchmark: str
    model: str
    case: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    bar: float | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        return None if self.bar is None or self.ratio is None else self.ratio <= self.bar


def interleave(cases: Sequence[Case], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each case in each round, after one warm-up of each.

    A round runs every case once, and each round starts with the next case: a machine that slows down, or a neighbour
    that wakes up, disturbs all cases of a round alike. The garbage collector waits.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        _time(case, device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(cases)
            for case in (*cases[first:], *cases[:first]):
                seconds[case.name].append(_time(case, device))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def _time(case: Case, device: torch.device) -> float:
    case.before()
    synchronize(device)
    started = time.perf_counter()
    case.run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total(*series: Sequence[float]) -> list[float]:
    """Sum per round."""
    return [sum(values) for values in zip(*series, strict=True)]


def compare(seconds: Sequence[float], floor: Sequence[float]) -> dict[str, Any]:
    """The fields of a row that compares two series: the ratio is taken inside each round, then its median."""
    ratios = [a / b for a, b in zip(seconds, floor, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(ratios),
        "measured": {
            "seconds": statistics.median(seconds),
            "floor_seconds": statistics.median(floor),
            "ratios": [round(ratio, 5) for ratio in ratios],
        },
    }


def facts(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    name, flags = cpu()
    found: dict[str, Any] = {
        "robustlens": robustlens.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "cpu": name,
        "cpu_flags": flags,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_bf16": native_bf16(device),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def cpu() -> tuple[str, list[str]]:
    """Model name of the processor and those of ``FLAGS`` that it has, from /proc/cpuinfo where that exists."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.is_file() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = entries.get("model name") or platform.processor() or platform.machine()
    present = set((entries.get("flags") or entries.get("Features") or "").split())
    return name, [flag for flag in FLAGS if flag in present]


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; without it, autocast is correct and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & set(cpu()[1]))


def commit() -> str | None:
    """Abbreviated commit of the checkout, with a + where files under version control differ from it."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
