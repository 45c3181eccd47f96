"""What each method buys on full MNIST, in a short run: robust accuracy beside standard training of the same length.

LeNetSmall, one epoch of Adam, the first 1,000 test images, PGD with the margin loss (50 steps, 2 restarts). Each row
names the radius and the least gain; where the honest answer is "little or none", the row says so: at most 10 points.
Gains are paired differences with bootstrap intervals (95 %), which must lie on the side that the row claims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, needs_data

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.core.discovery import build
from robustlens.core.types import Splits
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
FGSM = {"name": "adversarial", "attack": {"name": "fgsm", "threat": "linf:0.1"}}

#: Method → (settings, threat it is judged by, least gain in points; None claims at most 10 points).
ROWS: dict[str, tuple[dict[str, Any], str, float | None]] = {
    "pgd": ({"objective": {"name": "adversarial", "attack": PGD5}}, "l2:1.5", 20),
    "trades": ({"objective": {"name": "trades", "threat": "l2:1.5", "steps": 5}}, "l2:1.5", 20),
    "mart": ({"objective": {"name": "mart", "attack": PGD5}}, "l2:1.5", 20),
    "logit-pairing": ({"objective": {"name": "logit-pairing", "attack": PGD5}}, "l2:1.5", 20),
    "mma": ({"objective": {"name": "mma", "threat": "l2:2.0", "steps": 5}}, "l2:1.5", 10),
    "fgsm": ({"objective": FGSM}, "linf:0.1", 10),
    "fast": (
        {
            "objective": {
                "name": "adversarial",
                "attack": {"name": "fgsm", "threat": "linf:0.1", "random_start": True, "step_size": 0.125},
            }
        },
        "linf:0.1",
        10,
    ),
    "free": ({"update": {"name": "free", "threat": "linf:0.1", "replays": 4}}, "linf:0.1", 10),
    "awp": ({"objective": {"name": "adversarial", "attack": PGD5}, "update": "awp"}, "l2:1.5", 20),
    "noise": ({"objective": {"name": "noise", "threat": "l2:1.5"}}, "l2:1.5", None),
    "sam": ({"update": {"name": "sam", "rho": 0.05}}, "l2:1.5", None),
    "global-spectral-norm": ({"regularizers": [{"name": "global-spectral-norm", "weight": 3e-4}]}, "l2:1.5", None),
    "data-spectral-norm": (
        {"regularizers": [{"name": "data-spectral-norm", "weight": 0.1, "eps": 1.5, "iterations": 5}]},
        "l2:1.5",
        10,
    ),
    "jacobian": ({"regularizers": [{"name": "jacobian", "weight": 0.1}]}, "l2:1.5", 5),
    "input-gradient": ({"regularizers": [{"name": "input-gradient", "weight": 1.0}]}, "l2:1.5", 5),
    "grad-align": (
        {"objective": FGSM, "regularizers": [{"name": "grad-align", "threat": "linf:0.1"}]},
        "linf:0.1",
        10,
    ),
    "local-linearity": (
        {"regularizers": [{"name": "local-linearity", "threat": "linf:0.1", "steps": 3}]},
        "linf:0.1",
        10,
    ),
    "orthogonality": ({"regularizers": [{"name": "orthogonality", "beta": 1e-2}]}, "l2:1.5", 5),
    "average-margin": (
        {"regularizers": [{"name": "average-margin", "weight": 0.1}, {"name": "orthogonality", "beta": 1e-2}]},
        "l2:1.5",
        5,
    ),
    "spectral-clip": ({"constraints": [{"name": "spectral-clip", "norm": 1.0, "every": "epoch"}]}, "l2:1.5", None),
    "parseval": ({"constraints": [{"name": "parseval", "beta": 1e-2}]}, "l2:1.5", 5),
}


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load(DataConfig(source="mnist"))


@pytest.fixture(scope="module")
def standard(digits: Splits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    place = tmp_path_factory.mktemp("standard")
    return {threat: robust({}, threat, digits, place / threat[:4]) for threat in ("l2:1.5", "linf:0.1")}


def robust(method: dict[str, Any], threat: str, digits: Splits, place: Any) -> np.ndarray:
    """Which of the test images (1000,) withstand the attack after training with ``method``."""
    torch.manual_seed(0)
    model = build("model", "lenet-small").build(digits.shape, 10)
    optimizer = {"name": "adam", "lr": 2e-3}
    config = TrainingConfig.model_validate(
        {"epochs": 1, "optimizer": optimizer, "schedule": {"name": "one-cycle"}, "validation_examples": 100}
    )
    recipe = make_recipe(MethodConfig.model_validate({"label": "it", **method}))
    judge = PGD(threat=Lp.parse(threat), steps=50, restarts=2, loss="margin", early_stop=True)
    quick = PGD(threat=Lp.parse(threat), steps=5)
    train(model, digits, recipe, config, seed=0, run=RunDirectory(place), validation=quick)
    test = digits.test.first(1000)
    return torch.cat([evaluate(judge, model, b, gen=gen()).robust for b in test.batches(500)]).numpy()


@pytest.mark.parametrize("name", ROWS)
def test_learning(name: str, digits: Splits, standard: dict[str, np.ndarray], tmp_path: Any) -> None:
    method, threat, least = ROWS[name]
    ours, theirs = robust(method, threat, digits, tmp_path), standard[threat]
    draws = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    gains = 100 * (ours[draws].mean(1) - theirs[draws].mean(1))
    low, high = np.quantile(gains, [0.025, 0.975])
    said = f"{name}: {100 * ours.mean():.1f} against {100 * theirs.mean():.1f}, gain [{low:.1f}, {high:.1f}]"
    print(said)
    assert high < 10 if least is None else low > least, said
