"""Qin et al. 2019: local linearity regularization on CIFAR-10.

The settings are those of google-deepmind/local_linearity_regularizer. Its loss is
2·CE + 4·(γ + 0.3·|δᵀ∇ℓ|) + 2e-4·½‖w‖² at a learning rate of 0.1: the same steps as
CE + 2γ + 0.6·|δᵀ∇ℓ| + 1e-4·½‖w‖² at 0.2. It decays only convolutions and the last layer, here every weight is decayed.
It has 100,000 steps of 64 images, which are 128 epochs, and lowers the learning rate at 80,000, 88,000 and 96,000. Its
network is a WRN-28-8 with softplus, here ResNet-18; its radius grows over the first 500 steps, its steps to δ are those
of Adam, BatchNorm at x + δ uses the statistics of x, and it pads by reflection, none of which is done here.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

STEPS_PER_EPOCH = 50_000 / 64
THREAT = "linf:8/255"

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="local-linearity/cifar10",
        reference="Qin et al. 2019, arXiv 1907.02610; google-deepmind/local_linearity_regularizer, config.py",
        data="cifar10",
        model="resnet18",
        threat=THREAT,
        paper={
            "objective": "standard",
            "regularizers": [
                {
                    "name": "local-linearity",
                    "threat": THREAT,
                    "weight": 2.0,
                    "slope_weight": 0.6,
                    "steps": 10,
                    "step_size": 0.1,
                }
            ],
            "training": {
                "epochs": 128,
                "batch_size": 64,
                "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4},
                "schedule": {
                    "name": "multistep",
                    "milestones": [step / STEPS_PER_EPOCH for step in (80_000, 88_000, 96_000)],
                    "gamma": 0.1,
                },
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
)
