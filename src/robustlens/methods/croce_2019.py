"""Croce, Andriushchenko and Hein 2019: the maximum margin regularizer (MMR), alone and beside adversarial training, on
MNIST and CIFAR-10.

λ and γ = γ_B = γ_D are in the names of the published models (folders models/mmr and models/mmr+at of the repository's
history), everything else in train.py. The ℓ2 model of MMR with adversarial training on MNIST is that of epoch 50. Two
things differ here. The code makes the first half of each batch adversarial and regularizes both halves where
they are; here the cross-entropy is the mean over all images and all adversarial ones, and the regularizer looks at the
clean images. And its augmentation of CIFAR-10, an option of the script that the models' names leave open, also
changes brightness and contrast.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset
from robustlens.threats.lp import Lp

CODE = "Croce, Andriushchenko & Hein 2019, arXiv 1810.07481; provable-robustness-max-linear-regions, train.py"

#: Data, threat, PGD steps, γ and λ without adversarial training, γ and λ with it, learning rates of both.
ROWS = [
    ("mnist", "l2:0.3", 40, 0.45, 3.0, 0.45, 6.0, 1e-4, 5e-5),
    ("mnist", "linf:0.1", 40, 0.2, 1.0, 0.2, 0.5, 1e-3, 1e-3),
    ("cifar10", "l2:0.1", 7, 0.2, 1.5, 0.15, 0.5, 1e-3, 1e-3),
    ("cifar10", "linf:2/255", 7, 3 / 255, 1.0, 3 / 255, 0.1, 1e-3, 1e-3),
]


def preset(name: str, data: str, threat: str, gamma: float, weight: float, lr: float, objective: Any) -> Preset:
    norm = threat.partition(":")[0]
    training: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 128,
        "optimizer": {"name": "adam", "lr": lr},
        "schedule": {"name": "multistep", "milestones": [89], "gamma": 0.1},  # from the 90th epoch on
        "augment": [{"name": "pad-crop", "padding": 2}, "flip"] if data == "cifar10" else [],
    }
    mmr = {"name": "mmr", "weight": weight, "gamma_b": gamma, "gamma_d": gamma, "norm": norm}
    return Preset(
        name=f"{name}/{data}" if norm == "l2" else f"{name}/{data}-{norm}",
        reference=f"{CODE}; λ {weight:g} and γ {gamma:g} from the published model's name",
        data=data,
        model="lenet-small",
        threat=threat,
        paper={"objective": objective, "regularizers": [mmr], "training": training},
    )


def pgd(threat: str, steps: int) -> dict[str, Any]:
    """Steps of 2 ε / k, half of the loss on clean images."""
    attack = {"name": "pgd", "threat": threat, "steps": steps, "step_size": 2 * Lp.parse(threat).eps / steps}
    return {"name": "adversarial", "attack": attack, "clean_weight": 0.5}


PRESETS: tuple[Preset, ...] = tuple(
    each
    for data, threat, steps, gamma, weight, gamma_at, weight_at, lr, lr_at in ROWS
    for each in (
        preset("mmr", data, threat, gamma, weight, lr, "standard"),
        preset("mmr-at", data, threat, gamma_at, weight_at, lr_at, pgd(threat, steps)),
    )
)
