"""Figures over many networks: the lines that a paper draws, from small evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_evidence import reading, run

from robustlens.claims.evidence import Ask
from robustlens.recipes.charts import Chart, all_named, over, over_attack, over_strength
from robustlens.recipes.recipe import recipes
from robustlens.recipes.roth_2020 import step_of_radius
from robustlens.report.figures import write_charts
from robustlens.results.panels import Curve
from robustlens.results.runs import Run


def at(eps: float, loss: float, seed: int = 0, **parts: object) -> Run:
    gap = reading("gap", {"loss": (loss, 0.1), "error": 2 * loss})
    objective = "standard" if eps == 0 else f"pgd l2:{eps}"
    return run(f"ε {eps}", [gap], seed=seed, objective=objective, **parts)  # type: ignore[arg-type]


def chart(lines: object) -> Chart:
    return Chart(title="Gap", x_label="ε", y_label="gap", lines=lines)  # type: ignore[arg-type]


def lines(drawn: dict[str, Curve]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    return {
        (colour, each.name): (each.x.tolist(), each.y.tolist())
        for colour, curve in drawn.items()
        for each in curve.series
    }


def test_over_the_radius_of_training() -> None:
    """Seeds are averaged, families have colours, and standard training begins each."""
    runs = [at(eps, loss + 0.1 * seed, seed) for eps, loss in ((0, 1.0), (1.0, 2.0), (0.5, 1.5)) for seed in (0, 1)]
    asks = {"loss": Ask("gap", "loss"), "error": Ask("gap", "error")}
    alone = lines(chart(over_strength(asks)).draw(runs))
    assert alone["loss", ""] == ([0.0, 0.5, 1.0], pytest.approx([1.05, 1.55, 2.05]))
    assert alone["error", ""][1] == pytest.approx([2.1, 3.1, 4.1]) and len(alone) == 2
    other = [at(eps, 3.0, training={"epochs": 7}) for eps in (0, 1.0)]
    both = lines(chart(over_strength(asks)).draw([*runs, *other]))
    assert {stroke for _, stroke in both} == {"loss", "error"} and len({colour for colour, _ in both}) == 2
    assert ([0.0, 1.0], [3.0, 3.0]) in both.values()


def test_intervals_are_those_of_the_ledger_and_missing_where_one_is_missing() -> None:
    drawn = chart(over_strength({"loss": Ask("gap", "loss"), "error": Ask("gap", "error")})).draw([at(0, 1), at(1, 2)])
    (loss,), (error,) = drawn["loss"].series, drawn["error"].series
    assert loss.low is not None and loss.high is not None and error.low is error.high is None
    np.testing.assert_allclose(loss.high - loss.low, 0.2, rtol=1e-5)


def test_over_the_attack_and_over_a_number_of_the_network() -> None:
    def seen(eps: float, cosine: float) -> object:
        used = {"attack used": {"name": "pgd", "threat": f"l2:{eps}"}}
        return reading("alignment", {"cosine": cosine}, settings=used)

    runs = [run(name, [seen(0.5, value), seen(1.0, value / 2)]) for name, value in (("AT", 0.4), ("SNR", 0.2))]
    found = lines(chart(over_attack("alignment", "cosine", "l2")).draw(runs))
    assert found == {("AT", ""): ([0.5, 1.0], [0.4, 0.2]), ("SNR", ""): ([0.5, 1.0], [0.2, 0.1])}
    assert chart(over_attack("alignment", "cosine", "linf")).draw(runs) == {}
    attack = {"name": "pgd", "threat": "l2:1.0", "steps": 10}
    steps = [
        run("PGD", [reading("gap", {"loss": loss})], objective={"name": "adversarial", "attack": {**attack, **step}})
        for step, loss in (({"step_size": 0.1}, 1.0), ({"step_size": 10.0}, 3.0))
    ]
    assert [step_of_radius(each) for each in [*steps, at(0, 1.0)]] == [0.1, 10.0, None]
    assert lines(chart(over(step_of_radius, {"loss": Ask("gap", "loss")})).draw(steps)) == {
        ("loss", ""): ([0.1, 10.0], [1.0, 3.0])
    }


def test_a_line_for_every_layer_and_none_for_one_point(tmp_path: Path) -> None:
    def spread(eps: float) -> Run:
        layers = reading("spectra", {"spread, conv1": eps, "spread, fc": 1.0, "norm": 5.0})
        return run(f"ε {eps}", [layers], objective=f"pgd l2:{eps}")

    every = chart(all_named("spectra", "spread, ", over_strength))
    drawn = every.draw([spread(0.5), spread(1.0)])
    assert set(drawn) == {"conv1", "fc"} and every.draw([spread(0.5)]) == {}
    (path,) = write_charts([drawn], tmp_path)
    assert path.name == "networks-gap.svg" and path.read_text().startswith("<svg")


def test_titles_differ_within_a_recipe() -> None:
    for recipe in recipes().values():
        titles = [each.title for each in recipe.charts]
        assert len(set(titles)) == len(titles)
    assert sum(bool(recipe.charts) for recipe in recipes().values()) >= 15
