"""Hoffman, Roberts and Yaida 2019: Jacobian regularization on MNIST.

The settings are those of the example in facebookresearch/jacobian_regularizer. Its network has two hidden layers of 200
units, here it is one of 1,024. It standardises the images by σ = 0.3081 outside the network, with λ = 0.1; by pixels in
[0, 1] the same penalty has λ · σ².
"""

from __future__ import annotations

from robustlens.methods.preset import Preset

SIGMA = 0.3081

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="jacobian/mnist",
        reference="Hoffman, Roberts & Yaida 2019, arXiv 1908.02729; facebookresearch/jacobian_regularizer, "
        "examples/mnist.py",
        data="mnist",
        model="mlp",
        threat="l2:1.5",
        paper={
            "objective": "standard",
            "regularizers": [{"name": "jacobian", "weight": 0.1 * SIGMA**2, "projections": 1}],
            "training": {
                "epochs": 5,
                "batch_size": 64,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "constant"},
            },
        },
    ),
)
