"""The two depths of an audit: what is looked at, and the time that is named before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import gen
from torch import nn
from typer.testing import CliRunner

from robustlens.cli import app
from robustlens.core.discovery import build, discover
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Lens, Subject
from robustlens.data.arrays import from_arrays
from robustlens.lenses.accuracy import Accuracy
from robustlens.lenses.confidence import Confidence
from robustlens.lenses.gap import GeneralisationGap
from robustlens.lenses.jacobian_spectrum import JacobianSpectrum
from robustlens.lenses.landscape import WeightLandscape
from robustlens.lenses.margins import LogitMargins
from robustlens.studies.audit import estimate
from robustlens.studies.depth import expected_seconds, lenses_at
from robustlens.threats.lp import Lp
from robustlens.train.checkpoint import save_weights


class Counting(nn.Module):
    """Counts examples, forward and backward to the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))
        self.forwards = self.backwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        return self.layers(x)

    def _count(self, grad: torch.Tensor) -> None:
        self.backwards += len(grad)


@pytest.fixture
def subject() -> Subject:
    x, y = torch.rand(60, 1, 8, 8, generator=gen(1)), torch.arange(60) % 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Counting().eval()
    return Subject(model, from_arrays(train=(x[:40], y[:40]), test=(x[40:], y[40:])), Lp("l2", 0.5))


def test_every_lens_is_looked_through_at_both_depths() -> None:
    on_request = ("standard-accuracy", "linear-margins")
    kinds = {kind for name, kind in discover("lens").items() if name not in on_request}
    for depth in ("quick", "full"):
        assert {type(lens) for lens in lenses_at(depth)} == kinds
    assert lenses_at("full") != lenses_at("quick")
    assert all(hasattr(lens, "cost") for lens in lenses_at("quick") if lens.name != "layer-spectra")


@pytest.mark.parametrize(
    "lens",
    [
        Confidence(n_examples=15),
        GeneralisationGap(n_examples=10),
        LogitMargins(),
        JacobianSpectrum(n_examples=10, powered=0, regressed=0),
        WeightLandscape(n_examples=10),
    ],
    ids=lambda lens: lens.name,
)
def test_passes_are_counted_truly(lens: Lens, subject: Subject) -> None:
    """Against what the network sees; copies of it count too, as they are made from it."""
    seen = {"forward": 0, "backward": 0}
    Counting.forward, original = counted(seen), Counting.forward
    try:
        lens.look(subject, gen=gen())
    finally:
        Counting.forward = original
    cost: Passes = lens.cost(subject)
    promised = cost.forward + cost.inputs
    assert 0.6 * promised <= seen["forward"] <= 1.5 * promised, (seen, cost)


def counted(seen: dict[str, int]):
    forward = Counting.forward

    def count(self: Counting, x: torch.Tensor) -> torch.Tensor:
        seen["forward"] += len(x)
        return forward(self, x)

    return count


def test_seconds_follow_the_examples(subject: Subject) -> None:
    few, many = Accuracy(n_examples=5), Accuracy(n_examples=20)
    assert few.cost(subject) * 4 == many.cost(subject)
    found = expected_seconds([few], subject)
    assert found.keys() == {"accuracy"} and 0 < found["accuracy"] < 60


def test_an_estimate_leaves_the_model_alone(subject: Subject) -> None:
    model, test = subject.model.train(), subject.splits.test
    before = [p.clone() for p in model.parameters()]
    batch: Batch = test.batch(torch.arange(len(test)))
    found = estimate(model, (batch.x, batch.y), threat="l2:0.5", device="cpu")
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sum(found.values()) > 0


def test_the_command_says_the_time_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: lens for name, lens in discover("lens").items() if name in ("accuracy", "logit-margins")}
    monkeypatch.setattr("robustlens.studies.depth.discover", lambda kind: few)
    save_weights(build("model", "mlp").build((1, 8, 8), 10), tmp_path / "w.safetensors")
    asked = ["audit", "mlp", "--weights", str(tmp_path / "w.safetensors"), "--data", "digits", "--threat", "l2:0.5"]
    asked += ["--examples", "20", "--out", str(tmp_path / "out"), "--depth"]
    result = CliRunner().invoke(app, [*asked, "full"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("About ") and " on this machine" in result.output.partition("\n")[0]
    assert CliRunner().invoke(app, [*asked, "deep"]).exit_code == 2
