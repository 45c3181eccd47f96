"""Ding et al. 2020, max-margin adversarial training (MMA), on CIFAR-10 and MNIST, as the authors' script runs it.

``threat`` is what they evaluate at; the radius of the objective is d_max, of which their tables have several (named in
the reference). Networks differ: theirs are WRN-28-4 and the LeNet-5 of Madry et al. They keep the epoch of the largest
mean distance on validation images; here a study's ``weights`` decides.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

CODE = "Ding et al. 2020, arXiv 1812.02637; BorealisAI/mma_training, config.py"

#: 50,000 steps on 45,000 images, and drops after 20,000, 30,000 and 40,000 of them. Learning rates are 0.3, 0.09, 0.03
#: and 0.009 there; one factor for all three drops ends at the same one, by way of 0.093 and 0.029.
CIFAR10: dict[str, Any] = {
    "epochs": 142,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 2e-4},
    "schedule": {"name": "multistep", "milestones": [56.8, 85.2, 113.6], "gamma": 0.03 ** (1 / 3)},
    "augment": ["pad-crop", "flip"],
}

#: 100,000 steps on 55,000 images.
MNIST: dict[str, Any] = {"epochs": 91, "batch_size": 50, "optimizer": {"name": "adam", "lr": 1e-4}}


def mma(d_max: str, min_eps: float, steps: int) -> dict[str, Any]:
    return {"name": "mma", "threat": d_max, "min_eps": min_eps, "steps": steps, "search_steps": 10}


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="mma/cifar10",
        reference=f"{CODE}; d_max 12, 20, 32 of 255 (there WRN-28-4)",
        data="cifar10",
        model="resnet18",
        threat="linf:8/255",
        paper={"objective": mma("linf:20/255", 0.005, 10), "training": CIFAR10},
    ),
    Preset(
        name="mma/cifar10-l2",
        reference=f"{CODE}; d_max 1, 2, 3 (there WRN-28-4)",
        data="cifar10",
        model="resnet18",
        threat="l2:1.0",
        paper={"objective": mma("l2:2.0", 0.5, 10), "training": CIFAR10},
    ),
    Preset(
        name="mma/mnist",
        reference=f"{CODE}; d_max 0.45 (there the LeNet-5 of Madry et al.)",
        data="mnist",
        model="mnist-cnn",
        threat="linf:0.3",
        paper={"objective": mma("linf:0.45", 0.1, 40), "training": MNIST},
    ),
    Preset(
        name="mma/mnist-l2",
        reference=f"{CODE}; d_max 2, 4, 6 (there the LeNet-5 of Madry et al.)",
        data="mnist",
        model="mnist-cnn",
        threat="l2:2.0",
        paper={"objective": mma("l2:4.0", 0.5, 40), "training": MNIST},
    ),
)
