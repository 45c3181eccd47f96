"""Kannan, Kurakin and Goodfellow 2018, adversarial logit pairing, as a negative control on CIFAR-10 and MNIST.

λ and the mixed mini-batch are the released code's, which trains on ImageNet at 64×64. It has nothing for these two data
sets: attacks and training are those that adversarial training is known by there (Rice et al. 2020 on CIFAR-10, Madry et
al. 2018 on MNIST), so that logit pairing is all that differs.
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

CODE = "Kannan et al. 2018, arXiv 1803.06373; tensorflow/models, research/adversarial_logit_pairing (λ, mixed batches)"

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="logit-pairing/cifar10",
        reference=f"{CODE}; attack and training of Rice et al. 2020, arXiv 2002.11569",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={
            "objective": {
                "name": "logit-pairing",
                "attack": {"name": "pgd", "threat": "linf:8/255", "steps": 10, "step_size": 2 / 255},
                "weight": 0.5,
                "clean_weight": 0.5,
            },
            "training": {
                "epochs": 200,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "multistep", "milestones": [100, 150], "gamma": 0.1},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    Preset(
        name="logit-pairing/mnist",
        reference=f"{CODE}; attack and training of Madry et al. 2018, arXiv 1706.06083, MadryLab/mnist_challenge",
        data="mnist",
        model="mnist-cnn",
        threat="linf:0.3",
        paper={
            "objective": {
                "name": "logit-pairing",
                "attack": {"name": "pgd", "threat": "linf:0.3", "steps": 40, "step_size": 0.01},
                "weight": 0.5,
                "clean_weight": 0.5,
            },
            # 100,000 steps on 60,000 images.
            "training": {"epochs": 84, "batch_size": 50, "optimizer": {"name": "adam", "lr": 1e-4}},
        },
    ),
)
