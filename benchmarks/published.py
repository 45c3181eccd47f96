"""The networks that Wu and Yu (2019) published, under the attack of their paper at full length, judged by ``health``.

    python -m benchmarks.published DIRECTORY     # of mnist-cnn-lcr.safetensors, -std and -amr: hours of one core

Their attack: PGD on the cross-entropy, 1,000 steps of 0.01 at ℓ2 radius 2, no step where the gradient is below 1e-6.
MNIST is read from the directory that ROBUSTLENS_DATA names, as everywhere. A network that was judged is not judged
again while its entry stands in the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import ROOT, facts
from robustlens.attacks.pgd import PGD
from robustlens.core.discovery import build
from robustlens.core.rng import generator
from robustlens.core.types import Subject
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.lenses.health import Health
from robustlens.models.adapter import load_weights
from robustlens.results.panels import Table
from robustlens.threats.lp import Lp

NETWORKS = ("lcr", "std", "amr")
ATTACK = PGD(threat=Lp("l2", 2.0), steps=1000, step_size=0.01, grad_floor=1e-6)
IMAGES = 1000
OUT = ROOT / "benchmarks" / "results" / "published.json"


def judge(file: Path) -> dict[str, Any]:
    """What the paper's attack leaves, what each check does, and the verdict."""
    splits = load(DataConfig(source="mnist", train=IMAGES, valid=1))
    model = build("model", "mnist-cnn").build(splits.shape, len(splits.classes))
    load_weights(model, file)
    model = model.eval().to(memory_format=torch.channels_last)
    lens = Health(attack=ATTACK, n_examples=IMAGES, times=2, restarts=1, queries=200)
    reading = lens.look(Subject(model, splits, ATTACK.threat), gen=generator("cpu", 0, "published"))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "facts": facts(torch.device("cpu")),
        "attack": str(ATTACK),
        "status": reading.outcome.status,
        "why": reading.outcome.why,
        "says": reading.says,
        "quantities": {q.name: [q.value, q.low, q.high, q.n] for q in reading.quantities},
        "checks": [row for panel in reading.panels if isinstance(panel, Table) for row in panel.rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    found = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__.split("\n")[0])
    found.add_argument("directory", type=Path, help="where the networks lie")
    asked = found.parse_args(arguments)
    console = Console()
    record = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for name in NETWORKS:
        if name not in record:
            record[name] = judge(asked.directory / f"mnist-cnn-{name}.safetensors")
            OUT.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        console.print(f"{name}: {record[name]['status']}. {record[name]['says']} {record[name]['why']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
