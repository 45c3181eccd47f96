"""``python -m tests.faults``: kill every command at random moments; prints a table; ends with 1 where one failed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from .kill import COMMANDS, carry_out, start_warm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trials", type=int, default=50, help="kills of each command")
parser.add_argument("--seed", type=int, default=0, help="the moments follow from it")
parser.add_argument("--only", nargs="*", default=[command.name for command in COMMANDS], help="names of commands")
parser.add_argument("--json", type=Path, help="also write the counts here")
asked = parser.parse_args()

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as root:
    start_warm(Path(root) / "warm")
    found = [
        carry_out(command, Path(root), asked.trials, asked.seed, lambda line: print(line, file=sys.stderr, flush=True))
        for command in COMMANDS
        if command.name in asked.only
    ]
print(
    "| command | seconds | killed | half-written files left | went on from something | identical | repeated | faults |"
)
print("| --- | --- | --- | --- | --- | --- | --- | --- |")
for counts in found:
    row = [*(value for key, value in asdict(counts).items() if key != "faults"), len(counts.faults)]
    print("|", " | ".join(map(str, row)), "|")
    for fault in counts.faults:
        print(f"{counts.command}: {fault}", file=sys.stderr)
if asked.json is not None:
    asked.json.write_text(json.dumps([asdict(counts) for counts in found], indent=1))
sys.exit(any(counts.faults for counts in found))
