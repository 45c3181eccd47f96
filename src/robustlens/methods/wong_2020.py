"""Wong, Rice and Kolter 2020: fast adversarial training, one FGSM step from a random start, on CIFAR-10 and MNIST."""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Wong, Rice & Kolter 2020, arXiv 2001.03994, §4; locuslab/fast_adversarial"
WATCH = (
    "Stops when catastrophic overfitting sets in, as the code's --early-stop does, which is off by default; here PGD "
    "on validation images decides, there PGD-5 on one training batch."
)


def fgsm_rs(eps: str, step_size: float) -> dict[str, Any]:
    attack = {"name": "fgsm", "threat": f"linf:{eps}", "random_start": True, "step_size": step_size}
    return {"name": "adversarial", "attack": attack, "craft_mode": "train"}


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="fast/cifar10",
        reference=f"{PAPER}, CIFAR10/train_fgsm.py",
        data="cifar10",
        model="preact-resnet18",
        threat="linf:8/255",
        paper={
            "objective": fgsm_rs("8/255", 10 / 255),
            "training": {
                "epochs": 15,
                "batch_size": 128,
                "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4},
                "schedule": {"name": "one-cycle", "peak": 0.5},
                "augment": ["pad-crop", "flip"],
            },
        },
        sound={"training": {"collapse_watch": 0.2}},
        differs=WATCH,
    ),
    Preset(
        name="fast/mnist",
        reference=f"{PAPER}, MNIST/train_mnist.py",
        data="mnist",
        model="lenet-small",
        threat="linf:0.3",
        paper={
            "objective": fgsm_rs("0.3", 0.375),
            "training": {
                "epochs": 10,
                "batch_size": 100,
                "optimizer": {"name": "adam", "lr": 5e-3},
                "schedule": {"name": "one-cycle", "peak": 0.4},
            },
        },
        sound={"training": {"collapse_watch": 0.2}},
        differs=WATCH,
    ),
)
