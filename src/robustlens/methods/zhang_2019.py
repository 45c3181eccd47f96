"""Zhang et al. 2019, TRADES, on CIFAR-10 and MNIST, as the authors' scripts run it.

The scripts count epochs from 1 and lower the learning rate before the epoch that they name, so a drop "at 75" comes
after 74 epochs. On CIFAR-10 they stop at 76, two epochs after the first drop: the published robustness owes something
to that early stop. The paper's network there is WRN-34-10; the script offers a ResNet-18 in its place.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="trades/cifar10",
        reference="Zhang et al. 2019, arXiv 1901.08573; yaodongyu/TRADES, train_trades_cifar10.py (there WRN-34-10)",
        data="cifar10",
        model="resnet18",
        threat="linf:0.031",
        paper={
            "objective": {"name": "trades", "threat": "linf:0.031", "beta": 6.0, "steps": 10, "step_size": 0.007},
            "training": {
                "epochs": 76,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
                "schedule": {"name": "multistep", "milestones": [74, 89, 99], "gamma": 0.1},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    Preset(
        name="trades/mnist",
        reference="Zhang et al. 2019, arXiv 1901.08573; yaodongyu/TRADES, train_trades_mnist.py (β = 1, no decay)",
        data="mnist",
        model="mnist-cnn",
        threat="linf:0.3",
        paper={
            "objective": {"name": "trades", "threat": "linf:0.3", "beta": 1.0, "steps": 40, "step_size": 0.01},
            "training": {
                "epochs": 100,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
                "schedule": {"name": "multistep", "milestones": [54, 74, 89], "gamma": 0.1},
            },
        },
    ),
)
