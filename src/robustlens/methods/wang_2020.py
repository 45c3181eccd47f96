"""Wang et al. 2020, MART, on CIFAR-10 with a ResNet-18, as the authors' script runs it.

The attack starts at a uniform point of the ball; the script's starts at x + 0.001 · N(0, 1). It counts epochs from 1: a
drop of the learning rate "at 75" comes after 74 epochs.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="mart/cifar10",
        reference="Wang et al. 2020 (ICLR); YisenWang/MART, train_resnet.py",
        data="cifar10",
        model="resnet18",
        threat="linf:0.031",
        paper={
            "objective": {
                "name": "mart",
                "attack": {"name": "pgd", "threat": "linf:0.031", "steps": 10, "step_size": 0.007},
                "weight": 5.0,
            },
            "training": {
                "epochs": 120,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 3.5e-3},
                "schedule": {"name": "multistep", "milestones": [74, 89, 99], "gamma": 0.1},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
)
