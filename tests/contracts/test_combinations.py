"""Any objective with any two regularizers, any update and any constraint is a method that keeps every contract."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gen
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import Counting, config, fresh, small_splits
from torch import nn

from robustlens.attacks.fgsm import FGSM
from robustlens.core.discovery import discover
from robustlens.core.types import Batch, Moment
from robustlens.models.classifier import Chain
from robustlens.results.errors import InputError
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe


def rectifier_net() -> nn.Module:
    """Piecewise linear, with BatchNorm, dropout, features and a head: every method fits."""
    layers = {
        "conv": nn.Conv2d(1, 4, 3, padding=1, stride=2),
        "norm": nn.BatchNorm2d(4),
        "relu1": nn.ReLU(),
        "flatten": nn.Flatten(),
        "drop": nn.Dropout(0.2),
        "fc1": nn.Linear(64, 8),
        "relu2": nn.ReLU(),
        "fc2": nn.Linear(8, 4),
    }
    return Chain(OrderedDict(layers))


def examples(kind: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([example for cls in discover(kind).values() for example in cls.examples()])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A random method; two regularizers of one name would be one with another weight."""
    first, second = draw(examples("regularizer")), draw(examples("regularizer"))
    assume(first.name != second.name)
    recipe = Recipe(
        objective=draw(examples("objective")),
        regularizers=(first, second),
        update=draw(examples("update")),
        constraints=(draw(examples("constraint")),),
    )
    try:
        recipe.check(fresh(rectifier_net), small_splits().train.batch(torch.arange(4)).x)
    except InputError:  # one weight row, say; refused before training is a contract kept
        assume(False)
    return recipe


def step(recipe: Recipe, model: nn.Module, moment: Moment) -> Any:
    batch = small_splits().train.batch(torch.arange(8))
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    batch = Batch(batch.x, batch.y, batch.index, moment)
    return recipe.update.backward(model, recipe.objective, recipe.regularizers, batch, gen=gen(2))


def moment() -> Moment:
    return Moment(epoch=1.5, epochs=3, examples=40)


BUDGET = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@BUDGET
@given(recipes())
def test_a_step_is_replayable_and_touches_gradients_alone(recipe: Recipe) -> None:
    model = fresh(rectifier_net).train()
    before = [p.detach().clone() for p in model.parameters()]
    twin, here, there = copy.deepcopy(model), moment(), moment()
    terms = step(recipe, model, here)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert {r.name for r in recipe.regularizers} <= terms.parts.keys()
    total = terms.loss - sum(terms.parts[r.name] for r in recipe.regularizers)
    assert torch.isfinite(total) and terms.logits.shape == (8, 4)
    again = step(recipe, twin, there)
    assert torch.equal(terms.loss, again.loss)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), twin.buffers(), strict=True))
    assert here.memory.keys() == there.memory.keys()
    assert all(torch.equal(value, there.memory[name]) for name, value in here.memory.items())


@BUDGET
@given(recipes())
def test_regularizers_draw_and_move_nothing_of_the_networks(recipe: Recipe) -> None:
    """BatchNorm statistics and global random draws are those of the same method without its regularizers."""
    model, plain = fresh(rectifier_net).train(), fresh(rectifier_net).train()
    step(recipe, model, moment())
    random = torch.get_rng_state()
    step(dataclasses.replace(recipe, regularizers=()), plain, moment())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), plain.buffers(), strict=True))


@settings(BUDGET, max_examples=8)
@given(recipes(), st.integers(1, 9))
def test_killed_and_resumed_is_uninterrupted(recipe: Recipe, moment_of_death: int) -> None:
    class Killed(Exception):
        pass

    def kill(what: str, number: int) -> None:
        if (what, number) == ("step", moment_of_death):
            raise Killed

    plan = config(epochs=2, checkpoint_seconds=0, grad_clip=1.0, optimizer={"name": "sgd", "lr": 1e-4})

    def run(place: Path, watch: Any = None) -> list[dict[str, Any]]:
        attack, run = FGSM(threat=Lp("linf", 0.02)), RunDirectory(place)
        model = fresh(rectifier_net)
        return train(model, small_splits(), recipe, plan, seed=3, run=run, validation=attack, watch=watch)

    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place) / "whole", Path(place) / "broken"
        records = run(whole)
        with pytest.raises(Killed):
            run(broken, Counting(kill))
        resumed = run(broken)
        kept, again = load_file(whole / "state.safetensors"), load_file(broken / "state.safetensors")
        assert kept.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in kept.items())
    facts = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert facts == [{k: v for k, v in r.items() if k != "seconds"} for r in resumed]


def test_all_neutral_settings_together_are_standard_training_bit_for_bit() -> None:
    """Every combination of neutral parts, through one step."""

    def neutral(kind: str) -> list[Any]:
        return [cls.neutral() for cls in discover(kind).values() if hasattr(cls, "neutral")]

    plain = fresh(rectifier_net).train()
    step(Recipe(objective=discover("objective")["standard"]()), plain, moment())
    regularizers = tuple(neutral("regularizer"))
    tried = 0
    for objective, update in itertools.product(neutral("objective"), neutral("update")):
        recipe = Recipe(objective=objective, regularizers=regularizers, update=update)
        model = fresh(rectifier_net).train()
        try:
            recipe.check(model, small_splits().train.batch(torch.arange(4)).x)
        except InputError:
            continue
        step(recipe, model, moment())
        tried += 1
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), (objective, update)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert tried >= 4
