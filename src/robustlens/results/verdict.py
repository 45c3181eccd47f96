"""What became of a claim: a statistic, its interval, and whether that lies where the claim puts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Judgement = Literal["supported", "contradicted", "undecided", "not run"]

#: Where a statistic must lie for a claim to hold: above the first bound and below the second.
Region = tuple[float, float]

FALLS: Region = (float("-inf"), 0.0)
RISES: Region = (0.0, float("inf"))


@dataclass(frozen=True)
class Statistic:
    """A number with its 95 % interval, over the examples behind it and over ``seeds`` networks.

    ``low`` and ``high`` are None where nothing says how far the number can be trusted: one seed and no interval over
    examples. ``n`` is the least number of examples behind any part of it.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int
    n: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Verdict:
    """One claim judged on one setting.

    Attributes:
        judgement: supported where the whole interval lies in the claim's region, contradicted where none of it does,
            else undecided; undecided too where a reading behind it is unreliable, or has no interval at all.
        statistic: what was computed; None where it was not run.
        where: data, network and methods it was judged on.
        says: one sentence with the numbers, or what would have to be run.
        trouble: why a reading behind it is unreliable, if one is.
    """

    judgement: Judgement
    where: str
    says: str
    statistic: Statistic | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: a claim as its paper has it, and a verdict for each setting that the runs offer."""

    name: str
    paper: str
    section: str
    sentence: str
    measured: str
    verdicts: tuple[Verdict, ...]

    @property
    def judgement(self) -> Judgement:
        """What all settings agree on; undecided where some support it and some contradict it, or all are."""
        found = {verdict.judgement for verdict in self.verdicts} - {"undecided", "not run"}
        if len(found) == 1:
            return found.pop()
        return "undecided" if any(verdict.judgement != "not run" for verdict in self.verdicts) else "not run"


@dataclass(frozen=True)
class Beside:
    """A number of a paper beside ours.

    Attributes:
        row, column: where it stands in the paper's table.
        paper, tolerance: as printed (percentages as fractions), and how far ours may lie from it.
        ours: None where it was not measured.
        verdict: "agrees" where our whole interval lies within the tolerance, "differs" where none of it does,
            "undecided" or "not run".
        trouble: why the reading behind ours is unreliable.
        where: data, network and epochs of ours.
    """

    row: str
    column: str
    paper: float
    tolerance: float
    ours: Statistic | None
    verdict: str
    trouble: str = ""
    where: str = ""


def decide(statistic: Statistic, region: Region) -> Judgement:
    """Whether the interval of ``statistic`` lies inside ``region``, outside, or across one of its ends."""
    if statistic.low is None or statistic.high is None:
        return "undecided"
    low, high = region
    if low < statistic.low and statistic.high < high:
        return "supported"
    return "contradicted" if statistic.high <= low or statistic.low >= high else "undecided"
