"""What is timed: a network, a batch, the attacks on it, and the floors.

The floor of a k-step attack is k × (forward pass + backward pass to the input alone), parameters frozen, eval mode.
The floor of a training step is that + one plain training step (forward, backward to the weights, optimizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Case
from robustlens.attacks.pgd import PGD
from robustlens.core import discovery
from robustlens.core.modes import Precision
from robustlens.core.rng import generator
from robustlens.core.types import Batch
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.objectives.adversarial import Adversarial
from robustlens.threats.lp import Lp
from robustlens.updates.descend import Descend


@dataclass(frozen=True)
class Workload:
    """A network and the size of its batch; ``threats`` are the usual ones for its data."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    threats: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    classes: int = 10


MNIST = ("linf:0.3", "l2:2.0")
CIFAR = ("linf:8/255", "l2:128/255")

WORKLOADS = {
    work.model: work
    for work in (
        Workload("mnist-cnn", (1, 28, 28), 128, MNIST),
        Workload("lenet-small", (1, 28, 28), 128, MNIST),
        # Its papers take all images of 0 and 1 at once.
        Workload("logistic", (1, 28, 28), 12665, MNIST, classes=2),
        Workload("resnet18", (3, 32, 32), 64, CIFAR),
        Workload("cnn7", (3, 32, 32), 128, CIFAR),
        Workload("resnet56", (3, 32, 32), 128, CIFAR),
    )
}
#: The two that have a bar.
STANDARD = ("mnist-cnn", "resnet18")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a benchmark is run.

    Attributes:
        device: where.
        rounds: interleaved repetitions.
        models: names in ``WORKLOADS``.
        steps: of PGD.
        channels_last: the layout of the network's weights, in the product and in its floor alike.
        epochs, seeds, examples: of the trainings whose robust accuracies are compared (None takes all examples).
        tiny: small batches and a narrow ResNet, to see that everything runs.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 7
    models: tuple[str, ...] = STANDARD
    steps: int = 10
    channels_last: bool = False
    epochs: int = 10
    seeds: int = 3
    examples: int | None = None
    tiny: bool = False

    def workloads(self) -> list[Workload]:
        return [self.workload(name) for name in self.models]

    def workload(self, name: str) -> Workload:
        work = WORKLOADS[name]
        if not self.tiny:
            return work
        return replace(work, batch=4, settings={"width": 4} if name == "resnet18" else work.settings)


class Bench:
    """One network on one device, ready to be timed: the product's own paths and the floors below them."""

    def __init__(self, work: Workload, plan: Plan) -> None:
        self.work, self.plan, self.device = work, plan, plan.device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = discovery.build("model", {"name": work.model, **work.settings}).build(work.shape, work.classes)
        layout = torch.channels_last if plan.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(plan.device, memory_format=layout)
        self.batch = some_batch(work, plan.device)
        # The weights barely move, so that every round multiplies numbers of the same size.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.gen = generator(plan.device, 0, "benchmark")

    def attack(self, threat: str) -> PGD:
        return PGD(threat=Lp.parse(threat), steps=self.plan.steps)

    def freeze(self) -> None:
        self.model.eval().requires_grad_(False)

    def thaw(self) -> None:
        self.model.train().requires_grad_(True)

    def craft_floor(self) -> None:
        """k forward passes and k backward passes to the input; call ``freeze`` first."""
        input_passes(self.model, self.batch.x, self.batch.y, self.plan.steps)

    def plain_step(self) -> None:
        """One training step on clean images; call ``thaw`` first."""
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.batch.x), self.batch.y).backward()
        self.optimizer.step()

    def adversarial_step(self, threat: str, precision: Precision = "float32") -> None:
        """One training step as the training loop takes it; call ``thaw`` first."""
        objective = Adversarial(attack=self.attack(threat), precision=precision)
        self.optimizer.zero_grad(set_to_none=True)
        Descend().backward(self.model, objective, (), self.batch, gen=self.gen)
        self.optimizer.step()

    def floors(self) -> list[Case]:
        """The two parts of the floor of a training step, timed apart so that changing modes costs it nothing."""
        return [
            Case("craft floor", self.craft_floor, before=self.freeze),
            Case("plain step", self.plain_step, before=self.thaw),
        ]

    def describe(self) -> dict[str, Any]:
        return {"batch": len(self.batch), "shape": list(self.work.shape), "steps": self.plan.steps}


def input_passes(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """``steps`` × (forward, backward to the input)."""
    for _ in range(steps):
        point = x.detach().requires_grad_()
        loss = F.cross_entropy(model(point), y, reduction="sum")
        torch.autograd.grad(loss, point)


def some_batch(work: Workload, device: torch.device) -> Batch:
    """Real digits for MNIST's shape, whose pixels lie on the border of the box; uniform noise for other shapes."""
    if work.shape == (1, 28, 28):
        train = load(DataConfig(source="mnist5k")).to(device).train
        digits = train.batch(torch.arange(work.batch) % len(train))
        return replace(digits, y=digits.y % work.classes)
    x = torch.rand(work.batch, *work.shape, generator=generator("cpu", 0, "images")).to(device)
    return Batch(x, torch.arange(work.batch, device=device) % 10, torch.arange(work.batch, device=device))


def short(threats: Sequence[str]) -> list[tuple[str, str]]:
    """(threat, its norm in the papers' writing)."""
    written = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
    return [(threat, f"{written[threat.partition(':')[0]]} {threat.partition(':')[2]}") for threat in threats]
