"""Robust overfitting: what errors after several epochs say together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_epochs import study

from robustlens.lenses.gap import GeneralisationGap
from robustlens.lenses.overfitting import RISE, overfitting
from robustlens.report.page import write_page
from robustlens.results.panels import Curve
from robustlens.results.reading import Quantity, Reading
from robustlens.studies.epochs import schedule, side_by_side
from robustlens.studies.run import run_study

SPLITS = ("train", "test")


def gap(errors: NDArray[np.bool_]) -> Reading:
    """The generalisation gap of a network with these ``errors`` (n,) under attack."""
    levels = {"robust error": "fraction", "robust loss": "nats"}
    share = float(errors.mean())
    quantities = [
        Quantity(f"{measure}, {split}", share, unit, share, share, len(errors))
        for measure, unit in levels.items()
        for split in SPLITS
    ]
    return Reading("generalisation-gap", "", quantities=tuple(quantities), examples={"robust error, test": errors})


def falls_and_rises() -> list[tuple[int, Reading]]:
    """40, 10 and 30 of 100 images wrong, spread evenly."""
    places = np.arange(100)
    return [(e, gap(places % 10 < wrong)) for e, wrong in ((1, 4), (10, 1), (20, 3))]


def test_an_error_that_rises_again_is_overfitting() -> None:
    found = overfitting(falls_and_rises())
    assert found is not None
    rise = found[RISE]
    assert rise.value == pytest.approx(0.2) and rise.n == 100 and rise.low is not None and 0.1 < rise.low < 0.2
    assert found.says == (
        f"Robust test error is lowest after epoch 10, and +20.0 points [+{100 * rise.low:.1f}, "
        f"+{100 * (rise.high or 0):.1f}] from there to epoch 20: robust overfitting."
    )
    error, loss = found.panels
    assert isinstance(error, Curve) and isinstance(loss, Curve)
    assert [line.name for line in error.series] == ["train", "test"] and error.y_label == "fraction"
    assert error.series[1].y.tolist() == pytest.approx([0.4, 0.1, 0.3])


def test_an_error_that_only_falls_is_none() -> None:
    found = overfitting(falls_and_rises()[:2])
    assert found is not None and found[RISE].value == found[RISE].high == 0
    assert found.says == "Robust test error is lowest after epoch 10, the last: no robust overfitting."


def test_the_best_of_many_alike_epochs_is_not_better() -> None:
    """Ten networks that are all wrong on 30 % of the images: the lowest error lies below the last by luck alone."""
    rng = np.random.default_rng(0)
    naive, rises, sure = [], [], 0
    for _ in range(300):
        errors = rng.random((10, 200)) < 0.3
        found = overfitting([(epoch, gap(each)) for epoch, each in enumerate(errors)])
        assert found is not None
        naive.append(errors[-1].mean() - errors.mean(1).min())
        rises.append(found[RISE].value)
        sure += "robust overfitting." in found.says and "no robust" not in found.says
    assert np.mean(naive) > 0.04
    assert abs(np.mean(rises)) < 0.006, "unbiased: the standard error of 300 tries is 0.003"
    assert sure <= 20, "2.5 % of 300 expected"


@pytest.mark.parametrize("found", [falls_and_rises()[:1], [(e, gap(np.ones(1, bool))) for e in (1, 2)]])
def test_one_epoch_or_image_says_nothing(found: list[tuple[int, Reading]]) -> None:
    assert overfitting(found) is None
    over = side_by_side(schedule({"name": "generalisation-gap", "when": "epochs:1,2"}), found)
    assert "lowest" not in over.says


def test_a_lens_without_attack_does_not_speak_of_it() -> None:
    clean = [(e, Reading("generalisation-gap", "", examples={"error, test": np.ones(9, bool)})) for e in (1, 2)]
    assert GeneralisationGap(robust=False).follow(clean) is None


def test_gap_margins_and_flatness_stand_beside_each_other(tmp_path: Path) -> None:
    lenses = [{"name": name, "when": "epochs:1,2"} for name in ("generalisation-gap", "logit-margins")]
    (run,) = run_study(study([*lenses, {"name": "weight-landscape", "when": "epochs:1,2", "n_examples": 20}]), tmp_path)
    page = write_page([run], tmp_path / "page.html", title="t").read_text()
    view = page[page.index('id="overfitting"') :]
    titles = ("Robust error", "Robust loss", "Mean normalised margin, test", "Average robust flatness")
    places = [view.index(f"<h3>{title}</h3>") for title in titles]
    assert places == sorted(places)
    (mixed,) = run_study(study([*lenses, {**lenses[0], "robust": False}]), tmp_path / "mixed")
    assert 'id="overfitting"' in write_page([mixed], tmp_path / "page.html", title="t").read_text()
    (alone,) = run_study(study(lenses[:1]), tmp_path / "alone")
    page = write_page([alone], tmp_path / "page.html", title="t").read_text()
    assert "Robust error" in page and 'id="overfitting"' not in page
