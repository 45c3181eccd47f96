"""Finlay and Oberman 2021: input-gradient regularization on CIFAR-10.

The settings are those of cfinlay/tulip, cifar10. Its networks are ResNeXt-34 (2×32), here ResNet-18; its 16-pixel
cutout is left out, and its crops are padded with grey, here with black. The ℓ1 norm of the gradient is for ℓ∞ attacks.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

CODE = "Finlay & Oberman 2021, arXiv 1905.11468; cfinlay/tulip, cifar10/train.py (λ 0.1 and 1)"

TRAINING: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"name": "multistep", "milestones": [60, 120, 160], "gamma": 0.2},
    "augment": ["pad-crop", "flip"],
}


def tulip(name: str, norm: str, threat: str) -> Preset:
    penalty = {"name": "input-gradient", "weight": 0.1, "form": "difference", "norm": norm, "h": 0.01}
    return Preset(
        name=name,
        reference=CODE,
        data="cifar10",
        model="resnet18",
        threat=threat,
        paper={"objective": "standard", "regularizers": [penalty], "training": TRAINING},
    )


PRESETS: tuple[Preset, ...] = (
    tulip("input-gradient/cifar10", "l2", "l2:0.5"),
    tulip("input-gradient-l1/cifar10", "l1", "linf:8/255"),
)
