"""Generalisation bounds by hand on a linear model and a small chain, and the lemma on networks that bend."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.bound import GeneralizationBound
from robustlens.lenses.capacity import bartlett, intrinsic_dimension, layer_facts, log_sum, smallest_row_distance
from robustlens.lenses.nearest import nearest_boundary
from robustlens.lenses.oracle import linear_subject, two_sided_subject
from robustlens.linalg.layers import ConvOperator, LinearOperator, operators
from robustlens.linalg.segments import walk
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


def subject(model: nn.Module, n: int = 30, side: int = 6) -> Subject:
    x, y = torch.rand(n, 1, side, side, generator=gen(1)), torch.arange(n) % 3
    split = Split(x, y)
    return Subject(model, Splits("noise", split, split, split, ("a", "b", "c")), Lp("l2", 0.1))


def chain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        for layer in layers[1::2]:
            nn.init.normal_(layer.weight, std=0.5)
        return nn.Sequential(*layers)


def pooled() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1),
            nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten(), nn.Linear(12, 3),
        ).double().eval()  # fmt: skip


def segment(side: int = 6) -> tuple[Tensor, Tensor]:
    x, other = torch.rand(2, 1, 1, side, side, generator=gen(4), dtype=torch.float64)
    return x, other - x


def table(reading: object, title: str) -> dict[object, tuple[object, ...]]:
    (found,) = [panel for panel in reading.panels if panel.title.startswith(title)]
    return {row[0]: row for row in found.rows}


def test_oracles() -> None:
    for oracle in GeneralizationBound.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name


def test_every_factor_of_a_chain_by_hand() -> None:
    where = subject(chain())
    lens = GeneralizationBound(gamma=0.5, dimension=3.0, constant=2.0)
    reading = lens.look(where, gen=gen())
    matrices = [where.model[i].weight.detach().double().numpy() for i in (1, 3, 5)]
    sigma = [np.linalg.svd(w, compute_uv=False) for w in matrices]
    between = min(np.linalg.norm(matrices[2][a] - matrices[2][b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    near = nearest_boundary(where, where.splits.train, torch.arange(30), 250, gen())
    assert near is not None
    u_min = between * sigma[0][-1] * sigma[1][-1] * near.distance
    second = math.sqrt((2 * math.log(2) * (2.0 / 0.1) ** 3 + 2 * math.log(20)) / 30)
    factors = table(reading, "The bound of Theorem 4.1, factor by factor")
    assert factors["∏ σ_min"][1] == pytest.approx(sigma[0][-1] * sigma[1][-1], rel=1e-6)
    assert factors["u_min"][1] == pytest.approx(u_min, rel=1e-6)
    assert factors["first term"][1] == pytest.approx(max(0, 1 - u_min / 0.5), rel=1e-6)
    assert factors["second term"][1] == pytest.approx(second, rel=1e-9)
    assert 10 ** reading["log10 bound"].value == pytest.approx(1 - u_min / 0.5 + second, rel=1e-6)
    assert "vacuous by a factor of 10^1.3" in reading.says
    x = where.splits.train.images.double().numpy()
    rows = [np.linalg.norm(w, axis=1).sum() for w in matrices]
    largest = [s[0] for s in sigma]
    r = math.prod(largest) * sum((a / b) ** (2 / 3) for a, b in zip(rows, largest, strict=True)) ** 1.5
    truth = np.sqrt((x**2).sum()) * r * math.log(36) / (0.5 * 30) + math.sqrt(math.log(20) / 30)
    assert 10 ** reading["log10 bound, Bartlett 2017"].value == pytest.approx(truth, rel=1e-6)


def test_the_last_layer_is_the_one_that_runs_last() -> None:
    class Headed(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.head, self.body = layers[-1], layers[:-1]

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(x))
            return logits

    a, b = (
        GeneralizationBound(pieces=5).look(subject(net), gen=gen(0)).quantities for net in (chain(), Headed(chain()))
    )
    assert [(q.name, q.value) for q in a] == [(q.name, q.value) for q in b]


def test_logarithms_survive_what_numbers_do_not() -> None:
    """k = 4,000 dimensions: (C / ε)^k is 10^5204."""
    reading = GeneralizationBound(dimension=4000.0, constant=2.0).look(subject(chain()), gen=gen())
    expected = (4000 * math.log10(20) + math.log10(2 * math.log(2) / 30)) / 2
    assert reading["log10 bound"].value == pytest.approx(expected, abs=1e-9)
    assert f"10^{expected:.1f}" in reading.says
    assert table(reading, "The bound of")["(C_X / ε)^k"][1] is None
    assert log_sum([-math.inf, 400.0, 400.0]) == pytest.approx(400 + math.log10(2))


def test_a_zero_singular_value_leaves_the_first_term_whole() -> None:
    model = chain()
    with torch.no_grad():
        model[3].weight[1] = model[3].weight[0]
    reading = GeneralizationBound().look(subject(model), gen=gen())
    factors = table(reading, "The bound of")
    assert "log10 u_min" not in [q.name for q in reading.quantities]
    assert factors["first term"][1] == 1.0 and factors["u_min"][2] is None
    assert "0 to rounding" in factors["σ_min of 3"][3]


def test_scaling_the_last_layer_changes_no_bound() -> None:
    readings = []
    for scale in (1.0, 8.0):
        model = chain()
        with torch.no_grad():
            model[5].weight.mul_(scale)
            model[5].bias.mul_(scale)
        readings.append(GeneralizationBound().look(subject(model), gen=gen()))
    for name in ("log10 bound", "log10 bound, Bartlett 2017", "log10 bound, Sokolić 2017"):
        assert readings[1][name].value == pytest.approx(readings[0][name].value, abs=1e-6), name


def test_images_far_apart_need_a_ball_each() -> None:
    """Corners of a square, 0.6 apart, and three copies of one of them: 4 balls of radius 0.29, 1 of radius 0.5."""
    pixels = torch.tensor([[0.2, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.8], [0.2, 0.2], [0.2, 0.2], [0.2, 0.2]])
    split = Split(pixels.view(7, 1, 1, 2), torch.tensor([0, 1, 0, 1, 0, 0, 0]))
    for eps, balls in ((0.29, 4), (0.5, 1)):
        where = linear_subject(
            torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([0.0, -2.0]), train=split, test=split,
            threat=Lp("l2", eps),
        )  # fmt: skip
        least = GeneralizationBound().look(where, gen=gen())["log10 bound, at the very least"]
        truth = math.sqrt((2 * math.log(2) * balls + 2 * math.log(20)) / 7)
        assert 10**least.value == pytest.approx(truth, rel=1e-9) and least.nature == "lower bound"


def test_nearest_boundary_of_a_linear_model_is_exact_and_says_when_it_is_inside() -> None:
    where = two_sided_subject(train_shifts=[0.3, 0.25, -0.15, 0.4], test_shifts=[0.1, 0.1])
    near = nearest_boundary(where, where.splits.train, torch.arange(4), 3, gen())
    assert near is not None and near.distance == pytest.approx(0.15, abs=1e-6)  # a mistake counts as what it answers
    z = where.model(torch.cat([near.x, near.beyond]))[:, 1].detach()
    assert float(z[0]) == pytest.approx(0.6) and abs(float(z[1])) < 1e-6
    reading = GeneralizationBound().look(where, gen=gen())
    assert "does not apply" in table(reading, "The bound of")["v_min"][3]  # 0.15 < eps = 0.2


def test_the_lemma_where_every_bend_is_known() -> None:
    """relu(x₁ − ½) − relu(½ − x₂) from (0, 0) to (1, 1): both units bend at ½, a third at ¼."""
    first, last = nn.Linear(2, 3), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]))
        first.bias.copy_(torch.tensor([-0.5, 0.5, -0.5]))
        last.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]))
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).double()
    found = walk(model, torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 1, 2).double(), pieces=10)
    assert found.bends == pytest.approx((0.25, 0.5), abs=1e-12) and found.reached == 1
    assert found.summed.tolist() == pytest.approx([1.0, 3.0], abs=1e-9)
    assert found.residual < 1e-9


@pytest.mark.parametrize("model", [chain().double(), pooled()], ids=["dense", "pooled"])
def test_the_lemma_on_a_whole_segment(model: nn.Module) -> None:
    """Bends against a fine scan: the slope of the logits changes only where the walk says."""
    x, v = segment()
    found = walk(model, x, v, pieces=1000)
    assert found.reached == 1 and len(found.bends) >= 5 and found.residual < 1e-9
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        logits = model((x + t.view(-1, 1, 1, 1) * v)[:, 0:1])
    kinks = (logits[2:] - 2 * logits[1:-1] + logits[:-2]).abs().amax(1) > 1e-9
    near = np.abs(t[1:-1][kinks].numpy()[:, None] - np.array(found.bends)).min(1)
    assert int(kinks.sum()) >= 5 and near.max() <= 1 / 4000
    short = walk(model, x, v, pieces=3)
    assert short.bends == found.bends[:3] and short.reached == found.bends[2] and short.residual < 1e-9


def test_a_smooth_network_does_not_pass_for_a_piecewise_linear_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Softplus(), nn.Linear(5, 3)).double()
    assert walk(model, *segment(), pieces=100).residual > 1e-6


def test_the_product_of_smallest_values_is_no_lower_bound() -> None:
    """The weak step: W₁ = (1, 1)ᵀ with its second row set to zero, W₂ = (0, 1) have σ's √2 and 1 and the product 0."""
    one, two = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0, 1.0]])
    zeroed = one * torch.tensor([[1.0], [0.0]])
    smallest = float(torch.linalg.svdvals(one)[-1] * torch.linalg.svdvals(two)[-1])
    assert smallest == pytest.approx(2**0.5) and float(two @ zeroed) == 0.0


def test_layers_in_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False), nn.Flatten())
    (conv,) = operators(model, torch.zeros(1, 1, 6, 6))
    assert isinstance(conv, ConvOperator)
    with torch.no_grad():
        dense = model(torch.eye(36).view(36, 1, 6, 6)).T.double().numpy()
    facts = layer_facts(conv)
    values = np.linalg.svd(dense, compute_uv=False)
    assert (facts.largest, facts.smallest) == (pytest.approx(values[0], rel=1e-6), pytest.approx(values[-1], rel=1e-6))
    assert facts.rows == pytest.approx(np.linalg.norm(dense, axis=1).sum(), rel=1e-6) and facts.width == 72
    assert smallest_row_distance(torch.tensor([[3.0, 4.0]])) == 5.0
    zeros = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, stride=2, bias=False), nn.Flatten())
    (conv,) = operators(zeros, torch.zeros(1, 1, 7, 7))
    with torch.no_grad():
        dense = zeros(torch.eye(49).view(49, 1, 7, 7)).T.double().numpy()
    facts = layer_facts(conv)  # rows at the border are shorter
    assert facts.rows == pytest.approx(np.linalg.norm(dense, axis=1).sum(), rel=1e-6) and facts.width == 49
    eye = layer_facts(LinearOperator("eye", torch.eye(4)))
    assert 10 ** bartlett([eye, eye], 2.0, 1.0, 1, math.exp(-1)) == pytest.approx(2 * 4 * 2**1.5 * math.log(4) + 1)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_dimension_of_a_flat_piece(k: int) -> None:
    """A cube of dimension k in 20: the mean over seeds is within 15 % (edges lower it; 1,000 points)."""
    found = []
    for seed in range(3):
        basis = torch.linalg.qr(torch.randn(20, k, generator=gen(seed), dtype=torch.float64)).Q
        points = torch.rand(1000, k, generator=gen(10 + seed), dtype=torch.float64) @ basis.T
        found.append(intrinsic_dimension(torch.cdist(points, points)))
    assert np.mean(found) == pytest.approx(k, rel=0.15)
    assert intrinsic_dimension(torch.zeros(5, 5)) == 1.0


def test_what_has_no_bound_says_why() -> None:
    where = subject(chain())
    lens = GeneralizationBound(n_examples=20)
    empty = Split(where.splits.train.images[:0], where.splits.train.labels[:0])
    cases = {
        "training images": dataclasses.replace(where, splits=dataclasses.replace(where.splits, train=empty)),
        "radius 0": dataclasses.replace(where, threat=Lp("l2", 0.0)),
        "last layer is linear": subject(nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())),
    }
    for why, case in cases.items():
        reading = lens.look(case, gen=gen())
        assert reading.outcome.status == "failed" and why in reading.outcome.why
    flat = chain()
    nn.init.zeros_(flat[5].weight)
    assert lens.look(subject(flat), gen=gen()).outcome.status == "failed"


@pytest.mark.parametrize("change", [{"gamma": 0.0}, {"dimension": -1.0}, {"constant": 0.0}, {"eta": 1.0}])
def test_settings_that_cannot_be_used(change: dict[str, float]) -> None:
    with pytest.raises(InputError):
        GeneralizationBound(**change)
