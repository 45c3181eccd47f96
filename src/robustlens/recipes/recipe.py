"""A paper's table or figure as a study, with the paper's numbers and how far ours may lie from them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from robustlens.claims.evidence import Ask
from robustlens.core.discovery import discover, modules
from robustlens.recipes.charts import Chart
from robustlens.results.errors import InputError, unknown_name
from robustlens.results.store import RunDirectory

#: How large a study is made. ``paper``: as the paper has it. ``laptop``: less data, width or fewer epochs, hours of two
#: cores. ``smoke``: an epoch on a few images, which shows that everything runs and nothing else.
Scale = Literal["smoke", "laptop", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "laptop", "paper")

#: More examples than any split has.
ALL = 100_000
#: Steps that get somewhere in the few epochs of laptop scale, where a paper's own do not.
QUICK: Mapping[str, Any] = {
    "batch_size": 50,
    "optimizer": {"name": "adam", "lr": 1e-3},
    "schedule": {"name": "one-cycle"},
}


@dataclass(frozen=True, kw_only=True)
class Printed:
    """One number of the paper.

    Attributes:
        row, column: where it stands in the table or figure.
        value: as printed, percentages as fractions.
        method: label of the method in the study; ``study`` its position among the recipe's studies.
        ask: the quantity of ours that stands beside it.
        tolerance: ours agrees where its whole interval lies within ± this much of ``value``.
        same_images: both numbers are of the same images, all of the split, so that the interval is over seeds alone.
    """

    row: str
    column: str
    value: float
    method: str
    ask: Ask
    tolerance: float
    study: int = 0
    same_images: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A table or a figure.

    Attributes:
        name: "<number of the paper>-<table or figure>", such as "004-table1".
        paper: citation.
        what: the table or figure and what it shows.
        studies: settings of the studies at a scale, as a study file would have them. Recipes that look at the same
            networks give their study one name, and the networks are trained once; else it is the recipe's.
        networks: in place of studies, looks at networks that exist already: (directory of their weights, directory for
            runs, scale, device) → runs.
        printed: the paper's numbers; none for a figure without numbers.
        expects: time and machine at laptop and paper scale, measured or (said so) estimated; smoke takes minutes.
        differs: what is not as in the paper at ``paper`` scale, and what the other scales change; sentences.
        charts: figures over all its networks, drawn at the head of the page.
    """

    name: str
    paper: str
    what: str
    studies: Callable[[Scale], Sequence[Mapping[str, Any]]] = lambda scale: ()
    networks: Callable[[Path, Path, Scale, str], list[RunDirectory]] | None = None
    printed: tuple[Printed, ...] = ()
    expects: Mapping[Scale, str]
    differs: str = ""
    charts: tuple[Chart, ...] = ()

    def at(self, scale: Scale) -> list[dict[str, Any]]:
        """The studies' settings, named, with the scale in the name."""
        made = [copy.deepcopy(dict(settings)) for settings in self.studies(scale)]
        for number, settings in enumerate(made):
            part = f"-{number + 1}" if len(made) > 1 else ""
            name = settings.get("name", f"{self.name}{part}")
            settings["name"] = name + ("" if scale == "paper" else f"-{scale}")
        return [shrunk(settings) for settings in made] if scale == "smoke" else made


@cache
def recipes() -> Mapping[str, Recipe]:
    """Name → recipe, of every paper."""
    found = [recipe for module in modules("recipes") for recipe in getattr(module, "RECIPES", ())]
    return {recipe.name: recipe for recipe in sorted(found, key=lambda each: each.name)}


def find_recipe(name: str) -> Recipe:
    """The recipe called ``name``; raises InputError with the nearest one."""
    known = recipes()
    if name not in known:
        raise unknown_name("recipe", name, known)
    return known[name]


def find_scale(name: str) -> Scale:
    """The scale called ``name``; raises InputError with the nearest one."""
    for scale in SCALES:
        if scale == name:
            return scale
    raise unknown_name("scale", name, SCALES)


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """A study's settings at smoke scale: the same parts, one epoch, 200 images to learn from, 40 to test on.

    MNIST is taken from the 5,000 digits that install with the library.
    """
    data = dict(settings["data"])
    few = {"train": 200, "valid": 40, "test": 40}
    data |= {part: min(count, data.get(part) or count) for part, count in few.items()}
    if data["source"] == "mnist":
        data["source"] = "mnist5k"
    settings["data"] = data
    training = dict(settings.get("training", {}))
    settings["training"] = training | {"epochs": 1, "validation_examples": 20}
    for method in settings["methods"]:
        if "preset" in method or "epochs" in method.get("training", {}):
            method["training"] = dict(method.get("training", {})) | {"epochs": 1}
    settings["lenses"] = [_shrunk_lens(lens) for lens in settings["lenses"]]
    settings["seeds"] = list(settings.get("seeds", [0]))[:1]
    return settings


def _shrunk_lens(lens: str | Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": lens} if isinstance(lens, str) else dict(lens)
    known = discover("lens")
    if found["name"] not in known:
        raise InputError("lens of a recipe", expected="a lens", got=found["name"], fix="See `robustlens list lens`.")
    if "n_examples" in {field.name for field in dataclasses.fields(known[found["name"]])}:
        found["n_examples"] = min(found.get("n_examples") or 20, 20)
    if "effort" in {field.name for field in dataclasses.fields(known[found["name"]])}:
        found["effort"] = 0.02
    if "when" in found:
        found["when"] = "epochs:1"
    return found
