"""Small trainings that several test files share, and a process that is killed in the middle of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from conftest import SmallNet, gen
from torch import Generator, Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.pgd import PGD
from robustlens.core.rng import forked
from robustlens.core.types import Split, Splits
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.noise import Noise
from robustlens.objectives.standard import Standard
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train import loop
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.progress import Silent
from robustlens.train.recipe import Recipe

STEPS, EPOCHS = 5, 3  # of each case: 40 images in batches of 8


def small_splits(examples: int = 40) -> Splits:
    """Noisy stripes of 4 classes, 1×8×8, that a small network learns in part."""
    images = torch.rand(examples + 32, 1, 8, 8, generator=gen(7)).mul_(0.7)
    labels = torch.arange(len(images)) % 4
    images[torch.arange(len(images)), 0, 2 * labels] += 0.3
    parts = [Split(x, y) for x, y in zip(images.split([examples, 16, 16]), labels.split([examples, 16, 16]))]  # noqa: B905
    return Splits("stripes", *parts, classes=tuple("abcd"))


def fresh(make: Callable[[], nn.Module] = SmallNet, seed: int = 5) -> nn.Module:
    with forked():
        torch.manual_seed(seed)
        return make()


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


@dataclass(frozen=True, kw_only=True)
class Negative:
    """An augmentation of the user's own: the negative of every image."""

    name: ClassVar[str] = "negative"

    def augment(self, x: Tensor, *, gen: Generator) -> Tensor:
        return 1 - x


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"epochs": EPOCHS, "batch_size": 8, **settings})


#: Recipe and settings of the runs that are interrupted; together they have every kind of state that can be lost.
CASES: Mapping[str, tuple[Recipe, TrainingConfig]] = {
    "sgd": (
        Recipe(objective=Standard(label_smoothing=0.1)),
        config(
            optimizer={"name": "sgd", "lr": 0.05, "nesterov": True, "weight_decay": 1e-3},
            schedule={"name": "multistep", "milestones": [1.5]},
            checkpoint_seconds=0,
        ),
    ),
    "adam": (
        Recipe(objective=Adversarial(attack=PGD(threat=Lp("l2", 0.5), steps=2), clean_weight=0.5, craft_mode="train")),
        config(
            optimizer={"name": "adam", "lr": 3e-3},
            schedule={"name": "one-cycle"},
            averaging=0.8,
            augment=[{"name": "pad-crop", "padding": 1}, "flip"],
            checkpoint_seconds=0,
        ),
    ),
    "rmsprop": (
        Recipe(objective=Noise(threat=Lp("linf", 0.1))),
        config(
            optimizer={"name": "rmsprop", "lr": 1e-3, "momentum": 0.9},
            schedule={"name": "cosine", "warmup": 1},
            grad_clip=0.5,
            averaging=0.9,
            validate_every=2,
            checkpoint_seconds=0,
        ),
    ),
}


def run_case(case: str, place: Path, watch: Any = None) -> list[dict[str, Any]]:
    recipe, settings = CASES[case]
    attack = FGSM(threat=Lp("linf", 0.02))
    model, run = fresh(), RunDirectory(place)
    return train(model, small_splits(), recipe, settings, seed=3, run=run, validation=attack, watch=watch)


class Counting(Silent):
    """Counts steps, and calls ``at`` with the number of the step (over all epochs) and of the epoch."""

    def __init__(self, at: Callable[[str, int], None] = lambda what, number: None) -> None:
        self.steps: list[int] = []
        self.at = at

    def step(self, done: int, total: int, loss: float) -> None:
        self.steps.append(done)
        self.at("step", done)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.at("epoch", record["epoch"])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(case: str, place: Path, moment: str) -> None:
    """``step:4`` dies after that step, ``epoch:1`` after that epoch, ``best:1`` after that file was first written."""
    what, _, number = moment.partition(":")
    written = {"best": 0, "last": 0}
    save = loop.save_weights

    def save_and_die(model: nn.Module, path: Path, *rest: Any) -> None:
        save(model, path, *rest)
        written[path.stem] += 1
        if path.stem == what and written[what] == int(number):
            die()

    loop.save_weights = save_and_die
    run_case(case, place, Counting(lambda kind, count: die() if f"{kind}:{count}" == moment else None))


def main(root: str, *chains: str) -> None:
    """For each ``case=moment,moment``, train in a child process that dies at each moment in turn."""
    torch.set_num_threads(1)
    warm = torch.nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.SGD([warm]).step()  # imports what the children would import one by one
    for chain in chains:
        case, _, moments = chain.partition("=")
        (Path(root) / chain).mkdir()
        for moment in moments.split(","):
            child = os.fork()
            if child == 0:
                run_and_die(case, Path(root) / chain, moment)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                sys.exit(f"{chain}: was not killed at {moment}")


if __name__ == "__main__":
    main(*sys.argv[1:])
