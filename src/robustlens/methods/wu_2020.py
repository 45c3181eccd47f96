"""Wu, Xia and Wang 2020: adversarial weight perturbation with adversarial training and with TRADES, on CIFAR-10.

The script for TRADES counts epochs from 1, so that its warm-up and its learning rates end one epoch earlier.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset
from robustlens.methods.rice_2020 import OBJECTIVE, TRAINING

PAPER = "Wu, Xia & Wang 2020, arXiv 2004.05884"

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="adversarial-awp/cifar10",
        reference=f"{PAPER}; csdongxian/AWP, AT_AWP (the training of Rice et al.)",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={"objective": OBJECTIVE, "update": {"name": "awp", "gamma": 0.01}, "training": TRAINING},
    ),
    Preset(
        name="trades-awp/cifar10",
        reference=f"{PAPER}; csdongxian/AWP, trades_AWP/train_trades_cifar.py, whose network is WRN-34-10",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={
            "objective": {"name": "trades", "threat": "linf:8/255", "beta": 6.0, "steps": 10, "step_size": 2 / 255},
            "update": {"name": "awp", "gamma": 0.005, "warmup": 10},
            "training": TRAINING,
        },
    ),
)
