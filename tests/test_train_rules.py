"""What surrounds the steps of a run: constraints, memory, replays, rules that end it early, snapshots, starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import gen
from safetensors.torch import load_file
from small_runs import STEPS, Counting, config, fresh, linear_net, small_splits
from torch import Generator, Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.core.passes import Passes
from robustlens.core.rng import generator
from robustlens.core.types import Batch, Crafted, Terms
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.optimizer import make_optimizer
from robustlens.train.recipe import Recipe
from robustlens.updates.descend import Descend

ATTACK = FGSM(threat=Lp("linf", 0.05))


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Halves the weights, and tells their size before."""

    name: ClassVar[str] = "shrink"
    reference: ClassVar[str] = "this test"
    every: str = "step"

    def apply(self, model: nn.Module, x: Tensor) -> Mapping[str, float]:
        assert x.shape == (1, 1, 8, 8)
        size = float(model[1].weight.detach().norm())
        with torch.no_grad():
            model[1].weight.mul_(0.5)
        return {"size_before": size}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A penalty of 0 that counts in the run's memory how often it was called, and notes where in the run."""

    name: ClassVar[str] = "counted"
    reference: ClassVar[str] = "this test"
    passes: ClassVar[Passes] = Passes()

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        moment = crafted.batch.moment
        moment.memory["counted/calls"] = moment.memory.get("counted/calls", torch.zeros(())) + 1
        moment.memory["counted/epoch"] = torch.tensor(moment.epoch)
        assert (moment.epochs, moment.examples) == (3, 40)
        return crafted.x_adv.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class Twice(Descend):
    """Two plain steps on every batch."""

    replays: ClassVar[int] = 2


def run(
    place: Path, settings: TrainingConfig, recipe: Recipe | None = None, **more: Any
) -> tuple[nn.Module, list[Any]]:
    model = fresh(linear_net)
    records = train(
        model,
        small_splits(),
        recipe or Recipe(objective=Standard()),
        settings,
        seed=3,
        run=RunDirectory(place),
        validation=ATTACK,
        **more,
    )
    return model, records


def script(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> None:
    """Validation says ``shares`` one after the other; everything else about training is real."""
    left = iter(shares)

    def said(*_: Any, **__: Any) -> dict[str, float]:
        return {"valid_loss": 1.0, "valid_accuracy": 1.0, "valid_robust_accuracy": next(left)}

    monkeypatch.setattr("robustlens.train.loop.validate", said)


def test_constraint_after_every_step_or_at_the_epochs_end(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.0}
    settings = config(optimizer=optimizer, epochs=1)
    start = fresh(linear_net)
    for every in ("step", "epoch"):
        recipe = Recipe(objective=Standard(), constraints=(Shrink(every=every),))
        model, records = run(tmp_path / every, settings, recipe)
        by_hand = fresh(linear_net)
        data = small_splits().train
        order = torch.randperm(40, generator=generator("cpu", 3, "order", 0))
        for step in range(STEPS):
            pick = order[8 * step : 8 * step + 8]
            by_hand.zero_grad()
            nn.functional.cross_entropy(by_hand(data.images[pick]), data.labels[pick]).backward()
            with torch.no_grad():
                for p in by_hand.parameters():
                    p -= 0.1 * p.grad
                if every == "step":
                    by_hand[1].weight *= 0.5
        before = float(by_hand[1].weight.detach().norm()) * (2 if every == "step" else 1)
        if every == "epoch":
            with torch.no_grad():
                by_hand[1].weight *= 0.5
        assert torch.allclose(model[1].weight, by_hand[1].weight, atol=1e-7)
        assert records[-1]["size_before"] == pytest.approx(before, rel=1e-5)
        assert not torch.equal(model[1].weight, start[1].weight)


def test_memory_and_moment_survive_a_kill(tmp_path: Path) -> None:
    settings = config(checkpoint_seconds=0)
    recipe = Recipe(objective=Standard(), regularizers=(Counted(),))

    class Killed(Exception):
        pass

    def kill(what: str, number: int) -> None:
        if (what, number) == ("step", STEPS + 2):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, settings, recipe, watch=Counting(kill))
    run(tmp_path, settings, recipe)
    kept = load_file(tmp_path / "state.safetensors")
    assert kept["memory/counted/calls"] >= 3 * STEPS  # the step before the kill may be repeated, never lost
    assert kept["memory/counted/epoch"] == pytest.approx(2 + (STEPS - 1) / STEPS)


def test_replays_take_that_many_steps_on_each_batch(tmp_path: Path) -> None:
    settings = config(epochs=1, batch_size=40, optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.0})
    model, _ = run(tmp_path / "a", settings, Recipe(objective=Standard(), update=Twice()))
    by_hand, data = fresh(linear_net), small_splits().train
    for _ in range(2):
        by_hand.zero_grad()
        nn.functional.cross_entropy(by_hand(data.images), data.labels).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
    assert torch.allclose(model[1].weight, by_hand[1].weight, atol=1e-6)


def test_patience_stops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.5, 0.7, 0.6, 0.7, 0.9])
    _, records = run(tmp_path, config(epochs=5, patience=2))
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert "since epoch 2" in records[-1]["stopped"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["stopped"]
    _, again = run(tmp_path, config(epochs=5, patience=2))
    assert again == records, "a stopped run is finished"


def test_collapse_keeps_the_weights_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.5, 0.6])
    before, _ = run(tmp_path / "two", config(epochs=2, collapse_watch=0.2))
    script(monkeypatch, [0.5, 0.6, 0.3, 0.9])
    model, records = run(tmp_path / "four", config(epochs=4, collapse_watch=0.2))
    assert len(records) == 3 and "catastrophic overfitting" in records[-1]["stopped"]
    assert records[-1]["collapse_gap"] == pytest.approx(records[-1]["accuracy"] - 0.3)
    assert torch.equal(model[1].weight, before[1].weight)
    assert torch.equal(load_file(tmp_path / "four" / "last.safetensors")["1.weight"], before[1].weight)


def test_a_fall_within_the_watch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.5, 0.31, 0.2])
    _, records = run(tmp_path, config(epochs=3, collapse_watch=0.2))
    assert len(records) == 3 and "stopped" not in records[-1]


def test_log_spaced_epochs_and_snapshots(tmp_path: Path) -> None:
    settings = config(epochs=23, batch_size=40, validate_every="log", snapshots=True)
    model, records = run(tmp_path, settings)
    assert [r["epoch"] for r in records] == [1, 2, 5, 10, 20, 23]
    assert {f.name for f in tmp_path.glob("epoch-*")} == {f"epoch-{n}.safetensors" for n in (1, 2, 5, 10, 20, 23)}
    assert torch.equal(load_file(tmp_path / "epoch-23.safetensors")["1.weight"], model[1].weight)
    five, _ = run(tmp_path / "five", config(epochs=5, batch_size=40))
    assert torch.equal(load_file(tmp_path / "epoch-5.safetensors")["1.weight"], five[1].weight)


def test_single_numbers_take_their_own_learning_rate(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(64, 4), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) * self.scale

    settings = config(optimizer={"name": "sgd", "lr": 0.5, "momentum": 0.0, "scalar_lr": 0.1}, epochs=1, batch_size=40)
    model, data = fresh(Scaled), small_splits()
    plain = fresh(Scaled)
    nn.functional.cross_entropy(plain(data.train.images), data.train.labels).backward()
    train(model, data, Recipe(objective=Standard()), settings, seed=3, run=RunDirectory(tmp_path), validation=ATTACK)
    with torch.no_grad():
        assert torch.allclose(model.fc.weight, plain.fc.weight - 0.5 * plain.fc.weight.grad, atol=1e-6)
        assert torch.allclose(model.scale, plain.scale - 0.05 * plain.scale.grad, atol=1e-6)
    assert len(make_optimizer(linear_net(), settings).param_groups) == 1


def test_a_recipe_asks_its_parts_before_training(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Picky(Standard):
        def check(self, model: nn.Module, x: Tensor) -> None:
            raise InputError("picky", expected="another network", got="this one", fix="Take another.")

    with pytest.raises(InputError, match="another network"):
        run(tmp_path, config(), Recipe(objective=Picky()))
    assert not list(tmp_path.iterdir())


def test_passes_add_up() -> None:
    recipe = Recipe(objective=Standard(), regularizers=(Counted(),))
    assert str(recipe.passes) == "1 weight"
    assert str(Passes(inputs=10, weights=2) + Passes(forward=1) * 3) == "3 forward + 10 input + 2 weight"
    assert str(Passes()) == "none"
    assert Passes(inputs=10, weights=2, double=1).learning == Passes(weights=2, double=1)


def test_batches_carry_an_empty_moment() -> None:
    batch = Batch(torch.rand(2, 1, 2, 2, generator=gen()), torch.zeros(2).long(), torch.arange(2))
    assert batch.moment.memory == {} and batch.moment.epoch == 0
