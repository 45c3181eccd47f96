"""Madry et al. 2018: adversarial training with PGD, on MNIST and CIFAR-10.

Epochs are the steps of the authors' code times the batch over the training images. On MNIST 40 steps of 0.01 do not
cross the ball, whose width is 0.6; but nearly all pixels lie at the border of the box, where only half of it is left.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

PAPER = "Madry et al. 2018, arXiv 1706.06083, §5"

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="adversarial/mnist-madry",
        reference=f"{PAPER}; MadryLab/mnist_challenge, config.json, whose network has two 5×5 convolutions",
        data="mnist",
        model="mnist-cnn",
        threat="linf:0.3",
        paper={
            "objective": {
                "name": "adversarial",
                "attack": {"name": "pgd", "threat": "linf:0.3", "steps": 40, "step_size": 0.01},
            },
            "training": {
                "epochs": 83,
                "batch_size": 50,
                "optimizer": {"name": "adam", "lr": 1e-4},
                "schedule": {"name": "constant"},
            },
        },
    ),
    Preset(
        name="adversarial/cifar10-madry",
        reference=f"{PAPER}; MadryLab/cifar10_challenge, config.json, whose network is a wide ResNet-32 (w32-10)",
        data="cifar10",
        model="resnet18",
        threat="linf:8/255",
        paper={
            "objective": {
                "name": "adversarial",
                "attack": {"name": "pgd", "threat": "linf:8/255", "steps": 7, "step_size": 2 / 255},
                "craft_mode": "train",
            },
            "training": {
                "epochs": 205,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
                "schedule": {"name": "multistep", "milestones": [102.4, 153.6]},
                "augment": ["pad-crop", "flip"],
            },
        },
        sound={
            "objective": {
                "name": "adversarial",
                "attack": {"name": "pgd", "threat": "linf:8/255", "steps": 10, "step_size": 2 / 255},
                "craft_mode": "train",
            },
        },
        differs="10 steps of 2/255, as in the authors' code: the 7 of the paper do not cross the ball, "
        "whose width is 16/255.",
    ),
)
