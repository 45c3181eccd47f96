"""Yamada et al. 2021: does adversarial training sharpen the weight-loss landscape, and is it for their reason?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from robustlens.claims.evidence import (
    Ask,
    Family,
    families,
    is_standard,
    is_trained_against,
    name_of,
    norm,
    strength,
)
from robustlens.claims.ledger import Claim
from robustlens.claims.statistics import (
    Found,
    Judge,
    Sample,
    compare,
    trend,
    trouble_of,
    value,
    verdict_of,
    within,
)
from robustlens.results.reading import Reading
from robustlens.results.runs import Run
from robustlens.results.verdict import RISES, Region, Verdict

PAPER = "Yamada et al. 2021, arXiv 2102.02950"
NEEDS = "PGD training at three radii or more with the lens {lens}, each method with threat = its own radius"
STRONGEST = "leading eigenvalue, adversarial, frozen"

#: The largest radii of figure 3, by norm; standard training has none.
SHOWN = {"": 0.0, "l2": 1.0, "linf": 16.5 / 255, "l1": 0.0}

pgd = is_trained_against("pgd")


def bend(ask: Ask, region: Region) -> Judge:
    """How far a quantity bends away from a line over ε: the quadratic part of the parabola that fits it best.

    With u = (ε − ε_first) / (ε_last − ε_first) the fit is a + b u + c u², and the statistic c / (q_last − q_first):
    0 for a line, 1 for a parabola whose slope starts at 0.
    """

    def judged(family: Family) -> Verdict | None:
        found: dict[float, Mapping[int, Found]] = {}
        for eps, runs in family.by_strength.items():
            if eps > max(SHOWN[norm(run)] for run in runs.values()):
                continue
            there = {seed: each for seed, run in runs.items() if (each := ask.of(run)) is not None}
            if there:
                found[eps] = there
        if len(found) < 4:
            return None
        radii = sorted(found)
        u = (np.array(radii) - radii[0]) / (radii[-1] - radii[0])
        seeds = set.intersection(*(set(there) for there in found.values()))
        samples = []
        for seed in sorted(seeds):
            behind = [found[eps][seed] for eps in radii]
            q = np.array([quantity.value for quantity, _ in behind])
            samples.append(Sample(float(np.polyfit(u, q, 2)[0] / (q[-1] - q[0])), None, None, trouble_of(behind)))
        if not samples:
            return None
        text = f"Quadratic part of {ask.quantity} over ε = {radii[0]:.3g} … {radii[-1]:.3g}"
        return verdict_of(samples, region, family.where, text, "", "as a share of its change")

    return lambda runs: [verdict for family in families(runs, pgd) if (verdict := judged(family)) is not None]


noise = is_trained_against("noise")


def noise_beside_standard(ask: Ask, region: Region) -> Judge:
    """Training on the strongest noise over standard training, both looked at under the same noise."""

    def judge(runs: Sequence[Run]) -> list[Verdict]:
        found = []
        for each in ("l2", "linf"):
            noisy = [run for run in runs if noise(run) and norm(run) == each]
            most = max((strength(run) or 0.0 for run in noisy), default=0.0)
            strongest = [run for run in noisy if strength(run) == most]
            standard = [run for run in runs if is_standard(run)]
            judged = compare(ask, region, first=noise, second=is_standard, ratio=True, same_draws=True)
            found += judged([*strongest, *standard])
        return found

    return judge


def under_noise(run: Run, reading: Reading) -> bool:
    """A reading that was taken under uniform noise."""
    return name_of(reading.settings.get("attack used") or "") == "uniform-noise"


def is_logistic(run: Run) -> bool:
    return name_of(run.config["model"]) == "logistic" and pgd(run)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="004-eigenvalues-grow",
        paper=PAPER,
        section="§5.1, figure 3",
        sentence="The top eigenvalues of the Hessian grow with ε.",
        measured="Change of the leading eigenvalue (adversary frozen, at the radius of training) along the "
        "least-squares line over ε; above 0.",
        judge=trend(Ask("hessian", STRONGEST, own=True), RISES, member=pgd),
        needs=NEEDS.format(lens="hessian"),
    ),
    Claim(
        name="004-eigenvalues-linear",
        paper=PAPER,
        section="§5.1, figure 3",
        sentence="The eigenvalues are nearly linear with respect to ε.",
        measured="Quadratic part of the leading eigenvalue over ε (up to 1 in ℓ2 and 16/255 in ℓ∞, as in the figure), "
        "as a share of its change; within ± 0.25 (0 is a line, 1 a parabola whose slope starts at 0).",
        judge=bend(Ask("hessian", STRONGEST, own=True), (-0.25, 0.25)),
        needs=NEEDS.format(lens="hessian"),
    ),
    Claim(
        name="004-eigenvalues-grow-filter-normalised",
        paper="ours, after Yamada et al. 2021",
        section="§5.1, figure 3",
        sentence="They also grow where the size of the weights drops out.",
        measured="The same change in filter-normalised coordinates; above 0.",
        judge=trend(Ask("hessian", f"{STRONGEST}, filter-normalised", own=True), RISES, member=pgd),
        needs=NEEDS.format(lens="hessian"),
    ),
    Claim(
        name="004-adversary-held-or-following",
        paper="ours, after Yamada et al. 2021",
        section="§5.1, figure 3",
        sentence="It makes little difference whether the Hessian holds the adversary or lets it follow the weights.",
        measured="Curvature of the robust loss along the leading direction with the attack run again on both sides, "
        "over the leading eigenvalue with the adversary held; between 0.85 and 1.15.",
        judge=within(
            Ask("hessian", "curvature along the leading direction (adversarial, frozen), attacking again", own=True),
            Ask("hessian", STRONGEST, own=True),
            (0.85, 1.15),
            member=pgd,
            ratio=True,
        ),
        needs=NEEDS.format(lens="hessian"),
    ),
    Claim(
        name="004-landscape-sharpens",
        paper=PAPER,
        section="§5.1, figures 1, 2, 4 and 5",
        sentence="The weight-loss landscape becomes sharper as the noise of adversarial training becomes larger.",
        measured="Change, along the least-squares line over ε, of how far the robust loss rises at α = ± 0.5 along "
        "filter-normalised directions; above 0.",
        judge=trend(Ask("weight-landscape", "rise at ±0.5", own=True), RISES, member=pgd),
        needs=NEEDS.format(lens="weight-landscape"),
    ),
    Claim(
        name="004-noise-does-not-sharpen",
        paper=PAPER,
        section="§5.1, figures 1 and 2",
        sentence="Random noise does not sharpen the landscape as adversarial noise does.",
        measured="Rise at α = ± 0.5 after training on the strongest noise over that of standard training, both under "
        "that noise, on the same images along the same directions; between 0.8 and 1.25.",
        judge=noise_beside_standard(Ask("weight-landscape", "rise at ±0.5", where=under_noise), (0.8, 1.25)),
        needs="training on uniform noise and standard training, with weight-landscape under that noise",
    ),
    Claim(
        name="004-gap-grows",
        paper=PAPER,
        section="§5.2, Tables 1, 3, 5 and 6",
        sentence="The generalisation gap becomes larger in most cases as the noise becomes larger.",
        measured="Change of the robust error gap (test − train, at the radius of training) along the least-squares "
        "line over ε; above 0.",
        judge=trend(Ask("generalisation-gap", "robust error gap", own=True), RISES, member=pgd),
        needs=NEEDS.format(lens="generalisation-gap"),
    ),
    Claim(
        name="004-loss-gap-grows",
        paper="ours, after Yamada et al. 2021",
        section="Tables 1, 3, 5 and 6",
        sentence="The gap of the loss grows as well, which is less a matter of single images.",
        measured="Change of the robust loss gap along the least-squares line over ε; above 0.",
        judge=trend(Ask("generalisation-gap", "robust loss gap", own=True), RISES, member=pgd),
        needs=NEEDS.format(lens="generalisation-gap"),
    ),
    Claim(
        name="004-formula-9",
        paper=PAPER,
        section="Theorem 1, equation 9",
        sentence="At the optimum the Hessian is (ε / 2‖w‖)(I − wwᵀ/‖w‖²), so its leading eigenvalue is ε / (2‖w‖).",
        measured="Leading eigenvalue of the exact Hessian (closed form, adversary following, without the box) over "
        "ε / (2‖w‖); between 0.8 and 1.25.",
        judge=within(
            Ask("hessian", "leading eigenvalue, closed form without the box", own=True),
            Ask("hessian", "ε / (2‖w‖), equation 9", own=True),
            (0.8, 1.25),
            member=lambda run: is_logistic(run) and norm(run) == "l2",
            ratio=True,
        ),
        needs="logistic regression trained against ℓ2 PGD, with the lens hessian, threat = its own radius",
    ),
    Claim(
        name="004-formula-9-premise",
        paper=PAPER,
        section="proof of Theorem 1",
        sentence="Every example is at its own optimum, where the wrong class has probability s = ½ under attack.",
        measured="Mean s over the training images; between 0.4 and 0.6.",
        judge=value(Ask("hessian", "mean s, adversary without the box", own=True), (0.4, 0.6), member=is_logistic),
        needs="logistic regression trained against PGD, with the lens hessian, threat = its own radius",
    ),
)
