"""The generalisation gap from losses computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from twins import TWINS, scaled

from robustlens.attacks.pgd import PGD
from robustlens.core.types import Subject
from robustlens.lenses.gap import GeneralisationGap
from robustlens.lenses.oracle import two_sided_subject
from robustlens.results.intervals import wilson
from robustlens.threats.lp import Lp


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_oracles() -> None:
    for oracle in GeneralisationGap.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_levels_gaps_and_their_signs() -> None:
    train, test = [0.4, 0.1, 0.2, 0.3], [0.3, -0.2, -0.1, 0.1]
    subject = two_sided_subject(train_shifts=train, test_shifts=test)
    reading = GeneralisationGap(robust=False).look(subject, gen=gen())
    loss = {
        s: sum(math.log1p(math.exp(-4 * v)) for v in values) / 4 for s, values in (("train", train), ("test", test))
    }
    assert reading["loss, train"].value == pytest.approx(loss["train"], abs=1e-6)
    assert reading["loss, test"].value == pytest.approx(loss["test"], abs=1e-6)
    assert reading["loss gap"].value == pytest.approx(loss["test"] - loss["train"], abs=1e-6)
    assert reading["error gap"].value == 0.5
    assert reading["loss gap"].low <= reading["loss gap"].value <= reading["loss gap"].high
    assert reading.headline == ("loss gap", "error gap")
    assert "threat" not in reading.settings and "50.0 points higher" in reading.says


def test_no_error_at_all_leaves_an_interval() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 30, test_shifts=[0.2] * 20)
    reading = GeneralisationGap(robust=False).look(subject, gen=gen())
    ends = [(reading[name].low, reading[name].high) for name in ("error, test", "error gap")]
    assert ends[0] == (0.0, pytest.approx(0.1611, abs=5e-5)) and ends[1][0] == pytest.approx(-wilson(0, 30)[1])
    assert ends[1][1] == ends[0][1]


def test_each_split_gives_what_is_asked_for_or_all_that_it_has() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 30, test_shifts=[0.2] * 12)
    for wanted, train, test in ((None, 30, 12), (100, 30, 12), (20, 20, 12), (5, 5, 5)):
        reading = GeneralisationGap(n_examples=wanted, robust=False).look(subject, gen=gen())
        assert (reading["loss, train"].n, reading["loss, test"].n, reading["loss gap"].n) == (train, test, test)
        assert reading["loss gap"].value == pytest.approx(0.0, abs=1e-9) and f"on {train} images" in reading.says


def test_more_test_images_than_training_images_narrow_the_interval() -> None:
    shifts = [0.3, -0.1, 0.2, 0.1, -0.2] * 40
    few, many = (
        GeneralisationGap(robust=False).look(two_sided_subject(train_shifts=shifts[:20], test_shifts=test), gen=gen())
        for test in (shifts[:20], shifts)
    )
    assert many["loss gap"].value == pytest.approx(few["loss gap"].value, abs=1e-9)
    width = [reading["loss gap"].high - reading["loss gap"].low for reading in (few, many)]
    assert width[1] < 0.85 * width[0]  # (1/20 + 1/200)^½ against (2/20)^½: 0.74


def test_attack_of_ones_own() -> None:
    subject = two_sided_subject(train_shifts=[0.3] * 6, test_shifts=[0.1] * 6)
    attack = PGD(threat=Lp("linf", 0.2), steps=10)
    reading = GeneralisationGap(attack=attack).look(subject, gen=gen())
    assert reading.settings["threat"] == "linf:0.2"
    assert reading["robust error, train"].value == 0.0 and reading["robust error, test"].value == 1.0
    assert reading["robust loss, train"].value == pytest.approx(math.log1p(math.exp(-4 * (0.3 - 0.2))), abs=1e-5)


@dataclass(frozen=True)
class Retreat:
    """An attack that makes images safer."""

    name: ClassVar[str] = "retreat"
    threat: Lp

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return x + (2 * y - 1)[:, None, None, None] * torch.tensor([[self.threat.eps, 0.0], [0.0, 0.0]])


def test_a_useless_attack_does_not_lower_the_loss() -> None:
    subject = two_sided_subject(train_shifts=[0.1] * 4, test_shifts=[0.1] * 4)
    reading = GeneralisationGap(attack=Retreat(Lp("l2", 0.1))).look(subject, gen=gen())
    assert reading["robust loss, test"].value == reading["loss, test"].value


def test_the_model_is_left_alone_and_measured_in_eval_mode() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 6, test_shifts=[0.2] * 6)
    model = nn.Sequential(subject.model, nn.Dropout(0.9)).train()
    subject = type(subject)(model, subject.splits, subject.threat)
    random = torch.get_rng_state()
    reading = GeneralisationGap().look(subject, gen=gen())
    assert reading["error, test"].value == 0.0
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_losses_that_are_not_finite_fail() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 4, test_shifts=[0.2] * 4)
    with torch.no_grad():
        subject.model[1].weight.fill_(float("nan"))
    for robust in (False, True):
        assert GeneralisationGap(robust=robust).look(subject, gen=gen()).outcome.status == "failed"


TRAIN, TEST = [0.4, 0.3, 0.25, 0.3, -0.1, 0.4, 0.35], [0.3, -0.2, 0.1, 0.15, 0.4, -0.05, 0.1]


def check_gaps(change: Callable[[Subject], Subject], *, slope: float = 4.0, batch_size: int = 250) -> None:
    """Losses log(1 + e^{−slope · (s − ε)}), wrong where s ≤ ε, for shifts s, with ε = 0 and that of the threat."""
    subject = change(two_sided_subject(train_shifts=TRAIN, test_shifts=TEST))
    straight = PGD(threat=subject.threat, steps=20, random_start=False)
    reading = GeneralisationGap(attack=straight, batch_size=batch_size).look(subject, gen=gen())
    for prefix, eps in (("", 0.0), ("robust ", 0.2)):
        loss, error = (
            [sum(f(s) for s in shifts) / 7 for shifts in (TRAIN, TEST)]
            for f in (lambda s: math.log1p(math.exp(-slope * (s - eps))), lambda s: float(s <= eps))  # noqa: B023
        )
        for name, (train, test), tolerance in ((f"{prefix}loss", loss, 1e-5), (f"{prefix}error", error, 1e-12)):
            assert reading[f"{name}, train"].value == pytest.approx(train, rel=tolerance)
            assert reading[f"{name}, test"].value == pytest.approx(test, rel=tolerance)
            assert reading[f"{name} gap"].value == pytest.approx(test - train, rel=10 * tolerance)
            assert test > train


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_the_same_problem_told_otherwise(twin: Callable[[Subject], Subject]) -> None:
    """Losses in closed form, whatever the order, the names of the classes, or where the pixels stand."""
    check_gaps(twin)


@pytest.mark.parametrize(("scale", "shift"), [(0.1, 0.0), (1.0, 7.0), (5.0, -9.0)])
def test_losses_see_the_scale_of_the_logits_and_not_their_offset(scale: float, shift: float) -> None:
    check_gaps(lambda subject: scaled(subject, scale, shift), slope=4 * scale)


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_a_batch_does_not_count(size: int) -> None:
    check_gaps(lambda subject: subject, batch_size=size)
