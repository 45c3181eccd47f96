"""One training step on several processes of this machine, and what the same step costs on machines that are not here.

    torchrun --nproc-per-node 2 -m benchmarks.scaling           # measures, a thread (or a GPU) a process
    python -m benchmarks.scaling --predict                      # the table of docs/scale.md, from its formula

A step is PGD-10 training on a global batch. Rounds alternate between all processes, each with its share; the leader
alone with the whole batch while the others wait; and all with their shares and no word between them, which is what the
machine can do. The exchange of gradients is timed apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.harness import ROOT, Row, facts
from benchmarks.workload import WORKLOADS, Workload
from robustlens.attacks.pgd import PGD
from robustlens.core import discovery
from robustlens.core.modes import lay_channels_last
from robustlens.core.types import Batch, Moment
from robustlens.core.world import World, joined, together
from robustlens.objectives.adversarial import Adversarial
from robustlens.threats.lp import Lp
from robustlens.train.together import exchange
from robustlens.updates.descend import Descend

STEPS = 10


def measure(name: str, world: World, *, rounds: int, device: torch.device) -> list[Row]:
    """Seconds of a step of one process and of all, and of the exchange alone."""
    work = WORKLOADS[name]
    torch.manual_seed(0)
    model = discovery.build("model", {"name": name, **work.settings}).build(work.shape, work.classes).to(device)
    lay_channels_last(model, torch.zeros(1, *work.shape, device=device))
    alone, all_ = (stepper(model, work, who, who, device) for who in (World(), world))
    apart = stepper(model, work, world, World(), device)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found: dict[str, list[float]] = {"one": [], "all": [], "apart": [], "exchange": []}
    for number in range(rounds + 1):
        world.wait()
        one = seconds(alone, device) if world.leads else 0.0
        world.wait()
        both = seconds(all_, device)
        world.wait()
        each = seconds(apart, device)
        world.wait()
        told = seconds(lambda: world.average([p.grad for p in model.parameters() if p.grad is not None]), device)
        if number:  # the first warms up
            for key, value in zip(found, (one, both, each, told), strict=True):
                found[key].append(value)
    if not world.leads:
        return []
    ratios = [both / one for one, both in zip(found["one"], found["all"], strict=True)]
    median = {key: statistics.median(values) for key, values in found.items()}
    return [
        Row(
            benchmark="scaling",
            model=name,
            case=f"{world.size} processes / 1",
            ratio=statistics.median(ratios),
            low=min(ratios),
            high=max(ratios),
            n=rounds,
            measured={
                "over_apart": statistics.median(a / b for a, b in zip(found["all"], found["apart"], strict=True)),
                **{f"{key}_seconds": value for key, value in median.items()},
                "batch": work.batch,
                "parameters": parameters,
                "bytes_exchanged": volume(parameters, world.size),
            },
        )
    ]


def stepper(model: nn.Module, work: Workload, world: World, told: World, device: torch.device) -> Callable[[], object]:
    """A step on this process's share, of which the processes of ``told`` hear."""
    gen = torch.Generator(device).manual_seed(1)
    index = world.share(torch.arange(work.batch))
    x = torch.rand(work.batch, *work.shape, generator=torch.Generator().manual_seed(0))[index].to(device)
    batch = Batch(x, (index % work.classes).to(device), index, Moment(world=told))
    objective = Adversarial(attack=PGD(threat=Lp.parse(work.threats[0]), steps=STEPS))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        terms = Descend().backward(model, objective, (), batch, gen=gen)
        exchange(told, model, terms, batch.y, asks=False)

    return step


def seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def volume(parameters: int, size: int) -> float:
    """Bytes that each process sends in a step: a ring all-reduce of float32 gradients, 2 (S − 1) / S · 4 P."""
    return 2 * (size - 1) / size * 4 * parameters


@dataclass(frozen=True)
class Assumed:
    """What the prediction stands on. None of it was measured here.

    Attributes:
        forward: floating-point operations of a forward pass of an image (a multiplication and an addition are two).
        parameters, images, epochs: of the network and the training.
        attack_steps: k of the attack; one costs a forward pass and as much again for the gradient of the image.
        batch: images a GPU takes in a step.
        speed: operations a second that a GPU sustains in these convolutions.
        within, across: bytes a second of the exchange inside a machine of ``gpus`` GPUs, and between machines.
        latency: seconds of an exchange beside its bytes, for every doubling of the processes.
        price: of a GPU for an hour.
    """

    forward: float = 8.2e9
    parameters: float = 25.6e6
    images: float = 1.281e6
    epochs: float = 100
    attack_steps: int = 3
    batch: int = 64
    speed: float = 70e12
    within: float = 200e9
    across: float = 20e9
    gpus: int = 8
    latency: float = 20e-6
    price: float = 2.5


def predicted(world: int, at: Assumed) -> dict[str, float]:
    """Seconds of computing and of the exchange in a step, their sum over the training, its price; no overlap."""
    compute = at.batch * at.forward * (2 * at.attack_steps + 3) / at.speed
    wire = at.within if world <= at.gpus else at.across
    exchanged = volume(int(at.parameters), world) / wire + at.latency * (world.bit_length() - 1)
    steps = at.images * at.epochs / (world * at.batch)
    hours = steps * (compute + exchanged) / 3600
    return {
        "GPUs": world,
        "global batch": world * at.batch,
        "steps": steps,
        "compute s": compute,
        "exchange s": exchanged,
        "efficiency": compute / (compute + exchanged),
        "hours": hours,
        "GPU-hours": hours * world,
        "dollars": hours * world * at.price,
    }


def main() -> None:
    found = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    found.add_argument("--models", default="lenet-small,mnist-cnn")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--predict", action="store_true")
    asked = found.parse_args()
    console = Console()
    if asked.predict:
        rows = [predicted(world, Assumed()) for world in (1, 8, 64, 512)]
        shown = Table(*rows[0])
        for row in rows:
            shown.add_row(*(f"{value:,.4g}" for value in row.values()))
        console.print(shown)
        console.print(str(Assumed()), soft_wrap=True)
        return
    torch.set_num_threads(1)
    with together("auto") as place:
        device, world = torch.device(place), joined()
        names = asked.models.split(",")
        measured = [row for name in names for row in measure(name, world, rounds=asked.rounds, device=device)]
        if world.leads:
            record = {
                "benchmark": "scaling",
                "facts": facts(device),
                "rows": [dataclasses.asdict(row) for row in measured],
            }
            Path(ROOT / "benchmarks/results/scaling.json").write_text(json.dumps(record, indent=1) + "\n")
            for row in measured:
                console.print(
                    f"{row.model}: {row.case} {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}] {dict(row.measured)}"
                )


if __name__ == "__main__":
    main()
