"""The spectra lens on small networks, against dense matrices and its own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.spectra import LayerSpectra
from robustlens.linalg.spectra import circular_conv_spectrum
from robustlens.threats.lp import Lp


def subject(model: nn.Module, channels: int = 1) -> Subject:
    split = Split(torch.rand(4, channels, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2)
    return Subject(model, Splits("noise", split, split, split, ("a", "b")), Lp("l2", 0.5))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(27, 2),
    )  # fmt: skip


def padded_matrix(layer: nn.Conv2d) -> np.ndarray:
    """The matrix of a zero-padded convolution on 6 × 6 images, column by column."""
    with torch.no_grad():
        return (layer(torch.eye(36).view(36, 1, 6, 6)) - layer(torch.zeros(1, 1, 6, 6))).flatten(1).T.numpy()


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_oracles() -> None:
    for oracle in LayerSpectra.oracles():
        reading = oracle.lens.look(oracle.subject, gen=gen())
        for name, (value, tolerance) in oracle.expected.items():
            assert reading[name].value == pytest.approx(value, abs=tolerance), name
            assert reading[name].nature == "exact"


def test_numbers_of_a_small_network() -> None:
    model = network()
    reading = LayerSpectra().look(subject(model), gen=gen())
    first = circular_conv_spectrum(model[0].weight, (6, 6)).numpy()
    second = circular_conv_spectrum(model[3].weight, (6, 6), stride=(2, 2)).numpy()
    last = np.linalg.svd(model[5].weight.detach().double().numpy(), compute_uv=False)
    product = first[0] * second[0] * last[0]
    assert reading["log10 spectral complexity"].value == pytest.approx(math.log10(product), abs=1e-12)
    bounds = [row[5] for row in reading.panels[1].rows]
    assert reading["log10 product of norm bounds"].value == pytest.approx(sum(map(math.log10, bounds)), abs=1e-12)
    padded = np.linalg.svd(padded_matrix(model[0]), compute_uv=False)
    assert padded[0] <= bounds[0] and bounds[2] == pytest.approx(last[0])
    assert reading["largest layer norm"].nature == "estimate"  # zero padding: the circular operator stands for it
    assert reading["largest layer norm"].value == pytest.approx(max(first[0], second[0], last[0]))
    spreads = [first.std(), second.std(), last.std()]
    assert reading["mean spread of singular values"].value == pytest.approx(np.mean(spreads))
    assert reading["mean spread, convolutions"].value == pytest.approx(np.mean(spreads[:2]))
    curve, table = reading.panels
    assert [row[0] for row in table.rows] == ["0", "3", "5"]
    assert table.rows[1][2] == "circular operator at 6×6" and table.rows[2][2] == "exact"
    assert all(len(row) == len(table.header) for row in table.rows)
    assert all(len(s.x) <= 200 and s.y[0] == max(s.y) for s in curve.series)
    assert curve.series[0].y[-1] == first[-1] and (curve.series[0].x[0], curve.series[0].x[-1]) == (0.0, 1.0)


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
