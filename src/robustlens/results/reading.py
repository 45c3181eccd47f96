"""What a lens returns: plain, frozen data that says how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from numpy.typing import NDArray

from robustlens.results.panels import Panel

Status = Literal["ok", "unreliable", "failed"]


#: Shares of examples, and what holds the bit of every example.
BITS = {"clean accuracy": "clean", "robust accuracy": "robust"}


def spelled(threat: str, at: float | None = None) -> str:
    """A threat as people write it: "linf:0.03137254901960784" is "linf:8/255"; four digits of any other radius.

    ``at`` is a radius in place of the threat's own.
    """
    norm, _, radius = threat.partition(":")
    radius = radius if at is None else repr(at)
    try:
        eps = float(radius)
    except ValueError:
        return threat  # a threat of the user's own
    levels = 255 * eps
    if norm == "linf" and len(radius) > len("0.0125") and abs(levels - round(levels, 1)) < 1e-9:
        return f"{norm}:{levels:.4g}/255"
    return f"{norm}:{eps:.4g}"


@dataclass(frozen=True)
class Outcome:
    """Whether a reading can be believed; ``why`` is a sentence that a non-expert understands."""

    status: Status = "ok"
    why: str = ""

    @classmethod
    def unreliable(cls, why: str) -> Self:
        return cls("unreliable", why)

    @classmethod
    def failed(cls, why: str) -> Self:
        return cls("failed", why)


@dataclass(frozen=True)
class Quantity:
    """One number with its evidence.

    ``low``/``high`` bound a 95 % interval, ``n`` is the number of examples (or samples) behind it, ``residual``
    is the relative residual of an eigenvalue or singular value, and ``nature`` says what the number is.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    residual: float | None = None
    nature: Literal["exact", "estimate", "lower bound", "upper bound"] = "estimate"


class Values(NamedTuple):
    """One value an example: ``values`` (n,) of those at the positions ``places`` (n,) of a split."""

    split: object
    places: NDArray[Any]
    values: NDArray[Any]


@dataclass(frozen=True)
class Reading:
    """The result of one lens on one subject.

    Attributes:
        lens: name of the lens.
        settings: the lens's own fields, as plain JSON values (with the seed and the threat where it used one).
        outcome: ok, unreliable or failed, with a sentence.
        says: one plain-language line that tells what was found.
        quantities: the numbers, in the order to show them.
        headline: names of the quantities that belong in a summary table.
        panels: what to draw.
        examples: name → one value an example, kept for comparisons and not drawn: "index" (n,) is its position in the
            split, "clean" and "robust" (n,) say whether it was right before and after the attack. Others are called as
            the quantity that is their mean, "average margin, test" for one, and its positions are "index, test" then.
    """

    lens: str
    says: str
    outcome: Outcome = field(default_factory=Outcome)
    quantities: tuple[Quantity, ...] = ()
    headline: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    def of_each(self, quantity: str) -> Values | None:
        """The values of the examples of which ``quantity`` is the mean, where they were kept."""
        what, comma, where = quantity.partition(", ")
        places, values = (self.examples.get(f"{name}{comma}{where}") for name in ("index", BITS.get(what, what)))
        split, _, _ = f", {where}".partition(", epoch ")
        return None if places is None or values is None else Values((self.settings.get("split"), split), places, values)

    def __getitem__(self, name: str) -> Quantity:
        """The quantity called ``name``; KeyError lists the names there are."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(f"{name!r}; this reading has {', '.join(q.name for q in self.quantities)}")
