"""Roth, Kilcher and Hofmann 2020: ℓ2 adversarial training beside global and data-dependent spectral norms, on CIFAR-10.

The printed ε = 1.75 belongs to images in [−1, 1]: the authors' code has (8/255) · √3072 there, which is 0.875 of a
pixel here. λ needs no conversion (see ``data-spectral-norm``). All start from the network that ``standard`` trains, as
in that code and, for the regularized ones, in appendix A.4. Number of epochs and learning rate were searched and are
not printed: RMSprop, 10⁻⁴ and 50 epochs are the code's defaults, whose batch of 32 is 128 here. The weights of
equation 10 are a mean over clean and adversarial images, of which the code can also take fewer adversarial ones.

The two for MNIST are this library's, with the weights of the paper's grid (Table 2); the paper has no MNIST.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Roth, Kilcher & Hofmann 2020, arXiv 1906.01527"
CODE = "yk/neurips20_public"
EPS = 1.75 / 2
ITERS = 10

FINE: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 128,
    "optimizer": {"name": "rmsprop", "lr": 1e-4},
    "schedule": {"name": "constant"},
    "augment": ["pad-crop", "flip"],
}
PGA: dict[str, Any] = {"name": "pgd", "threat": f"l2:{EPS}", "steps": ITERS, "step_size": 2 * EPS / ITERS}
DATA_SPECTRAL: dict[str, Any] = {"name": "data-spectral-norm", "weight": 3e-2, "eps": EPS, "iterations": ITERS}
GLOBAL_SPECTRAL: dict[str, Any] = {"name": "global-spectral-norm", "weight": 3e-4, "iterations": 1}


def cifar10(name: str, where: str, objective: Any, *regularizers: dict[str, Any]) -> Preset:
    return Preset(
        name=name,
        reference=f"{PAPER}, {where}; {CODE}",
        data="cifar10",
        model="cnn7",
        threat=f"l2:{EPS}",
        paper={"objective": objective, "regularizers": list(regularizers), "training": FINE},
        fine_tunes=True,
    )


def mnist(regularizer: dict[str, Any]) -> Preset:
    return Preset(
        name=f"{regularizer['name']}/mnist",
        reference=f"settings of this library; the method is that of {PAPER}",
        data="mnist",
        model="mnist-cnn",
        threat="l2:1.5",
        paper={
            "objective": "standard",
            "regularizers": [regularizer],
            "training": {
                "epochs": 20,
                "batch_size": 128,
                "optimizer": {"name": "adam", "lr": 1e-3},
                "schedule": {"name": "cosine"},
            },
        },
    )


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="standard/cifar10-cnn7",
        reference=f"{PAPER}, Table 1 (93.5 %); training of aaron-xichen/pytorch-playground, where its weights are from",
        data="cifar10",
        model="cnn7",
        threat=f"l2:{EPS}",
        paper={
            "objective": "standard",
            "training": {
                "epochs": 150,
                "batch_size": 200,
                "optimizer": {"name": "adam", "lr": 1e-3},
                "schedule": {"name": "multistep", "milestones": [80, 120], "gamma": 0.1},
                "augment": ["pad-crop", "flip"],
            },
        },
    ),
    cifar10(
        "adversarial/cifar10-cnn7",
        "eq. 10 and Table 1 (λ = 1)",
        {"name": "adversarial", "attack": PGA, "clean_weight": 0.5},
    ),
    # λ/2 ‖f(x) − f(x*)‖², written as the mean over 10 logits that logit-pairing has.
    cifar10(
        "adversarial-squared/cifar10-cnn7",
        "eq. 32, with ε, α and λ of Table 1",
        {"name": "logit-pairing", "attack": {**PGA, "loss": "squared"}, "clean_weight": 1.0, "weight": 3e-2 * 10 / 2},
    ),
    cifar10(
        "adversarial-large-step/cifar10-cnn7",
        "appendix A.9, Figure 8 (α far beyond ε)",
        {"name": "adversarial", "attack": {**PGA, "step_size": 1000 * EPS}, "clean_weight": 0.5},
    ),
    cifar10("global-spectral-norm/cifar10", "eq. 6 and Table 1", "standard", GLOBAL_SPECTRAL),
    cifar10("data-spectral-norm/cifar10", "eq. 9 and Table 1", "standard", DATA_SPECTRAL),
    mnist({**DATA_SPECTRAL, "eps": 1.5}),
    mnist(GLOBAL_SPECTRAL),
)
