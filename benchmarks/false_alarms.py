"""How often ``health`` objects to an attack that has nothing to hide.

    python -m benchmarks.false_alarms            # 20 networks, 100 looks: a quarter of an hour of one core

Networks without any masking (LeNetSmall on mnist5k, standard training and PGD-7, in ℓ∞ and ℓ2) are trained from several
seeds, once, into ``runs/reference``. The default attack is judged on disjoint parts of the 1,000 test images, and every
alarm is kept with its reason. A network that gives all images one answer fails, and is no part of the rate.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import ROOT, facts
from robustlens.core.discovery import build
from robustlens.core.rng import generator
from robustlens.core.types import Split, Splits, Subject
from robustlens.data.sources import load
from robustlens.lenses.health import Health
from robustlens.models.adapter import load_weights
from robustlens.results.intervals import wilson
from robustlens.results.panels import Table
from robustlens.results.store import RunDirectory
from robustlens.studies.config import StudyConfig
from robustlens.studies.run import run_study
from robustlens.threats.lp import Lp

#: What networks are trained for, and judged at.
THREATS = ("linf:0.15", "l2:1.5")
#: Images of one look.
IMAGES = 200


def study(threat: str, seeds: int) -> StudyConfig:
    pgd = {"name": "adversarial", "attack": {"name": "pgd", "threat": threat, "steps": 7}}
    return StudyConfig.model_validate(
        {
            "name": f"honest-{threat.split(':')[0]}",
            "model": "lenet-small",
            "threat": threat,
            "data": {"source": "mnist5k"},
            "training": {
                "optimizer": {"name": "adam", "lr": 2e-3},
                "schedule": {"name": "one-cycle"},
                "batch_size": 64,
                "epochs": 6,
                "validation_examples": 100,
            },
            "seeds": list(range(seeds)),
            "methods": [{"label": "standard", "objective": {"name": "standard"}}, {"label": "PGD", "objective": pgd}],
            "lenses": [],
        }
    )


def looks(run: RunDirectory, splits: Splits, threat: str) -> Iterator[dict[str, Any]]:
    """What ``health`` says of one network, on one part of the test images after the other."""
    model = build("model", "lenet-small").build(splits.shape, len(splits.classes))
    load_weights(model, run.path / "last.safetensors")
    lens = Health(n_examples=IMAGES)
    for part in range(len(splits.test) // IMAGES):
        batch = splits.test.batch(torch.arange(part * IMAGES, (part + 1) * IMAGES))
        some = replace(splits, test=Split(batch.x, batch.y))
        reading = lens.look(Subject(model.eval(), some, Lp.parse(threat)), gen=generator("cpu", part, "false alarms"))
        rows = [row for panel in reading.panels if isinstance(panel, Table) for row in panel.rows]
        yield {
            "network": run.path.name,
            "threat": threat,
            "part": part,
            "status": reading.outcome.status,
            "alarms": [row[0] for row in rows if row[-1] == "alarm"],
            "why": reading.outcome.why,
            "shares": {q.name: q.value for q in reading.quantities if "accuracy" in q.name},
        }


def main(arguments: Sequence[str] | None = None) -> int:
    found = argparse.ArgumentParser(prog="python -m benchmarks.false_alarms", description=__doc__.split("\n")[0])
    found.add_argument("--seeds", type=int, default=5, help="networks of each kind")
    asked = found.parse_args(arguments)
    console, seen = Console(), []
    for threat in THREATS:
        config = study(threat, asked.seeds)
        splits = load(config.data)
        for run in run_study(config, ROOT / "runs" / "reference"):
            for look in looks(run, splits, threat):
                seen.append(look)
                console.print(f"{look['network']}, part {look['part']}: {look['status']} {look['why']}")
    collapsed = {look["network"] for look in seen if look["status"] == "failed"}
    judged = [look for look in seen if look["status"] != "failed"]
    objected = sum(look["status"] == "unreliable" for look in judged)
    low, high = wilson(objected, len(judged))
    checks = Counter(check for look in seen for check in look["alarms"])
    console.print(f"{objected} of {len(judged)} looks object [{low:.1%}, {high:.1%}]: {dict(checks)}")
    console.print(f"{len(collapsed)} of {len({look['network'] for look in seen})} networks collapsed in training")
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "facts": facts(torch.device("cpu")),
        "looks": len(judged),
        "alarms": objected,
        "share": [objected / len(judged), low, high],
        "collapsed": sorted(collapsed),
        "by check": checks,
        "all": seen,
    }
    out = ROOT / "benchmarks" / "results" / "false-alarms.json"
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
