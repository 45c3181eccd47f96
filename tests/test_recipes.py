"""Recipes: all can be planned, their numbers have something to stand beside, and what they write can be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_evidence import reading, run
from typer.testing import CliRunner

from robustlens.claims.evidence import Ask
from robustlens.cli import app
from robustlens.core.discovery import describe, discover
from robustlens.recipes.recipe import SCALES, Printed, Recipe, Scale, find_recipe, find_scale, recipes
from robustlens.recipes.reproduce import Reproduction, compared, parse_seeds
from robustlens.recipes.yamada_2021 import Gap
from robustlens.report.front import attacked
from robustlens.report.front import beside as beside_papers
from robustlens.results.errors import InputError
from robustlens.results.intervals import wilson
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import read_runs
from robustlens.results.store import find_runs
from robustlens.studies.config import make_study, write_study
from robustlens.studies.epochs import schedule
from robustlens.studies.plan import make_plan


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())
def test_every_recipe_can_be_planned(recipe: Recipe, scale: Scale) -> None:
    studies = [make_study(settings) for settings in recipe.at(scale)]
    assert set(recipe.expects) >= {"laptop", "paper"}
    assert bool(studies) is (recipe.networks is None)
    for study in studies:
        plan = make_plan(study)
        assert make_study(json.loads(study.model_dump_json())) == study and write_study(study)
        if scale == "smoke":
            assert all(run.training.epochs == 1 for run in plan.runs) and len(study.seeds) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_recipes_that_share_a_study_share_its_networks(scale: Scale) -> None:
    """What is called the same is the same network, and is trained once."""
    networks: dict[tuple[str, str, int], set[str]] = {}
    for recipe in recipes().values():
        for settings in recipe.at(scale):
            study = make_study(settings)
            for planned in make_plan(study).runs:
                networks.setdefault((study.name, planned.label, planned.seed), set()).add(planned.hash)
    assert len(networks) > 100
    assert {where: hashes for where, hashes in networks.items() if len(hashes) > 1} == {}


@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())
def test_every_printed_number_has_something_to_stand_beside(recipe: Recipe) -> None:
    studies = recipe.at("laptop")
    if recipe.networks is not None:
        assert recipe.printed
        return
    for printed in recipe.printed:
        study = studies[printed.study]
        assert printed.method in [method["label"] for method in study["methods"]]
        lenses = [lens if isinstance(lens, str) else lens["name"] for lens in study["lenses"]]
        assert printed.ask.lens.removesuffix(" over epochs") in lenses and printed.ask.lens in discover("lens")
        assert printed.tolerance > 0
    places = [(printed.row, printed.column, printed.study, printed.method) for printed in recipe.printed]
    assert len(set(places)) == len(places)


def test_there_is_a_recipe_for_every_paper() -> None:
    assert {name[:3] for name in recipes()} == {"000", "001", "003", "004"}


def test_unknown_names_have_a_nearest_one() -> None:
    with pytest.raises(InputError, match="004-table1"):
        find_recipe("004-tabel1")
    with pytest.raises(InputError, match="laptop"):
        find_scale("labtop")
    assert parse_seeds(None) is None and parse_seeds("0, 2") == [0, 2]
    with pytest.raises(InputError, match="0,1,2"):
        parse_seeds("0;1")


def test_a_recipe_without_numbers_or_verdicts_shows_no_empty_table() -> None:
    assert Reproduction(find_recipe("003-figure1"), "smoke", (), (), (), {}).front == []
    assert all(not recipe.what.endswith(".") for recipe in recipes().values())


def test_what_an_attack_leaves_beside_autoattack_standard() -> None:
    def left(lens: str, value: float, threat: str = "l2:2.0", **parts: Any) -> Reading:
        settings = {"attack": {"name": "pgd", "threat": threat}} if lens == "accuracy" else {"threat": threat}
        return reading(lens, {"robust accuracy": (value, 0.01)}, settings=settings, **parts)

    checks = reading(
        "health",
        {"robust accuracy": 0.9, "robust accuracy after all checks": (0.4, 0.01)},
        settings={"threat": "l2:2.0"},
        outcome=Outcome.unreliable("Zero gradients."),
    )
    seeds = [
        run("AMR", [left("accuracy", 0.99, "l2:0.5"), left("accuracy", 0.95), left("standard-accuracy", 0.3), checks]),
        run("AMR", [left("standard-accuracy", 0.2)], seed=1),
    ]
    table = attacked([*seeds, run("LR", [left("accuracy", 0.1)])])
    assert table is not None
    assert [[cell.split(" [")[0] for cell in row] for row in table.rows] == [
        ["AMR, seed 0", "l2:2", "95.0 %", "40.0 %", "30.0 %", "100", "unreliable"],
        ["AMR, seed 1", "l2:2", "—", "—", "20.0 %", "100", "not run"],
    ]
    assert "[29.0, 31.0]" in table.rows[0][4] and table.detail[0].endswith("Zero gradients.")
    assert attacked([run("LR", [left("accuracy", 0.1)])]) is None


def test_our_number_beside_the_papers() -> None:
    ask = Ask("accuracy", "robust accuracy")

    def beside(value: float, half: float, **parts: Any) -> str:
        printed = Printed(row="r", column="c", value=0.5, method="PGD", ask=ask, tolerance=0.1)
        runs = [run("PGD", [reading("accuracy", {"robust accuracy": (value, half)}, **parts)]), run("other", [])]
        return compared(printed, runs).verdict

    assert [beside(0.52, 0.05), beside(0.52, 0.09), beside(0.7, 0.05)] == ["agrees", "undecided", "differs"]
    absent = Printed(row="r", column="c", value=0.5, method="FGSM", ask=ask, tolerance=0.1)
    assert compared(absent, [run("PGD", [])]).verdict == "not run"
    doubtful = run(
        "PGD", [reading("accuracy", {"robust accuracy": (0.5, 0.01)}, outcome=Outcome.unreliable("Masked."))]
    )
    row = compared(Printed(row="r", column="c", value=0.5, method="PGD", ask=ask, tolerance=0.1), [doubtful])
    assert row.trouble == "Masked."
    assert beside_papers([row], "Table 1").rows[0][-1] == "agrees ⚠" and "⚠" in beside_papers([row], "Table 1").note


def test_one_networks_number_keeps_its_own_interval() -> None:
    """Of 92 answers that are all right Wilson's interval is [0.96, 1]; one that is as wide on both sides leaves 1."""
    low, high = wilson(92, 92)
    whole = Reading("accuracy", "All.", quantities=(Quantity("robust accuracy", 1.0, low=low, high=high, n=92),))
    ask = Ask("accuracy", "robust accuracy")
    printed = Printed(row="r", column="c", value=0.9, method="PGD", ask=ask, tolerance=0.05)
    row = compared(printed, [run("PGD", [whole])])
    assert row.ours is not None and (row.ours.low, row.ours.high) == (low, high) and high == 1.0


def test_numbers_of_the_same_images_differ_by_training_alone() -> None:
    ask = Ask("accuracy", "robust accuracy")
    printed = Printed(row="r", column="c", value=0.5, method="PGD", ask=ask, tolerance=0.05, same_images=True)
    seeds = [
        run("PGD", [reading("accuracy", {"robust accuracy": (v, 0.2)})], seed=k) for k, v in enumerate([0.50, 0.52])
    ]
    row = compared(printed, seeds)
    assert row.ours is not None and row.ours.high == pytest.approx(0.51 + 12.7062 * 0.01, abs=1e-4)
    alone = compared(printed, seeds[:1])
    assert alone.verdict == "undecided", "one network says nothing of another, and keeps the interval over examples"
    assert alone.ours is not None and (alone.ours.low, alone.ours.high) == pytest.approx((0.3, 0.7))


def test_a_gap_is_training_minus_test_accuracy() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table II (a), method 10: 56/70 − 48/80 is within 0.0524 and 0.3339."""
    readings = [
        Reading(
            "accuracy",
            "",
            quantities=(Quantity("robust accuracy", k / n, "", *wilson(k, n), n),),
            settings={"split": s},
        )
        for s, k, n in (("train", 56, 70), ("test", 48, 80))
    ]
    found = Gap("accuracy", "robust accuracy").of(run("PGD", readings))
    assert found is not None and found[0].value == pytest.approx(0.2) and found[0].n == 80
    assert (found[0].low, found[0].high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert Gap("accuracy", "robust accuracy").of(run("PGD", readings[:1])) is None


@pytest.mark.parametrize(
    ("recipe", "other"), [("001-figure4", "001-figure2"), ("003-table1-mnist-mlp", "003-table2-mnist-lenet")]
)
def test_a_recipe_asks_for_its_own_lenses_alone(recipe: str, other: str) -> None:
    lenses = tuple(schedule(chosen) for chosen in find_recipe(recipe).at("laptop")[0]["lenses"])
    found = Reproduction(find_recipe(recipe), "laptop", (), (), (), {}, lenses)
    known = []
    for name in (recipe, other):
        for chosen in find_recipe(name).at("laptop")[0]["lenses"]:
            each = schedule(chosen)
            settings = json.loads(json.dumps(describe(each.lens))) | {"attack used": "some"}
            asked = found.asked(reading(each.name, {}, settings=settings))
            known += [settings] if name == recipe else []
            assert asked is (settings in known), settings
            assert found.asked(reading("another", {}, settings=settings)) is False


def test_a_recipe_from_the_command_line_to_the_summary(tmp_path: Path) -> None:
    kept, out = tmp_path / "docs" / "reproduction", tmp_path / "runs"
    command = ["reproduce", "004-table1", "--scale", "smoke", "--out", str(out), "--keep", str(kept)]
    stale = kept / "figures" / "004-table1-smoke" / "accuracy-as-it-was-once-called.svg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    for _ in range(2):  # the second time everything is there already
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "was there already" in result.output
    for place in (result.output, (out / "004-table1-smoke.html").read_text()):
        assert "004-gap-grows" in place and "000-loss-gap-falls" not in place, (
            "the claims of its paper, as far as judged"
        )
    record = json.loads((kept / "004-table1-smoke.json").read_text())
    assert record["command"] == "robustlens reproduce 004-table1 --scale smoke" and len(record["rows"]) == 18
    assert record["rows"][0]["ours"]["n"] == 20 and (out / "004-table1-smoke.html").is_file()
    slim = read_runs(find_runs([kept]))
    assert len(slim) == 6 and all(run.readings for run in slim) and not list(kept.rglob("*.safetensors"))
    full = {run.hash: run for run in read_runs(find_runs([out]))}
    for each in slim:
        ours, theirs = (
            {(r.lens, r.quantities, tuple(r.examples.get("robust", ()))) for r in run.readings}
            for run in (each, full[each.hash])
        )
        assert ours == theirs and max(len(bits) for *_, bits in ours) == 20
    text = (tmp_path / "docs" / "reproduction.md").read_text()
    assert "| ε = 0.4 | test | 99.86 % |" in text and "`004-gap-grows`" in text and record["command"] in text
    assert "Trained at" not in text, "the commit that measured them has trained them too"
    verdicts = [row["verdict"] for row in record["rows"]]
    assert "| [004-table1](#004-table1-smoke-scale) | smoke | 6 |" in text and "## 004-table1 (smoke scale)" in text
    lines = [next(line for line in text.splitlines() if at in line) for at in ("| networks |", "| [004-table1]")]
    heads, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert {head: int(count) for head, count in zip(heads[4:], row[4:], strict=True)} == Counter(verdicts)
    figures = list((kept / "figures" / "004-table1-smoke").glob("*.svg"))
    assert figures and all(f"(reproduction/figures/004-table1-smoke/{figure.name})" in text for figure in figures)
    assert not stale.exists()
    ledger = CliRunner().invoke(app, ["claims", str(kept), "--page", str(tmp_path / "claims.html")])
    assert ledger.exit_code == 0 and "004-formula-9" in ledger.output
    page = (tmp_path / "claims.html").read_text()
    assert 'class="verdict not-run"' in page and "004-formula-9" in page
