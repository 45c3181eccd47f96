"""An audit as RobustBench's record of a model: the fields of its ``ModelInfo``, as text where it has text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import robustlens
from robustlens.report.numbers import interval, number
from robustlens.results.reading import Quantity, Reading
from robustlens.threats.lp import Lp

#: The fields of RobustBench's ``ModelInfo`` (robustbench/utils.py, version 1.1.1), in its order.
FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "corruptions_acc", "corruptions_acc_3d", "corruptions_mce", "corruptions_mce_3d",
    "autoattack_acc", "footnote",
)  # fmt: skip

#: The lens whose result at full effort is an ``autoattack_acc``, and its attack's name.
STANDARD = "standard-accuracy"
AUTOATTACK = "AutoAttack-standard"


def robustbench_record(readings: Sequence[Reading], *, dataset: str, architecture: str, threat: Lp) -> dict[str, Any]:
    """The fields that an audit knows; null is what it cannot know (paper, authors, training data, …).

    Accuracies are percentages of the images looked at, as text with two digits. ``autoattack_acc`` is filled by
    AutoAttack-standard alone; what any attack found stands in ``footnote``, with its interval and n.
    """
    known: dict[str, Any] = {"dataset": dataset, "architecture": architecture, "eps": fraction(threat.eps)}
    notes = []
    for reading in readings:
        values = {quantity.name: quantity for quantity in reading.quantities}
        if "robust accuracy" not in values:
            continue
        robust = values["robust accuracy"]
        if "clean accuracy" in values:
            known["clean_acc"] = _percent(values["clean accuracy"])
        attack = _attack(reading)
        if attack == AUTOATTACK:
            known["autoattack_acc"] = _percent(robust)
        trust = "" if reading.outcome.status == "ok" else f", {reading.outcome.status}: {reading.outcome.why}"
        bounds = interval(robust.low, robust.high, robust.unit)
        notes.append(f"{attack}: {number(robust.value, robust.unit)} {bounds} of {robust.n} images{trust}")
    if notes:
        known["footnote"] = f"{threat.norm}, robustlens {robustlens.__version__}; {'; '.join(dict.fromkeys(notes))}"
    return {field: known.get(field) for field in FIELDS}


def _attack(reading: Reading) -> str:
    """What attacked, by the reading's lens and settings."""
    if reading.lens == STANDARD and reading.settings.get("effort") == 1:
        return AUTOATTACK
    described = reading.settings.get("attack used")
    return str(described["name"]) if isinstance(described, Mapping) else reading.lens


def _percent(quantity: Quantity) -> str:
    return f"{round(100 * quantity.value, 2):g}"


def fraction(eps: float) -> str:
    """A radius as papers write it: 8/255 where it is a small number of grey levels, else a decimal number.

    >>> fraction(8 / 255), fraction(0.5)
    ('8/255', '0.5')
    """
    levels = round(255 * eps)
    return f"{levels}/255" if 0 < levels <= 32 and abs(levels - 255 * eps) < 1e-9 else f"{eps:g}"
