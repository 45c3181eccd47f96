"""Small trainings in float64 that two processes share, and the process that takes part in them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config, fresh, small_splits
from torch import distributed, nn

from robustlens.attacks.pgd import PGD
from robustlens.core.discovery import discover
from robustlens.core.types import Split, Splits
from robustlens.core.world import World, joined
from robustlens.methods.preset import presets
from robustlens.models.classifier import Chain
from robustlens.models.linear import Logistic
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory
from robustlens.studies.plan import preset_recipe
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe
from robustlens.updates.descend import Descend

PROCESSES = 2


def net(*, across: bool) -> nn.Module:
    """Piecewise linear, in float64; with layers that look ``across`` a batch or draw for it, or without."""
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(1, 4, 3, padding=1, stride=2)}
    if across:
        layers["norm"] = nn.BatchNorm2d(4)
    layers["relu1"] = nn.ReLU()
    if across:
        layers |= {"drop1": nn.Dropout2d(0.1), "drop2": nn.Dropout(0.1)}
    layers["flatten"] = nn.Flatten()
    if across:
        layers["drop"] = nn.Dropout(0.2)
    layers |= {"fc1": nn.Linear(64, 8), "relu2": nn.ReLU(), "fc2": nn.Linear(8, 4)}
    return Chain(OrderedDict(layers)).double()


def cases() -> Iterator[tuple[str, Recipe, TrainingConfig]]:
    """Every discovered part alone, and what needs more than one of them.

    Of the images for the validation 5 are seen: two processes have 3 and 2 of them.
    """
    plain = config(
        epochs=2, optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9}, validate_every=2, validation_examples=5
    )
    pgd = PGD(threat=Lp("l2", 0.5), steps=2)
    for number, objective in enumerate(examples("objective")):
        yield f"{objective.name}-{number}", Recipe(objective=objective), plain
    for number, regularizer in enumerate(examples("regularizer")):
        yield f"{regularizer.name}-{number}", Recipe(objective=Standard(), regularizers=(regularizer,)), plain
    for number, update in enumerate(examples("update")):
        yield f"{update.name}-{number}", Recipe(objective=Standard(), update=update), plain
    for number, constraint in enumerate(examples("constraint")):
        yield f"{constraint.name}-{number}", Recipe(objective=Standard(), constraints=(constraint,)), plain
    attacked = Recipe(objective=Adversarial(attack=pgd))
    settings: dict[str, dict[str, Any]] = {
        "augmented": {"augment": [{"name": "pad-crop", "padding": 1}, "flip", "random-resized-crop"]},
        "averaged": {"averaging": 0.8, "grad_clip": 0.5},
        "rmsprop": {"optimizer": {"name": "rmsprop", "lr": 1e-3}},
    }
    for name, setting in settings.items():
        yield name, attacked, config(**{"epochs": 2, "validate_every": 2, **setting})
    seen = Adversarial(attack=pgd, craft_mode="train", clean_weight=0.5)
    synchronised = config(epochs=2, batch_norm="synchronised", validate_every=2)
    yield "across", attacked, synchronised
    yield "across-crafting", Recipe(objective=seen), synchronised
    for name in ("jacobian", "data-spectral-norm"):
        twice = discover("regularizer")[name].examples()[0]
        yield f"across-{name}", Recipe(objective=attacked.objective, regularizers=(twice,)), synchronised
    leaving = Adversarial(attack=PGD(threat=Lp("l2", 0.3), steps=2, restarts=3, early_stop=True))
    jacobian = discover("regularizer")["jacobian"].examples()[0]  # it draws after images have left the attack
    yield "leaving", Recipe(objective=leaving, regularizers=(jacobian,)), plain
    yield from ((name.replace("/", "-"), recipe, plain) for name, recipe in combinations().items())


def combinations() -> dict[str, Recipe]:
    """The first preset with every combination of parts."""
    found: dict[tuple[type, ...], tuple[str, Recipe]] = {}
    for name in presets():
        recipe = preset_recipe(name)
        parts = (recipe.objective, *recipe.regularizers, recipe.update, *recipe.constraints)
        own = tuple(type(part) for part in parts if not isinstance(part, Standard | Descend))
        if len(own) > 1:
            found.setdefault(own, (name, recipe))
    return dict(found.values())


def examples(kind: str) -> list[Any]:
    return [example for cls in discover(kind).values() for example in cls.examples()]


def carry_out(
    case: str,
    recipe: Recipe,
    settings: TrainingConfig,
    place: Path,
    world: World,
    *,
    batch: int,
    device: torch.device | str = "cpu",
) -> None:
    """Train it on ``device`` in batches of ``batch``, of which the last of the epoch is half as large.

    On two of the four classes, and a single logit, where the method asks for that.
    """
    settings = settings.model_copy(update={"batch_size": batch})
    splits = small_splits(5 * batch + batch // 2)
    splits = Splits(splits.name, *map(double, (splits.train, splits.valid, splits.test)), classes=splits.classes)
    model = fresh(lambda: net(across=case.startswith("across")))
    if case.startswith("mma"):  # which attacks what is right
        learn(model, splits.train)
    attack = PGD(threat=Lp("linf", 0.02), steps=2)
    try:
        recipe.check(model, splits.train.batch(torch.arange(4)).x)
    except InputError:
        for split in (splits.train, splits.valid):
            split.labels.remainder_(2)
        model = fresh(lambda: Logistic().build((1, 8, 8), 2)).double()
    model, splits = model.to(device), splits.to(torch.device(device))
    train(model, splits, recipe, settings, seed=3, run=RunDirectory(place / case), validation=attack, world=world)


def require_same(there: Path, here: Path, *, tolerance: float) -> None:
    """That the trainings at both places left the same weights and epochs."""
    for name in ("last", "best"):
        theirs, ours = (load_file(place / f"{name}.safetensors") for place in (there, here))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance)
    for one, other in zip(RunDirectory(there).metrics(), RunDirectory(here).metrics(), strict=True):
        assert other.keys() == one.keys()
        for key in one.keys() - {"seconds"}:
            assert other[key] == pytest.approx(one[key], rel=1e-9, abs=1e-12), key


def learn(model: nn.Module, split: Split) -> None:
    """Train the network on all of ``split`` until it is right about some and wrong about others."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    while ((model(split.images).softmax(1)[range(len(split)), split.labels] > 0.5).float().mean()) < 0.5:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.images), split.labels).backward()
        optimizer.step()


def double(split: Split) -> Split:
    return Split(split.images.double(), split.labels)


def main(root: Path, rank: int, batch: int) -> None:
    """Be the process ``rank`` of all cases, in batches of ``batch``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=PROCESSES)
    for case, recipe, settings in cases():
        carry_out(case, recipe, settings, root, joined(), batch=batch)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
