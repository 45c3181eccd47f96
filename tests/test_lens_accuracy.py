"""Robust accuracy against closed forms, and models that only look robust."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from twins import TWINS, scaled

from robustlens.attacks.pgd import PGD
from robustlens.core.discovery import build, describe
from robustlens.core.steady import unsteadiness
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.accuracy import Accuracy, at_radius
from robustlens.lenses.oracle import linear_subject, two_sided_subject
from robustlens.results.errors import InputError
from robustlens.results.intervals import wilson
from robustlens.results.panels import Curve, Gallery, Table
from robustlens.threats.lp import Lp


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_model(subject: Subject, model: nn.Module) -> Subject:
    return Subject(model, subject.splits, subject.threat)


def test_oracles() -> None:
    for oracle in Accuracy.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        assert reading.outcome.status == "ok", reading.outcome.why
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_linear_model_at_every_radius(norm: str, dual: int) -> None:
    """Right under attack exactly where the margin exceeds eps · ‖w₁ − w₀‖ in the dual norm (the box is far away)."""
    draw = torch.Generator().manual_seed(516)  # no ℓ2 distance within 2 % of a radius, as near as ten steps come
    images = 0.5 + 0.1 * torch.randn(200, 1, 3, 3, generator=draw).clamp(-2, 2)
    weight = torch.randn(2, 9, generator=draw)
    bias = torch.tensor([0.0, float((weight[0] - weight[1]).sum()) / 2])
    score = (images.flatten(1).double() @ (weight[1] - weight[0]).double()) + float(bias[1])
    y = (score + 0.05 * torch.randn(200, generator=draw) > 0).long()
    size = float(torch.linalg.vector_norm((weight[1] - weight[0]).double(), ord=dual))
    distance = ((2 * y - 1) * score / size).numpy()
    radii = (0.01, 0.02, 0.05)
    assert min(np.abs(distance - r).min() for r in (0.0, *radii)) > 1e-6  # no example sits on a threshold
    split = Split(images, y)
    subject = linear_subject(weight, bias, train=split, test=split, threat=Lp(norm, 0.05))
    reading = Accuracy(radii=radii, batch_size=64, pictures=3).look(subject, gen=gen())
    curve = reading.panels[0]
    assert isinstance(curve, Curve) and curve.y_range == (0.0, 1.0)
    assert curve.series[0].x.tolist() == [0.0, *radii]
    truth = [(distance > r).sum() for r in (0.0, *radii)]
    assert curve.series[0].y.tolist() == pytest.approx([t / 200 for t in truth], abs=1e-12)
    assert curve.series[1].y.tolist() == pytest.approx([t / truth[0] for t in truth], abs=1e-12)
    final = reading["robust accuracy"]
    assert (final.low, final.high) == wilson(int(truth[-1]), 200) and final.nature == "upper bound"
    assert reading["conditional robust accuracy"].n == truth[0]


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors the first pixel at ½, as far as the threat allows: a stub for counting by hand."""

    name: ClassVar[str] = "flip"
    threat: Lp

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        moved = x.clone()
        moved[:, 0, 0, 0] = 1 - x[:, 0, 0, 0]
        return moved


def test_conditional_and_class_counts_by_hand() -> None:
    """Six of eight are right; mirroring a pixel at ½ ± s changes it by 2 s, and turns it if s of that is allowed."""
    shifts = [0.1, 0.1, 0.3, 0.3, 0.3, -0.1, -0.1, 0.1]  # classes 0 1 0 1 0 1 0 1
    subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
    attack = Flip(threat=Lp("linf", 0.4))
    reading = Accuracy(attack=attack, radii=(0.4,)).look(subject, gen=gen())
    # At s = 0.1 the change is 0.2; at s = 0.3 it is cut from 0.6 to 0.4 and ends 0.1 beyond the boundary: all fall.
    assert reading["clean accuracy"].value == 6 / 8
    assert reading["robust accuracy"].value == 0.0
    weaker = dataclasses.replace(attack, threat=Lp("linf", 0.25))
    reading = Accuracy(attack=weaker).look(subject, gen=gen())
    assert reading["robust accuracy"].value == 3 / 8
    assert reading["conditional robust accuracy"].value == 3 / 6
    classes = reading.panels[2]
    assert isinstance(classes, Table)
    assert classes.rows == (("0", 4, 3 / 4, 2 / 4, 2 / 3), ("1", 4, 3 / 4, 1 / 4, 1 / 3))


def test_an_example_that_fell_stays_fallen() -> None:
    """An attack that works at small radii alone must not make the curve rise."""

    @dataclasses.dataclass(frozen=True)
    class SmallOnly:
        name: ClassVar[str] = "small"
        threat: Lp

        def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
            if self.threat.eps == 0.2:
                return x
            return PGD(threat=self.threat, steps=20, loss="margin").perturb(model, x, y, gen=gen)

    subject = two_sided_subject(train_shifts=[0.04, 0.3], test_shifts=[0.04, 0.3])
    reading = Accuracy(attack=SmallOnly(Lp("l2", 0.2))).look(subject, gen=gen())
    assert reading.panels[0].series[0].y.tolist() == [1.0, 0.5, 0.5, 0.5, 0.5]
    gallery = reading.panels[3]
    assert gallery.captions[0].startswith("0 → 1, distance 0.05") and gallery.captions[1].startswith("1 → 1 (holds)")


def test_pictures() -> None:
    subject = two_sided_subject(train_shifts=[0.1] * 5, test_shifts=[-0.1, 0.1, 0.1, 0.3, 0.1])
    reading = Accuracy(pictures=3, batch_size=2).look(subject, gen=gen())
    gallery = reading.panels[3]
    assert isinstance(gallery, Gallery)
    assert gallery.images.shape == (3, 3, 2, 2, 1) and gallery.images.dtype == np.uint8
    k = int(gallery.header[2].split("× ")[1])
    clean, attacked, difference = (gallery.images[:, i].astype(float) / 255 for i in range(3))
    np.testing.assert_allclose(difference, 0.5 + k * (attacked - clean), atol=(2 * k + 1) / 255)
    assert difference.min() >= 0.0 and difference.max() <= 1.0
    assert len(Accuracy(pictures=0).look(subject, gen=gen()).panels) == 3


class Saturated(nn.Module):
    """Gradients that vanish in float32: tanh of a thousand times the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(1e4 * self.inner(x))


class Noisy(Saturated):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits + 0.1 * torch.randn_like(logits)


def test_masked_and_random_models_are_unreliable() -> None:
    subject = two_sided_subject(train_shifts=[0.3] * 8, test_shifts=[0.3] * 8)
    masked = Accuracy().look(with_model(subject, Saturated(subject.model)), gen=gen())
    assert masked.outcome.status == "unreliable" and "gradient masking" in masked.outcome.why
    assert masked["share of useless gradients"].value == 1.0
    noisy = Accuracy().look(with_model(subject, Noisy(subject.model)), gen=gen())
    assert noisy.outcome.status == "unreliable" and "different answers" in noisy.outcome.why


class NoisyElsewhere(Saturated):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits + 0.1 * torch.randn_like(logits) * (x != x[:1]).flatten(1).any(1)[:, None]


def test_chance_is_noticed_beside_the_first_image() -> None:
    subject = two_sided_subject(train_shifts=[0.3] * 8, test_shifts=[0.3] * 8)
    x = subject.splits.test.batch(torch.arange(8)).x
    assert unsteadiness(subject.model, x) == 0.0 < 0.01 < unsteadiness(NoisyElsewhere(subject.model), x)


def test_a_failing_attack_is_noticed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Idle:
        name: ClassVar[str] = "idle"
        threat: Lp

        def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
            return x

    subject = two_sided_subject(train_shifts=[0.1] * 8, test_shifts=[0.1] * 8)
    reading = Accuracy(attack=Idle(Lp("l2", 0.2))).look(subject, gen=gen())
    assert reading["robust accuracy"].value == 1.0 and reading["accuracy without limit"].value == 1.0
    assert reading.outcome.status == "unreliable" and "freely" in reading.outcome.why


def test_steps_grow_with_the_radius() -> None:
    attack = PGD(threat=Lp("linf", 8 / 255), step_size=2 / 255)
    larger = at_radius(attack, 16 / 255)
    assert larger.threat == Lp("linf", 16 / 255) and larger.step_size == pytest.approx(4 / 255)
    assert at_radius(attack, 0.0).threat.eps == 0.0


def test_the_model_is_left_alone() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 6, test_shifts=[0.2] * 6)
    model = nn.Sequential(nn.BatchNorm2d(1), subject.model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    Accuracy().look(with_model(subject, model), gen=gen())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nan_models_nothing_right_and_wrong_settings() -> None:
    subject = two_sided_subject(train_shifts=[-0.1] * 4, test_shifts=[-0.1] * 4)
    reading = Accuracy().look(subject, gen=gen())
    assert reading["robust accuracy"].value == 0.0 and reading["robust accuracy"].high > 0.4
    assert "conditional robust accuracy" not in [q.name for q in reading.quantities]
    with torch.no_grad():
        subject.model[1].weight.fill_(float("nan"))
    reading = Accuracy().look(subject, gen=gen())
    assert reading["clean accuracy"].value == 0.0 and reading.outcome.status == "unreliable"
    for wrong in ({"radii": ()}, {"radii": (-1.0,)}, {"split": "tests"}):
        with pytest.raises(InputError, match="expected"):
            Accuracy(**wrong)


def test_no_radius_and_settings_that_come_back() -> None:
    subject = two_sided_subject(train_shifts=[0.2] * 4, test_shifts=[0.2] * 4)
    still = Subject(subject.model, subject.splits, Lp("l2", 0.0))
    reading = Accuracy().look(still, gen=gen())
    assert reading["robust accuracy"].value == 1.0 and reading.panels[0].series[0].x.tolist() == [0.0]
    for lens in Accuracy.examples():
        assert build("lens", describe(lens)) == lens


def test_samples_ignore_the_generator() -> None:
    shifts = np.linspace(-0.1, 0.4, 60).tolist()
    subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
    lens = Accuracy(n_examples=20)
    one, other = (lens.look(subject, gen=torch.Generator().manual_seed(s))["clean accuracy"] for s in (1, 2))
    assert one == other and one.n == 20


def test_colour_and_odd_channels() -> None:
    for channels, panels in ((3, 4), (2, 3)):
        split = Split(torch.rand(6, channels, 2, 2, generator=gen()), torch.arange(6) % 2)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4 * channels, 2))
        subject = Subject(model, Splits("noise", split, split, split, ("cat", "dog")), Lp("linf", 0.1))
        assert len(Accuracy(radii=(0.1,)).look(subject, gen=gen()).panels) == panels


#: Signed ℓ2 distances to the boundary, none within 5 % of a quarter of 0.1.
DISTANCES = (-0.04, 0.01, 0.03, 0.045, 0.06, 0.068, 0.09, 0.12, 0.2, 0.3)


def orthogonal_subject() -> Subject:
    """Four classes with orthonormal rows; image i lies DISTANCES[i] from the boundary to its nearest class.

    With x − ½ = Σ a_k w_k + something orthogonal to all rows, class k has the logit 6 a_k, and the boundary between two
    classes lies |a_y − a_k| / √2 away. a is √2 · distance for y, 0 for the next class and −0.4 for the other two.
    """
    draw = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64)).Q.T
    y = torch.arange(40) % 4
    distance = torch.tensor(DISTANCES, dtype=torch.float64).repeat_interleave(4)
    a = torch.full((40, 4), -0.4, dtype=torch.float64)
    each = torch.arange(40)
    a[each, y], a[each, (y + 1) % 4] = 2**0.5 * distance, 0.0
    x = 0.5 + a @ basis[:4] + 0.02 * torch.randn(40, 12, generator=draw, dtype=torch.float64) @ basis[4:]
    assert x.min() > 0.05 and x.max() < 0.95
    split = Split(x.float().view(40, 1, 4, 4), y)
    weight, bias = 6 * basis[:4], -3 * basis[:4].sum(1)
    return linear_subject(weight, bias, train=split, test=split, threat=Lp("l2", 0.1))


def check_distances(subject: Subject, lens: Accuracy) -> None:
    reading = lens.look(subject, gen=gen())
    curve = reading.panels[0]
    truth = [sum(d > r for d in DISTANCES) / 10 for r in (0.0, 0.025, 0.05, 0.075, 0.1)]
    assert curve.series[0].y.tolist() == pytest.approx(truth, abs=1e-12) and truth[0] > truth[-1]
    assert curve.series[1].y.tolist() == pytest.approx([t / 0.9 for t in truth], abs=1e-12)
    assert reading["robust accuracy"].value == 0.3 and reading["robust accuracy"].n == 40
    assert reading["accuracy without limit"].value == 0.0
    classes = {row[0]: row[1:] for row in reading.panels[2].rows}
    assert set(classes) == set("0123")
    assert all(row == (10, 0.9, 0.3, pytest.approx(1 / 3)) for row in classes.values())


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_the_same_problem_told_otherwise(twin: Callable[[Subject], Subject]) -> None:
    """Counts by distance, whatever the order, the names of the classes, or where the pixels stand."""
    subject = orthogonal_subject()
    other = twin(subject)
    x, y = other.splits.test.images, other.splits.test.labels
    assert not (torch.equal(x, subject.splits.test.images) and torch.equal(y, subject.splits.test.labels))
    check_distances(other, Accuracy())


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1.0, 7.0), (20.0, -40.0)])
def test_the_scale_and_the_offset_of_the_logits_do_not_count(scale: float, shift: float) -> None:
    check_distances(scaled(orthogonal_subject(), scale, shift), Accuracy())


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_size_of_a_batch_does_not_count(size: int) -> None:
    attack = PGD(threat=Lp("l2", 0.1), steps=10, loss="margin", early_stop=True)
    check_distances(orthogonal_subject(), Accuracy(batch_size=size, attack=attack))
