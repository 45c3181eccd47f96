"""All lenses at two depths, and how long a look will take before it is taken."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch.nn import functional as F

from robustlens.core.discovery import discover
from robustlens.core.modes import evaluating
from robustlens.core.passes import Passes
from robustlens.core.types import Lens, Subject
from robustlens.results.errors import unknown_name

Depth = Literal["quick", "full"]


def lenses_at(depth: Depth) -> tuple[Lens, ...]:
    """Every lens: with its defaults for "quick", and for "full" as its ``thorough()`` has it, where it has one.

    A lens that says ``on_request = True`` is left out.
    """
    if depth not in get_args(Depth):
        raise unknown_name("depth", str(depth), get_args(Depth))
    found: list[Lens] = []
    for cls in discover("lens").values():
        if getattr(cls, "on_request", False):
            continue
        found.append(cls.thorough() if depth == "full" and hasattr(cls, "thorough") else cls())
    return tuple(found)


def expected_seconds(lenses: Sequence[Lens], subject: Subject) -> dict[str, float]:
    """Name of each lens → seconds that its passes through the network will take on this machine.

    A lens counts them in ``cost(subject)``, for one example each; every kind of pass is timed here on a few images.
    What is not a pass (decompositions, bootstrap) is left out, and so is what an attack saves by stopping early.
    """
    wanted = {lens.name: lens.cost(subject) for lens in lenses if hasattr(lens, "cost")}
    kinds = {f.name for f in dataclasses.fields(Passes) for cost in wanted.values() if getattr(cost, f.name)}
    unit = {kind: _seconds(kind, subject) for kind in kinds}
    return {name: sum(getattr(cost, kind) * seconds for kind, seconds in unit.items()) for name, cost in wanted.items()}


def _seconds(kind: str, subject: Subject) -> float:
    """Seconds of one pass of this kind with one example; the faster of two batches."""
    n = min(32, len(subject.splits.test))
    batch = subject.splits.test.batch(torch.arange(n))
    x, y = batch.x.to(subject.device), batch.y.to(subject.device)
    model = subject.model
    weights = [p for p in model.parameters() if p.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def inputs() -> None:
        point = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(point), y), point)

    def learn() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), weights, allow_unused=True)

    def product() -> None:
        slopes = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True, allow_unused=True)
        total = torch.stack([slope.sum() for slope in slopes if slope is not None]).sum()
        torch.autograd.grad(total, weights, allow_unused=True)

    def fastest(run: Callable[[], None]) -> float:
        spent = []
        for _ in range(2):
            started = time.monotonic()
            run()
            spent.append(time.monotonic() - started)
        return min(spent) / n

    with evaluating(model):
        if kind == "double":
            return max(fastest(product) - fastest(learn), 0.0)
        return fastest({"forward": forward, "inputs": inputs, "weights": learn, "tangent": inputs}[kind])
