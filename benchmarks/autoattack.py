"""AutoAttack-standard beside its reference implementation: accuracy and time, attack by attack and together.

    python -m benchmarks.autoattack            # all networks, n = 1,000: hours of a laptop's CPU
    python -m benchmarks.autoattack --networks "MNIST, PGD ℓ2" --examples 200

It needs the reference (``pip install git+https://github.com/fra31/auto-attack``), MNIST and CIFAR-10 (under
``ROBUSTLENS_DATA``, or from the Hub), and trains the networks once, into ``runs/reference``.

Each attack runs on all images that the network gets right; both implementations take the same batches, one after the
other, and the order alternates. An image is robust *overall* if no attack of the four broke it. The line-up as it is
used, each attack on what the ones before it left, is timed apart on the first ``--timed`` images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.harness import ROOT, facts, total
from robustlens.attacks.ensemble import AutoAttackStandard
from robustlens.attacks.worst_case import STANDS, worst_case
from robustlens.core.discovery import build
from robustlens.core.types import Batch
from robustlens.data.sources import load
from robustlens.models.adapter import load_weights
from robustlens.studies.config import StudyConfig
from robustlens.studies.run import run_study
from robustlens.threats.lp import Lp

#: The reference's names of the four attacks, in our order, and of the norms.
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}

ADAM = {"optimizer": {"name": "adam", "lr": 2e-3}, "schedule": {"name": "one-cycle"}, "batch_size": 128}


def pgd(threat: str) -> dict[str, Any]:
    return {"name": "adversarial", "attack": {"name": "pgd", "threat": threat, "steps": 7}}


@dataclass(frozen=True)
class Network:
    """What is trained and where it is judged."""

    threat: str
    data: str = "mnist"
    model: str = "lenet-small"
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "standard"})
    epochs: int = 3


NETWORKS = {
    "MNIST, standard, ℓ∞": Network("linf:0.1"),
    "MNIST, standard, ℓ2": Network("l2:1.5"),
    "MNIST, PGD ℓ∞": Network("linf:0.1", objective=pgd("linf:0.1")),
    "MNIST, PGD ℓ2": Network("l2:1.5", objective=pgd("l2:1.5")),
    "CIFAR-10, PGD ℓ∞": Network("linf:4/255", "cifar10", "convnet", pgd("linf:4/255"), 6),
    "LeNet, standard, ℓ∞": Network("linf:0.1", model="lenet"),
    "LeNet, PGD ℓ∞": Network("linf:0.1", model="lenet", objective=pgd("linf:0.1")),
    "LeNet, PGD ℓ2": Network("l2:1.5", model="lenet", objective=pgd("l2:1.5")),
    "MNIST-CNN, standard, ℓ∞": Network("linf:0.1", model="mnist-cnn"),
    "MNIST-CNN, PGD ℓ∞": Network("linf:0.1", model="mnist-cnn", objective=pgd("linf:0.1")),
    "MNIST-CNN, PGD ℓ2": Network("l2:1.5", model="mnist-cnn", objective=pgd("l2:1.5")),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One attack on one network: accuracies of both, and the ratio of times by batch."""

    network: str
    threat: str
    attack: str
    n: int
    ours: float
    reference: float
    seconds: float
    reference_seconds: float
    ratio: float
    low: float
    high: float

    @property
    def above(self) -> float:
        """Points by which our accuracy lies above the reference's: what we missed."""
        return 100 * (self.ours - self.reference)


def trained(label: str, network: Network, out: Path) -> tuple[nn.Module, Any]:
    """The network and its data; the training is not repeated."""
    study = StudyConfig.model_validate(
        {
            "name": "networks",
            "model": network.model,
            "threat": network.threat,
            "data": {"source": network.data},
            "training": ADAM | {"epochs": network.epochs, "validation_examples": 200},
            "methods": [{"label": label, "objective": network.objective}],
            "lenses": [],
        }
    )
    (run,) = run_study(study, out)
    splits = load(study.data)
    model: nn.Module = build("model", network.model).build(splits.shape, len(splits.classes))
    load_weights(model, run.path / "last.safetensors")
    return model.eval(), splits


def contest(label: str, network: Network, model: nn.Module, batches: Sequence[Batch], timed: int) -> list[Line]:
    """Every attack alone, all together, and the line-up in a row."""
    from autoattack import AutoAttack

    threat = Lp.parse(network.threat)
    reference = AutoAttack(
        model, norm=NORMS[threat.norm], eps=threat.eps, seed=0, verbose=False, device="cpu", version="standard"
    )
    ours = AutoAttackStandard(threat=threat).line_up

    def theirs(names: Sequence[str], batch: Batch) -> Tensor:
        reference.attacks_to_run = list(names)
        found = reference.run_standard_evaluation(batch.x, batch.y, bs=len(batch))
        with torch.no_grad():
            return model(found).argmax(1) == batch.y

    def own(attacks: Sequence[Any], batch: Batch) -> Tensor:
        return worst_case(attacks, model, [batch], seed=0).broken_by == STANDS

    races = {
        name: race(lambda b, a=attack: own([a], b), lambda b, n=name: theirs([n], b), batches)
        for name, attack in zip(ATTACKS, ours, strict=True)
    }
    alone = list(races.values())
    races["all four"] = Race(
        torch.stack([each.held for each in alone]).all(0),
        torch.stack([each.their_held for each in alone]).all(0),
        total(*(each.seconds for each in alone)),
        total(*(each.their_seconds for each in alone)),
    )
    few = [batch for batch in batches if int(batch.index[-1]) < timed] or batches[:1]
    races["line-up"] = race(lambda b: own(ours, b), lambda b: theirs(ATTACKS, b), few)
    return [line(label, network, name, each) for name, each in races.items()]


@dataclass(frozen=True)
class Race:
    """Which examples still stand after each, and the seconds of each by batch."""

    held: Tensor
    their_held: Tensor
    seconds: list[float]
    their_seconds: list[float]


def race(ours: Callable[[Batch], Tensor], theirs: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> Race:
    """Both on every batch, in alternating order."""
    held: tuple[list[Tensor], list[Tensor]] = ([], [])
    seconds: tuple[list[float], list[float]] = ([], [])
    for number, batch in enumerate(batches):
        for who in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            held[who].append((ours, theirs)[who](batch))
            seconds[who].append(time.perf_counter() - started)
    return Race(torch.cat(held[0]), torch.cat(held[1]), *seconds)


def line(label: str, network: Network, attack: str, found: Race) -> Line:
    ratios = [mine / theirs for mine, theirs in zip(found.seconds, found.their_seconds, strict=True)]
    return Line(
        network=label,
        threat=network.threat,
        attack=attack,
        n=len(found.held),
        ours=float(found.held.float().mean()),
        reference=float(found.their_held.float().mean()),
        seconds=sum(found.seconds),
        reference_seconds=sum(found.their_seconds),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def table(lines: Sequence[Line]) -> list[str]:
    """Rows of a markdown table."""
    heads = ("network", "threat", "attack", "n", "reference", "robustlens", "above, points", "reference, s", "ours, s")
    rows = ["| " + " | ".join((*heads, "time ratio, by batch")) + " |", "|" + " --- |" * (len(heads) + 1)]
    for each in lines:
        cells = (
            each.network,
            each.threat,
            each.attack,
            str(each.n),
            f"{each.reference:.1%}",
            f"{each.ours:.1%}",
            f"{each.above:+.1f}",
            f"{each.reference_seconds:.1f}",
            f"{each.seconds:.1f}",
            f"{each.ratio:.2f} ({each.low:.2f} to {each.high:.2f})",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    console = Console()
    out = ROOT / "benchmarks" / "results" / "autoattack"
    chosen = asked.networks.split(";") if asked.networks else list(NETWORKS)
    for label in chosen:
        network = NETWORKS[label]
        model, splits = trained(label, network, ROOT / "runs" / "reference")
        batches = list(splits.test.first(asked.examples).batches(asked.batch))
        started = time.monotonic()
        lines = contest(label, network, model, batches, asked.timed)
        for row in table(lines):
            console.print(row, soft_wrap=True, highlight=False)
        if not asked.dry:
            keep(out, label, lines, asked.examples, time.monotonic() - started)
    return 0


def keep(out: Path, label: str, lines: Sequence[Line], examples: int, wall: float) -> None:
    """One file per network, and one page of all."""
    out.mkdir(parents=True, exist_ok=True)
    number = list(NETWORKS).index(label)
    record = {
        "network": label,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall, 1),
        "examples": examples,
        "seed": 0,
        "facts": facts(torch.device("cpu")),
        "training": asdict(NETWORKS[label]),
        "lines": [asdict(each) for each in lines],
    }
    (out / f"{number}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    rows = table([Line(**each) for one in found for each in one["lines"]])
    head = ["# AutoAttack-standard beside the reference", "", "Written by `python -m benchmarks.autoattack`.", ""]
    (out / "table.md").write_text("\n".join([*head, *rows]) + "\n")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.autoattack", description=__doc__.split("\n")[0])
    found.add_argument("--networks", help=f"of {'; '.join(NETWORKS)}; with semicolons between")
    found.add_argument("--examples", type=int, default=1000, help="images of the test split")
    found.add_argument("--timed", type=int, default=250, help="images on which the line-up is timed in a row")
    found.add_argument("--batch", type=int, default=250, help="images attacked together, in both")
    found.add_argument("--dry", action="store_true", help="print, and keep nothing")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
