"""Health checks on trained networks: honest ones, ones that mask their gradients, and the published ones of 003."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import DATA, NETWORKS, gen, needs
from test_lens_health import alarms
from test_published_003 import published
from torch import Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.discovery import build
from robustlens.core.types import Attack, Splits, Subject
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.lenses.health import Health
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp

pytestmark = pytest.mark.slow

WEAK, STRONG = Lp("linf", 0.1), Lp("linf", 0.3)


@cache
def digits() -> Splits:
    return load(DataConfig(source="mnist5k"))


@cache
def trained(adversary: Attack | None, *, seed: int = 0, epochs: int = 6, lr: float = 2e-3) -> nn.Module:
    """lenet-small on 4,000 digits: Adam in one cycle, on what ``adversary`` makes of them."""
    splits, draw = digits(), gen(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = build("model", "lenet-small").build(splits.shape, 10)
    steps = epochs * -(-len(splits.train) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for batch in splits.train.batches(64, order=torch.randperm(len(splits.train), generator=draw)):
            x = batch.x if adversary is None else craft(adversary, model, batch.x, batch.y, gen=draw)
            optimizer.zero_grad()
            cross_entropy(model(x), batch.y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class Around(nn.Module):
    """A trained network, its input or output changed."""

    def __init__(self, model: nn.Module, *, levels: int = 0, noise: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.levels, self.noise, self.scale = model, levels, noise, scale

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.levels).round() / self.levels if self.levels else x
        x = x + self.noise * torch.randn_like(x) if self.noise else x
        return self.scale * self.model(x)


def look(model: nn.Module, threat: Lp, attack: Attack | None = None, **settings: int) -> Reading:
    reading = Health(attack=attack, **settings).look(Subject(model, digits(), threat), gen=gen())
    print(reading.says, reading.outcome.why, {q.name: q.value for q in reading.quantities})
    return reading


HONEST = {
    "standard, linf": (None, WEAK),
    "standard, l2": (None, Lp("l2", 1.0)),
    "pgd, linf": (PGD(threat=Lp("linf", 0.15), steps=7), Lp("linf", 0.15)),
    "pgd, l2": (PGD(threat=Lp("l2", 1.5), steps=7), Lp("l2", 1.5)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", HONEST)
def test_no_false_alarm(name: str, seed: int) -> None:
    adversary, threat = HONEST[name]
    reading = look(trained(adversary, seed=seed), threat)
    assert not alarms(reading), reading.outcome.why
    assert 0.05 < reading["robust accuracy"].value < 0.98, "nothing to be wrong about"


def test_saturated_logits_under_cross_entropy() -> None:
    model = Around(trained(None), scale=100.0)
    reading = look(model, STRONG, PGD(threat=STRONG, steps=50))
    assert reading["robust accuracy"].value > 0.5
    assert alarms(reading) >= {"the margin loss", "the dlr loss", "gradients", "random search", "transfer", "no limit"}
    assert not alarms(look(model, STRONG)), "the margin attack is not fooled"


def test_quantised_input() -> None:
    reading = look(Around(trained(None), levels=4), STRONG)
    assert reading["robust accuracy"].value > 0.5
    assert alarms(reading) >= {"gradients", "random search", "transfer", "slopes"}


def test_random_transform() -> None:
    reading = look(Around(trained(None), noise=0.2), WEAK)
    assert "same answer" in alarms(reading)


def test_catastrophic_overfitting_judged_by_its_own_attack() -> None:
    threat = STRONG
    model = trained(FGSM(threat=threat), epochs=15)
    reading = look(model, threat, FGSM(threat=threat))
    assert reading["robust accuracy"].value > 0.5
    assert reading["robust accuracy after all checks"].value < 0.1
    assert alarms(reading) >= {"more steps", "the margin loss"}


PAPER = PGD(threat=Lp("l2", 2.0), steps=100, step_size=0.1, grad_floor=1e-6)


@needs(DATA / "mnist", NETWORKS)
@pytest.mark.parametrize(
    ("which", "n", "paper", "margin", "masked"),
    [
        ("std", 100, 0.859, 0.165, True),
        ("lcr", 200, 0.255, 0.249, False),
        ("amr", 100, 0.968, 0.300, True),
        pytest.param("std", 1000, 0.859, 0.165, True, marks=pytest.mark.slow),
        pytest.param("lcr", 1000, 0.255, 0.249, False, marks=pytest.mark.slow),
        pytest.param("amr", 1000, 0.968, 0.300, True, marks=pytest.mark.slow),
    ],
)
def test_published_numbers_of_003(which: str, n: int, paper: float, margin: float, masked: bool) -> None:
    """The paper's attack at ℓ2 radius 2, with the same path in fewer steps (spec 4.10 has n = 1000)."""
    splits = load(DataConfig(source="mnist", train=1000, valid=1))
    lens = Health(attack=PAPER, n_examples=n, times=2, restarts=1, queries=200)
    reading = lens.look(Subject(published(which), splits, PAPER.threat), gen=gen())
    print(reading.says, reading.outcome.why, {q.name: q.value for q in reading.quantities})
    error = 4 * 0.5 / n**0.5
    assert reading["robust accuracy"].value == pytest.approx(paper, abs=error)
    assert (reading.outcome.status == "unreliable") == masked, reading.outcome.why
    if masked:
        assert alarms(reading) >= {"the margin loss", "the dlr loss"}
        left = reading["robust accuracy"].value - reading["lost to the margin loss"].value
        assert left == pytest.approx(margin, abs=error)
        assert "gradient masking" in reading.outcome.why
