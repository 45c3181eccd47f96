"""``python -m benchmarks [name …]``: run, print, and keep the numbers with the machine they belong to."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT, Row, facts
from benchmarks.variants import allow_tf32
from benchmarks.workload import STANDARD, WORKLOADS, Plan
from robustlens.studies.run import pick_device

NAMES = ("crafting", "step", "methods", "lenses", "bf16", "memory", "peers", "smallest", "variants")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    plan = Plan(
        device=pick_device(asked.device),
        rounds=asked.rounds or (3 if asked.quick else 7),
        models=tuple(asked.models.split(",")),
        channels_last=asked.channels_last,
        **({"epochs": 5, "seeds": 1} if asked.quick else {}),
    )
    console = Console()
    out = Path(asked.out) if asked.out else None if asked.quick else ROOT / "benchmarks" / "results"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line at its start and end
    allow_tf32(False)  # float32 means float32, on GPUs too
    machine = facts(plan.device)
    console.print(describe(machine))
    for name in asked.names or NAMES:
        started = time.monotonic()
        rows = importlib.import_module(f"benchmarks.{name}").run(plan)
        console.print(table(name, rows))
        if out is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            ran = {"models": plan.models, "rounds": plan.rounds, "channels_last": plan.channels_last}
            wall = round(time.monotonic() - started, 1)
            record = {"benchmark": name, "date": now, "wall_seconds": wall, "plan": ran, "facts": machine}
            write(out, name, record | {"rows": [dataclasses.asdict(row) | {"met": row.met} for row in rows]})
    if out is not None:
        (out / "table.md").write_text(markdown(out))
        console.print(f"Written: {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument("names", nargs="*", choices=NAMES, metavar="name", help=f"which ones: {', '.join(NAMES)}")
    found.add_argument("--quick", action="store_true", help="3 rounds, short trainings; nothing is kept without --out")
    found.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    found.add_argument("--rounds", type=int, help="interleaved repetitions (7)")
    found.add_argument("--models", default=",".join(STANDARD), help=f"of {','.join(WORKLOADS)}")
    found.add_argument("--channels-last", action="store_true", help="this layout, in the product and in its floor")
    found.add_argument("--out", help="directory of the results (benchmarks/results)")
    return found


def describe(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    where = machine.get("gpu") or machine["cpu"]
    flags = ", ".join(machine["cpu_flags"]) or "none of the flags that matter"
    units = "in hardware" if machine["native_bf16"] else "emulated"
    return (
        f"robustlens {machine['robustlens']} ({machine['commit']}), torch {machine['torch']}, {machine['device']}: "
        f"{where}, {machine['threads']} threads of {machine['cpus']} CPUs, {flags}; bfloat16 {units}"
    )


def cells(row: Row) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    spread = "" if row.low is None or row.n < 2 else f"{number(row.low)} to {number(row.high)}"
    seconds = row.measured.get("seconds")
    time_ms = "" if seconds is None else f"{1000 * seconds:.1f}"
    verdict = {True: "met", False: "MISSED", None: ""}[row.met]
    rounds = str(row.n) if row.n else ""
    bar = "" if row.bar is None else f"≤ {row.bar:.2f}"
    return [row.model, row.case, number(row.ratio), spread, bar, verdict, time_ms, rounds, row.note]


COLUMNS = ("model", "case", "ratio", "spread", "bar", "", "ms", "n", "note")


def table(name: str, rows: Sequence[Row]) -> Table:
    found = Table(*COLUMNS, title=name)
    for row in rows:
        found.add_row(*cells(row), style="red" if row.met is False else None)
    return found


def write(out: Path, name: str, record: dict[str, Any]) -> None:
    """One file per benchmark and device, and layout where it is not the usual one."""
    device = record["facts"].get("gpu") or record["facts"]["device"]
    layout = "-channels-last" if record["plan"]["channels_last"] else ""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (out / f"{name}-{slug}{layout}.json").write_text(text + "\n")


def markdown(out: Path) -> str:
    """Every result of this command in ``out`` as one markdown page."""
    lines = ["# Results", "", "Written by `python -m benchmarks`; do not edit.", ""]
    for file in sorted(file for name in NAMES for file in out.glob(f"{name}-*.json")):
        record = json.loads(file.read_text())
        layout = ", channels_last" if record["plan"]["channels_last"] else ""
        lines += [f"## {record['benchmark']}{layout}", "", describe(record["facts"]), ""]
        lines += [f"{record['date']}, {record['wall_seconds']} s, {record['plan']['rounds']} rounds.", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        for plain in record["rows"]:
            row = Row(**{key: value for key, value in plain.items() if key != "met"})
            lines.append("| " + " | ".join(cells(row)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
