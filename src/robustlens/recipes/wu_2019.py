"""Wu and Yu 2019: margins over the epochs, and what the average-margin regularizer (AMR) does for robustness.

Every robust accuracy is given by the paper's own attack (ℓ2-PGD on the cross-entropy, 1,000 steps of 0.01, last
iterate, which stalls where gradients are below 1e-6), and beside it by AutoAttack-standard; `health` says what the
paper's attack misses, with 100 steps of a twentieth of the radius.

Methods are given as the authors ran them ("paper") and as printed ("sound"); where only one is named, they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustlens.recipes.recipe import ALL, QUICK, Recipe, Scale
from robustlens.recipes.wu_2019_numbers import RADII, TABLE1, TABLE2, rows, threat

PAPER = "Wu & Yu 2019, arXiv 1907.11780"
LABELS = ("Std", "LCR, paper", "LCR, sound", "AMR, paper", "AMR, sound")
NAMES = {"Std": "standard", "LCR": "orthogonality", "AMR": "average-margin", "Adv": "adversarial"}

KEPT = "2 % of the training images are kept for validation, which the paper does not do; the last epoch counts."
SLOW = (
    "The learning rate of AMR is a fifth of the others', as in the authors' scripts: after 20 epochs it is far from "
    "its end, and what is found of AMR there says little of 200."
)
#: Data that is left of the training set at laptop scale.
FEW_IMAGES = 5_000


def method(data: str, short: str, label: str, epochs: int | None = None) -> dict[str, Any]:
    """A preset under its label ("AMR, paper"), with its own epochs or ``epochs``.

    In a few of them the paper's rates leave CIFAR-10's CNN with one answer for all images.
    """
    name, _, protocol = label.partition(", ")
    preset = f"{NAMES[name]}/{data}-{short}" + (f"@{protocol}" if protocol else "")
    if epochs is None:
        return {"label": label, "preset": preset}
    return {"label": label, "preset": preset, "training": {"epochs": epochs, **(QUICK if data == "cifar10" else {})}}


def attacked(data: str, scale: Scale, n: int, *, at: float | None = None) -> list[dict[str, Any]]:
    """Clean accuracy of all test images; the paper's attack at every radius; AutoAttack-standard and the checks.

    ``n`` images at laptop scale; at paper scale all of them under the paper's attack, 1,000 under the others. The
    checks are made at the largest radius, or ``at``.
    """
    largest = RADII[data][-1] if at is None else at
    steps, some = (20 if scale == "smoke" else 1000), (1000 if scale == "paper" else n)
    found: list[dict[str, Any]] = [
        {
            "name": "accuracy",
            "radii": [0.0],
            "attack": {"name": "pgd", "threat": threat(0.0)},
            "n_examples": 500 if scale == "smoke" else ALL,
            "pictures": 0,
        }
    ]
    for eps in RADII[data]:
        pgd = {"name": "pgd", "threat": threat(eps), "steps": steps, "step_size": 0.01, "grad_floor": 1e-6}
        of = ALL if scale == "paper" else n
        found.append({"name": "accuracy", "radii": [eps], "attack": pgd, "n_examples": of, "pictures": 0})
    stalls = {"name": "pgd", "threat": threat(largest), "steps": 100, "step_size": largest / 20, "grad_floor": 1e-6}
    found.append({"name": "standard-accuracy", "n_examples": some, "effort": 0.02 if scale == "smoke" else 1.0})
    found.append({"name": "health", "attack": stalls, "n_examples": some})
    return found


def watched(when: str, n: int, *, linear: bool = False) -> list[dict[str, Any]]:
    """Margins and errors over the epochs."""
    distance = {"name": "boundary-distance", "n_examples": n, "pictures": 0}
    gap = {"name": "generalisation-gap", "n_examples": ALL, "robust": False, "when": when}
    return [{"name": "linear-margins", "when": when} if linear else {**distance, "when": when}, gap, distance]


def study(
    data: str, model: str, methods: Sequence[Mapping[str, Any]], lenses: list[dict[str, Any]], scale: Scale
) -> dict[str, Any]:
    images = {"train": FEW_IMAGES} if data == "cifar10" and scale != "paper" else {}
    return {
        "data": {"source": data, "valid_fraction": 0.02, **images},
        "model": model,
        "threat": threat(RADII[data][-1]),
        "training": {"validation_examples": 200},
        "seeds": [0, 1, 2] if scale == "paper" else [0],
        "methods": list(methods),
        "lenses": lenses,
    }


# Figures 1 and 4


def figure1(scale: Scale) -> list[dict[str, Any]]:
    """Logistic regression without a bias on 0 against 1, by gradient descent with a constant step (§3)."""
    longest = 1_000_000 if scale == "paper" else 20_000
    marks = [lead * 10**power for power in range(7) for lead in (1, 2, 5) if lead * 10**power <= longest]
    when = f"epochs:{','.join(map(str, marks))}"
    plain = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    fast = {**plain, "momentum": 0.9, "nesterov": True}
    return [
        {
            "data": {"source": "mnist", "classes": [0, 1], "valid_fraction": 0.01},
            "model": "logistic",
            "threat": threat(1.0),
            "training": {"schedule": {"name": "constant"}, "validate_every": "log", "validation_examples": 100},
            "seeds": [0],
            "methods": [
                {
                    "label": "gradient descent",
                    "training": {"epochs": longest, "batch_size": 12_665, "optimizer": plain},
                },
                {"label": "SGD, momentum", "training": {"epochs": longest // 5, "batch_size": 128, "optimizer": fast}},
            ],
            "lenses": [
                {"name": "linear-margins", "when": when},
                {"name": "generalisation-gap", "n_examples": ALL, "robust": False, "when": when},
            ],
        }
    ]


# Table 1, figures 2, 3, 5, 6, 7 and 8

#: Epochs after which networks are looked at, for training of 200, 20 and 10 epochs.
SCHEDULE = {200: "epochs:1,10,20,30,40,50,80,120,160,200", 20: "epochs:1,2,5,10,20", 10: "epochs:1,2,5,10"}


def table1(data: str, short: str, scale: Scale, *, n: int, near: int, epochs: int = 20) -> dict[str, Any]:
    """``n`` images are attacked, the distances of ``near`` are measured, in training of ``epochs``, at laptop scale."""
    model = {"mlp": "mlp", "cnn": "mnist-cnn" if data == "mnist" else "cifar-cnn"}[short]
    paper = scale == "paper"
    when = SCHEDULE[200 if paper else epochs]
    lenses = [*attacked(data, scale, n), *watched(when, 500 if paper else near)]
    methods = [method(data, short, label, None if paper else epochs) for label in LABELS]
    return study(data, model, methods, lenses, scale) | {"name": f"003-{data}-{short}"}


def mlp(scale: Scale) -> dict[str, Any]:
    """Trained as long as the paper's at laptop scale too."""
    return table1("mnist", "mlp", scale, n=1000, near=200, epochs=200)


def cnn(scale: Scale) -> dict[str, Any]:
    return table1("mnist", "cnn", scale, n=200, near=100)


def cifar_table1(scale: Scale) -> list[dict[str, Any]]:
    return [
        table1("cifar10", "mlp", scale, n=200, near=100),
        table1("cifar10", "cnn", scale, n=40, near=40, epochs=10),
    ]


def softmax_regression(scale: Scale) -> dict[str, Any]:
    short, near = "softmax-regression", 500 if scale == "paper" else 200
    when = "epochs:1,10,20,50,100,200,500,1000"
    methods = [method("mnist", short, label) for label in ("Std", "AMR, paper")]
    return study("mnist", short, methods, watched(when, near, linear=True), scale)


def figures(scale: Scale) -> list[dict[str, Any]]:
    """The margins of Table 1's networks; those that were trained for it already are not trained again."""
    networks = []
    for made in (mlp(scale), cnn(scale)):
        made["methods"] = [each for each in made["methods"] if each["label"] in ("Std", "AMR, paper")]
        made["lenses"] = [
            each for each in made["lenses"] if each["name"] in ("boundary-distance", "generalisation-gap")
        ]
        networks.append(made)
    return [softmax_regression(scale) | {"name": "003-mnist-lr"}, *networks]


# Table 2


def fine_tuned(data: str) -> dict[str, Any]:
    return {"label": "DD", "preset": f"deep-defense/{data}", "start": "Std"}


def table2(data: str, scale: Scale, *, n: int, epochs: int, attacks: int) -> dict[str, Any]:
    """LeNet on MNIST, ConvNet on CIFAR-10; ``epochs``, and ``attacks`` of adversarial training, at laptop scale."""
    model, paper = {"mnist": "lenet", "cifar10": "convnet"}[data], scale == "paper"
    labels = ("Adv, paper", "Adv, sound", "AMR, paper", "AMR, sound")
    long = {label: None if paper else attacks if label.startswith("Adv") else epochs for label in ("Std", *labels)}
    methods = [method(data, model, "Std", long["Std"]), fine_tuned(data)]
    methods += [method(data, model, label, long[label]) for label in labels]
    return study(data, model, methods, attacked(data, scale, n), scale)


def small(data: str, scale: Scale, *, n: int, epochs: int) -> dict[str, Any]:
    """LeNetSmall: MMR, whose step takes a second, beside AMR; at laptop scale with few images of CIFAR-10.

    AutoAttack and the checks at half of the largest radius, where something is left.
    """
    at = RADII[data][1]
    mmr: dict[str, Any] = {"label": "MMR", "preset": f"mmr/{data}"}
    if scale != "paper":
        mmr["training"] = {"epochs": epochs, "schedule": {"name": "multistep", "milestones": [0.9 * epochs]}}
    limit = None if scale == "paper" else epochs
    methods = [mmr, *(method(data, "lenet-small", label, limit) for label in ("AMR, paper", "AMR, sound"))]
    return study(data, "lenet-small", methods, attacked(data, scale, n, at=at), scale) | {"threat": threat(at)}


def cifar_table2(scale: Scale) -> list[dict[str, Any]]:
    return [
        table2("cifar10", scale, n=100, epochs=10, attacks=3),
        small("cifar10", scale, n=100, epochs=10),
    ]


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="003-figure1",
        paper=PAPER,
        what="Figures 1 and 4: minimum and average margin of logistic regression on 0 against 1 over the epochs, "
        "beside the hard-margin SVM's; histograms, nearest pictures, losses and errors",
        studies=figure1,
        expects={
            "laptop": "82 minutes of one core that had other work (measured)",
            "paper": "11 hours or more (estimated)",
        },
        differs="The paper names neither step size nor epochs: gradient descent with steps of 0.1, half of what is "
        "stable, for 1,000,000 epochs, and SGD with momentum for a fifth of that, whose epoch goes about 1,000 "
        "times as far. 1 % of the training images are kept for validation. laptop: a fiftieth of the epochs.",
    ),
    Recipe(
        name="003-table1-mnist-mlp",
        paper=PAPER,
        what="Table 1, MNIST-MLP: standard training, LCR and AMR under the paper's attack, with average margins",
        studies=lambda scale: [mlp(scale)],
        printed=tuple(rows("mnist", TABLE1["mnist", "mlp"], LABELS)),
        expects={
            "laptop": "three hours and a quarter of one core that had other work (measured)",
            "paper": "2 hours of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} laptop: one seed, 1,000 test images attacked.",
    ),
    Recipe(
        name="003-table1-mnist-cnn",
        paper=PAPER,
        what="Table 1, MNIST-CNN: standard training, LCR and AMR under the paper's attack, with average margins",
        studies=lambda scale: [cnn(scale)],
        printed=tuple(rows("mnist", TABLE1["mnist", "cnn"], LABELS)),
        expects={
            "laptop": "two hours of one core (measured)",
            "paper": "6 hours of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} laptop: 20 epochs instead of 200, one seed, 200 test images attacked. {SLOW}",
    ),
    Recipe(
        name="003-figures6-7",
        paper=PAPER,
        what="Figures 3, 5, 6 and 7 on MNIST: margins, their histograms and the errors of softmax regression, MLP and "
        "CNN over the epochs, with standard training and AMR",
        studies=figures,
        expects={
            "laptop": "40 minutes after 003-table1-mnist-mlp and -cnn, of one core that had other work (measured)",
            "paper": "as 003-table1-mnist-cnn (estimated)",
        },
        differs=f"{KEPT} laptop: 20 epochs of the CNN instead of 200; the MLP has its 200, the regression its 1,000.",
    ),
    Recipe(
        name="003-table2-mnist-lenet",
        paper=PAPER,
        what="Table 2, MNIST-LeNet: standard training, Deep Defense, adversarial training and AMR",
        studies=lambda scale: [table2("mnist", scale, n=200, epochs=20, attacks=5)],
        printed=tuple(rows("mnist", TABLE2["mnist", "lenet"], ("Std", "DD", "Adv, paper", "Adv, sound", "AMR, paper"))),
        expects={
            "laptop": "three hours of one core that had other work, half an hour more for the lenses (measured)",
            "paper": "12 hours of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} laptop: 20 epochs instead of 200, 5 of adversarial training, one seed, 200 test images.",
    ),
    Recipe(
        name="003-table2-mnist-lenet-small",
        paper=PAPER,
        what="Table 2, MNIST-LeNetSmall: MMR and AMR",
        studies=lambda scale: [small("mnist", scale, n=500, epochs=20)],
        printed=tuple(rows("mnist", TABLE2["mnist", "lenet-small"], ("MMR", "AMR, paper", "AMR, sound"))),
        expects={
            "laptop": "two hours of two processes, of a core each, all but ten minutes of it MMR's (measured)",
            "paper": "2 hours of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} MMR's published ℓ2 model has γ 0.45, λ 3. laptop: 20 epochs instead of 100 and 200, "
        "one seed, 500 test images attacked.",
    ),
    Recipe(
        name="003-cifar10-table1",
        paper=PAPER,
        what="Table 1 and figures 2, 3, 5 and 8 on CIFAR-10: MLP and CNN with standard training, LCR and AMR",
        studies=cifar_table1,
        printed=tuple(
            printed
            for study_, short in enumerate(("mlp", "cnn"))
            for printed in rows("cifar10", TABLE1["cifar10", short], LABELS, study=study_, what=f"{short.upper()}, ")
        ),
        expects={
            "laptop": "two hours of one core that had other work (measured)",
            "paper": "a day of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} laptop: 5,000 training images, 20 and 10 epochs of Adam instead of 200 of SGD, one seed, "
        "200 and 40 test images attacked.",
    ),
    Recipe(
        name="003-cifar10-table2",
        paper=PAPER,
        what="Table 2 on CIFAR-10: ConvNet with standard training, Deep Defense, adversarial training and AMR; "
        "LeNetSmall with MMR and AMR",
        studies=cifar_table2,
        printed=(
            *rows(
                "cifar10",
                TABLE2["cifar10", "convnet"],
                ("Std", "DD", "Adv, paper", "Adv, sound", "AMR, paper", "AMR, sound"),
                what="ConvNet, ",
            ),
            *rows(
                "cifar10",
                TABLE2["cifar10", "lenet-small"],
                ("MMR", "AMR, paper", "AMR, sound"),
                study=1,
                what="LeNetSmall, ",
            ),
        ),
        expects={
            "laptop": "an hour and 40 minutes of one core to train (measured), an hour for the lenses (estimated)",
            "paper": "a day of one GPU for three seeds (estimated)",
        },
        differs=f"{KEPT} Deep Defense's settings for CIFAR-10 were not published: those of MNIST. laptop: 5,000 "
        "training images, 10 epochs instead of 200, 3 of adversarial training, one seed, 100 test images attacked.",
    ),
)
