"""Exact margins of linear classifiers, against the formula and the SVM of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import gen
from sklearn.svm import LinearSVC
from torch import nn

from robustlens.core.types import Split, Splits, Subject
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.lenses.linear_margins import LinearMargins
from robustlens.results.panels import Gallery, Histogram
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp


@pytest.fixture(scope="module")
def zeros_and_ones() -> Splits:
    return load(DataConfig(source="digits", classes=(0, 1)))


def look(model: nn.Module, splits: Splits, **settings: object) -> Reading:
    subject = Subject(model.eval(), splits, Lp("l2", 1.0))
    return LinearMargins(**settings).look(subject, gen=gen())  # type: ignore[arg-type]


def linear(inputs: int, classes: int, *, bias: bool) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes, bias=bias))


def arrays(split: Split) -> tuple[np.ndarray, np.ndarray]:
    batch = split.batch(torch.arange(len(split)))
    return batch.x.flatten(1).double().numpy(), batch.y.numpy()


@pytest.mark.parametrize("bias", [False, True])
def test_binary_margins_and_the_svm_beside_them(zeros_and_ones: Splits, bias: bool) -> None:
    model = linear(64, 2, bias=bias)
    reading = look(model, zeros_and_ones)
    w = (model[1].weight[1] - model[1].weight[0]).detach().double().numpy()
    b = float((model[1].bias[1] - model[1].bias[0]).detach()) if bias else 0.0
    for name in ("train", "test"):
        x, y = arrays(getattr(zeros_and_ones, name))
        margins = (2 * y - 1) * (x @ w + b) / np.linalg.norm(w)
        assert reading[f"minimum margin, {name}"].value == pytest.approx(margins.min(), rel=1e-4)
        assert reading[f"average margin, {name}"].value == pytest.approx(abs(margins).mean(), rel=1e-5)
        assert reading[f"mean signed margin, {name}"].value == pytest.approx(margins.mean(), abs=1e-5)
        assert reading[f"error, {name}"].value == (margins <= 0).mean()
    x, y = arrays(zeros_and_ones.train)
    if bias:
        assert (
            reading["largest minimum margin"].value
            > look(linear(64, 2, bias=False), zeros_and_ones)["largest minimum margin"].value
        )
    else:
        svm = LinearSVC(loss="hinge", C=1e4, fit_intercept=False, tol=1e-6, max_iter=1_000_000).fit(x, y).coef_[0]
        least = ((2 * y - 1) * (x @ svm)).min() / np.linalg.norm(svm)
        assert reading["largest minimum margin"].value == pytest.approx(least, rel=1e-3)
        assert reading["cosine with the SVM"].value == pytest.approx(
            w @ svm / np.linalg.norm(w) / np.linalg.norm(svm), abs=1e-3
        )
    assert reading.outcome.status == "ok" and reading["minimum margin, train"].nature == "exact"
    histogram = next(panel for panel in reading.panels if isinstance(panel, Histogram))
    assert sum(histogram.counts["train, SVM"]) == len(y)


def test_of_many_classes_the_nearest_tie_counts() -> None:
    splits = load(DataConfig(source="digits"))
    model = linear(64, 10, bias=True)
    reading = look(model, splits)
    x, y = arrays(splits.test)
    weight, bias = (p.detach().double().numpy() for p in (model[1].weight, model[1].bias))
    z = x @ weight.T + bias
    margins = np.empty(len(x))
    for i, row in enumerate(z):
        top = row.argmax()
        ways = [(row[top] - row[k]) / np.linalg.norm(weight[top] - weight[k]) for k in range(10) if k != top]
        margins[i] = min(ways) if top == y[i] else -min(ways)
    assert reading["minimum margin, test"].value == pytest.approx(margins.min(), rel=1e-4)
    assert reading["average margin, test"].value == pytest.approx(abs(margins).mean(), rel=1e-4)
    assert not any("SVM" in q.name or "largest" in q.name for q in reading.quantities), "that is for two classes"


def test_the_size_of_the_weights_changes_nothing(zeros_and_ones: Splits) -> None:
    model = linear(64, 2, bias=False)
    once = look(model, zeros_and_ones)
    with torch.no_grad():
        model[1].weight.mul_(1000)
    again = look(model, zeros_and_ones)
    for a, b in zip(once.quantities, again.quantities, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4), a.name


def test_pictures_are_on_the_boundary(zeros_and_ones: Splits) -> None:
    model = linear(64, 2, bias=False)
    with torch.no_grad():
        model[1].weight[0] = 0
        batch = zeros_and_ones.train.batch(torch.arange(len(zeros_and_ones.train)))
        images, labels = batch.x, batch.y
        model[1].weight[1] = images[labels == 1].mean(0).flatten() - images[labels == 0].mean(0).flatten()
    reading = look(model, zeros_and_ones)
    gallery = next(panel for panel in reading.panels if isinstance(panel, Gallery))
    assert [caption.partition(":")[0] for caption in gallery.captions] == [
        "0, nearest",
        "0, usual",
        "1, nearest",
        "1, usual",
    ]
    assert gallery.header[1] == "on the boundary"
    foot = torch.from_numpy(gallery.images[0, 1].copy()).float().permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        there, usual = model(foot)[0, 1], model(images)[:, 1].abs().mean()
    assert abs(float(there)) < 0.05 * float(usual)


def test_a_network_that_bends_is_told(zeros_and_ones: Splits) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    reading = look(model, zeros_and_ones)
    assert reading.outcome.status == "unreliable" and "not linear in the pixels" in reading.outcome.why
    assert reading["average margin, train"].nature == "estimate"


def test_classes_that_no_hyperplane_separates_have_no_svm() -> None:
    points = torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.5, 0.5], [0.5, 0.4]]).view(-1, 1, 1, 2)
    split = Split(points, torch.tensor([1, 1, 0, 0]))
    model = linear(2, 2, bias=True)
    reading = look(model, Splits("mixed", split, split, split, ("no", "yes")))
    assert reading.outcome.status == "ok" and "largest minimum margin" not in {q.name for q in reading.quantities}
