"""Kwon et al. 2021: adaptive sharpness-aware minimisation on CIFAR-10, and the same step in adversarial training.

The authors' code perturbs biases as SAM does and takes ρ = 0.5. ρ = 2 is what they advised for the form here, which
treats all parameters alike (davda54/sam). Adversarial training with it is a combination of two papers.
"""

from __future__ import annotations

from robustlens.methods import rice_2020
from robustlens.methods.preset import Preset

PAPER = "Kwon et al. 2021, arXiv 2102.11600"
UPDATE = {"name": "sam", "rho": 2.0, "adaptive": True}

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="standard-asam/cifar10",
        reference=f"{PAPER}, §5; SamsungLabs/ASAM, example_cifar.py, for WRN-28-10; ρ of davda54/sam",
        data="cifar10",
        model="resnet18",
        threat="linf:8/255",
        paper={
            "objective": {"name": "standard", "label_smoothing": 0.1},
            "update": UPDATE,
            "training": {
                "epochs": 200,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "cosine"},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    Preset(
        name="adversarial-asam/cifar10",
        reference=f"{PAPER}, with the adversarial training of Rice et al. 2020, arXiv 2002.11569; ρ of davda54/sam",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={"objective": rice_2020.OBJECTIVE, "update": UPDATE, "training": rice_2020.TRAINING},
    ),
)
