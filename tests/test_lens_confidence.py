"""Probabilities, losses and their variation from closed forms of two-class linear models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import gen
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.confidence import Confidence, spread_interval
from robustlens.lenses.oracle import two_sided_subject
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

TRAIN, TEST = [0.4, 0.4, 0.3, 0.3], [0.4, 0.3, 0.1, -0.1, 0.02]


def sided(threat: Lp, test: list[float] = TEST) -> Subject:
    subject = two_sided_subject(train_shifts=TRAIN, test_shifts=test)
    return Subject(subject.model, subject.splits, threat)


def loss(shifts: list[float], radius: float = 0.0) -> Any:
    return np.array([math.log1p(math.exp(-4 * (s - radius))) for s in shifts])


@pytest.mark.parametrize("number", range(len(Confidence.oracles())))
def test_oracles(number: int) -> None:
    oracle = Confidence.oracles()[number]
    reading = oracle.lens.look(oracle.subject, gen=gen())
    for name, (value, tolerance) in oracle.expected.items():
        assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_loss_variation_by_hand_at_radii_of_ones_own() -> None:
    reading = Confidence(radii=(0.3, 0.05)).look(sided(Lp("linf", 0.1)), gen=gen())
    for radius in (0.05, 0.3):
        variation = loss(TEST, radius) - loss(TEST)
        mean, spread = (reading[f"{what} at {radius}"] for what in ("mean loss variation", "spread of loss variation"))
        assert mean.value == pytest.approx(variation.mean(), abs=1e-5) and mean.nature == "lower bound"
        assert spread.value == pytest.approx(variation.std(), abs=1e-5)
        assert mean.n == spread.n == 5 and mean.low < mean.value < mean.high and spread.low < spread.value < spread.high
    assert reading.headline == ("mean probability, test, clean", "mean loss variation at 0.3")
    assert reading.settings["radii used"] == [0.05, 0.3]
    curve, table = reading.panels[-2:]
    assert [line.name for line in curve.series] == ["mean", "standard deviation"]
    assert [row[0] for row in table.rows] == [0.05, 0.3]
    assert curve.series[0].y.tolist() == [row[1] for row in table.rows]


def test_default_radii_of_every_threat() -> None:
    for threat, radii in ((Lp("linf", 0.3), [1 / 255, 2 / 255, 4 / 255]), (Lp("l2", 1.0), [0.25, 0.5, 1.0])):
        assert Confidence().look(sided(threat), gen=gen()).settings["radii used"] == radii


def test_the_box_limits_the_variation() -> None:
    """A pixel that is already at the end of the box cannot be moved further from the right side."""
    attack = PGD(threat=Lp("l2", 0.2), steps=10, random_start=False)
    reading = Confidence(attack=attack, radii=(0.2,)).look(sided(attack.threat, [-0.5, -0.5, -0.4]), gen=gen())
    assert reading["mean loss variation at 0.2"].value == pytest.approx(
        (loss([-0.4], 0.1) - loss([-0.4])).item() / 3, abs=1e-5
    )


def test_histograms_hold_every_example_and_their_middle() -> None:
    threat = Lp("linf", 0.1)
    reading = Confidence(bins=10).look(sided(threat), gen=gen())
    panels = {panel.title: panel for panel in reading.panels[:4]}
    states = {"clean": 0.0, "attacked": 0.1}
    for split, shifts in (("train", TRAIN), ("test", TEST)):
        for state, radius in states.items():
            losses = loss(shifts, radius)
            for title, values, (low, high) in (
                ("Probability of the right class", np.exp(-losses), (0.0, 1.0)),
                ("Probability of the right class, middle values", np.exp(-losses), (0.1, 0.9)),
                ("Loss", losses, (0.0, np.inf)),
                ("Loss, middle values", losses, (-math.log(0.9), -math.log(0.1))),
            ):
                panel = panels[title]
                edges = panel.edges + np.append(np.zeros(10), 1e-6)  # the largest loss, but for float32
                counts = panel.counts[f"{split}, {state}"]
                assert counts.sum() == ((values >= low) & (values <= high)).sum(), (title, split, state)
                assert np.array_equal(counts, np.histogram(values, bins=edges)[0])
            middle = reading[f"share of middle probabilities, {split}, {state}"]
            chance = np.exp(-losses)
            assert middle.value == ((chance > 0.1) & (chance < 0.9)).mean() and middle.n == len(shifts)
    assert len(panels) == 4 and panels["Probability of the right class, middle values"].edges[[0, -1]].tolist() == [
        0.1,
        0.9,
    ]
    assert reading["mean probability, test, attacked"].nature == "upper bound"


class Shifted(nn.Module):
    """Adds to all logits of an image what depends on the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 3 * x.flatten(1).sum(1, keepdim=True) - 5


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    one = sided(Lp("linf", 0.1))
    two = Subject(Shifted(one.model).eval(), one.splits, one.threat)
    first, second = (Confidence().look(subject, gen=gen()) for subject in (one, two))
    for quantity in first.quantities:
        assert second[quantity.name].value == pytest.approx(quantity.value, abs=1e-5), quantity.name


@dataclass(frozen=True)
class Retreat:
    """An attack that makes images safer."""

    name: ClassVar[str] = "retreat"
    threat: Lp

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return x + (2 * y - 1)[:, None, None, None] * torch.tensor([[self.threat.eps, 0.0], [0.0, 0.0]])


def test_no_attack_makes_an_image_safer() -> None:
    reading = Confidence(attack=Retreat(Lp("l2", 0.1))).look(sided(Lp("l2", 0.1)), gen=gen())
    assert reading["mean loss variation at 0.1"].value == reading["spread of loss variation at 0.1"].value == 0.0
    assert reading["mean probability, test, attacked"].value == reading["mean probability, test, clean"].value


@dataclass(frozen=True)
class OnceOnly:
    """An attack that works at one radius and does nothing at others."""

    name: ClassVar[str] = "once-only"
    threat: Lp

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        step = self.threat.eps if self.threat.eps == 0.1 else 0.0
        return x - (2 * y - 1)[:, None, None, None] * torch.tensor([[step, 0.0], [0.0, 0.0]])


def test_what_a_smaller_radius_found_counts_at_the_larger_ones() -> None:
    reading = Confidence(attack=OnceOnly(Lp("l2", 0.1)), radii=(0.1, 0.2, 0.05)).look(sided(Lp("l2", 0.1)), gen=gen())
    found = [reading[f"mean loss variation at {radius}"].value for radius in (0.05, 0.1, 0.2)]
    assert found[0] == 0.0 < found[1] == found[2] == pytest.approx((loss(TEST, 0.1) - loss(TEST)).mean(), abs=1e-5)


def test_without_training_images() -> None:
    subject = sided(Lp("linf", 0.1))
    empty = Split(subject.splits.train.images[:0], subject.splits.train.labels[:0])
    splits = Splits("test only", empty, empty, subject.splits.test, subject.splits.classes)
    reading = Confidence().look(Subject(subject.model, splits, subject.threat), gen=gen())
    assert reading.outcome.status == "ok" and not any("train" in q.name for q in reading.quantities)


def test_spread_interval_of_normal_values_and_of_equal_ones() -> None:
    """Of 300 normal samples of 400, the interval holds the true value in 95 % ± 3.8 % (three standard errors)."""
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        low, high = spread_interval(draw.normal(size=400))
        inside += low <= 1 <= high
    assert abs(inside / 300 - 0.95) < 0.038
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2 * 400), rel=0.2)
    assert spread_interval(np.ones(5)) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"radii": ()}, {"radii": (0.1, 0.0)}, {"bins": 0}, {"batch_size": 0}])
def test_refuses_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"confidence {next(iter(wrong))}"):
        Confidence(**wrong)
    with pytest.raises(InputError, match="at least 1"):
        Confidence(n_examples=0).look(sided(Lp("linf", 0.1)), gen=gen())
    with pytest.raises(InputError, match="a radius > 0"):
        Confidence().look(sided(Lp("l2", 0.0)), gen=gen())


def test_broken_logits_fail() -> None:
    subject = sided(Lp("linf", 0.1))
    with torch.no_grad():
        subject.model[1].weight.fill_(float("nan"))
    assert Confidence().look(subject, gen=gen()).outcome.status == "failed"
