"""Lenses at chosen epochs: what they see, what they cost, and what is said when weights are not there."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustlens.report.page import write_page
from robustlens.results.errors import InputError
from robustlens.results.panels import Curve, Gallery
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.store import RunDirectory
from robustlens.studies.config import StudyConfig, make_study
from robustlens.studies.epochs import schedule, side_by_side
from robustlens.studies.plan import make_plan
from robustlens.studies.run import run_study

MARGINS = {"name": "logit-margins", "when": "epochs:1,2,4"}


def study(lenses: list[Any], **training: Any) -> StudyConfig:
    return make_study(
        {
            "data": {"source": "digits", "train": 200, "valid": 50, "test": 100},
            "model": {"name": "mlp", "hidden": 8},
            "threat": "l2:0.5",
            "methods": [{"label": "standard"}],
            "training": {"epochs": 4, "batch_size": 50, **training},
            "lenses": lenses,
        }
    )


def reading(run: RunDirectory, lens: str) -> Reading:
    (found,) = [each for each in run.readings() if each.lens == lens]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    (found,) = run_study(study([MARGINS, "logit-margins"]), tmp_path_factory.mktemp("runs"))
    return found


def test_each_epoch_is_what_a_run_of_that_length_ends_with(run: RunDirectory, tmp_path: Path) -> None:
    over = reading(run, "logit-margins over epochs")
    assert {file.name for file in run.path.glob("epoch-*.safetensors")} == {
        f"epoch-{epoch}.safetensors" for epoch in (1, 2, 4)
    }
    (short,) = run_study(study(["logit-margins"], epochs=2, schedule={"name": "constant"}), tmp_path / "a")
    (kept,) = run_study(study([MARGINS], schedule={"name": "constant"}), tmp_path / "b")
    two = reading(kept, "logit-margins over epochs")
    for quantity in reading(short, "logit-margins").quantities:
        assert two[f"{quantity.name}, epoch 2"].value == quantity.value
    end = reading(run, "logit-margins")
    for quantity in end.quantities:
        assert over[f"{quantity.name}, epoch 4"] == Quantity(**{**vars(quantity), "name": f"{quantity.name}, epoch 4"})
    assert set(over.headline) == set(), "the table of results shows the end alone"


def test_curves_run_over_the_epochs(run: RunDirectory) -> None:
    over = reading(run, "logit-margins over epochs")
    end = reading(run, "logit-margins")
    curves = [panel for panel in over.panels if isinstance(panel, Curve)]
    assert len(curves) == len(end.headline) > 0
    for name, curve in zip(end.headline, curves, strict=True):
        (line,) = curve.series
        assert line.x.tolist() == [1, 2, 4]
        assert line.y.tolist() == [over[f"{name}, epoch {epoch}"].value for epoch in (1, 2, 4)]
    assert "epochs 1, 2, 4" in over.says
    page = write_page([run], run.path / "page.html", title="Epochs").read_text()
    assert "logit margins over epochs" in page


def test_what_is_kept_of_examples_is_kept_of_every_epoch(tmp_path: Path) -> None:
    lens = {"name": "boundary-distance", "n_examples": 10, "steps": 3, "when": "epochs:1,2"}
    (run,) = run_study(study([lens, {"name": "accuracy", "n_examples": 20, "when": "epochs:2"}], epochs=2), tmp_path)
    for name, n in (("boundary-distance", 10), ("accuracy", 20)):
        over = reading(run, f"{name} over epochs")
        measure = "average margin, train" if n == 10 else "robust accuracy"
        for epoch in (1, 2) if n == 10 else (2,):
            quantity = over[f"{measure}, epoch {epoch}"]
            each = over.of_each(quantity.name)
            assert each is not None and len(each.places) == n and each.values.mean() == pytest.approx(quantity.value)


def test_scheduling_a_lens_trains_nothing_else(run: RunDirectory) -> None:
    """The weights, and the run's address, are those of a study without the lens."""
    plain, scheduled = (make_plan(study(lenses)).runs[0].hash for lenses in (["logit-margins"], [MARGINS]))
    assert plain == scheduled


def test_nothing_is_measured_twice(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustlens.lenses.margins import LogitMargins

    looked: list[Any] = []
    look = LogitMargins.look

    def counted(self: LogitMargins, *args: Any, **kwargs: Any) -> Reading:
        looked.append(self)
        return look(self, *args, **kwargs)

    monkeypatch.setattr(LogitMargins, "look", counted)
    out = run.path.parent.parent
    run_study(study([MARGINS, "logit-margins"]), out)
    assert looked == []
    run_study(study([{"name": "logit-margins", "when": "epochs:2,4"}]), out)
    assert looked == [], "another choice among the epochs reads what is there"


def test_a_lens_that_comes_too_late_says_so_and_others_go_on(tmp_path: Path) -> None:
    run_study(study(["logit-margins"]), tmp_path)
    (run,) = run_study(study([MARGINS, "generalisation-gap"]), tmp_path)
    late = reading(run, "logit-margins over epochs")
    assert late.outcome.status == "failed" and "epoch 1, 2, 4 were not kept" in late.outcome.why
    assert reading(run, "generalisation-gap").outcome.status == "ok"


def test_a_run_that_stopped_early_shows_what_it_reached(tmp_path: Path) -> None:
    lens = {"name": "logit-margins", "when": "epochs:1,30"}
    settings = study([lens], epochs=30, patience=1, optimizer={"name": "sgd", "lr": 1e-9})
    (run,) = run_study(settings, tmp_path)
    assert run.metrics()[-1]["epoch"] < 30
    assert "epochs 1:" in reading(run, "logit-margins over epochs").says


def test_pictures_stand_below_each_other_and_doubts_are_kept() -> None:
    def at(value: int, outcome: Outcome) -> Reading:
        picture = Gallery("Nearest", ("clean", "adversarial"), ("digit",), np.full((1, 2, 4, 4, 1), value, np.uint8))
        return Reading("seen", "It says 1.", outcome, (Quantity("distance", value, n=3),), ("distance",), (picture,))

    found = [(1, at(1, Outcome())), (5, at(2, Outcome.unreliable("gradients vanish")))]
    over = side_by_side(schedule({"name": "logit-margins", "when": "epochs:1,5"}), found)
    (gallery,) = [panel for panel in over.panels if isinstance(panel, Gallery)]
    assert gallery.captions == ("epoch 1: digit", "epoch 5: digit")
    assert gallery.images[:, 0, 0, 0, 0].tolist() == [1, 2]
    assert over.outcome == Outcome.unreliable("after epoch 5: gradients vanish")
    assert over.says == "Over epochs 1, 5: distance 1 → 2."
    nothing = [(epoch, Reading("seen", "Nothing.", Outcome.failed("no answer"))) for epoch in (1, 5)]
    failed = side_by_side(schedule({"name": "logit-margins", "when": "epochs:1,5"}), nothing).outcome
    assert failed == Outcome.failed("after epoch 1: no answer after epoch 5: no answer")


def test_what_many_epochs_say_is_short_and_in_the_units_of_the_page() -> None:
    marks = range(1, 15)
    gaps = [Reading("seen", "", Outcome(), (Quantity("gap", -0.01 * e, "fraction"),), ("gap",)) for e in marks]
    over = side_by_side(schedule({"name": "logit-margins", "when": "epochs:1,14"}), list(zip(marks, gaps, strict=True)))
    assert over.says == "Over 14 epochs from 1 to 14: gap −1.0 % → −14.0 %."


@pytest.mark.parametrize("when", ["epochs:", "epochs:0", "epochs:1;2", "1,2", "epochs:1,2x", 3, "never"])
def test_refuses_other_moments(when: Any) -> None:
    with pytest.raises(InputError, match="epochs from 1 on"):
        schedule({"name": "logit-margins", "when": when})


@pytest.mark.parametrize("n", [0, -5])
@pytest.mark.parametrize("lens", ["accuracy", "health", "hessian"])
def test_refuses_to_look_at_no_example(lens: str, n: int) -> None:
    with pytest.raises(InputError, match=f"{lens} n_examples: expected at least 1, got {n}"):
        schedule({"name": lens, "n_examples": n})


def test_code_that_changed_under_a_finished_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n        super().__init__("
    code += "nn.Flatten(), nn.Linear(64, 10))\n    def forward(self, x):\n        return super().forward({})\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    asked = study(["logit-margins"], epochs=1).model_copy(
        update={"model": {"name": "external", "source": "net_of_mine:Net"}}
    )
    for change, refused in (("x", False), ("x", False), ("1 - x", True)):
        (tmp_path / "net_of_mine.py").write_text(code.format(change))
        monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)
        importlib.invalidate_caches()
        if refused:
            with pytest.raises(InputError, match="its code has changed"):
                run_study(asked, tmp_path / "runs")
        else:
            run_study(asked, tmp_path / "runs")


def test_refuses_epochs_that_no_run_has() -> None:
    with pytest.raises(InputError, match="at most 4, got 9"):
        make_plan(study([{"name": "logit-margins", "when": "epochs:1,9"}]))


def test_the_network_of_the_end_is_not_disturbed(run: RunDirectory, tmp_path: Path) -> None:
    (plain,) = run_study(study(["logit-margins"]), tmp_path)
    a, b = reading(plain, "logit-margins"), reading(run, "logit-margins")
    assert a.quantities == b.quantities
    assert copy.deepcopy(a.says) == b.says and torch.is_grad_enabled()
