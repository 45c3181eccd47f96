"""The claims of Roth et al. 2020 on runs made by hand, and the recipes that would make real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, needs_data
from scipy.stats import t as student
from torch import nn

from robustlens.claims.ledger import ledger
from robustlens.claims.roth_2020 import CLAIMS
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.power_iteration import PowerIteration
from robustlens.recipes.recipe import SCALES
from robustlens.recipes.reproduce import reproduce
from robustlens.recipes.roth_2020 import RECIPES
from robustlens.results.errors import InputError
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run, read_runs
from robustlens.results.verdict import Verdict
from robustlens.studies.config import make_study
from robustlens.studies.plan import make_plan
from robustlens.threats.lp import Lp

BY_NAME = {claim.name.removeprefix("001-"): claim for claim in CLAIMS}
WRONG = Outcome.unreliable("Gradients are masked.")
HALF = 0.02  # half the width of every interval

Values = Mapping[tuple[str, str], float]  # (lens, quantity) → value


def config(kind: str, step: float | None = None) -> dict[str, Any]:
    """``kind``: standard, adversarial, global, global10 or data, all at radius 1.5."""
    attack = {"name": "pgd", "threat": "l2:1.5", "steps": 10, "step_size": 0.3 if step is None else step}
    regularizers: dict[str, list[dict[str, Any]]] = {
        "global": [{"name": "global-spectral-norm", "iterations": 1}],
        "global10": [{"name": "global-spectral-norm", "iterations": 10}],
        "data": [{"name": "data-spectral-norm", "eps": 1.5}],
    }
    return {
        "data": {"source": "mnist"},
        "model": {"name": "lenet-small"},
        "training": {"epochs": 3},
        "objective": {"name": "adversarial", "attack": attack} if kind == "adversarial" else {"name": "standard"},
        "regularizers": regularizers.get(kind, []),
        "update": {"name": "descend"},
        "constraints": [],
    }


def reading(lens: str, quantity: str, value: float, threat: str = "l2:1.5", outcome: Outcome = Outcome()) -> Reading:  # noqa: B008
    settings: dict[str, Any] = {"threat": threat}
    if lens == "accuracy":
        settings |= {"radii": None, "attack": None, "split": "test"}
    if lens == "alignment":
        settings["untrained"] = True
    if lens == "pga-power-iteration":
        settings |= {"small": 1e-5}
    found = Quantity(quantity, value, "", value - HALF, value + HALF, 100)
    return Reading(lens, "It is 1.", outcome, (found,), settings=settings)


def runs_of(kind: str, readings: Sequence[Reading], *, seeds: int = 3, step: float | None = None) -> list[Run]:
    settings = config(kind, step)
    return [
        Run(kind, seed, "study", f"{kind}{step}{seed}", settings | {"seed": seed}, {}, [], readings)
        for seed in range(seeds)
    ]


def judged(name: str, runs: Sequence[Run]) -> Verdict:
    (verdict,) = BY_NAME[name].judge(runs)
    return verdict


LEADING, LAST = "alignment with the leading direction", "alignment with the last direction"
AWAY, HERE = "largest singular value, adversarial", "largest singular value at the image"
DEVIATION = "deviation, features, adversarial"

#: Claim → lens, quantity, kinds of the two methods, and the first one's supporting, contradicting and undecided value
#: beside 1 (0.5 for accuracies and alignments).
COMPARED: dict[str, tuple[str, str, str, str, tuple[float, float, float]]] = {
    **{
        f"{what}-{name}": (lens, quantity, kind, "standard", (0.5, 1.5, 1.0))
        for name, kind in (("adversarial", "adversarial"), ("data-dependent", "data"))
        for what, lens, quantity in (
            ("spectrum-damped", "jacobian-spectrum", "Frobenius norm, clean"),
            ("spectrum-damped-relative", "jacobian-spectrum", "Frobenius norm, clean"),
            ("linear-random", "local-linearity", "deviation, features, random"),
            ("linear-adversarial", "local-linearity", DEVIATION),
            ("linear-relative", "local-linearity", "relative deviation, features, adversarial"),
            ("top-value-stays-low", "local-linearity", AWAY),
            ("top-value-stays-low-relative", "local-linearity", AWAY),
        )
    },
    **{
        f"alignment-larger-{name}": ("alignment", f"{LEADING}, adversarial", kind, "standard", (0.7, 0.3, 0.5))
        for name, kind in (("adversarial", "adversarial"), ("data-dependent", "data"))
    },
    **{
        f"robust-beats-global-{name}": ("accuracy", "robust accuracy", kind, "global", (0.8, 0.5, 0.6))
        for name, kind in (("adversarial", "adversarial"), ("data-dependent", "data"))
    },
    "spectrum-global-unchanged": (
        "jacobian-spectrum", "Frobenius norm, clean", "global", "standard", (1.1, 0.5, 0.8),
    ),
    "spectrum-data-dependent-below-adversarial": (
        "jacobian-spectrum", "Frobenius norm, clean", "data", "adversarial", (0.9, 1.2, 1.0),
    ),
    "linear-global-as-standard": ("local-linearity", DEVIATION, "global", "standard", (1.1, 2.0, 1.5)),
    "robust-data-dependent-as-adversarial": (
        "accuracy", "robust accuracy", "data", "adversarial", (0.5, 0.4, 0.55),
    ),
    "robust-global-as-standard": ("accuracy", "robust accuracy", "global", "standard", (0.51, 0.7, 0.45)),
    "global-iterations-robustness": ("accuracy", "robust accuracy", "global10", "global", (0.5, 0.6, 0.53)),
    "global-iterations-linearity": ("local-linearity", DEVIATION, "global10", "global", (1.0, 1.5, 1.25)),
    "global-iterations-top-value": ("local-linearity", AWAY, "global10", "global", (1.0, 0.5, 0.8)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_two_methods(name: str) -> None:
    lens, quantity, first, second, values = COMPARED[name]
    beside = 0.5 if lens in ("accuracy", "alignment") else 1.0
    scale = [reading("logit-margins", "mean margin, test", 1.0), reading("local-linearity", HERE, 1.0)]
    other = runs_of(second, [reading(lens, quantity, beside), *scale])
    for value, wanted in zip(values, ("supported", "contradicted", "undecided"), strict=True):
        verdict = judged(name, [*runs_of(first, [reading(lens, quantity, value), *scale]), *other])
        assert verdict.judgement == wanted, verdict
        assert verdict.statistic is not None and verdict.statistic.seeds == 3 and verdict.statistic.n == 100
    masked = runs_of(first, [reading(lens, quantity, values[0], outcome=WRONG), *scale])
    assert judged(name, [*masked, *other]).judgement == "undecided"
    assert not BY_NAME[name].judge(other)


UNTRAINED = "untrained, adversarial"
#: Claim → the two quantities, and the first one's supporting, contradicting and undecided value beside 0.5.
WITHIN: dict[str, tuple[str, str, tuple[float, float, float]]] = {
    "perturbations-align": (f"{LEADING}, adversarial", f"{LEADING}, random", (1.5, 0.6, 1.0)),
    "alignment-falls-with-rank": (f"{LAST}, adversarial", f"{LEADING}, adversarial", (0.1, 0.8, 0.5)),
    "random-network-no-rank": (f"{LEADING}, {UNTRAINED}", f"{LAST}, {UNTRAINED}", (0.5, 1.5, 0.75)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_two_quantities_of_a_network(name: str) -> None:
    first, second, values = WITHIN[name]
    for value, wanted in zip(values, ("supported", "contradicted", "undecided"), strict=True):
        found = [reading("alignment", first, value), reading("alignment", second, 0.5)]
        assert judged(name, runs_of("standard", found)).judgement == wanted


VALUES = {
    "theorem-1": ("share that agrees, small balls", "standard", (0.97, 0.5, 0.9)),
    "theorem-1-beyond-the-cell": ("cosine, the threat's ball", "data", (0.9, 0.5, 0.8)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_quantity_of_a_network(name: str) -> None:
    quantity, kind, values = VALUES[name]
    for value, wanted in zip(values, ("supported", "contradicted", "undecided"), strict=True):
        verdict = judged(name, runs_of(kind, [reading("pga-power-iteration", quantity, value)]))
        assert verdict.judgement == wanted
        assert verdict.statistic is not None
        assert (verdict.statistic.low, verdict.statistic.high) == pytest.approx((value - HALF, value + HALF))


def test_theorem_1_is_judged_in_the_ball_of_training() -> None:
    name, quantity = "theorem-1-beyond-the-cell", "cosine, the threat's ball"
    for kind in ("adversarial", "data"):
        other = [reading("pga-power-iteration", quantity, 0.99, threat) for threat in ("l2:0.15", "l2:4.0")]
        there = reading("pga-power-iteration", quantity, 0.5)
        assert judged(name, runs_of(kind, [*other, there])).judgement == "contradicted"
        assert BY_NAME[name].judge(runs_of(kind, other)) == []


def test_alignment_over_radii() -> None:
    name = "alignment-falls-with-radius"
    for last, wanted in ((0.2, "supported"), (0.8, "contradicted"), (0.5, "undecided")):
        found = [
            reading("alignment", f"{LEADING}, adversarial", value, threat)
            for value, threat in ((0.5, "l2:1.5"), (last, "l2:3.0"))
        ]
        verdict = judged(name, runs_of("standard", found))
        assert verdict.judgement == wanted and verdict.statistic is not None
        assert verdict.statistic.value == pytest.approx(last - 0.5)
        assert verdict.statistic.high - verdict.statistic.low == pytest.approx(2 * HALF * 2**0.5)
    one_norm_each = [reading("alignment", f"{LEADING}, adversarial", 0.5, threat) for threat in ("l2:1.5", "linf:0.1")]
    assert not BY_NAME[name].judge(runs_of("standard", one_norm_each))


def steps(values: Mapping[float, float]) -> list[Run]:
    found = [runs_of("adversarial", [reading("accuracy", "robust accuracy", v)], step=s) for s, v in values.items()]
    return [run for runs in found for run in runs]


def test_step_sizes() -> None:
    rise, level = "large-steps-rise-first", "large-steps-level-off"
    for first, wanted in ((0.2, "supported"), (0.8, "contradicted"), (0.5, "undecided")):
        assert judged(rise, steps({0.03: first, 0.3: 0.9, 1.5: 0.5, 15.0: 0.1})).judgement == wanted
    for last, wanted in ((0.5, "supported"), (0.3, "contradicted"), (0.55, "undecided")):
        assert judged(level, steps({0.03: 0.1, 1.5: 0.5, 15.0: (0.5 + last) / 2, 150.0: last})).judgement == wanted
    assert not BY_NAME[level].judge(steps({0.03: 0.1, 1.5: 0.5})) and not BY_NAME[rise].judge(
        steps({1.5: 0.5, 3.0: 0.5})
    )


def test_intervals_by_hand() -> None:
    """log ratios of three seeds with their spread; a line over log α; a quotient of quantities of two lenses."""
    ratios, runs = (
        np.array([0.4, 0.5, 0.7]),
        runs_of("standard", [reading("jacobian-spectrum", "Frobenius norm, clean", 2.0)]),
    )
    for seed, ratio in enumerate(ratios):
        runs.append(runs_of("data", [reading("jacobian-spectrum", "Frobenius norm, clean", 2 * ratio)])[seed])
    found = judged("spectrum-damped-data-dependent", runs).statistic
    by_examples = np.mean([HALF * np.hypot(1 / (2 * ratio), 1 / 2) for ratio in ratios])
    by_seeds = student.ppf(0.975, 2) * np.log(ratios).std(ddof=1) / 3**0.5
    half = np.hypot(by_examples, by_seeds)
    assert found is not None and found.value == pytest.approx(np.exp(np.log(ratios).mean()))
    assert (found.low, found.high) == pytest.approx(tuple(found.value * np.exp([-half, half])))

    x, y = np.log([1.5, 15.0, 600.0]), np.array([0.5, 0.6, 0.55])
    line = np.polyfit(x, y, 1)[0] * (x[-1] - x[0])
    away = x - x.mean()
    error = HALF * (x[-1] - x[0]) / np.sqrt((away**2).sum())
    found = judged("large-steps-level-off", steps(dict(zip([1.5, 15.0, 600.0], y.tolist(), strict=True)))).statistic
    assert found is not None and (found.value, found.low, found.high) == pytest.approx(
        (line, line - error, line + error)
    )

    def scaled(kind: str, norm: float, margin: float) -> list[Run]:
        both = (
            reading("jacobian-spectrum", "Frobenius norm, clean", norm),
            reading("logit-margins", "mean margin, test", margin),
        )
        return runs_of(kind, both)

    found = judged(
        "spectrum-damped-relative-adversarial", [*scaled("standard", 8.0, 4.0), *scaled("adversarial", 2.0, 2.0)]
    ).statistic
    half = HALF * np.sqrt((1 / np.array([8.0, 4.0, 2.0, 2.0]) ** 2).sum())
    assert found is not None and (found.value, found.low) == pytest.approx((0.5, 0.5 * np.exp(-half)))


def test_threats_and_radii_are_not_mixed() -> None:
    """Robust accuracies count at equal threats, and data-dependent SNR beside adversarial training of its radius."""
    name = "robust-data-dependent-as-adversarial"
    data = runs_of("data", [reading("accuracy", "robust accuracy", 0.5)])
    other = runs_of("adversarial", [reading("accuracy", "robust accuracy", 0.5, "l2:3.0")])
    assert not BY_NAME[name].judge([*data, *other])
    wider = runs_of("adversarial", [reading("accuracy", "robust accuracy", 0.5)])
    for run in wider:
        run.config["objective"]["attack"]["threat"] = "l2:2.0"
    assert not BY_NAME[name].judge([*data, *wider])


def test_step_sizes_of_the_sweep_alone_are_adversarial_training() -> None:
    """Neither an attack that does not cross the ball nor one with huge steps stands for the method."""
    for step, wanted in ((0.03, 0), (0.15, 1), (0.75, 1), (1500.0, 0)):
        found = [reading("jacobian-spectrum", "Frobenius norm, clean", 1.0)]
        runs = [*runs_of("standard", found), *runs_of("adversarial", found, step=step)]
        assert len(BY_NAME["spectrum-damped-adversarial"].judge(runs)) == wanted


def test_a_negative_margin_is_no_scale() -> None:
    norm, margin = (reading("jacobian-spectrum", "Frobenius norm, clean", 1.0), "mean margin, test")
    runs = runs_of("standard", [norm, reading("logit-margins", margin, 1.0)])
    runs += runs_of("data", [norm, reading("logit-margins", margin, -1.0)])
    assert not BY_NAME["spectrum-damped-relative-data-dependent"].judge(runs)


def test_every_claim_is_tested() -> None:
    special = {"alignment-falls-with-radius", "large-steps-rise-first", "large-steps-level-off"}
    assert {*COMPARED, *WITHIN, *VALUES, *special} == set(BY_NAME)


def lens_of(choice: Any) -> str:
    return choice if isinstance(choice, str) else choice["name"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("scale", SCALES)
def test_recipes_can_be_planned(recipe: Any, scale: Any) -> None:
    studies = [make_study(settings) for settings in recipe.at(scale)]
    plans = [make_plan(study) for study in studies]
    assert all(
        len(plan.runs) == len(study.methods) * len(study.seeds) for plan, study in zip(plans, studies, strict=True)
    )
    for printed in recipe.printed:
        study = studies[printed.study]
        assert printed.method in {method.label for method in study.methods}
        assert printed.ask.lens in {lens_of(lens) for lens in study.lenses}
    assert set(recipe.expects) == set(SCALES)


def test_recipes_share_their_networks() -> None:
    """Seven recipes of one study train five networks a seed; fine-tuned seeds differ in nothing but the seed."""
    addresses = {
        run.hash for recipe in RECIPES if recipe.name not in ("001-figure8", "001-mnist")
        for study in recipe.at("laptop") for run in make_plan(make_study(study)).runs
    }  # fmt: skip
    assert len(addresses) == 5
    (table1,) = next(recipe for recipe in RECIPES if recipe.name == "001-table1").at("paper")
    tuned = [run.settings for run in make_plan(make_study(table1)).runs if run.label == "adversarial"]
    assert len(tuned) == 3 and {settings["start"] for settings in tuned} == {tuned[0]["start"]}


def small(weight: float = 1.0, eps: float = 2.0) -> Subject:
    """Two hidden layers of ReLUs on 8 images, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        net[5].weight.mul_(weight)
    split = Split(torch.rand(8, 1, 8, 8, generator=gen(1)), torch.arange(8) % 4)
    return Subject(net.eval(), Splits("noise", split, split, split, tuple("abcd")), Lp("l2", eps))


def test_the_attack_is_the_power_method_in_small_balls_alone() -> None:
    found = PowerIteration().look(small(), gen=gen())
    assert found["share that agrees, small balls"].value == 1.0
    assert (
        found["distance, small balls"].value
        < 1e-6
        < found["relative difference of the objectives, the threat's ball"].value
    )
    assert found["relative difference of the objectives, small balls"].value < 1e-6
    assert found["distance, small balls, the paper's steps"].value > 0.01
    assert found["distance, the threat's ball"].value > 0.01
    over_radius, over_steps = (panel.series[0] for panel in found.panels[:2])
    assert (over_radius.x[0], over_radius.x[-1]) == pytest.approx((-5, np.log10(2)))
    assert list(over_steps.y) == sorted(over_steps.y, reverse=True) and over_steps.y[-1] == over_radius.y[0]
    again = PowerIteration(batch_size=3).look(small(weight=100.0), gen=gen())
    assert again["share that agrees, small balls"].value == 1.0, "the scale of the logits does not matter"


def test_what_the_lens_refuses() -> None:
    for bad in ({"small": 0.0}, {"iterations": 0}):
        with pytest.raises(InputError, match=f"pga-power-iteration {next(iter(bad))}"):
            PowerIteration(**bad)
    with pytest.raises(InputError, match="the threat's radius"):
        PowerIteration(small=3.0).look(small(), gen=gen())
    assert PowerIteration().look(small(weight=0.0), gen=gen()).outcome.status == "failed"


@pytest.mark.slow
def test_the_companion_runs(tmp_path: Any) -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == "001-mnist")
    done = reproduce(recipe, "smoke", tmp_path)
    assert done.record["networks"] == 11
    entries = ledger(read_runs(done.runs), CLAIMS)
    assert not [entry.name for entry in entries if entry.judgement == "not run"]


@pytest.mark.slow
@needs_data
def test_table1_runs(tmp_path: Any) -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == "001-table1")
    assert [row.verdict for row in reproduce(recipe, "smoke", tmp_path).rows].count("not run") == 0
