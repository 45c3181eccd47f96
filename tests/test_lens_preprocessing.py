"""Networks that are given the wrong images, labels or mode are recognised, and honest ones are left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import comb

import pytest
import torch
from conftest import DATA, NETWORKS, gen, needs
from small_runs import fresh
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.core.types import Split, Splits, Subject
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.lenses.preprocessing import Preprocessing
from robustlens.results.paired import tail
from robustlens.results.panels import Table
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp

IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
HALF = 0.5, 0.5


@cache
def digits() -> Splits:
    return load(DataConfig(source="digits"))


@cache
def colours() -> Splits:
    """Digits tinted red, green or blue: 30 classes, of which a grey network can tell ten."""
    parts = []
    for part in (digits().train, digits().valid, digits().test):
        tint = torch.arange(len(part)) % 3
        weight = torch.full((len(part), 3, 1, 1), 0.4)
        weight[torch.arange(len(part)), tint] = 1
        parts.append(Split(part.images * weight, 10 * tint + part.labels))
    return Splits("tinted", *parts, classes=tuple(map(str, range(30))))


@cache
def trained(tinted: bool = False, hidden: int = 400, seed: int = 0, examples: int = 1200) -> nn.Module:
    """A network of one hidden layer with BatchNorm: random features, and on them the best linear layer in squares."""
    splits = colours() if tinted else digits()
    x, y = splits.train.images[:examples], splits.train.labels[:examples]

    def build() -> nn.Module:
        features = nn.Flatten(), nn.Linear(x[0].numel(), hidden), nn.BatchNorm1d(hidden, momentum=None), nn.ReLU()
        return nn.Sequential(*features, nn.Linear(hidden, len(splits.classes)))

    model = fresh(build, seed)
    with torch.no_grad():
        model[:3](x)
        h = model.eval()[:4](x).double()
        targets = F.one_hot(y, len(splits.classes)).double() - 1 / len(splits.classes)
        ridge = h.T @ h + 3 * torch.eye(hidden).double()
        model[4].weight.copy_(5 * torch.linalg.solve(ridge, h.T @ targets).T)
        model[4].bias.zero_()
    return model


class Given(nn.Module):
    """A network that is given ``before(x)``, and whose answer is ``after`` of what it says."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


def same(value: Tensor) -> Tensor:
    return value


def look(
    model: nn.Module,
    before: Callable[[Tensor], Tensor] = same,
    after: Callable[[Tensor], Tensor] = same,
    splits: Splits | None = None,
    **fields: object,
) -> Reading:
    subject = Subject(Given(model, before, after).eval(), splits or digits(), Lp("linf", 0.1))
    return Preprocessing(**fields).look(subject, gen=gen())


def right(model: nn.Module, splits: Splits) -> float:
    part = splits.test
    with torch.no_grad():
        return float((model(part.images).argmax(1) == part.labels).float().mean())


def test_the_networks_have_learnt() -> None:
    assert right(trained(), digits()) > 0.93 and right(trained(True), colours()) > 0.85


GREY = [
    (lambda x: x / 255, "gain from pixels to 255", "pixels from 0 to 255"),
    (lambda x: 0.3081 * x + 0.1307, "gain from normalising", "expects normalised images"),
    (lambda x: 0.5 * x + 0.5, "gain from normalising", "expects normalised images"),
    (lambda x: (x - 0.5) / 0.5, "gain from undoing", "normalised twice"),
]


@pytest.mark.parametrize(("before", "name", "words"), GREY)
def test_pixels_of_another_convention(before: Callable[[Tensor], Tensor], name: str, words: str) -> None:
    """The network inside is honest, so undoing ``before`` gives all of its accuracy back."""
    reading = look(trained(), before)
    assert reading.outcome.status == "unreliable" and words in reading.outcome.why, reading.outcome.why
    assert reading["signs of misuse"].value == 1
    regained = reading["clean accuracy"].value + reading[name].value
    assert regained == pytest.approx(look(trained())["clean accuracy"].value, abs=0.03)


COLOUR = [
    (lambda x: x.flip(1), "other channels", "blue, green, red"),
    (lambda x: x * IMAGENET[1] + IMAGENET[0], "normalising", "put the normalisation inside"),
    (lambda x: (x - IMAGENET[0]) / IMAGENET[1], "undoing", "normalised twice"),
]


@pytest.mark.parametrize(("before", "kind", "words"), COLOUR)
def test_colours_of_another_convention(before: Callable[[Tensor], Tensor], kind: str, words: str) -> None:
    reading = look(trained(True), before, splits=colours())
    assert reading.outcome.status == "unreliable" and words in reading.outcome.why, reading.outcome.why
    assert reading[f"gain from {kind}"].value > 0.2


def test_labels_that_are_shifted_or_sorted_as_text() -> None:
    for after in (lambda z: z.roll(1, 1), lambda z: z.roll(-1, 1)):
        reading = look(trained(), after=after)
        assert "numbers the classes otherwise" in reading.outcome.why and "labels " in reading.outcome.why
        assert reading["gain from other labels"].value > 0.8
    order = torch.tensor([int(name) for name in sorted(map(str, range(30)))])
    reading = look(trained(True), after=lambda z: z[:, order], splits=colours(), n_examples=360)
    assert reading.outcome.status == "unreliable" and "classes in another order" in reading.outcome.why
    (found,) = [row for row in reading.panels[0].rows if row[0] == "classes in another order"]
    assert found[6] in (179, 180), "judged on the images that the order was not fitted to"


def test_two_mistakes_at_once_are_both_told() -> None:
    reading = look(nn.Sequential(trained(), nn.Softmax(1)), lambda x: x / 255)
    assert reading["signs of misuse"].value == 2
    assert "0 to 255" in reading.outcome.why and "remove the last softmax" in reading.outcome.why


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


class Counting(nn.Module):
    """Counts its passes in a buffer, in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


def test_training_mode() -> None:
    reading = look(nn.Sequential(Dropping(), trained()))
    assert "F.dropout" in reading.outcome.why and reading["change when asked again"].value > 0.05
    assert "BatchNorm" not in reading.outcome.why

    batch = nn.Sequential(*trained())
    batch[2] = nn.BatchNorm1d(400, track_running_stats=False)
    reading = look(batch)
    assert "other images in its batch" in reading.outcome.why and reading["change when asked again"].value == 0
    assert reading["change in another batch"].value > 0.05

    counting = Counting()
    reading = look(nn.Sequential(counting, trained()))
    assert "changes the network's buffers" in reading.outcome.why and reading["signs of misuse"].value == 1
    assert counting.passes == 0, "left as it was"


def test_probabilities_and_their_logarithms() -> None:
    reading = look(trained(), after=lambda z: z.softmax(1))
    assert "remove the last softmax" in reading.outcome.why
    assert reading["answers that are probabilities"].value == 1
    reading = look(trained(), after=lambda z: z.log_softmax(1))
    assert reading.outcome.status == "ok" and "harmless" in reading.says
    assert "harmless" not in look(trained()).says


def test_every_row_of_the_tables_says_what_it_means() -> None:
    reading = look(trained(True), lambda x: x.flip(1), splits=colours())
    tries, facts = reading.panels
    assert isinstance(tries, Table) and isinstance(facts, Table)
    verdicts = {row[0]: row[-1] for row in tries.rows}
    assert len(verdicts) == 13 and verdicts["channels in the order blue, green, red"] == "finding"
    assert {row[-1] for row in facts.rows} == {"as it should be"}
    before = {row[1] for row in tries.rows if row[6] == 256}
    assert before == {reading["clean accuracy"].value}


def test_the_chance_of_a_false_alarm_is_what_is_promised() -> None:
    """Exactly: where both tries are equally good, a try is called better with probability ≤ alpha / tries.

    Of d images on which they differ the number won is Binomial(d, ½), for every d.
    """
    for tries in (10, 13):
        for d in (1, 9, 14, 40, 256):
            alarms = sum(comb(d, won) / 2**d for won in range(d + 1) if tail(won, d) <= 1e-3 / tries)
            assert alarms <= 1e-3 / tries
    assert any(tail(won, 14) <= 1e-3 / 13 for won in range(15)), "and it can be found at all"


def test_no_false_alarm_on_honest_networks() -> None:
    """Of 60 networks, weak and strong, none is accused."""
    accused, accuracies = [], []
    for seed in range(12):
        for hidden, examples in ((10, 100), (20, 1200), (60, 300), (150, 150), (400, 1200)):
            reading = look(trained(False, hidden, seed, examples))
            accuracies.append(reading["clean accuracy"].value)
            if reading.outcome.status != "ok":
                accused.append((hidden, examples, accuracies[-1], reading.outcome.why))
    assert accused == []
    assert min(accuracies) < 0.6 and max(accuracies) > 0.95


@needs(DATA / "mnist", NETWORKS)
def test_published_networks_are_honest() -> None:
    from test_published_003 import published

    splits = load(DataConfig(source="mnist", train=10, valid=10, test=1000))
    for name in ("std", "lcr", "amr"):
        subject = Subject(published(name), splits, Lp("l2", 1.5))
        assert Preprocessing().look(subject, gen=gen()).outcome.status == "ok", name


def test_too_few_images_to_say_anything() -> None:
    reading = look(trained(), lambda x: x / 255, n_examples=1)
    assert reading["signs of misuse"].value == 0 and reading.outcome.status == "ok"


def test_images_of_any_number_of_channels() -> None:
    """Usual statistics are known for one and for three channels; others are tried without them."""
    split = Split(torch.rand(20, 2, 4, 4, generator=gen()), torch.arange(20) % 3)
    model = fresh(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    splits = Splits("two channels", split.first(0), split.first(0), split, ("a", "b", "c"))
    reading = Preprocessing().look(Subject(model, splits, Lp("l2", 0.5)), gen=gen())
    assert reading.outcome.status == "ok" and "gain from normalising" in {q.name for q in reading.quantities}
