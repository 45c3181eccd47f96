"""The claims of Wen, Li and Jia on made-up runs, and their recipes' studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robustlens.claims.evidence import name_of
from robustlens.claims.ledger import Claim
from robustlens.claims.wen_2020 import CLAIMS
from robustlens.recipes.recipe import SCALES, Recipe, Scale, find_recipe, recipes
from robustlens.results.intervals import wilson
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run, read_runs
from robustlens.studies.config import StudyConfig, make_study
from robustlens.studies.plan import make_plan
from robustlens.studies.run import run_study

RECIPES = [recipe for name, recipe in recipes().items() if name.startswith("000-")]
BY_NAME = {claim.name.removeprefix("000-"): claim for claim in CLAIMS}
STRENGTHS = (0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
#: t quantile at 0.975 with 2 degrees of freedom, and that of the normal distribution, from tables.
T2, Z = 4.302653, 1.959964
THREAT = {"split": "test", "threat": "linf:0.1"}

#: Claim → lens, quantity, and which way the paper has it go.
TRENDS = {
    "loss-gap-falls": ("generalisation-gap", "loss gap", -1),
    "training-loss-rises": ("generalisation-gap", "loss, train", 1),
    "test-error-rises": ("generalisation-gap", "error, test", 1),
    "margins-near-zero-test": ("logit-margins", "share near the boundary, test", 1),
    "margins-near-zero-train": ("logit-margins", "share near the boundary, train", 1),
    "margin-spread-falls-test": ("logit-margins", "spread of margins, test", -1),
    "margin-spread-falls-train": ("logit-margins", "spread of margins, train", -1),
    "normalised-margins-fall-test": ("logit-margins", "mean normalised margin, test", -1),
    "normalised-margins-fall-train": ("logit-margins", "mean normalised margin, train", -1),
    "confidence-moves-to-the-middle": ("confidence", "share of middle probabilities, test, clean", 1),
    "mean-layer-spread-falls": ("layer-spectra", "mean spread of singular values", -1),
    "test-loss-falls": ("generalisation-gap", "loss, test", -1),
    "error-gap-grows-on-cifar10": ("generalisation-gap", "error gap", 1),
    "conditional-robust-accuracy-rises": ("accuracy", "conditional robust accuracy", 1),
    "robust-accuracy-rises": ("accuracy", "robust accuracy", 1),
    "loss-variation-falls": ("confidence", "mean loss variation at 0.025", -1),
    "spread-of-loss-variation-falls": ("confidence", "spread of loss variation at 0.025", -1),
    "clipped-loss-gap-falls": ("generalisation-gap", "loss gap", -1),
}


def run(eps: float, seed: int, readings: Sequence[Reading], **parts: Any) -> Run:
    attack = {"name": parts.pop("attack", "pgd"), "threat": f"linf:{eps!r}", "steps": 10, "step_size": eps / 4}
    config = {
        "data": {"source": parts.pop("source", "mnist")},
        "model": {"name": parts.pop("model", "lenet-small")},
        "objective": {"name": "adversarial", "attack": attack} if eps else {"name": "standard"},
        "regularizers": [],
        "constraints": parts.pop("constraints", []),
        "update": {"name": "descend"},
        "training": {"epochs": 20},
        "seed": seed,
    }
    return Run(f"{attack['name']} {eps}", seed, "study", f"{config}", config, {}, [], readings)


def reading(lens: str, values: Mapping[str, float], half: float | None = 0.01, **outcome: Any) -> Reading:
    quantities = tuple(
        Quantity(name, value, "", None if half is None else value - half, None if half is None else value + half, 100)
        for name, value in values.items()
    )
    return Reading(lens, "", quantities=quantities, settings=THREAT, **outcome)


def trained(lens: str, quantity: str, change: float, jitter: float = 0.02, **parts: Any) -> list[Run]:
    """Networks whose ``quantity`` changes by ``change`` (give or take ``jitter``) from the least radius to the most."""
    slopes = [(change + jitter * (seed - 1)) / 0.15 for seed in SEEDS]
    return [
        run(eps, seed, [reading(lens, {quantity: 1.0 + slopes[seed] * eps})], **parts)
        for eps in STRENGTHS
        for seed in SEEDS
    ]


def parts_of(name: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"attack": "fgsm"} if name.startswith("fgsm-") else {}
    if name == "clipped-loss-gap-falls":
        parts["constraints"] = [clip()]
    return parts | ({"source": "uoft-cs/cifar10"} if "cifar" in name or name == "test-loss-falls" else {})


def clip(norm: float = 1.0) -> dict[str, Any]:
    return {"name": "spectral-clip", "norm": norm, "how": "clip"}


def judged(name: str, runs: Sequence[Run]) -> list[str]:
    return [verdict.judgement for verdict in BY_NAME[name].judge(runs)]


CASES = [*TRENDS, *(f"fgsm-{name}" for name in list(TRENDS)[:11])]
SPECIAL = {"spread-falls-in-most-layers", "clipping-flips-error-gap", "clipping-turns-error-gap-down"}


def test_every_claim_is_tested() -> None:
    assert set(BY_NAME) == {*CASES, *SPECIAL, "fgsm-spread-falls-in-most-layers"}


@pytest.mark.parametrize("name", CASES)
def test_trends(name: str) -> None:
    lens, quantity, way = TRENDS[name.removeprefix("fgsm-")]
    parts = parts_of(name)
    assert judged(name, trained(lens, quantity, 0.3 * way, **parts)) == ["supported"]
    assert judged(name, trained(lens, quantity, -0.3 * way, **parts)) == ["contradicted"]
    assert judged(name, trained(lens, quantity, 0.05 * way, 0.2, **parts)) == ["undecided"]
    assert judged(name, []) == []


def test_trend_by_hand() -> None:
    """Values 1, 2, 5 at radii 0.05, 0.1, 0.2, every one ± 0.1; another seed has 1, 2, 4 and a third 1, 2, 3."""
    tops = (5.0, 4.0, 3.0)
    runs = [
        run(eps, seed, [reading("generalisation-gap", {"loss, train": value}, 0.1)])
        for seed in SEEDS
        for eps, value in zip(STRENGTHS, (1.0, 2.0, tops[seed]), strict=True)
    ]
    changes = [np.polyfit(STRENGTHS, (1.0, 2.0, top), 1)[0] * 0.15 for top in tops]
    x = np.array(STRENGTHS) - np.mean(STRENGTHS)
    by_examples = 0.1 * 0.15 / np.sqrt((x**2).sum())
    by_seeds = T2 * np.std(changes, ddof=1) / np.sqrt(3)
    (verdict,) = BY_NAME["training-loss-rises"].judge(runs)
    found = verdict.statistic
    assert found is not None and found.low is not None and found.high is not None
    assert (found.seeds, found.n) == (3, 100)
    assert found.value == pytest.approx(np.mean(changes))
    assert found.high - found.value == pytest.approx(np.hypot(by_examples, by_seeds), rel=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_standard_training_counts_for_the_loss_gap_and_not_for_margins() -> None:
    """With an outlier at radius 0 the fitted line turns round."""
    for name, turned in (("loss-gap-falls", "contradicted"), ("normalised-margins-fall-test", "supported")):
        lens, quantity, _ = TRENDS[name]
        runs = trained(lens, quantity, -0.3)
        runs += [run(0.0, seed, [reading(lens, {quantity: -9.0})]) for seed in SEEDS]
        assert judged(name, runs) == [turned]


def test_linear_models_and_other_data_are_not_judged() -> None:
    lens, quantity, way = TRENDS["error-gap-grows-on-cifar10"]
    assert judged("error-gap-grows-on-cifar10", trained(lens, quantity, way)) == []
    assert judged("loss-gap-falls", trained("generalisation-gap", "loss gap", -1.0, model="logistic")) == []
    assert judged("test-loss-falls", trained(lens, "loss, test", -1.0, source="cifar100")) == ["supported"]


@pytest.mark.parametrize(
    ("lens", "found", "counts"),
    [
        ("accuracy", {"clean accuracy": 0.1135, "accuracy without limit": 0.1135}, False),
        ("accuracy", {"clean accuracy": 0.1135, "accuracy without limit": 0.01}, True),
        ("generalisation-gap", {"loss, test": 2.3025, "error, test": 0.9}, False),  # ten classes, one answer
        ("generalisation-gap", {"loss, test": 2.1, "error, test": 0.75}, True),  # right in 25 %, exp(−2.1) is 12 %
        ("generalisation-gap", {"loss, test": 1e-4, "error, test": 1e-3}, True),  # nearly all right, and as sure of it
    ],
)
def test_networks_with_one_answer_are_not_judged(lens: str, found: dict[str, float], counts: bool) -> None:
    """Training at the largest radius left these where they began, without a gap."""
    runs = trained("generalisation-gap", "loss gap", 0.3)
    more = [
        run(0.3, seed, [reading(lens, found), reading("generalisation-gap", {"loss gap": -50.0})]) for seed in SEEDS
    ]
    assert judged("loss-gap-falls", runs) == ["contradicted"]
    assert judged("loss-gap-falls", [*runs, *more]) == ["supported" if counts else "contradicted"]


def test_accuracies_at_different_radii_are_no_trend() -> None:
    name = "conditional-robust-accuracy-rises"
    runs = trained("accuracy", "conditional robust accuracy", 0.3)
    own = [_at(r, r.readings[0]) for r in runs]
    assert judged(name, [Run(**{**vars(r), "readings": [o]}) for r, o in zip(runs, own, strict=True)]) == []
    both = [Run(**{**vars(r), "readings": [o, *r.readings]}) for r, o in zip(runs, own, strict=True)]
    (verdict,) = BY_NAME[name].judge(both)
    assert verdict.where.endswith("measured at linf:0.1")


def test_variations_of_the_loss_are_judged_at_each_size_of_a_change() -> None:
    runs = trained("confidence", "mean loss variation at 0.025", -1.0)
    more = [
        replace(r, readings=[*r.readings, *(_renamed(each, "mean loss variation at 0.05") for each in r.readings)])
        for r in runs
    ]
    places = [verdict.where.partition("measured at ")[2] for verdict in BY_NAME["loss-variation-falls"].judge(more)]
    assert places == ["linf:0.1, changes of 0.025", "linf:0.1, changes of 0.05"]


def _renamed(found: Reading, name: str) -> Reading:
    return replace(found, quantities=tuple(replace(q, name=name) for q in found.quantities))


def _at(of: Run, found: Reading) -> Reading:
    return Reading(**{**vars(found), "settings": THREAT | {"threat": of.config["objective"]["attack"]["threat"] + "1"}})


def test_unreliable_accuracy_decides_nothing() -> None:
    outcome = Outcome.unreliable("Its gradients vanish.")
    runs = [
        run(eps, seed, [reading("accuracy", {"robust accuracy": eps}, outcome=outcome)])
        for eps in STRENGTHS
        for seed in SEEDS
    ]
    (verdict,) = BY_NAME["robust-accuracy-rises"].judge(runs)
    assert verdict.judgement == "undecided" and "vanish" in verdict.says


def layers(shares: Sequence[int], seeds: Sequence[int] = SEEDS, **parts: Any) -> list[Run]:
    """Four layers, of which ``shares[seed]`` spread less at the largest radius."""
    found = []
    for seed in seeds:
        for eps in STRENGTHS:
            values = {}
            for k in range(4):
                sign = -1 if k < shares[seed] else 1
                values[f"spread of singular values, layer{k}"] = 1.0 + sign * eps
                values[f"spread of singular values, layer{k}, BatchNorm folded in"] = 1.0 + eps
            found.append(run(eps, seed, [reading("layer-spectra", values, None)], **parts))
    return found


@pytest.mark.parametrize("before", ["", "fgsm-"])
def test_most_layers(before: str) -> None:
    name = f"{before}spread-falls-in-most-layers"
    parts = parts_of(name)
    assert judged(name, layers((4, 4, 4), **parts)) == ["supported"]
    assert judged(name, layers((0, 0, 0), **parts)) == ["contradicted"]
    assert judged(name, layers((2, 2, 2), **parts)) == ["undecided"], "seeds that agree on 2 layers of 4 are no proof"
    assert judged(name, layers((4, 3, 1), **parts)) == ["undecided"]
    assert judged(name, layers((4,), seeds=(0,), **parts)) == ["undecided"]
    (verdict,) = BY_NAME[name].judge(layers((4, 3, 1), **parts))
    shares, found = np.array([1.0, 0.75, 0.25]), verdict.statistic
    assert found is not None and found.high is not None
    assert (found.value, found.n, found.seeds) == (pytest.approx(shares.mean()), 4, 3)
    over_layers = np.mean([np.ptp(wilson(k, 4)) / 2 for k in (4, 3, 1)])
    half = np.hypot(T2 * shares.std(ddof=1) / np.sqrt(3), over_layers)
    assert found.high - found.value == pytest.approx(half, rel=1e-5)
    trained_at = [eps for eps in STRENGTHS if eps > 0]
    sums = [n * (max(trained_at) - min(trained_at)) for n in ((4 + 3 + 1) / 3, (0 + 1 + 3) / 3)]
    assert f"shrink by {sums[0]:.3g} together, the others grow by {sums[1]:.3g} (B.2)" in verdict.says


def error_gaps(free: float, held: float, jitter: float = 0.02, norm: float = 1.0) -> list[Run]:
    of = "generalisation-gap", "error gap"
    return [*trained(*of, free, jitter), *trained(*of, held, jitter, constraints=[clip(norm)])]


def test_clipping_flips_the_error_gap() -> None:
    flips, turns = "clipping-flips-error-gap", "clipping-turns-error-gap-down"
    for free, held, jitter, flipped, turned in (
        (0.3, -0.3, 0.02, "supported", "supported"),
        (-0.2, -0.6, 0.02, "contradicted", "supported"),
        (0.3, 0.6, 0.02, "contradicted", "contradicted"),
        (0.3, 0.0, 0.02, "undecided", "supported"),
        (0.1, 0.0, 0.2, "undecided", "undecided"),
    ):
        runs = error_gaps(free, held, jitter)
        assert (judged(flips, runs), judged(turns, runs)) == ([flipped], [turned])
    for name in (flips, turns):
        assert judged(name, error_gaps(0.3, -0.3, norm=3.0)) == []
        assert judged(name, error_gaps(0.3, -0.3)[:9]) == []


def test_clipping_with_a_reading_that_is_not_reliable() -> None:
    runs = error_gaps(0.3, -0.3)
    (first,) = runs[0].readings
    runs[0] = replace(runs[0], readings=[replace(first, outcome=Outcome.unreliable("Gradients are masked."))])
    for name in ("clipping-flips-error-gap", "clipping-turns-error-gap-down"):
        assert judged(name, error_gaps(0.3, -0.3)) == ["supported"] and judged(name, runs) == ["undecided"]


def test_clipping_by_hand() -> None:
    """Slopes 0.28, 0.30, 0.32 without and −0.42, −0.40, −0.38 with clipping, every value ± 0.01."""
    x = np.array(STRENGTHS) - np.mean(STRENGTHS)
    half = np.hypot(0.01 * 0.15 / np.sqrt((x**2).sum()), T2 * 0.02 / np.sqrt(3))
    runs = error_gaps(0.3, -0.4)
    for name, value, width in (
        ("clipping-flips-error-gap", 0.3, half),
        ("clipping-turns-error-gap-down", 0.7, np.sqrt(2) * half),
    ):
        (verdict,) = BY_NAME[name].judge(runs)
        found = verdict.statistic
        assert found is not None
        assert found.value == pytest.approx(value)
        assert (found.low, found.high) == (
            pytest.approx(value - width, rel=1e-4),
            pytest.approx(value + width, rel=1e-4),
        )


def studies(recipe: Recipe, scale: Scale) -> list[StudyConfig]:
    return [make_study(settings) for settings in recipe.at(scale)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes(recipe: Recipe, scale: Scale) -> None:
    found = studies(recipe, scale)
    for study in found:
        make_plan(study)
    for printed in recipe.printed:
        study = found[printed.study]
        assert printed.method in {method.label for method in study.methods}
        assert printed.ask.lens in {name_of(lens) for lens in study.lenses}
        assert printed.tolerance > 0 or printed.value == 0


def test_recipes_of_the_same_networks_train_them_once() -> None:
    by_name: dict[str, set[str]] = {}
    for recipe in RECIPES:
        for study in studies(recipe, "paper"):
            runs = {run.hash for run in make_plan(study).runs}
            assert by_name.setdefault(study.name, runs) == runs


def test_printed_numbers_add_up() -> None:
    """Train and test make the gap, within the rounding of the print."""
    for recipe in RECIPES:
        rows: dict[str, dict[str, float]] = {}
        for printed in recipe.printed:
            rows.setdefault(f"{printed.study} {printed.row}", {})[printed.column] = printed.value
        for row in rows.values():
            if "loss gap" in row:
                assert row["test loss"] - row["train loss"] == pytest.approx(row["loss gap"], abs=0.00151)
            if "error gap" in row:
                gap = 1 - row["train error"] - row["test accuracy"]
                assert gap == pytest.approx(row["error gap"], abs=0.00021)


@pytest.mark.parametrize(
    ("name", "others"),
    [("000-mnist", {"000-test-loss-falls", "000-error-gap-grows-on-cifar10"}), ("000-cifar10", set())],
)
def test_the_companions_decide_what_their_data_can(name: str, others: set[str]) -> None:
    """Their runs, with made-up readings, are judged by every claim that does not name other data."""
    study = studies(find_recipe(name), "paper")[0]
    values: dict[str, dict[str, float]] = {}
    for lens, quantity, _ in TRENDS.values():
        values.setdefault(lens, {})[quantity] = 0.5
    values["generalisation-gap"]["error gap"] = 0.5
    values["layer-spectra"]["spread of singular values, conv1"] = 0.5
    assert {name_of(lens) for lens in study.lenses} == set(values)
    readings = [reading(lens, found) for lens, found in values.items()]
    runs = [
        Run(planned.label, planned.seed, study.name, planned.hash, planned.settings, {}, [], readings)
        for planned in make_plan(study).runs
    ]
    unjudged = {claim.name for claim in CLAIMS if not _verdicts(claim, runs)}
    assert unjudged == others


def _verdicts(claim: Claim, runs: Sequence[Run]) -> int:
    return len(claim.judge(runs))


@pytest.mark.slow
def test_a_recipe_runs(tmp_path: Any) -> None:
    (study,) = studies(find_recipe("000-mnist"), "smoke")
    runs = read_runs(run_study(study, tmp_path, device="cpu"))
    assert len(runs) == 11
    lenses = {reading.lens: reading for reading in runs[0].readings}
    assert {reading.outcome.status for reading in lenses.values()} <= {"ok", "unreliable"}
    for lens, quantity, _ in TRENDS.values():
        assert quantity in {each.name for each in lenses[lens].quantities}
    needing_layers = {name for name in BY_NAME if name.endswith("most-layers")}
    for name in set(BY_NAME) - needing_layers - {"test-loss-falls", "error-gap-grows-on-cifar10"}:
        assert BY_NAME[name].judge(runs), name
