"""Logit margins by hand, and what must not change when logits are scaled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.local_linearity import LocalLinearity
from robustlens.lenses.margins import LogitMargins, normalised_margin, skewness
from robustlens.lenses.oracle import linear_subject
from robustlens.lenses.shared_bins import histogram
from robustlens.linalg.layers import linear_head
from robustlens.regularizers.average_margin import AverageMargin
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def three_classes(scale: float = 1.0, n: int = 90) -> Subject:
    draw = torch.Generator().manual_seed(3)
    images, y = torch.rand(n, 1, 2, 2, generator=draw), torch.arange(n) % 3
    weight = scale * torch.randn(3, 4, generator=draw)
    return linear_subject(weight, torch.zeros(3), train=Split(images[: n // 2], y[: n // 2]), test=Split(images, y))


def test_oracles() -> None:
    for oracle in LogitMargins.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_margins_by_hand() -> None:
    subject = three_classes()
    reading = LogitMargins(batch_size=7, bins=12, near=0.25).look(subject, gen=gen())
    weight = subject.model[1].weight.detach().double().numpy()
    z = subject.splits.test.images.flatten(1).double().numpy() @ weight.T
    y = subject.splits.test.labels.numpy()
    margins = np.array([row[c] - max(np.delete(row, c)) for row, c in zip(z, y, strict=True)])
    assert reading["mean margin, test"].value == pytest.approx(margins.mean(), abs=1e-6)
    assert reading["mean margin, test"].low < margins.mean() < reading["mean margin, test"].high
    assert reading["spread of margins, test"].value == pytest.approx(margins.std(), abs=1e-6)
    skew = ((margins - margins.mean()) ** 3).mean() / margins.std() ** 3
    assert reading["skewness of margins, test"].value == pytest.approx(skew, abs=1e-5)
    assert reading["share near the boundary, test"].value == (np.abs(margins) < 0.25).mean()
    assert reading["smallest margin, test"].value == pytest.approx(margins.min(), abs=1e-6)
    histogram = reading.panels[0]
    assert len(histogram.edges) == 13
    assert histogram.counts["test"].sum() == 90 and histogram.counts["train"].sum() == 45


def test_margins_in_feature_space_by_hand_whatever_the_rows_measure() -> None:
    class Net(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.head = torch.nn.Linear(2, 3)
            with torch.no_grad():
                self.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, scale], [-3.0, 4.0]]))

        def features(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(x))

    x = torch.tensor([[0.5, 0.25], [0.0, 1.0]]).view(2, 1, 1, 2)
    # Rows of norm 1: (1, 0), (0, 1), (−0.6, 0.8). (0.5, 0.25) → 0.5, 0.25, −0.1; (0, 1) → 0, 1, 0.8.
    split = Split(x, torch.tensor([0, 1]))
    subject = three_classes()
    for scale in (2.0, 50.0):
        asked = Subject(Net(scale), Splits("two", split, split, split, ("a", "b", "c")), subject.threat)
        reading = LogitMargins().look(asked, gen=gen())
        assert reading["mean feature margin, test"].value == pytest.approx((0.25 + 0.2) / 2, abs=1e-7)
        assert "Feature-space margins" in [panel.title for panel in reading.panels]
    assert all("feature" not in each.name for each in LogitMargins().look(subject, gen=gen()).quantities)


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_scale_free_measures_do_not_see_the_scale(scale: float) -> None:
    lens = LogitMargins(by_complexity=True)
    one, other = (lens.look(three_classes(s), gen=gen()) for s in (1.0, scale))
    for name in ("mean normalised margin", "relative spread", "skewness of margins", "mean margin / complexity"):
        assert other[f"{name}, test"].value == pytest.approx(one[f"{name}, test"].value, rel=1e-4), name
    assert other["mean margin, test"].value == pytest.approx(scale * one["mean margin, test"].value, rel=1e-4)


def test_normalised_margin_has_its_bounds() -> None:
    z = torch.tensor([[1.0, -1.0, 0.0], [0.0, 5.0, 5.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 0])
    truth = [1 / 2**0.5, -5 / (50 / 3) ** 0.5, 0.0, 1 / (2 / 3) ** 0.5]
    assert normalised_margin(z, y).tolist() == pytest.approx(truth)
    two = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert float(normalised_margin(two, torch.tensor([0]))) == pytest.approx(2**0.5)


def test_skewness_of_equal_and_of_exponential_values() -> None:
    assert skewness(np.ones(5)) == 0.0
    assert skewness(np.array([0.0, 0.0, 0.0, 1.0])) == pytest.approx(2 / 3**0.5)


def test_samples_and_broken_logits() -> None:
    subject = three_classes()
    assert LogitMargins(n_examples=20).look(subject, gen=gen())["mean margin, train"].n == 20
    with pytest.raises(InputError, match="at least 1"):
        LogitMargins(n_examples=0).look(subject, gen=gen())
    with torch.no_grad():
        subject.model[1].weight.fill_(float("inf"))
    assert LogitMargins().look(subject, gen=gen()).outcome.status == "failed"


def test_equal_margins() -> None:
    split = Split(torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64))
    subject = three_classes()
    subject = Subject(subject.model, Splits("same", split, split, split, ("a", "b", "c")), subject.threat)
    reading = LogitMargins().look(subject, gen=gen())
    assert reading["spread of margins, test"].value == pytest.approx(0.0, abs=1e-12)
    assert reading.panels[0].counts["test"].sum() == 4


def test_margins_that_differ_by_rounding_alone_have_a_histogram() -> None:
    values = {"test": np.full(20, 0.7) + np.arange(20) * 1e-17, "train": np.array([0.7, np.nextafter(0.7, 1)])}
    panel = histogram("", "", values, 30)
    assert panel.edges[0] == pytest.approx(0.2) and {name: c.sum() for name, c in panel.counts.items()} == {
        "test": 20,
        "train": 2,
    }


class Between(torch.nn.Module):
    """Has ``features`` and a linear ``head``, and something between them."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        inner = [torch.nn.Conv2d(1, 6, 3)] if shape == "image" else [torch.nn.Flatten(), torch.nn.Linear(64, 6)]
        self.features, self.shape, self.head = torch.nn.Sequential(*inner), shape, torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.features(x)
        return self.head(inside.mean((2, 3)) if self.shape == "image" else inside.relu())


@pytest.mark.parametrize("shape", ["image", "flat"])
def test_features_that_the_head_does_not_see_are_none(shape: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    net, split = Between(shape).eval(), Split(images, labels)
    assert linear_head(net, images) is None
    with pytest.raises(InputError, match="head"):
        AverageMargin(exact=True).check(net, images)
    asked = Subject(net, Splits("noise", split, split, split, tuple("abcd")), Lp("linf", 0.3))
    reading = LogitMargins().look(asked, gen=gen())
    assert reading.outcome.status == "ok" and not any("feature" in q.name for q in reading.quantities)
    lens = LocalLinearity(n_examples=4, n_norms=2, n_facets=0)
    reading = lens.look(asked, gen=gen())
    assert reading.outcome.status == "ok" and not any("features" in q.name for q in reading.quantities)
