"""Andriushchenko and Flammarion 2020: FGSM with GradAlign on CIFAR-10 and SVHN.

The settings are those of the scripts in tml-epfl/understanding-fast-adv-training, in float32. Their step of 1.25 ε from
the clean image is clipped to ε, which is FGSM; on SVHN it grows over the first five epochs, which is left out here.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Andriushchenko & Flammarion 2020, arXiv 2007.02617; tml-epfl/understanding-fast-adv-training, sh/exps_diff_eps"


def grad_align(name: str, threat: str, weight: float, *, epochs: int, lr: float, augment: list[str]) -> Preset:
    data = name.partition("/")[2]
    training: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": 128,
        "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "one-cycle", "peak": 0.4},
        "augment": augment,
    }
    attack = {"name": "fgsm", "threat": threat}
    return Preset(
        name=name,
        reference=f"{PAPER}_{data}.sh",
        data=data,
        model="preact-resnet18",
        threat=threat,
        paper={
            "objective": {"name": "adversarial", "attack": attack, "craft_mode": "train"},
            "regularizers": [{"name": "grad-align", "threat": threat, "weight": weight}],
            "training": training,
        },
    )


PRESETS: tuple[Preset, ...] = (
    grad_align("grad-align/cifar10", "linf:8/255", 0.2, epochs=30, lr=0.3, augment=["pad-crop", "flip"]),
    grad_align("grad-align-16/cifar10", "linf:16/255", 2.0, epochs=30, lr=0.3, augment=["pad-crop", "flip"]),
    grad_align("grad-align/svhn", "linf:8/255", 2.5, epochs=15, lr=0.05, augment=["pad-crop"]),
)
