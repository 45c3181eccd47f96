"""What uses of one lens are called: a table of settings and labels, and names that stay whatever the order."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fuzz.elements import Elements
from test_report import make_run

from robustlens.report.figures import file_names, write_figures
from robustlens.report.labels import labels
from robustlens.report.page import write_page
from robustlens.results.panels import Curve
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory

Settings = dict[str, Any]


def pgd(threat: str = "linf:0.1", **changes: Any) -> Settings:
    plain = {"steps": 10, "step_size": None, "loss": "ce", "early_stop": False, "grad_floor": 1e-12}
    return {"name": "pgd", "threat": threat, **plain, **changes}


def use(attack: Settings | None = None, *, used: Settings | None = None, **changes: Any) -> Settings:
    """Settings as the accuracy lens writes them."""
    used = used or attack or pgd()
    plain = {"name": "accuracy", "radii": None, "attack": attack, "split": "test", "n_examples": 1000, "pictures": 4}
    return {**plain, "seed": 0, "threat": used["threat"], "attack used": used} | changes


STANDARD = {"name": "autoattack-standard", "threat": "linf:0.1", "effort": 1.0}
QUARTERS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]

CASES: dict[str, tuple[list[Settings], list[str]]] = {
    "one use": ([use(pgd())], [""]),
    "another attack": ([use(pgd()), use(STANDARD)], [" (pgd)", " (autoattack-standard)"]),
    "another attack, and another of the same": (
        [use(pgd()), use(pgd(loss="margin")), use(STANDARD)],
        [" (pgd, ce loss)", " (pgd, margin loss)", " (autoattack-standard)"],
    ),
    "the threat": ([use(pgd("l2:1.0")), use(pgd("l2:2.0"))], [", l2:1", ", l2:2"]),
    "a threat in levels": (
        [use(pgd("linf:0.03137254901960784")), use(pgd("linf:0.01568627450980392"))],
        [", linf:8/255", ", linf:4/255"],
    ),
    "a step size that goes with the threat": (
        [use(pgd("l2:1.0", step_size=0.25)), use(pgd("l2:2.0", step_size=0.5))],
        [", l2:1", ", l2:2"],
    ),
    "a step size alone": (
        [use(pgd(step_size=0.25)), use(pgd(step_size=0.5))],
        [" (step size 0.25)", " (step size 0.5)"],
    ),
    "an attack's field": ([use(pgd(steps=10)), use(pgd(steps=100))], [" (steps 10)", " (steps 100)"]),
    "pairs that differ in different fields": (
        [use(pgd()), use(pgd(steps=100)), use(pgd(), split="train", n_examples=None)],
        [
            " (steps 10, test split, 1000 examples)",
            " (steps 100, test split, 1000 examples)",
            " (steps 10, train split, all examples)",
        ],
    ),
    "threat and field": (
        [use(pgd("l2:1.0")), use(pgd("l2:2.0", early_stop=True))],
        [", l2:1 (early stop no)", ", l2:2 (early stop yes)"],
    ),
    "lists": (
        [use(radii=None), use(radii=QUARTERS), use(radii=[0.0]), use(radii=[0.5, 1.0]), use(radii=[])],
        [" (default radii)", " (radii 0 to 2 (9))", " (radii 0)", " (radii 0.5 and 1)", " (no radii)"],
    ),
    "the default and the same given": ([use(), use(pgd())], [" (default attack)", " (pgd attack)"]),
    "a field that older readings lack": ([{"steps": 10}, {}], [" (steps 10)", " (default steps)"]),
    "no attack beside one": (
        [{"robust": False, "attack": None}, {**use(pgd()), "robust": True}],
        [" (robust no)", " (robust yes)"],
    ),
    "one name at two depths": (
        [{"restarts": 3, "attack": pgd(restarts=1)}, {"restarts": 5, "attack": pgd(restarts=2)}],
        [" (restarts 3, attack restarts 1)", " (restarts 5, attack restarts 2)"],
    ),
    "a threat inside the attack alone": ([{"attack": pgd("l2:1.0")}, {"attack": pgd("l2:2.0")}], [", l2:1", ", l2:2"]),
    "when": (
        [{"when": "epochs:1,2", "n_examples": 10}, {"when": "epochs:1,5", "n_examples": 10}],
        [" (epochs:1,2)", " (epochs:1,5)"],
    ),
    "what only costs time": (
        [use(batch_size=10), use(batch_size=20), use(radii=[1.0])],
        [" (default radii, batch size 10)", " (default radii, batch size 20)", " (radii 1)"],
    ),
    "what only costs time, beside a field that one lacks": (
        [use(STANDARD, batch_size=10), use(STANDARD, batch_size=20), use(pgd()), use(pgd(steps=100))],
        [
            " (autoattack-standard, batch size 10)",
            " (autoattack-standard, batch size 20)",
            " (pgd, steps 10)",
            " (pgd, steps 100)",
        ],
    ),
    "a line-up": (
        [{"line-up": [STANDARD, pgd()]}, {"line-up": [STANDARD]}],
        [" (line-up autoattack-standard and pgd)", " (line-up autoattack-standard)"],
    ),
}


@pytest.mark.parametrize(("uses", "expected"), CASES.values(), ids=CASES)
def test_what_uses_of_a_lens_are_called(uses: list[Settings], expected: list[str]) -> None:
    for order in itertools.permutations(range(len(uses))):
        found = labels("my_lens", [uses[i] for i in order])
        assert found == ["my lens" + expected[i] for i in order]


def test_what_reads_alike_has_an_address() -> None:
    ends = [[0.0, 0.5, 1.0], [0.0, 0.25, 1.0]]
    uses = [{"radii": radii, "a": 1.00001 + seed, "seed": seed} for seed in (0, 1) for radii in ends]
    found = labels("x", uses)
    assert len(set(found)) == 4
    assert all(re.fullmatch(r"x \(radii 0 to 1 \(3\), a [12]\) · [0-9a-f]{6}", each) for each in found)
    assert labels("x", uses[::-1]) == found[::-1]
    assert labels("x", [each | {"seed": 9} for each in uses]) == found


@pytest.mark.parametrize("odd", [{"threat": 3}, {"attack used": "x"}, {"name": None}, {"a": [{}, [1, "x"]]}, {"": {}}])
def test_settings_that_somebody_made_up_have_labels(odd: Settings) -> None:
    assert len({*labels("x", [odd, {}, {"threat": "a:b:c", "attack used": [], "name": {"name": []}}])}) == 3


def test_file_names_are_short_and_stay_whatever_the_order() -> None:
    long = "accuracy (" + "very long, " * 20
    parts = [
        ("accuracy, l2:1", "Margins"),
        (f"{long}a)", "Loss"),
        (f"{long}b)", "Loss"),
        ("…",),
        ("accuracy, l2=1", "Margins"),
    ]
    names = file_names(parts)
    assert names[0] == "accuracy-l2-1-margins" and names[3] == "figure" and names[4] == "accuracy-l2-1-margins-2"
    assert names[1].endswith("-loss") and names[2] == f"{names[1]}-2" and len(names[1]) <= 60 + len("-loss")
    assert file_names(parts[::-1]) == names[::-1]
    assert file_names([("a", "b")] * 3) == ["a-b", "a-b-2", "a-b-3"]


def test_titles_columns_and_files_have_one_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "PGD", 0)
    (panel,) = (panel for panel in run.readings()[0].panels if isinstance(panel, Curve) and not panel.log_y)
    for threat in ("l2:1.0", "l2:2.0"):
        found = Reading("accuracy", "It says so.", panels=(panel,), settings=use(pgd(threat)))
        run.write_reading(run.reading_path("accuracy", found.settings), found)

    def files(runs: list[RunDirectory], place: str) -> set[str]:
        return {path.name for path in write_figures(runs, tmp_path / place, format="svg")}

    expected = {f"accuracy-l2-{radius}-accuracy-by-radius.svg" for radius in (1, 2)}
    other = make_run(tmp_path / "other", "ERM", 0)
    assert files([run, other], "a") == files([other, run], "b") >= expected
    page = Elements(write_page([run], tmp_path / "page.html", title="x").read_text())
    assert {"accuracy, l2:1", "accuracy, l2:2"} <= {word.strip() for word in page.words}
    drawn = {spec["usermeta"]["file"] for spec in json.loads(page.scripts[0])}
    assert {f"{name}.svg" for name in drawn} >= expected
