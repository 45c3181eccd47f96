"""What each method buys on full MNIST, in a short run: robust accuracy beside standard training of the same length.

One epoch of Adam, the first 1,000 test images, PGD with the margin loss (50 steps, 2 restarts). LeNetSmall, unless the
row names another network; a method that fine-tunes gets a second epoch, and so does what it is compared with. Each row
names the radius and the least gain; where the honest answer is "little or none", the row says so: at most 10 points.
Gains are paired differences with bootstrap intervals (95 %), which must lie on the side that the row claims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, needs_data

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.core.discovery import build
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.results.store import RunDirectory
from robustlens.studies.config import MethodConfig
from robustlens.studies.plan import make_recipe
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train

pytestmark = [needs_data, pytest.mark.slow]

PGD5 = {"name": "pgd", "threat": "l2:1.5", "steps": 5}
PGD_AT = {"name": "adversarial", "attack": PGD5}
FGSM = {"name": "fgsm", "threat": "linf:0.1"}
FGSM_AT = {"name": "adversarial", "attack": FGSM}
FAST = {"name": "adversarial", "attack": FGSM | {"random_start": True, "step_size": 0.125}}
ORTHOGONALITY = {"name": "orthogonality", "beta": 1e-2}
DATA_NORM = {"name": "data-spectral-norm", "weight": 0.1, "eps": 1.5, "iterations": 5}


@dataclass(frozen=True)
class Row:
    """Settings of a method, the threat it is judged by, and the least gain in points; None claims at most 10."""

    method: dict[str, Any]
    threat: str
    least: float | None
    model: dict[str, Any] = field(default_factory=lambda: {"name": "lenet-small"})
    classes: tuple[int, ...] | None = None
    fine_tunes: bool = False


def regularized(regularizer: dict[str, Any], threat: str, least: float | None, **more: Any) -> Row:
    return Row({"regularizers": [regularizer]}, threat, least, **more)


ROWS = {
    "pgd": Row({"objective": PGD_AT}, "l2:1.5", 30),
    "pgd-half-clean": Row({"objective": PGD_AT | {"clean_weight": 0.5}}, "l2:1.5", 30),
    "pgd-averaged": Row({"objective": PGD_AT, "training": {"averaging": 0.99}}, "l2:1.5", 30),
    "trades": Row({"objective": {"name": "trades", "threat": "l2:1.5", "steps": 5}}, "l2:1.5", 30),
    "mart": Row({"objective": {"name": "mart", "attack": PGD5}}, "l2:1.5", 30),
    "logit-pairing": Row({"objective": {"name": "logit-pairing", "attack": PGD5}}, "l2:1.5", 30),
    "mma": Row({"objective": {"name": "mma", "threat": "l2:2.0", "steps": 5}}, "l2:1.5", 30),
    "fgsm": Row({"objective": FGSM_AT}, "linf:0.1", 40),
    "fast": Row({"objective": FAST}, "linf:0.1", 40),
    "free": Row({"update": {"name": "free", "threat": "linf:0.1", "replays": 4}}, "linf:0.1", 40),
    "awp": Row({"objective": PGD_AT, "update": "awp"}, "l2:1.5", 30),
    "noise": Row({"objective": {"name": "noise", "threat": "l2:1.5"}}, "l2:1.5", None),
    "sam": Row({"update": {"name": "sam", "rho": 0.05}}, "l2:1.5", None),
    "asam": Row({"update": {"name": "sam", "rho": 0.5, "adaptive": True}}, "l2:1.5", None),
    "global-spectral-norm": regularized({"name": "global-spectral-norm", "weight": 3e-4}, "l2:1.5", None),
    "data-spectral-norm": regularized(DATA_NORM, "l2:1.5", 25),
    "data-spectral-norm-jacobian": regularized(DATA_NORM | {"form": "jacobian"}, "l2:1.5", 25),
    "jacobian": regularized({"name": "jacobian", "weight": 0.1}, "l2:1.5", 20),
    "input-gradient": regularized({"name": "input-gradient", "weight": 1.0}, "l2:1.5", 15),
    "grad-align": Row(
        {"objective": FGSM_AT, "regularizers": [{"name": "grad-align", "threat": "linf:0.1"}]}, "linf:0.1", 40
    ),
    "local-linearity": regularized({"name": "local-linearity", "threat": "linf:0.1", "steps": 3}, "linf:0.1", 40),
    "orthogonality": regularized(ORTHOGONALITY, "l2:1.5", 5),
    "average-margin": Row({"regularizers": [{"name": "average-margin", "weight": 0.1}, ORTHOGONALITY]}, "l2:1.5", 10),
    "average-margin-hinge": Row(
        {"regularizers": [{"name": "average-margin", "weight": 0.1, "variant": "hinge"}, ORTHOGONALITY]}, "l2:1.5", 10
    ),
    "mmr": regularized(
        {"name": "mmr", "weight": 1.0, "gamma_b": 0.45, "gamma_d": 0.45, "warmup": 0},
        "l2:0.3",
        None,
        model={"name": "mlp", "hidden": 64},
    ),
    "deep-defense": regularized({"name": "deep-defense", "iterations": 3}, "l2:1.5", 5, fine_tunes=True),
    "logistic-adversary": Row(
        {"objective": {"name": "logistic-adversary", "threat": "linf:0.1"}},
        "linf:0.1",
        5,
        model={"name": "logistic"},
        classes=(0, 1),
    ),
    "spectral-clip": Row({"constraints": [{"name": "spectral-clip", "norm": 1.0, "every": "epoch"}]}, "l2:1.5", None),
    "parseval": Row({"constraints": [{"name": "parseval", "beta": 1e-2}]}, "l2:1.5", 5),
    "unit-rows": Row({"constraints": ["unit-rows"]}, "l2:1.5", None),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row, dict[str, Any]], np.ndarray]:
    """``robust``, which trains and judges the same thing once only."""
    known: dict[str, np.ndarray] = {}

    def once(row: Row, method: dict[str, Any]) -> np.ndarray:
        key = repr((method, row.threat, row.model, row.classes, row.fine_tunes))
        if key not in known:
            known[key] = robust(row, method, tmp_path_factory.mktemp("run"))
        return known[key]

    return once


def robust(row: Row, method: dict[str, Any], place: Path) -> np.ndarray:
    """Which of the test images (1000,) withstand the attack after training with ``method``."""
    digits = load(DataConfig(source="mnist", classes=row.classes))
    torch.manual_seed(0)
    model = build("model", row.model).build(digits.shape, len(row.classes or range(10)))
    quick = PGD(threat=Lp.parse(row.threat), steps=5)
    stages = [({}, 2e-3), (method, 2e-4)] if row.fine_tunes else [(method, 2e-3)]
    for number, (settings, lr) in enumerate(stages):
        described = MethodConfig.model_validate({"label": "it", **settings})
        usual = {"optimizer": {"name": "adam", "lr": lr}, "schedule": {"name": "one-cycle"}, "validation_examples": 100}
        config = TrainingConfig.model_validate({"epochs": 1, **usual, **described.training})
        recipe = make_recipe(described)
        run = RunDirectory(place / str(number))
        train(model, digits, recipe, config, seed=0, run=run, validation=quick)
    judge = PGD(threat=Lp.parse(row.threat), steps=50, restarts=2, loss="margin", early_stop=True)
    test = digits.test.first(1000)
    return torch.cat([evaluate(judge, model, b, gen=gen()).robust for b in test.batches(500)]).numpy()


@pytest.mark.parametrize("name", ROWS)
def test_learning(name: str, measured: Callable[[Row, dict[str, Any]], np.ndarray]) -> None:
    row = ROWS[name]
    ours, theirs = measured(row, row.method), measured(row, {})
    draws = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    gains = 100 * (ours[draws].mean(1) - theirs[draws].mean(1))
    low, high = np.quantile(gains, [0.025, 0.975])
    said = f"{name}: {100 * ours.mean():.1f} against {100 * theirs.mean():.1f}, gain [{low:.1f}, {high:.1f}]"
    print(said)
    assert high < 10 if row.least is None else low > row.least, said
