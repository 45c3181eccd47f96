"""The networks that Wu and Yu 2019 published, audited: are the numbers of Table 1 those networks' robustness?"""

from __future__ import annotations

from pathlib import Path

from robustlens.core.discovery import build
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.methods.preset import find_preset
from robustlens.models.adapter import load_weights
from robustlens.recipes.recipe import Recipe, Scale
from robustlens.recipes.wu_2019 import PAPER, attacked
from robustlens.recipes.wu_2019_numbers import RADII, TABLE1, rows, threat
from robustlens.results.store import RunDirectory
from robustlens.studies.audit import audit

PUBLISHED = {
    "Std, published": ("mnist-cnn-std", "mnist-cnn", "standard/mnist-cnn"),
    "LCR, published": ("mnist-cnn-lcr", "mnist-cnn", "orthogonality/mnist-cnn@paper"),
    "AMR, published": ("mnist-cnn-amr", "mnist-cnn", "average-margin/mnist-cnn@paper"),
    "LR, published": ("mnist-lr-std", "softmax-regression", "standard/mnist-softmax-regression"),
}
#: The MNIST-CNN rows of Table 1, for which these networks stand.
PUBLISHED_ROWS = tuple(
    rows("mnist", TABLE1["mnist", "cnn"], [label for label in PUBLISHED if not label.startswith("LR")])
)


def published(place: Path, out: Path, scale: Scale, device: str) -> list[RunDirectory]:
    """Look at the networks of watml/rob-margin in ``place``, without training anything.

    The runs say how they were trained as far as the authors' code and their stored losses tell it, so that claims can
    tell them apart: the networks of Table 1 are the authors', not ours, and are compared among themselves alone.
    """
    splits = load(DataConfig(source="mnist"))
    n, near = {"smoke": (10, 10), "laptop": (200, 200), "paper": (1000, 500)}[scale]
    found = []
    for label, (file, architecture, name) in PUBLISHED.items():
        model = build("model", architecture).build(splits.shape, len(splits.classes))
        load_weights(model, place / f"{file}.safetensors")
        lenses = [*attacked("mnist", scale, n), {"name": "boundary-distance", "n_examples": near}]
        lenses += [{"name": "linear-margins"}] if architecture == "softmax-regression" else []
        largest = threat(RADII["mnist"][-1])
        run = audit(model, splits, threat=largest, lenses=lenses, label=label, out=out, device=device)
        preset, protocol = find_preset(name)
        record = run.read_json("run.json")
        trained = {"regularizers": [], "constraints": [], "update": "descend", **preset.settings(protocol)}
        subject = {"data": {"source": "mnist"}, "model": {"name": architecture, "weights": "published"}}
        run.write_json("run.json", {**record, "config": {**record["config"], **trained, **subject}})
        found.append(run)
    return found


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="003-published-networks",
        paper=PAPER,
        what="Table 1, MNIST-CNN, on the authors' own networks: their attack beside AutoAttack-standard and the health "
        "checks, and margins",
        networks=published,
        printed=PUBLISHED_ROWS,
        expects={
            "laptop": "about an hour of one core (half of it measured)",
            "paper": "half a day of one core (estimated)",
        },
        differs="Nothing is trained: --weights names the directory of mnist-cnn-std.safetensors and the other three. "
        "At laptop scale 200 images are attacked with the paper's 1,000 steps and 200 distances of each split are "
        "measured, at paper scale 1,000 and 500.",
    ),
)
