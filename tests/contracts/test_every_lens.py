"""What every lens must hold: its oracles, a faithful record, and a subject left as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn

from robustlens.core.discovery import discover
from robustlens.core.types import Lens, Subject
from robustlens.data.arrays import from_arrays
from robustlens.lenses.oracle import Oracle
from robustlens.results.store import RunDirectory, read_reading
from robustlens.threats.lp import Lp

LENSES = [lens for cls in discover("lens").values() for lens in cls.examples()]
ORACLES = [(cls.name, oracle) for cls in discover("lens").values() for oracle in cls.oracles()]


@pytest.fixture
def subject() -> Subject:
    x = torch.rand(40, 1, 8, 8, generator=gen(1))
    y = torch.arange(40) % 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallNet().eval()
    return Subject(model, from_arrays(train=(x[:28], y[:28]), test=(x[28:], y[28:])), Lp("l2", 0.5))


@pytest.mark.parametrize(("name", "oracle"), ORACLES, ids=lambda v: v if isinstance(v, str) else "")
def test_oracles(name: str, oracle: Oracle) -> None:
    """A subject with a closed form gives the values it must give."""
    reading = oracle.lens.look(oracle.subject, gen=gen())
    assert oracle.expected, "an oracle that expects nothing"
    for quantity, (value, tolerance) in oracle.expected.items():
        assert reading[quantity].value == pytest.approx(value, abs=tolerance or 1e-15, rel=0), quantity


@pytest.mark.parametrize("name", list(discover("lens")))
def test_has_oracles(name: str) -> None:
    assert any(name == other for other, _ in ORACLES)


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.name)
def test_reading_says_how_far_it_can_be_trusted(lens: Lens, subject: Subject) -> None:
    reading = lens.look(subject, gen=gen())
    assert reading.lens == lens.name
    assert reading.says.endswith(".") and any(c.isdigit() for c in reading.says)
    assert {q.name for q in reading.quantities} >= set(reading.headline) != set()
    for quantity in reading.quantities:
        if quantity.low is not None and quantity.high is not None:
            assert quantity.low <= quantity.value <= quantity.high, quantity
        evidence = quantity.n is not None or quantity.residual is not None or quantity.nature != "estimate"
        assert evidence or lens.name == "layer-spectra", quantity


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.name)
def test_reading_survives_the_disk(lens: Lens, subject: Subject, tmp_path: Path) -> None:
    reading = lens.look(subject, gen=gen())
    path = tmp_path / "reading"
    RunDirectory(tmp_path).write_reading(path, reading)
    back = read_reading(path)
    assert (back.says, back.outcome, back.quantities) == (reading.says, reading.outcome, reading.quantities)
    assert (back.headline, back.settings) == (reading.headline, dict(reading.settings))
    assert len(back.panels) == len(reading.panels) > 0
    for a, b in zip(back.panels, reading.panels, strict=True):
        assert (a.kind, a.title) == (b.kind, b.title)
        assert {k: list(v) for k, v in a.columns().items()} == {k: list(v) for k, v in b.columns().items()}


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.name)
def test_same_seed_same_reading_and_the_model_untouched(lens: Lens, subject: Subject) -> None:
    model = subject.model
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    once, again = lens.look(subject, gen=gen(3)), lens.look(subject, gen=gen(3))
    assert once.quantities == again.quantities
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training and torch.equal(random, torch.get_rng_state())


class Broken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * torch.nan


@pytest.mark.parametrize("lens", [x for x in LENSES if x.name != "layer-spectra"], ids=lambda lens: lens.name)
def test_a_model_that_answers_nan_is_never_ok(lens: Lens, subject: Subject) -> None:
    broken = Subject(Broken(subject.model), subject.splits, subject.threat)
    assert lens.look(broken, gen=gen()).outcome.status != "ok"
