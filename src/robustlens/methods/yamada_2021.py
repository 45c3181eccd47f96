"""Yamada et al. 2021: adversarial and noise training of logistic regression on MNIST 0 against 1 (MNIST2), and PGD
training of ResNet-18 on CIFAR-10 and SVHN.

Each preset has one radius; the paper's tables go through several, with everything else alike, and those stand in the
reference. The paper names no optimizer: MNIST2 has what reproduces Tables 1 and 3, the deep networks have that of Rice
et al. 2020. It picks the epoch of the best robust accuracy on the test set; here a study's validation images decide.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Yamada et al. 2021, arXiv 2102.02950"

ELL2 = "ε 0.2, 0.4, 0.6, 0.8, 1"
ELLINF = "ε 4, 8, 12, 16, 25.5, 51, 76.5 of 255"
DEEP = "ε 4, 8, 12, 16 of 255"

MNIST2: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "schedule": {"name": "constant"},
}
RICE: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"name": "multistep", "milestones": [100, 150], "gamma": 0.1},
    "augment": ["pad-crop", "flip"],
}
SVHN: dict[str, Any] = {**RICE, "optimizer": {**RICE["optimizer"], "lr": 0.01}, "augment": []}


def logistic(name: str, table: str, threat: str, objective: Any) -> Preset:
    return Preset(
        name=name,
        reference=f"{PAPER}, {table}; digits 0 and 1 alone: data.classes = [0, 1]",
        data="mnist",
        model="logistic",
        classes=(0, 1),
        threat=threat,
        paper={"objective": objective, "training": MNIST2},
    )


def pgd(threat: str, steps: int, step_size: float | None = None) -> dict[str, Any]:
    attack: dict[str, Any] = {"name": "pgd", "threat": threat, "steps": steps}
    return {"name": "adversarial", "attack": attack if step_size is None else {**attack, "step_size": step_size}}


def deep(data: str, model: str, pixels: str, table: str, step: int, training: dict[str, Any]) -> tuple[Preset, Preset]:
    reference = f"{PAPER}, {table}; {pixels}"
    plain = Preset(
        name=f"standard/{data}-{model}",
        reference=f"{reference}; ε 0",
        data=data,
        model=model,
        threat="linf:8/255",
        paper={"objective": "standard", "training": training},
    )
    adversarial = Preset(
        name=f"adversarial/{data}-{model}",
        reference=f"{reference}; {DEEP}",
        data=data,
        model=model,
        threat="linf:8/255",
        paper={"objective": pgd("linf:8/255", 7, step / 255), "training": training},
        sound={"objective": pgd("linf:8/255", 7)},
        differs=f"Steps of 2.5 ε / 7: 7 × {step}/255 does not cross the ball, whose width is 2 ε; at the table's ε "
        "16/255 it reaches less than half of that.",
    )
    return plain, adversarial


PRESETS: tuple[Preset, ...] = (
    logistic("standard/mnist-logistic", "Tables 1 and 3, ε 0", "l2:1.0", "standard"),
    logistic("adversarial/mnist-logistic-l2", f"Table 1: {ELL2}, steps of 0.15 ε", "l2:1.0", pgd("l2:1.0", 40, 0.15)),
    logistic("adversarial/mnist-logistic-linf", f"Table 3: {ELLINF}", "linf:16/255", pgd("linf:16/255", 40, 0.01)),
    logistic("noise/mnist-logistic-l2", f"Table 2: {ELL2}", "l2:1.0", {"name": "noise", "threat": "l2:1.0"}),
    logistic(
        "noise/mnist-logistic-linf", f"Table 4: {DEEP}", "linf:16/255", {"name": "noise", "threat": "linf:16/255"}
    ),
    logistic(
        "logistic-adversary/mnist-logistic-l2",
        "Theorem 1, eq. 7: the adversary of the theory, without the pixel box",
        "l2:1.0",
        {"name": "logistic-adversary", "threat": "l2:1.0"},
    ),
    logistic(
        "logistic-adversary/mnist-logistic-linf",
        "eq. 4 in the ℓ∞ norm, without the pixel box",
        "linf:16/255",
        {"name": "logistic-adversary", "threat": "linf:16/255"},
    ),
    *deep("cifar10", "resnet18", "per_image = true in the model (appendix: as Madry et al.)", "Table 5", 2, RICE),
    *deep("svhn", "preact-resnet18", "mean = std = [0.5] in the model (as AWP's code)", "Table 6", 1, SVHN),
)
