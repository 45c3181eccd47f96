"""Rice, Wong and Kolter 2020: the settings of adversarial training that most later papers share.

Their point is that the robust accuracy is best soon after the first drop of the learning rate, and falls from there:
compare ``weights = "best"`` with ``weights = "last"`` in a study.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

#: PGD on ℓ∞ with the network in train mode.
OBJECTIVE: dict[str, Any] = {
    "name": "adversarial",
    "attack": {"name": "pgd", "threat": "linf:8/255", "steps": 10, "step_size": 2 / 255},
    "craft_mode": "train",
}
TRAINING: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"name": "multistep", "milestones": [100, 150]},
    "augment": ["pad-crop", "flip"],
}

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="adversarial/cifar10-rice",
        reference="Rice, Wong & Kolter 2020, arXiv 2002.11569, §3; locuslab/robust_overfitting, train_cifar.py",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={"objective": OBJECTIVE, "training": TRAINING},
    ),
)
