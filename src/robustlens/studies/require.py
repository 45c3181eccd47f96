"""What an audit must show: "robust>=0.45" as a condition that guards a build."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from robustlens.report.numbers import interval, number
from robustlens.results.errors import InputError, RobustlensError, unknown_name
from robustlens.results.reading import Quantity, Reading
from robustlens.studies.robustbench import STANDARD

#: What can be required → the quantity that answers for it.
NAMES = {"robust": "robust accuracy", "clean": "clean accuracy"}


class RequirementFailed(RobustlensError):
    """A network does not show what was required of it, or it cannot be believed that it does."""


@dataclass(frozen=True)
class Requirement:
    """``name`` ("clean" or "robust") accuracy must be at least ``least``."""

    name: str
    least: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "robust>=0.45" or "clean >= 90%".

        Raises:
            InputError: another name, another comparison, or a share outside [0, 1].
        """
        match = re.fullmatch(r"\s*(\w*)\s*>=\s*([0-9.]+(?:[eE]-?[0-9]+)?)\s*(%?)\s*", text)
        if match is None:
            raise InputError(
                "--require", expected="a name, >= and a share", got=repr(text), fix='Write for example "robust>=0.45".'
            )
        name, value, percent = match.groups()
        if name not in NAMES:
            raise unknown_name("--require", name, NAMES)
        try:
            least = float(value) / (100 if percent else 1)
        except ValueError:
            least = float("nan")
        if not 0 <= least <= 1:
            raise InputError(
                "--require",
                expected="a share from 0 to 1, or a percentage",
                got=repr(text),
                fix=f'Write for example "{name}>=0.45" or "{name}>=45%".',
            )
        return cls(name, least)

    def problem(self, readings: Sequence[Reading]) -> str:
        """Empty where it is met, else what was expected and what came.

        AutoAttack-standard decides where it was run. Otherwise the smallest value does, because attacks give upper
        bounds, and every reading of it must be ok. There must be no sign that the network is used wrongly.
        """
        wanted = NAMES[self.name]
        measured = [(q, reading) for reading in readings for q in reading.quantities if q.name == wanted]
        measured = [pair for pair in measured if pair[1].lens == STANDARD] or measured
        expected = f"expected {wanted} of at least {number(self.least, 'fraction')}"
        if not measured:
            failed = [f"{r.lens} failed ({r.outcome.why})" for r in readings if r.outcome.status == "failed"]
            return f"{expected}, got no measurement{': ' if failed else ''}{'; '.join(failed)}"
        quantity, reading = min(measured, key=lambda pair: pair[0].value)
        got = f"{_shown(quantity)} by {reading.lens}"
        misused = [each for each in readings if each.lens == "preprocessing" and each.outcome.status == "unreliable"]
        for each in (*(reading for _, reading in measured), *misused):
            if each.outcome.status != "ok":
                return f"{expected}, got {got}, which is unreliable: {each.outcome.why}"
        return "" if quantity.value >= self.least else f"{expected}, got {got}"


def _shown(quantity: Quantity) -> str:
    bounds = interval(quantity.low, quantity.high, quantity.unit)
    count = "" if quantity.n is None else f", n = {quantity.n:,}"
    return " ".join(f"{number(quantity.value, quantity.unit)} {bounds}{count}".split())


def check_requirements(requirements: Sequence[Requirement], readings: Sequence[Reading]) -> None:
    """Raise RequirementFailed, in one line, unless ``readings`` meet every requirement."""
    problems = [problem for each in requirements if (problem := each.problem(readings))]
    if problems:
        raise RequirementFailed(f"requirement: {'; '.join(problems).rstrip('.')}.")
