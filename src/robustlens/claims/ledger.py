"""Every claim there is, judged by the runs at hand."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import robustlens.claims
from robustlens.claims.statistics import Judge
from robustlens.results.errors import InputError
from robustlens.results.runs import Run
from robustlens.results.verdict import Entry, Verdict


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of a paper as a function of readings.

    Attributes:
        name: "<number of the paper>-<what it says>", such as "000-loss-gap-falls".
        paper: citation; section: where in it.
        sentence: what it says, in its own words or close to them.
        measured: the statistic in words, and where it must lie for the claim to hold.
        judge: a verdict for each setting that the runs offer; none where they offer none.
        needs: what has to be run for it, in words; said where nothing was.
    """

    name: str
    paper: str
    section: str
    sentence: str
    measured: str
    judge: Judge
    needs: str


def of_paper(number: str, paper: str) -> Callable[[str, str, str, str, Judge, str], Claim]:
    """Makes the claims of one paper from name, section, sentence, what is measured, judge, and what it needs."""

    def claim(name: str, section: str, sentence: str, measured: str, judge: Judge, needs: str) -> Claim:
        return Claim(
            name=f"{number}-{name}",
            paper=paper,
            section=section,
            sentence=sentence,
            measured=measured,
            judge=judge,
            needs=needs,
        )

    return claim


@cache
def claims() -> tuple[Claim, ...]:
    """The claims of all papers, by name."""
    home = robustlens.claims
    modules = [importlib.import_module(f"{home.__name__}.{info.name}") for info in pkgutil.iter_modules(home.__path__)]
    found = [claim for module in modules for claim in getattr(module, "CLAIMS", ())]
    return tuple(sorted(found, key=lambda claim: claim.name))


def find_claim(path: str) -> Claim:
    """The claim that ``pkg.module:NAME`` names; raises InputError for anything else."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise InputError(
            path,
            expected="pkg.module:NAME that can be imported",
            got=f"{type(error).__name__}: {error}",
            fix="Check the spelling, and that its directory is on PYTHONPATH.",
        ) from error
    if not isinstance(found, Claim):
        raise InputError(path, expected="a Claim", got=repr(found), fix="See docs/write-a-claim.md.")
    return found


def ledger(runs: Sequence[Run], judged: Sequence[Claim] | None = None) -> list[Entry]:
    """Each claim with its verdicts; one that no run bears on is "not run" and says what it needs.

    Runs that say nothing of how they were trained (audits of foreign networks) bear on no claim.
    """
    runs = [run for run in runs if "objective" in run.config]
    entries = []
    for claim in claims() if judged is None else judged:
        verdicts = tuple(claim.judge(runs)) or (Verdict("not run", "", f"It needs {claim.needs}."),)
        entries.append(Entry(claim.name, claim.paper, claim.section, claim.sentence, claim.measured, verdicts))
    return entries
