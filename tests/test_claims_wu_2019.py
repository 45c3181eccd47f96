"""The claims of Wu and Yu 2019 on made-up runs with known answers, and their recipes as plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, NETWORKS, needs
from scipy.stats import t as student

from robustlens.claims.ledger import ledger
from robustlens.claims.wu_2019 import CLAIMS
from robustlens.recipes.recipe import SCALES, Recipe, Scale
from robustlens.recipes.reproduce import compared, reproduce
from robustlens.recipes.wu_2019 import RECIPES
from robustlens.recipes.wu_2019_published import PUBLISHED, PUBLISHED_ROWS, published
from robustlens.results.intervals import wilson
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run, read_runs
from robustlens.results.verdict import Verdict
from robustlens.studies.config import make_study
from robustlens.studies.epochs import schedule
from robustlens.studies.plan import make_plan

NAMES = {claim.name.removeprefix("003-"): claim for claim in CLAIMS}
PARTS: dict[str, list[str]] = {
    "standard": [],
    "LCR": ["orthogonality"],
    "AMR": ["average-margin", "orthogonality"],
    "MMR": ["mmr"],
}
Z = 1.959964


def run(method: str, *readings: Reading, seed: int = 0, model: str = "mlp", seconds: Sequence[float] = ()) -> Run:
    config: dict[str, Any] = {
        "data": {"source": "mnist"},
        "model": {"name": model},
        "objective": {"name": "standard"},
        "regularizers": [{"name": name} for name in PARTS[method]],
        "update": {"name": "descend"},
        "constraints": [],
        "training": {"epochs": 10},
        "seed": seed,
    }
    metrics = [{"epoch": epoch, "seconds": spent} for epoch, spent in enumerate(seconds, start=1)]
    return Run(method, seed, "", f"{method}{seed}", config, {"device": "cpu"}, metrics, readings)


def number(name: str, value: float, half: float | None = None, **more: Any) -> Quantity:
    """With half the width of its interval."""
    ends = {} if half is None else {"low": value - half, "high": value + half}
    return Quantity(name, value, **ends, **more)


def over_epochs(lens: str, name: str, values: dict[int, float], half: float | None, **more: Any) -> Reading:
    numbers = tuple(number(f"{name}, epoch {epoch}", value, half, **more) for epoch, value in values.items())
    return Reading(f"{lens} over epochs", "", quantities=numbers)


def reading(lens: str, *quantities: Quantity, floor: float = 1e-12, eps: float = 2.0, why: str = "") -> Reading:
    settings = {"threat": f"l2:{eps}", "attack used": {"name": "pgd", "grad_floor": floor}}
    return Reading(lens, "", Outcome.unreliable(why) if why else Outcome(), quantities, settings=settings)


def judged(name: str, *runs: Run) -> Verdict:
    (verdict,) = NAMES[name].judge(runs)
    return verdict


def judgements(name: str, cases: Sequence[Sequence[Run]]) -> list[str]:
    return [judged(name, *runs).judgement for runs in cases]


ALL = ["supported", "contradicted", "undecided"]


@pytest.mark.parametrize(
    ("name", "lens", "quantity", "ends", "half"),
    [
        ("minimum-margin-rises", "linear-margins", "minimum margin, train", (0.4, -0.4, 0.0), None),
        ("average-margin-falls", "linear-margins", "average margin, train", (-0.4, 0.4, 0.01), 0.05),
        ("average-margin-falls-on-test", "linear-margins", "average margin, test", (-0.4, 0.4, 0.01), 0.05),
        ("minimum-margin-rises-networks", "boundary-distance", "estimated minimum margin, train", (0.4, -0.4, 0), 0.05),
        ("average-margin-falls-networks", "boundary-distance", "average margin, train", (-0.4, 0.4, 0.01), 0.05),
    ],
)
def test_margins_over_epochs(name: str, lens: str, quantity: str, ends: tuple[float, ...], half: float | None) -> None:
    """What happens before epoch 10 is left out for linear networks, whose first epochs are single steps."""
    first = 10 if lens == "linear-margins" else 1
    nature = "exact" if half is None else "estimate"

    def made(end: float) -> Run:
        return run("standard", over_epochs(lens, quantity, {first: 1.0, 100: 1.0 + end}, half, nature=nature))

    found = [judged(name, made(end)) for end in ends]
    assert [each.judgement for each in found[:2]] == ALL[:2]
    statistic = found[0].statistic
    assert statistic is not None and statistic.value == pytest.approx(ends[0])
    wide = 0.0 if half is None else sqrt(2) * half
    assert (statistic.low, statistic.high) == (pytest.approx(ends[0] - wide), pytest.approx(ends[0] + wide))
    if half is not None:
        assert found[2].judgement == "undecided"
    assert NAMES[name].judge([run("AMR", *made(0.4).readings)]) == [], "that is not standard training"


def test_the_first_epochs_of_gradient_descent_do_not_count() -> None:
    way = {1: 0.5, 10: 1.0, 100: 0.8}
    fell = run("standard", over_epochs("linear-margins", "average margin, train", way, 0.01))
    assert judged("average-margin-falls", fell).judgement == "supported"
    one = run("standard", over_epochs("linear-margins", "average margin, train", {1: 0.5, 100: 0.8}, 0.01))
    assert NAMES["average-margin-falls"].judge([one]) == [], "one epoch is no change"


def test_reaching_the_svm() -> None:
    def share(values: dict[int, float]) -> Run:
        lens = over_epochs("linear-margins", "share of the largest minimum margin", values, None, nature="exact")
        return run("standard", lens, model="logistic")

    cases = [[share({10: 0.2, 100: 0.95})], [share({10: 0.7, 100: 0.6})], [share({10: 0.2, 100: 0.6})]]
    assert judgements("reaches-the-svm", cases) == ALL
    assert "still grows" in judged("reaches-the-svm", *cases[2]).says


@pytest.mark.parametrize(
    ("name", "lens"),
    [("not-by-overfitting", "linear-margins"), ("not-by-overfitting-networks", "generalisation-gap")],
)
def test_overfitting_is_judged_by_the_best_epoch(name: str, lens: str) -> None:
    def errors(last: float, half: float) -> Run:
        return run("standard", over_epochs(lens, "error, test", {1: 0.05, 5: 0.02, 10: last}, half))

    assert judgements(name, [[errors(0.021, 0.001)], [errors(0.04, 0.001)], [errors(0.024, 0.004)]]) == ALL
    statistic = judged(name, errors(0.04, 0.001)).statistic
    assert statistic is not None and statistic.value == pytest.approx(0.02)


def test_amr_keeps_its_average_margin() -> None:
    def way(last: float, half: float) -> Run:
        return run("AMR", over_epochs("boundary-distance", "average margin, train", {1: 1.0, 20: last}, half))

    cases = [[way(1.1, 0.02)], [way(0.7, 0.02)], [way(0.95, 0.05)]]
    assert judgements("amr-keeps-the-average-margin", cases) == ALL


@pytest.mark.parametrize(
    ("name", "model", "quantity", "values"),
    [
        ("amr-raises-the-average-margin", "mlp", "average margin, test", (1.5, 0.5, 1.01)),
        ("amr-raises-the-estimated-margin", "mlp", "estimated average margin, test", (1.5, 0.5, 1.01)),
        ("amr-two-to-three-times", "mlp", "average margin, test", (2.5, 1.2, 1.5)),
        ("amr-up-to-twice", "mnist-cnn", "average margin, test", (1.7, 3.0, 1.26)),
    ],
)
def test_ratios_of_margins(name: str, model: str, quantity: str, values: tuple[float, ...]) -> None:
    def pair(margin: float) -> list[Run]:
        means = {"AMR": margin, "standard": 1.0}
        return [run(m, reading("boundary-distance", number(quantity, v, 0.05)), model=model) for m, v in means.items()]

    assert judgements(name, [pair(value) for value in values]) == ALL
    statistic = judged(name, *pair(values[0])).statistic
    error = sqrt((0.05 / Z / values[0]) ** 2 + (0.05 / Z) ** 2)
    assert statistic is not None and statistic.low == pytest.approx(exp(log(values[0]) - Z * error))


def test_ratios_are_asked_of_the_networks_that_the_paper_names() -> None:
    def pair(model: str) -> list[Run]:
        lens = reading("boundary-distance", number("average margin, test", 1.0, 0.05))
        return [run("AMR", lens, model=model), run("standard", lens, model=model)]

    assert NAMES["amr-two-to-three-times"].judge(pair("mnist-cnn")) == []
    assert NAMES["amr-up-to-twice"].judge(pair("mlp")) == []


def reported(*at: tuple[float, float], half: float = 0.01) -> list[Reading]:
    """What the paper's attack leaves at radii, alarms and all."""
    why = "The gradients vanish."
    return [reading("accuracy", number("robust accuracy", v, half), floor=1e-6, eps=eps, why=why) for eps, v in at]


@pytest.mark.parametrize(
    ("name", "other", "values"),
    [
        ("amr-beats-lcr-reported", "LCR", (0.9, 0.1, 0.501)),
        ("amr-beats-mmr-reported", "MMR", (0.9, 0.1, 0.501)),
        ("amr-like-lcr-at-small-radii", "LCR", (0.801, 0.7, 0.82)),
    ],
)
def test_what_the_papers_attack_reports_counts_at_its_radius(name: str, other: str, values: tuple[float, ...]) -> None:
    def pair(value: float) -> list[Run]:
        small = name.endswith("radii")
        ours = reported((0.5, value if small else 0.8), (2.0, 0.4 if small else value), half=0.005)
        strong = reading("accuracy", number("robust accuracy", 0.0, 0.005), eps=3.0)
        return [run("AMR", *ours, strong), run(other, *reported((0.5, 0.8), (2.0, 0.5), half=0.005), strong)]

    assert judgements(name, [pair(value) for value in values]) == ALL


@pytest.mark.parametrize(("name", "other"), [("amr-beats-lcr", "LCR"), ("amr-beats-mmr", "MMR")])
def test_what_autoattack_leaves_decides(name: str, other: str) -> None:
    def pair(value: float, why: str = "") -> list[Run]:
        ours = reading("standard-accuracy", number("robust accuracy", value, 0.02), why=why)
        theirs = reading("standard-accuracy", number("robust accuracy", 0.3, 0.02))
        return [run("AMR", ours, *reported((2.0, 0.99))), run(other, theirs, *reported((2.0, 0.3)))]

    assert judgements(name, [pair(0.5), pair(0.1), pair(0.31)]) == ALL
    assert judged(name, *pair(0.5, "Square broke more.")).judgement == "undecided"


def test_seeds_widen_the_interval() -> None:
    runs = [
        run(method, reading("standard-accuracy", number("robust accuracy", value, 0.02)), seed=seed)
        for method, values in (("AMR", (0.5, 0.6, 0.55)), ("LCR", (0.3, 0.3, 0.3)))
        for seed, value in enumerate(values)
    ]
    statistic = judged("amr-beats-lcr", *runs).statistic
    differences = np.array([0.2, 0.3, 0.25])
    half = sqrt((sqrt(2) * 0.02) ** 2 + (student.ppf(0.975, 2) * differences.std(ddof=1) / sqrt(3)) ** 2)
    assert statistic is not None and statistic.seeds == 3
    assert (statistic.low, statistic.high) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))


@pytest.mark.parametrize(("name", "method"), [("amr-is-real", "AMR"), ("lcr-is-real", "LCR")])
def test_what_the_checks_break_was_not_real(name: str, method: str) -> None:
    def checked(left: float, stands: float, n: int = 200) -> list[Run]:
        numbers = number("robust accuracy", left, n=n), number("robust accuracy after all checks", stands, n=n)
        return [run(method, reading("health", *numbers, floor=1e-6, why="The cross-entropy saturates."))]

    assert judgements(name, [checked(0.9, 0.895), checked(0.97, 0.31), checked(0.9, 0.86)]) == ALL
    low, high = wilson(132, 200)
    statistic = judged(name, *checked(0.97, 0.31)).statistic
    assert statistic is not None and statistic.value == pytest.approx(0.66) and statistic.n == 200
    assert (statistic.high or 0) - (statistic.low or 0) == pytest.approx(high - low)
    other = [replace(one, readings=[replace(one.readings[0], settings={})]) for one in checked(0.9, 0.1)]
    assert NAMES[name].judge(other) == [], "another attack than the paper's says nothing of it"


def test_cost_of_a_step() -> None:
    def pair(seconds: Sequence[float]) -> list[Run]:
        return [run("AMR", seconds=seconds), run("standard", seconds=[10.0, 10.1, 9.9, 10.0])]

    cases = [pair([10.9, 11.1, 11.0, 11.0]), pair([29.0, 31.0, 30.0, 30.0]), pair([10.0, 15.0, 11.0, 14.0])]
    assert judgements("amr-costs-a-standard-step", cases) == ALL
    statistic = judged("amr-costs-a-standard-step", *cases[1]).statistic
    a, b = np.array([29.0, 31, 30, 30]), np.array([10.0, 10.1, 9.9, 10])
    error = sqrt(sum((s.std(ddof=1) / 2 / s.mean()) ** 2 for s in (a, b)))
    assert statistic is not None and statistic.value == pytest.approx(3)
    assert statistic.high == pytest.approx(3 * exp(Z * error))


def test_cost_without_records_needs_seeds() -> None:
    def timed(method: str, seconds: float, seed: int, device: str = "cpu") -> Run:
        return replace(run(method, seed=seed), provenance={"device": device, "seconds": seconds})

    one = [timed("AMR", 110.0, 0), timed("standard", 100.0, 0)]
    assert judged("amr-costs-a-standard-step", *one).judgement == "undecided"
    more = [timed("AMR", 110.5, 1), timed("standard", 100.0, 1), timed("AMR", 109.5, 2), timed("standard", 100.0, 2)]
    assert judged("amr-costs-a-standard-step", *one, *more).judgement == "supported"
    assert NAMES["amr-costs-a-standard-step"].judge([one[0], timed("standard", 9.0, 0, "cuda")]) == []


def test_without_runs_every_claim_says_what_it_needs() -> None:
    entries = ledger([], CLAIMS)
    assert {entry.judgement for entry in entries} == {"not run"}
    assert all(entry.verdicts[0].says.startswith("It needs ") for entry in entries)
    assert len({entry.name for entry in entries}) == len(entries)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_are_plans_and_ask_what_they_measure(recipe: Recipe, scale: Scale) -> None:
    plans = [make_plan(make_study(settings)) for settings in recipe.at(scale)]
    for printed in recipe.printed:
        plan = plans[printed.study]
        assert printed.method in {run.label for run in plan.runs}
        assert printed.ask.lens in {lens.name for lens in plan.lenses}
        if threat := printed.ask.settings.get("threat"):
            attacks = [getattr(lens.lens, "attack", None) for lens in plan.lenses]
            assert threat in {str(attack.threat) for attack in attacks if attack is not None}


def test_networks_of_two_recipes_are_trained_once() -> None:
    table, figures = (next(r for r in RECIPES if r.name == name) for name in ("003-table1-mnist-mlp", "003-figures6-7"))
    (mine,) = table.at("laptop")
    again = next(settings for settings in figures.at("laptop") if settings["name"] == mine["name"])
    trained = {run.hash for run in make_plan(make_study(mine)).runs}
    assert {run.hash for run in make_plan(make_study(again)).runs} < trained
    watched = {str(schedule(lens)) for lens in again["lenses"]}
    assert watched < {str(schedule(lens)) for lens in mine["lenses"]}, "their epochs are kept by both"


@pytest.mark.slow
def test_figure1_runs(tmp_path: Path) -> None:
    found = reproduce(next(r for r in RECIPES if r.name == "003-figure1"), "smoke", tmp_path)
    lenses = {lens for one in read_runs(found.runs) for lens in (reading.lens for reading in one.readings)}
    assert lenses == {"linear-margins over epochs", "generalisation-gap over epochs"}


@pytest.mark.slow
def test_table1_runs(tmp_path: Path) -> None:
    found = reproduce(next(r for r in RECIPES if r.name == "003-table1-mnist-mlp"), "smoke", tmp_path)
    assert all(row.ours is not None for row in found.rows)
    runs = read_runs(found.runs)
    decided = {entry.name for entry in ledger(runs, CLAIMS) if entry.judgement != "not run"}
    assert decided >= {f"003-{name}" for name in ("amr-is-real", "amr-beats-lcr", "amr-two-to-three-times")}


@pytest.mark.slow
@needs(DATA / "mnist", NETWORKS)
def test_published_networks(tmp_path: Path) -> None:
    runs = read_runs(published(NETWORKS, tmp_path, "smoke", "cpu"))
    assert [run.method for run in runs] == list(PUBLISHED)
    rows = {(row.row, row.column): row for row in (compared(printed, runs) for printed in PUBLISHED_ROWS)}
    for label in ("Std, published", "LCR, published", "AMR, published"):
        clean = rows[label, "clean"]
        assert clean.verdict != "differs" and clean.ours is not None and clean.ours.n == 500
    assert judged("amr-is-real", *runs).statistic is not None
