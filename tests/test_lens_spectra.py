"""The spectra lens on small networks, against dense matrices and its own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.spectra import FOLDED, PLAIN, LayerSpectra
from robustlens.lenses.spread import compare_spreads
from robustlens.linalg.layers import Skipped, operators
from robustlens.linalg.spectra import circular_conv_spectrum
from robustlens.results.errors import InputError
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def subject(model: nn.Module, dtype: torch.dtype = torch.float32) -> Subject:
    split = Split(torch.rand(4, 1, 6, 6, generator=gen(), dtype=dtype), torch.arange(4) % 2)
    return Subject(model, Splits("noise", split, split, split, ("a", "b")), Lp("l2", 0.5))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(27, 2),
    )  # fmt: skip


def trained_norm(model: nn.Sequential) -> nn.Sequential:
    """With a BatchNorm that is not the identity."""
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 3.0]))
        norm.running_var.copy_(torch.tensor([0.1, 1.0, 4.0, 0.5]))
    return model


def matrix_of(part: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of an affine map on images (C, H, W), column by column, in float64."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return (part(basis) - part(torch.zeros_like(basis))).flatten(1).T.numpy()


def rows(reading: Reading, title: str) -> list[dict[str, str | float | None]]:
    (table,) = [panel for panel in reading.panels if panel.title == title]
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_numbers_of_a_small_network() -> None:
    model = network()
    reading = LayerSpectra().look(subject(model), gen=gen())
    first = circular_conv_spectrum(model[0].weight, (6, 6)).numpy()
    second = circular_conv_spectrum(model[3].weight, (6, 6), stride=(2, 2)).numpy()
    last = np.linalg.svd(model[5].weight.detach().double().numpy(), compute_uv=False)
    table = rows(reading, PLAIN)
    assert [row["layer"] for row in table] == ["0", "3", "5"]
    assert table[1]["operator"] == "circular operator at 6×6" and table[2]["operator"] == "exact"
    spreads = [first.std(), second.std(), last.std()]
    assert [row["standard deviation"] for row in table] == pytest.approx(spreads)
    assert [row["largest"] for row in table] == pytest.approx([first[0], second[0], last[0]])
    assert [reading[f"spread of singular values, {name}"].value for name in "035"] == pytest.approx(spreads)
    assert reading["mean spread of singular values"].value == pytest.approx(np.mean(spreads))
    assert reading["mean spread, convolutions"].value == pytest.approx(np.mean(spreads[:2]))
    assert reading["mean spread of singular values"].nature == "estimate"  # the circular operator stands for two layers
    curve = reading.panels[0]
    assert all(len(s.x) <= 200 and s.y[0] == max(s.y) for s in curve.series)
    assert curve.series[0].y[-1] == first[-1] and (curve.series[0].x[0], curve.series[0].x[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("folded", [False, True])
def test_norms_and_products_against_the_layers_matrices(folded: bool) -> None:
    model = trained_norm(network()).double().eval()
    reading = LayerSpectra().look(subject(model, dtype=torch.float64), gen=gen())
    parts = [(model[:2] if folded else model[:1], (1, 6, 6)), (model[3:4], (4, 6, 6)), (model[5:], (27,))]
    matrices = [matrix_of(part, shape) for part, shape in parts]
    norms = [np.linalg.norm(matrix, ord=2) for matrix in matrices]
    table, suffix = rows(reading, FOLDED if folded else PLAIN), ", BatchNorm folded in" if folded else ""
    for row, norm in zip(table, norms, strict=True):
        assert row["norm as padded"] == pytest.approx(norm, rel=1e-5)
        assert row["norm as padded"] <= norm * (1 + 1e-12) and norm <= row["upper bound"] * (1 + 1e-12)
        assert row["residual"] is None or row["residual"] < 1e-3
    assert [row["residual"] is None for row in table] == [False, False, True]
    product = reading[f"log10 spectral complexity{suffix}"]
    assert product.value == pytest.approx(sum(map(math.log10, norms)), abs=1e-5)
    assert product.nature == "lower bound" and 0 <= product.residual < 1e-3
    bound = reading[f"log10 product of norm bounds{suffix}"]
    assert bound.nature == "upper bound" and bound.value >= product.value
    assert bound.value == pytest.approx(sum(math.log10(row["upper bound"]) for row in table), abs=1e-12)
    ratios = [np.linalg.norm(m, axis=1).sum() / norm for m, norm in zip(matrices, norms, strict=True)]
    bartlett = math.prod(norms) * sum(ratio ** (2 / 3) for ratio in ratios) ** 1.5
    assert reading[f"log10 Bartlett complexity{suffix}"].value == pytest.approx(math.log10(bartlett), abs=1e-5)
    assert reading[f"largest layer norm{suffix}"].value == pytest.approx(max(norms), rel=1e-5)


def test_folding_changes_only_the_layer_before_the_norm() -> None:
    reading = LayerSpectra().look(subject(trained_norm(network()).eval()), gen=gen())
    plain, folded = rows(reading, PLAIN), rows(reading, FOLDED)
    assert folded[0]["standard deviation"] != plain[0]["standard deviation"]
    assert folded[1:] == plain[1:]
    without = LayerSpectra().look(subject(nn.Sequential(nn.Flatten(), nn.Linear(36, 2))), gen=gen())
    assert len(without.panels) == 2 and not any("BatchNorm" in q.name for q in without.quantities)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_after_an_activation_is_folded_into_nothing(inplace: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 2)
    ).eval()
    kinds = [(part.name, isinstance(part, Skipped)) for part in operators(net, torch.rand(1, 1, 6, 6))]
    assert kinds == [("0", False), ("2", True), ("4", False)]


def test_comparing_spreads() -> None:
    """Of spreads s → 2s, s, s/4: one layer grows by s₁, one shrinks by 3s₃/4."""
    model = network()
    before = LayerSpectra().look(subject(model), gen=gen())
    spreads = [row["standard deviation"] for row in rows(before, PLAIN)]
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[5].weight.div_(4)
    after = LayerSpectra().look(subject(model), gen=gen())
    found = compare_spreads(before, after)
    assert found.growing == pytest.approx((spreads[0], spreads[0], 1))
    assert found.shrinking == pytest.approx((0.75 * spreads[2], 0.75 * spreads[2], 1))
    back = compare_spreads(after, before)
    assert (back.growing, back.shrinking) == (found.shrinking, found.growing)
    assert compare_spreads(before, before) == ((0, 0, 0), (0, 0, 0))
    reshaped = compare_spreads(before, after, table=FOLDED, column="reshaped: standard deviation")
    assert (reshaped.growing.layers, reshaped.shrinking.layers) == (1, 1)
    other = LayerSpectra().look(subject(nn.Sequential(nn.Flatten(), nn.Linear(36, 2))), gen=gen())
    with pytest.raises(InputError, match="the same layers"):
        compare_spreads(before, other)
    with pytest.raises(InputError, match="layer-spectra"):
        compare_spreads(before, Reading("accuracy", ""))


def test_the_model_is_left_alone() -> None:
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    LayerSpectra().look(subject(model), gen=gen())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_scaling_a_layer_scales_its_spectrum() -> None:
    model = network()
    before = LayerSpectra(bound=False).look(subject(model), gen=gen())
    with torch.no_grad():
        model[3].weight.mul_(10)
    after = LayerSpectra(bound=False).look(subject(model), gen=gen())
    gain = after["log10 spectral complexity"].value - before["log10 spectral complexity"].value
    assert gain == pytest.approx(1.0, abs=1e-6)
    assert "log10 product of norm bounds" not in [q.name for q in before.quantities]


def test_zero_layers_and_broken_weights_are_said() -> None:
    model = network()
    nn.init.zeros_(model[3].weight)
    reading = LayerSpectra().look(subject(model), gen=gen())
    assert reading.outcome.status == "ok" and "all zeros" in reading.says
    assert "log10 spectral complexity" not in reading.headline
    nn.init.constant_(model[3].weight, float("nan"))
    assert LayerSpectra().look(subject(model), gen=gen()).outcome.status == "failed"
    assert LayerSpectra().look(subject(nn.Flatten()), gen=gen()).outcome.status == "failed"


def test_what_is_left_out_is_listed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.ConvTranspose2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(36, 2))
    table = rows(LayerSpectra().look(subject(model), gen=gen()), PLAIN)
    assert [row["layer"] for row in table] == ["3", "0", "1"]
    assert all("not measured" in str(row["operator"]) and row["values"] is None for row in table[1:])


@pytest.mark.parametrize("field", ["points", "steps"])
def test_settings_are_checked(field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: expected at least 1"):
        LayerSpectra(**{field: 0})
