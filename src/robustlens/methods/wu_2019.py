"""Wu and Yu 2019: standard training, Lipschitz regularization (LCR), average-margin regularization (AMR), and their PGD
baseline, on MNIST and CIFAR-10.

``paper`` is what the authors ran: the scripts of watml/rob-margin, as far as they go, with the penalty loop that counts
each layer twice (β = 2·10⁻³) and the hinge form of the margin term, both read off the published MNIST-CNNs; LeNets and
ConvNet, for which there are no scripts, follow appendix F with the same code. For CIFAR-CNN the code of that time holds
clamp(−α, 0, τ) instead, which is 0 for every right prediction; it has the hinge here, like all others. ``sound`` is the
printed objective.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Wu & Yu 2019, arXiv 1907.11780, appendix F"
CODE = f"{PAPER}; watml/rob-margin, train.sh"

#: Architecture, its name in presets, τ of appendix F, τ of train.sh (None: no script).
MNIST = [
    ("softmax-regression", "softmax-regression", 5.0, 5.0),
    ("mlp", "mlp", 5.0, 5.0),
    ("mnist-cnn", "cnn", 10.0, 40.0),
    ("lenet", "lenet", 40.0, None),
    ("lenet-small", "lenet-small", 40.0, None),
]
CIFAR10 = [
    ("softmax-regression", "softmax-regression", 5.0, 5.0),
    ("mlp", "mlp", 10.0, 10.0),
    ("cifar-cnn", "cnn", 10.0, 10.0),
    ("convnet", "convnet", 50.0, None),
    ("lenet-small", "lenet-small", 40.0, None),
]
#: The largest radius of the paper's tables, which is also that of its adversarial training.
THREAT = {"mnist": "l2:2.0", "cifar10": "l2:0.4"}

TWICE = "β is 1e-3 as printed; the code adds every layer's penalty a second time, at its bias."


def training(data: str, model: str, lr: float, *, epochs: int = 0, weight_decay: float = 0.0) -> dict[str, Any]:
    """SGD with Nesterov momentum, 200 epochs (linear models 1,000), batches of 128."""
    settings: dict[str, Any] = {
        "epochs": epochs or (1000 if model == "softmax-regression" else 200),
        "batch_size": 128,
        "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": weight_decay},
        "schedule": {"name": "constant"},
    }
    if (data, model) == ("cifar10", "lenet-small"):
        settings["augment"] = [{"name": "pad-crop", "padding": 2}, "flip"]
    return settings


def margins(tau: float, variant: str, beta: float) -> list[dict[str, Any]]:
    return [
        {"name": "average-margin", "weight": 0.1, "tau": tau, "variant": variant},
        {"name": "orthogonality", "beta": beta},
    ]


def standard(data: str, model: str, short: str, ran: bool) -> Preset:
    lr = 0.005 if model == "cifar-cnn" else 0.01
    return Preset(
        name=f"standard/{data}-{short}",
        reference=f"{CODE if ran else PAPER}" + (" (lr 0.005; printed 0.01)" if model == "cifar-cnn" else ""),
        data=data,
        model=model,
        threat=THREAT[data],
        paper={"objective": "standard", "training": training(data, model, lr)},
    )


def lipschitz(data: str, model: str, short: str, ran: bool) -> Preset:
    linear = model == "softmax-regression"
    beta, differs = 2e-3, TWICE
    if linear and data == "mnist":
        beta, differs = 2.0, "β is 1e-3 as printed; the script leaves it at 1, which the code counts twice."
    return Preset(
        name=f"orthogonality/{data}-{short}",
        reference=f"{CODE if ran else PAPER + ' (the same β for all networks; in none of the tables)'}: LCR",
        data=data,
        model=model,
        threat=THREAT[data],
        paper={
            "objective": "standard",
            "regularizers": [{"name": "orthogonality", "beta": beta}],
            "training": training(data, model, 0.01, epochs=200 if linear and data == "cifar10" else 0),
        },
        sound={"regularizers": [{"name": "orthogonality", "beta": 1e-3}]},
        differs=differs,
    )


def average_margin(data: str, model: str, short: str, printed: float, ran: float | None) -> Preset:
    tau = printed if ran is None else ran
    decays = (data, model) == ("cifar10", "softmax-regression")
    differs = f"The margin term is eq. 15, −λ[α]₀^τ, instead of its hinge λ max(0, τ − α); {TWICE}"
    if tau != printed:
        differs += f" τ is {printed:g} as printed, for the script's {tau:g}."
    if decays:
        differs += " No weight decay, which only the script has."
    return Preset(
        name=f"average-margin/{data}-{short}",
        reference=f"{CODE if ran else PAPER}: AMR (lr 0.002 of the scripts; printed 0.01)",
        data=data,
        model=model,
        threat=THREAT[data],
        paper={
            "objective": "standard",
            "regularizers": margins(tau, "hinge", 2e-3),
            "training": training(data, model, 0.002, weight_decay=1e-3 if decays else 0.0),
        },
        sound={
            "regularizers": margins(printed, "paper", 1e-3),
            **({"training": training(data, model, 0.002)} if decays else {}),
        },
        differs=differs,
    )


def adversarial(data: str, model: str, short: str) -> Preset:
    attack = {"name": "pgd", "threat": THREAT[data], "steps": 40}
    eps = THREAT[data].removeprefix("l2:")
    return Preset(
        name=f"adversarial/{data}-{short}",
        reference=f"{PAPER}, Table 2 (Adv); gradient floor of advertorch's L2PGDAttack",
        data=data,
        model=model,
        threat=THREAT[data],
        paper={
            "objective": {"name": "adversarial", "attack": {**attack, "step_size": 0.01, "grad_floor": 1e-6}},
            "training": training(data, model, 0.01),
        },
        sound={"objective": {"name": "adversarial", "attack": attack}},
        differs=f"Steps of 2.5 ε / 40 and no gradient floor: 40 × 0.01 is a walk of 0.4 in a ball of radius {eps}, and "
        "a floor of 1e-6 stops the walk where the cross-entropy is saturated.",
    )


PRESETS: tuple[Preset, ...] = (
    *(
        preset
        for data, networks in (("mnist", MNIST), ("cifar10", CIFAR10))
        for model, short, printed, ran in networks
        for preset in (
            standard(data, model, short, ran is not None),
            lipschitz(data, model, short, ran is not None),
            average_margin(data, model, short, printed, ran),
        )
    ),
    adversarial("mnist", "lenet", "lenet"),
    adversarial("cifar10", "convnet", "convnet"),
)
