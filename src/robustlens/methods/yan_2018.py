"""Yan, Guo and Zhang 2018: Deep Defense, which fine-tunes trained networks, on MNIST and CIFAR-10.

Settings are the defaults of the authors' script, which are those of LeNet on MNIST. For ConvNet on CIFAR-10 no
λ, c and d were published; it has the same here, with the script's flips and norm guard: a decision, c up to 70 is worth
a try. The threats are the largest radii at which Wu & Yu 2019 compare it. The authors subtract the mean image (and
whiten CIFAR-10) before the network, which makes their ‖x‖ smaller.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

CODE = "Yan, Guo & Zhang 2018, arXiv 1803.00404; deepdefense.pytorch, deepdefense.py"


def preset(data: str, model: str, threat: str, guard: float, augment: list[str], source: str) -> Preset:
    training: dict[str, Any] = {
        "epochs": 5,
        "batch_size": 100,
        "optimizer": {"name": "sgd", "lr": 5e-4, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "multistep", "milestones": [4], "gamma": 0.5},
        "augment": augment,
    }
    defense = {"name": "deep-defense", "weight": 15.0, "c": 25.0, "d": 5.0, "guard": guard}
    return Preset(
        name=f"deep-defense/{data}",
        reference=f"{CODE}{source}",
        data=data,
        model=model,
        threat=threat,
        paper={"objective": "standard", "regularizers": [defense], "training": training},
        fine_tunes=True,
    )


PRESETS: tuple[Preset, ...] = (
    preset("mnist", "lenet", "l2:2.0", 5e-6, [], " (defaults)"),
    preset("cifar10", "convnet", "l2:0.4", 1e-5, ["flip"], "; λ, c and d are those of MNIST, a decision"),
)
