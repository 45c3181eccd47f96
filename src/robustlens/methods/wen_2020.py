"""Wen, Li and Jia 2020: adversarial training as a regularization, and its strength ("AR 4, 8, 16") beside the largest
operator norm that a layer may have ("SP 1, 3, 5").

The CIFAR networks have no BatchNorm: set ``norm = "fixup"`` on the study's model. All of them are evaluated at 8/255,
whatever they trained on. Weight decay and the learning rate of scalar biases are those of the Fixup repository, the
flip for Tiny-ImageNet is usual; the paper names none of these. The FGSM networks overfit catastrophically at strength
8 and 16 (their accuracy under FGSM says little: read that under PGD beside it), which is how the paper trained them.

Its clean accuracies are higher than radii of so many pixel levels allow, and its text can be read in two ways in which
the attack is weaker. Both are presets beside it: ``-normalised`` takes radius and step on images divided by their
standard deviation (0.24 to 0.28 in the channels of both CIFARs: a quarter here, and one radius for all channels),
``-half-clean`` averages the adversarial loss with the clean one.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

PAPER = "Wen, Li and Jia 2020, arXiv 2011.07478"
FIXUP = 'model.norm = "fixup"'

CIFAR: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 256,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "scalar_lr": 0.1},
    "schedule": {"name": "multistep", "milestones": [100, 150], "gamma": 0.1},
    "augment": ["pad-crop", "flip"],
}
TINY: dict[str, Any] = {
    "epochs": 90,
    "batch_size": 256,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "schedule": {"name": "multistep", "milestones": [30, 60], "gamma": 0.1},
    "augment": [{"name": "random-resized-crop", "size": 56}, "flip"],
}


def against(strength: int, *, unit: float = 1.0, **more: Any) -> dict[str, Any]:
    """PGD with 10 steps of 2/255 from a random start, at a radius of ``strength`` / 255, both in units of ``unit``."""
    attack = {"name": "pgd", "threat": f"linf:{strength * unit:g}/255", "steps": 10, "step_size": 2 * unit / 255}
    return {"name": "adversarial", "attack": attack, **more}


def preset(name: str, where: str, data: str, model: str, paper: dict[str, Any], **sound: Any) -> Preset:
    return Preset(
        name=name,
        reference=f"{PAPER}, {where}",
        data=data,
        model={"name": model, "norm": "fixup"} if model.startswith("resnet") else model,
        threat="linf:8/255",
        paper={**paper, "training": TINY if data == "tiny-imagenet" else CIFAR},
        **sound,
    )


def pgd(strength: int, data: str, model: str, table: int) -> Preset:
    method = f"pgd-{strength}" + ("-resnet110" if model == "resnet110" else "")
    return preset(f"{method}/{data}", f"Table {table}; {FIXUP}", data, model, {"objective": against(strength)})


def weaker(strength: int, data: str, table: int) -> tuple[Preset, Preset]:
    """The two readings of the text under which the attack is weaker."""
    where = f"Table {table}, another reading of appendix B.1; {FIXUP}"
    objectives = {"normalised": against(strength, unit=0.25), "half-clean": against(strength, clean_weight=0.5)}
    one, other = (
        preset(f"pgd-{strength}-{reading}/{data}", where, data, "resnet56", {"objective": objective})
        for reading, objective in objectives.items()
    )
    return one, other


def fgsm(strength: int, data: str) -> Preset:
    objective = {"name": "adversarial", "attack": {"name": "fgsm", "threat": f"linf:{strength}/255"}}
    where = f"appendix B.6, Table 2; {FIXUP}"
    return preset(f"fgsm-{strength}/{data}", where, data, "resnet56", {"objective": objective})


def tiny(strength: int) -> Preset:
    objective: Any = against(strength) if strength else "standard"
    where = "Table 5; data.size = 56, data.train_size = 64"
    return preset(f"pgd-{strength}/tiny-imagenet", where, "tiny-imagenet", "wrn50-2", {"objective": objective})


def controlled(strength: int, norm: int) -> Preset:
    clip = {"name": "spectral-clip", "norm": float(norm), "every": "epoch"}
    return preset(
        f"spectral-clip-{norm}+pgd-{strength}/cifar10",
        f"appendix B.4 and D.3, Table 6, SP {norm}; {FIXUP}",
        "cifar10",
        "resnet56",
        {"objective": against(strength), "constraints": [{**clip, "how": "clip"}]},
        sound={"constraints": [{**clip, "how": "alternating"}]},
        differs="Clips until every layer is within the bound: one clip and crop can leave a 3×3 layer a third above 1.",
    )


STRENGTHS = (4, 8, 16)

PRESETS: tuple[Preset, ...] = (
    *(
        pgd(strength, data, model, table)
        for data, table in (("cifar10", 3), ("cifar100", 4))
        for model in ("resnet56", "resnet110")
        for strength in STRENGTHS
    ),
    *(each for data, table in (("cifar10", 3), ("cifar100", 4)) for s in STRENGTHS for each in weaker(s, data, table)),
    *(fgsm(strength, data) for data in ("cifar10", "cifar100") for strength in STRENGTHS),
    *(tiny(strength) for strength in (0, *STRENGTHS)),
    *(controlled(strength, norm) for norm in (1, 3, 5) for strength in STRENGTHS),
)
