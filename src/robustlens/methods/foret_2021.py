"""Foret et al. 2021: sharpness-aware minimisation on CIFAR-10, and the same step in adversarial training.

The paper trains on clean images. Its step with adversarial training is a combination of two papers, with the radius
of this one and the training of Rice et al.
"""

from __future__ import annotations

from robustlens.methods import rice_2020
from robustlens.methods.preset import Preset

PAPER = "Foret et al. 2021, arXiv 2010.01412"
UPDATE = {"name": "sam", "rho": 0.05}

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="standard-sam/cifar10",
        reference=f"{PAPER}, §3.1 and Table 6 (WRN-28-10, 200 epochs); google-research/sam (schedule, clipping)",
        data="cifar10",
        model="resnet18",
        threat="linf:8/255",
        paper={
            "objective": "standard",
            "update": UPDATE,
            "training": {
                "epochs": 200,
                "batch_size": 256,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "cosine"},
                "grad_clip": 5.0,
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    Preset(
        name="adversarial-sam/cifar10",
        reference=f"{PAPER}, with the adversarial training of Rice et al. 2020, arXiv 2002.11569",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={"objective": rice_2020.OBJECTIVE, "update": UPDATE, "training": rice_2020.TRAINING},
    ),
)
