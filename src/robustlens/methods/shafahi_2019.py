"""Shafahi et al. 2019: free adversarial training on CIFAR-10, as its authors and as Wong et al. trained it.

An epoch here takes 8 steps on every batch. The authors' 80,000 steps are 10,000 batches of 128, or 25.6 epochs.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

PAPER = "Shafahi et al. 2019, arXiv 1904.12843, §4.1"
UPDATE = {"name": "free", "threat": "linf:8/255", "replays": 8}

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="free/cifar10",
        reference=f"{PAPER}; ashafahi/free_adv_train, config.py, whose network is WRN-32-10",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={
            "objective": "standard",
            "update": UPDATE,
            "training": {
                "epochs": 26,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
                "schedule": {"name": "multistep", "milestones": [12.8, 19.2]},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    Preset(
        name="free/cifar10-cyclic",
        reference=f"{PAPER}; in Wong, Rice & Kolter 2020, arXiv 2001.03994; locuslab/fast_adversarial, train_free.py",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={
            "objective": "standard",
            "update": UPDATE,
            "training": {
                "epochs": 10,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.04, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "one-cycle", "peak": 0.5},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
)
