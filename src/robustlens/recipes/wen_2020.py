"""Wen, Li and Jia 2020: adversarial training at growing strength, its gaps, margins and singular values.

All networks are attacked at 8/255, whatever they were trained for; "PGD" is the accuracy among the images that were
right before. Accuracies become fractions, training accuracy the error beside it. Table 1 prints numbers that a change
of the cross-entropy cannot have (0.13 where a third of the right images fall): they fit the change of the probability,
and that is what stands beside them here.

The recipes of one data set and network share their study, so that what one has trained the others only look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustlens.claims.evidence import Ask
from robustlens.methods.wen_2020 import PAPER, STRENGTHS
from robustlens.recipes.charts import RADIUS, Chart, all_named, over_strength
from robustlens.recipes.recipe import ALL, QUICK, Printed, Recipe, Scale
from robustlens.recipes.wen_2020_numbers import TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, Numbers

THREAT = "linf:8/255"
RADII = (1 / 255, 2 / 255, 4 / 255)
#: Of a share, and, as a part of the printed number, of a loss. The paper gives no spread over seeds.
SHARE, LOSS = 0.02, 0.2
#: Less of everything but the attack.
LAPTOP: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 64,
    "optimizer": {"lr": 0.02},
    "schedule": {"name": "multistep", "milestones": [10, 15], "gamma": 0.1},
}
FEW = {"train": 3000, "valid": 200, "test": 2000}

Settings = dict[str, Any]

#: Table 1 prints variations of the loss that fit those of the probability alone (the lens says why).
MEASURES: dict[str, Ask] = {
    "train error": Ask("generalisation-gap", "error, train"),
    "test accuracy": Ask("accuracy", "clean accuracy"),
    "error gap": Ask("generalisation-gap", "error gap"),
    "train loss": Ask("generalisation-gap", "loss, train"),
    "test loss": Ask("generalisation-gap", "loss, test"),
    "loss gap": Ask("generalisation-gap", "loss gap"),
    "PGD": Ask("accuracy", "conditional robust accuracy"),
    **{
        f"{kind} loss variation, ε = {k}": Ask("confidence", f"{kind} probability variation at {k / 255:.4g}")
        for k in (1, 2, 4)
        for kind in ("mean", "spread of")
    },
}


def over_radii(title: str, y_label: str, **asks: Ask) -> Chart:
    """A figure over the radius of training; the lines of several ``asks`` have their names."""
    lines = over_strength({name.replace("_", " "): ask for name, ask in asks.items()})
    return Chart(title=title, x_label=RADIUS, y_label=y_label, lines=lines)


GAP = "generalisation-gap"
#: Figures 1, 3, 5c, 6, 8 and 10, for every network there is.
CHARTS = (
    over_radii("Loss gap", "test loss − training loss", gap=Ask(GAP, "loss gap")),
    over_radii("Losses", "loss", train=Ask(GAP, "loss, train"), test=Ask(GAP, "loss, test")),
    over_radii("Error gap", "test error − training error", gap=Ask(GAP, "error gap")),
    over_radii("Errors", "error rate", train=Ask(GAP, "error, train"), test=Ask(GAP, "error, test")),
    over_radii(
        "Accuracy under one attack",
        "share right",
        of_all=Ask("accuracy", "robust accuracy"),
        of_those_right_before=Ask("accuracy", "conditional robust accuracy"),
    ),
    over_radii(
        "Spread of the margins of test images", "logits", spread=Ask("logit-margins", "spread of margins, test")
    ),
    Chart(
        title="Spread of each layer's singular values",
        x_label=RADIUS,
        y_label="standard deviation",
        lines=all_named("layer-spectra", "spread of singular values, ", over_strength),
    ),
)


def lenses(threat: str, eps: float, radii: Sequence[float], n: int) -> list[Settings]:
    """What the figures show: accuracy by 10 steps of a quarter of the radius, gaps, margins, probabilities, spectra."""
    attack = {"name": "pgd", "threat": threat, "steps": 10, "step_size": eps / 4}
    return [
        {"name": "accuracy", "attack": attack, "radii": [eps], "n_examples": n, "pictures": 4},
        {"name": "generalisation-gap", "robust": False, "n_examples": ALL},
        {"name": "logit-margins"},
        {
            "name": "confidence",
            "attack": {"name": "pgd", "threat": threat, "steps": 20},
            "radii": list(radii),
            "n_examples": n,
        },
        {"name": "layer-spectra", "bound": False},
    ]


def method(label: str, preset: str, scale: Scale, laptop: Settings = LAPTOP) -> Settings:
    return {"label": label, "preset": preset, "training": {} if scale == "paper" else laptop}


def cifar(data: str, network: str, kind: str, methods: Callable[[Scale], list[Settings]], scale: Scale) -> Settings:
    """One network on one of the CIFAR sets; at laptop scale ``lenet-small`` is Net A and ``convnet`` Net B."""
    whole = scale == "paper"
    small = "lenet-small" if network == "resnet56" else "convnet"
    return {
        "name": f"000-{data}-{network}{kind}",
        "data": {"source": data, "valid_fraction": 0.02} if whole else {"source": data, **FEW},
        "model": {"name": network, "norm": "fixup"} if whole else small,
        "threat": THREAT,
        "training": {"validate_every": 10, "validation_examples": 200},
        "methods": methods(scale),
        "seeds": [0] if whole or network == "resnet110" else [0, 1, 2],
        "lenses": lenses(THREAT, 8 / 255, RADII, 10_000 if whole else 1000),
    }


def trained(attack: str, data: str, suffix: str = "") -> Callable[[Scale], list[Settings]]:
    """One method for each strength."""
    return lambda scale: [method(f"AR {s}", f"{attack}-{s}{suffix}/{data}@paper", scale) for s in STRENGTHS]


def controlled(scale: Scale) -> list[Settings]:
    """Clipped once at the end of an epoch, as the paper did, and until every layer is within the bound ("sound")."""
    return [
        method(label if how == "paper" else f"{label}, sound", f"spectral-clip-{norm}+pgd-{s}/cifar10@{how}", scale)
        for norm in (1, 3, 5)
        for how in ("paper", "sound")
        for s in STRENGTHS
        for label in [f"SP {norm}, AR {s}"]
    ]


def net(data: str, network: str, scale: Scale) -> Settings:
    suffix = "-resnet110" if network == "resnet110" else ""
    return cifar(data, network, "", trained("pgd", data, suffix), scale)


def both_nets(data: str) -> Callable[[Scale], list[Settings]]:
    return lambda scale: [net(data, network, scale) for network in ("resnet56", "resnet110")]


def one_net(data: str) -> Callable[[Scale], list[Settings]]:
    return lambda scale: [net(data, "resnet56", scale)]


def with_fgsm(data: str) -> Callable[[Scale], list[Settings]]:
    return lambda scale: [cifar(data, "resnet56", "-fgsm", trained("fgsm", data), scale)]


def with_clipping(scale: Scale) -> list[Settings]:
    return [net("cifar10", "resnet56", scale), cifar("cifar10", "resnet56", "-clipped", controlled, scale)]


def weaker(scale: Scale) -> list[Settings]:
    return [
        cifar("cifar10", "resnet56", f"-{reading}", trained("pgd", "cifar10", f"-{reading}"), scale)
        for reading in ("normalised", "half-clean")
    ]


def tiny(scale: Scale) -> list[Settings]:
    """Tiny-ImageNet; at laptop scale 20 of its 200 classes, by steps in which networks at 0 and 4 / 255 learn more."""
    whole = scale == "paper"
    quick = {"epochs": 20, **QUICK}
    source: Settings = {"source": "tiny-imagenet", "valid_fraction": 0.02}
    return [
        {
            "name": "000-tiny-imagenet",
            "data": {"size": 56, "train_size": 64, **(source if whole else {**FEW, "source": "tiny-imagenet-20"})},
            "model": "wrn50-2" if whole else "lenet-small",
            "threat": THREAT,
            "training": {"validate_every": 10, "validation_examples": 200},
            "methods": [method(f"AR {s}", f"pgd-{s}/tiny-imagenet@paper", scale, quick) for s in (0, *STRENGTHS)],
            "seeds": [0] if whole else [0, 1, 2],
            "lenses": lenses(THREAT, 8 / 255, RADII, ALL if whole else 1000),
        }
    ]


def printed(numbers: Numbers, row: str = "", *, before: str = "", first: int = 4, study: int = 0) -> list[Printed]:
    """A block of a table; errors, accuracies and their gaps in percent."""
    strengths = [s for s in (0, *STRENGTHS) if s >= first]
    found = []
    for measure, values in numbers.items():
        of_losses = "loss" in measure
        for s, value in zip(strengths, values, strict=True):
            exact = value if of_losses else round(value / 100, 4)
            found.append(
                Printed(
                    row=f"{row} {before}AR {s}".strip(),
                    column=measure,
                    value=exact,
                    method=f"{before}AR {s}",
                    ask=MEASURES[measure],
                    tolerance=round(LOSS * value, 6) if of_losses else SHARE,
                    study=study,
                )
            )
    return found


PIXELS = (
    "The radii are in pixels and training sees adversarial images alone. The paper's clean accuracies are higher than "
    "such training gives, so its attack was probably weaker (000-table3-readings has two such readings): its trends, "
    "not its numbers, are what to compare. 2 % of the training images are kept for validation; weight decay is 1e-4."
)
SMALLER = (
    "At laptop scale: 3,000 training images, 20 epochs in batches of 64 at a learning rate of 0.02, and a network of "
    "four layers in place of the ResNet (of five, one seed, for ResNet-110); the attack is the paper's."
)


def recipe(
    name: str,
    what: str,
    studies: Callable[[Scale], list[Settings]],
    blocks: Sequence[list[Printed]],
    times: tuple[str, str],
    differs: str = f"{PIXELS} {SMALLER}",
    charts: tuple[Chart, ...] = CHARTS,
) -> Recipe:
    laptop, paper = times
    return Recipe(
        name=f"000-{name}",
        paper=PAPER,
        what=what,
        studies=studies,
        printed=tuple(each for block in blocks for each in block),
        expects={
            "paper": f"about {paper} on one data-centre GPU (estimated); one network each, --seeds 0,1,2 for intervals",
            "laptop": f"about {laptop} on two cores (estimated)",
            "smoke": "one to three minutes",
        },
        differs=differs,
        charts=charts,
    )


def by_study(tables: Mapping[str, Numbers]) -> list[list[Printed]]:
    return [printed(numbers, row, study=k) for k, (row, numbers) in enumerate(tables.items())]


def on_one_set(data: str) -> list[Recipe]:
    """What the paper shows of both CIFAR sets at once."""
    called = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[data]
    suffix = "" if data == "cifar10" else f"-{data}"
    return [
        recipe(
            f"figure5{suffix}",
            f"Figure 5: probabilities, losses and the spread of each layer's singular values, ResNet-56 on {called}",
            one_net(data),
            [],
            ("a quarter of an hour", "4 hours"),
            charts=CHARTS[-1:],
        ),
        recipe(
            f"table1{suffix}",
            f"Table 1 and figure 7: the most that a change of 1, 2 or 4 / 255 adds to the loss, ResNet-56 on {called}",
            one_net(data),
            [printed(TABLE1[called])],
            ("a quarter of an hour", "4 hours"),
            differs=f"{PIXELS} The printed numbers fit the change of the probability of the right class, which stands "
            f"beside them, found by 20 steps of an eighth of the radius. {SMALLER}",
            charts=(),
        ),
        recipe(
            f"table2{suffix}",
            f"Table 2 and figures 8 to 10: the same trained with FGSM, ResNet-56 on {called}",
            with_fgsm(data),
            [printed(TABLE2[called])],
            ("8 minutes", "an hour"),
            differs=f"{PIXELS} Trained from the image itself at 8 and 16 / 255, networks tend to learn to fool FGSM "
            f"alone. {SMALLER}",
        ),
    ]


RECIPES: tuple[Recipe, ...] = (
    *on_one_set("cifar10"),
    *on_one_set("cifar100"),
    recipe(
        "table3",
        "Table 3, figures 1, 3 and 4: ResNet-56 and ResNet-110 on CIFAR-10 at strengths 4, 8 and 16: gaps, accuracies, "
        "margins and singular values",
        both_nets("cifar10"),
        by_study(TABLE3),
        ("40 minutes", "12 hours"),
    ),
    recipe(
        "table6",
        "Table 6 and figure 6: ResNet-56 on CIFAR-10 with operator norms held to 1, 3, 5 and not at all",
        with_clipping,
        [
            printed(TABLE3["ResNet-56"], "none"),
            *(printed(numbers, before=f"SP {norm}, ", study=1) for norm, numbers in TABLE6.items()),
        ],
        ("an hour and a half", "30 hours"),
        differs=f"{PIXELS} Beside the paper's one clip at the end of an epoch stands one that reaches the bound "
        f'("sound"). {SMALLER}',
    ),
    recipe(
        "table4",
        "Table 4, figures 3 and 4: ResNet-56 and ResNet-110 on CIFAR-100 at strengths 4, 8 and 16",
        both_nets("cifar100"),
        by_study(TABLE4),
        ("40 minutes", "12 hours"),
    ),
    recipe(
        "table5",
        "Table 5 and figure 3: WRN-50-2 on Tiny-ImageNet at strengths 0, 4, 8 and 16",
        tiny,
        [printed(TABLE5, first=0)],
        ("12 minutes", "four days"),
        differs=f"{PIXELS} At laptop scale: 20 of the 200 classes, 3,000 training images, 20 epochs of Adam in "
        "batches of 50, and a network of four layers, which at 8 and 16 / 255 gives one answer for all images.",
    ),
    recipe(
        "table3-readings",
        "Table 3 under the two readings of appendix B.1 in which the attack is weaker: radii on normalised images, and "
        "half of the loss on clean ones; ResNet-56 on CIFAR-10",
        weaker,
        [printed(TABLE3["ResNet-56"], row, study=k) for k, row in enumerate(("normalised", "half clean"))],
        ("half an hour", "8 hours"),
        differs=SMALLER,
    ),
)
