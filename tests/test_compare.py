"""Two runs compared example by example, and what an audit must show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen
from small_runs import fresh
from torch import nn

from robustlens.core.types import Subject
from robustlens.data.arrays import from_arrays
from robustlens.lenses.accuracy import Accuracy
from robustlens.results.errors import InputError
from robustlens.results.paired import Paired
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.store import RunDirectory, read_reading
from robustlens.studies.audit import audit
from robustlens.studies.compare import compare
from robustlens.studies.require import Requirement, RequirementFailed, check_requirements
from robustlens.studies.robustbench import FIELDS, fraction, robustbench_record
from robustlens.threats.lp import Lp

EPS = 0.005
X = torch.rand(60, 1, 8, 8, generator=gen(2)) * 0.4 + 0.3  # the box is farther than any change reaches
Y = torch.arange(60) % 2


def linear(seed: int) -> nn.Module:
    """Two classes, told apart by a hyperplane through the mean image."""
    model = fresh(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), seed)
    with torch.no_grad():
        model[1].bias.sub_(model(X).mean(0))
    return model


def truth(model: nn.Module, eps: float = EPS) -> tuple[np.ndarray, np.ndarray]:
    """Right before, and right for every change of ℓ∞ size eps: margin > eps · ‖w_y − w_other‖₁."""
    with torch.no_grad():
        z = model(X)
        margin = (z[:, 1] - z[:, 0]) * (2 * Y - 1)
        width = (model[1].weight[1] - model[1].weight[0]).abs().sum()
    return (margin > 0).numpy(), (margin > eps * width).numpy()


def looked(model: nn.Module, out: Path, *, label: str = "model", threat: str = f"linf:{EPS}", **options: Any) -> Path:
    attack = {"name": "pgd", "threat": threat, "steps": 5, "loss": "margin"}
    lens = {"name": "accuracy", "pictures": 0, "batch_size": 25, "attack": attack, **options}
    run = audit(model, (X, Y), threat=threat, label=label, lenses=[lens], out=out, device="cpu")
    return run.path


def test_every_example_is_kept_with_its_position_and_survives_the_disk(tmp_path: Path) -> None:
    """In the fixed random order of a sample, and against the closed form of a linear network."""
    model = linear(1)
    subject = Subject(model, from_arrays(test=(X, Y)), Lp("linf", EPS))
    reading = Accuracy(n_examples=40, batch_size=16).look(subject, gen=gen())
    clean, robust = truth(model)
    index = reading.examples["index"]
    assert len(set(index.tolist())) == 40 and index.tolist() != sorted(index.tolist())
    assert reading.examples["clean"].tolist() == clean[index].tolist()
    assert reading.examples["robust"].tolist() == robust[index].tolist()
    assert 0 < robust.sum() < clean.sum() < 60
    RunDirectory(tmp_path).write_reading(tmp_path / "reading", reading)
    back = read_reading(tmp_path / "reading")
    assert back.examples.keys() == reading.examples.keys()
    assert all(
        np.array_equal(back.examples[k], v) and back.examples[k].dtype == v.dtype for k, v in reading.examples.items()
    )
    without = dataclasses.replace(reading, examples={})
    RunDirectory(tmp_path).write_reading(tmp_path / "without", without)
    assert read_reading(tmp_path / "without").examples == {}


def test_two_runs_against_the_closed_form(tmp_path: Path) -> None:
    models = [linear(1), linear(2)]
    places = [looked(model, tmp_path, label=label) for model, label in zip(models, "ab", strict=True)]
    found = {each.quantity: each for each in compare(*places)}
    for position, name in enumerate(("clean accuracy", "robust accuracy")):
        bits = [truth(model)[position] for model in models]
        assert found[name].paired == Paired.of(*bits)
        assert found[name].labels == ("a", "b") and found[name].threat == f"linf:{EPS}" and found[name].doubt == ""
    assert found["robust accuracy"].paired.difference != 0
    back = {each.quantity: each for each in compare(places[1], places[0])}
    assert back["robust accuracy"].paired.difference == -found["robust accuracy"].paired.difference
    itself = compare(places[0], places[0])
    assert [each.paired.difference for each in itself] == [0, 0] and itself[0].labels == ("a (A)", "a (B)")


def test_what_cannot_be_believed_is_said(tmp_path: Path) -> None:
    class Saturated(nn.Module):
        """Gradients vanish: every image is 1000 logits from the boundary."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = linear(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(1e4 * self.inner(x))

    first = looked(linear(1), tmp_path, label="fine")
    second = looked(Saturated(), tmp_path, label="masked")
    found = compare(first, second)
    assert all(each.doubt.startswith("masked: ") for each in found)


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    base = looked(linear(1), tmp_path / "a")
    others = {
        f"threat of accuracy: expected the same in both, got linf:{EPS} and linf:0.1": {"threat": "linf:0.1"},
        "n_examples of accuracy: expected the same in both, got 1000 and 30": {"n_examples": 30},
        "radii of accuracy": {"radii": [0.05]},
    }
    for number, (words, options) in enumerate(others.items()):
        with pytest.raises(InputError, match=words) as caught:
            compare(base, looked(linear(2), tmp_path / f"b{number}", **options))
        assert "\n" not in str(caught.value)
    other = audit(
        linear(2), (X.flip(0), Y), threat=f"linf:{EPS}", lenses=["accuracy"], out=tmp_path / "c", device="cpu"
    )
    with pytest.raises(InputError, match=r"two runs on the same test images, got arrays .60 test images. and arrays"):
        compare(base, other.path)
    none = audit(linear(2), (X, Y), threat=f"linf:{EPS}", lenses=["logit-margins"], out=tmp_path / "d", device="cpu")
    with pytest.raises(InputError, match="got accuracy and none"):
        compare(base, none.path)
    looked(linear(3), tmp_path / "a")
    with pytest.raises(InputError, match="expected one run, got 2"):
        compare(tmp_path / "a", base)
    with pytest.raises(InputError, match="no such directory"):
        compare(base, tmp_path / "nowhere")


# What must be shown


def reading(robust: float, *, lens: str = "accuracy", status: str = "ok", why: str = "", n: int = 1000) -> Reading:
    quantities = (
        Quantity("clean accuracy", 0.9, "fraction", 0.88, 0.92, n),
        Quantity("robust accuracy", robust, "fraction", robust - 0.03, robust + 0.03, n, nature="upper bound"),
    )
    return Reading(lens, "1.", Outcome(status, why), quantities, settings={"attack used": {"name": "pgd"}})


@pytest.mark.parametrize(
    ("text", "name", "least"),
    [
        ("robust>=0.45", "robust", 0.45),
        (" clean >= 90 % ", "clean", 0.9),
        ("robust>=1", "robust", 1),
        ("robust>=45.5%", "robust", 0.455),
    ],
)
def test_requirements_are_read(text: str, name: str, least: float) -> None:
    found = Requirement.parse(text)
    assert found.name == name and found.least == pytest.approx(least)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("robust", "a name, >= and a share"),
        ("robust>0.4", "a name, >= and a share"),
        ("robust<=0.4", "a name, >= and a share"),
        ("robust>=", "a name, >= and a share"),
        ("robust>=-1", "a name, >= and a share"),
        ("robust>=nan", "a name, >= and a share"),
        ("robust>=1.2.3", "a share from 0 to 1"),
        ("robust>=45", 'Write for example "robust>=0.45" or "robust>=45%"'),
        ("robust>=101%", "a share from 0 to 1"),
        ("robus>=0.4", "Did you mean 'robust'?"),
        ("", "a name, >= and a share"),
    ],
)
def test_requirements_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(InputError, match="--require") as caught:
        Requirement.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_requirements_are_met_or_say_what_was_expected_and_what_came() -> None:
    robust, clean = Requirement("robust", 0.45), Requirement("clean", 0.9)
    check_requirements([robust, clean], [reading(0.45)])
    check_requirements([], [])
    with pytest.raises(RequirementFailed) as caught:
        check_requirements([robust, Requirement("clean", 0.95)], [reading(0.412)])
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "requirement: expected robust accuracy of at least 45.0 %, got 41.2 % [38.2, 44.2], n = 1,000 by accuracy; "
        "expected clean accuracy of at least 95.0 %, got 90.0 % [88.0, 92.0], n = 1,000 by accuracy."
    )
    # The strongest attack decides, and the doubt about a weaker one does not matter.
    masked = reading(0.9, status="unreliable", why="Gradients vanish.")
    check_requirements([robust], [masked, reading(0.46, lens="standard-accuracy")])
    for readings, words in (
        (
            [reading(0.9), reading(0.4, lens="standard-accuracy")],
            "got 40.0 % [37.0, 43.0], n = 1,000 by standard-accuracy",
        ),
        ([masked], "got 90.0 % [87.0, 93.0], n = 1,000 by accuracy, which is unreliable: Gradients vanish."),
        ([reading(0.9), Reading("preprocessing", "1.", Outcome.unreliable("Twice."))], "which is unreliable: Twice."),
        ([reading(0.8), reading(0.9, lens="health", status="unreliable", why="Missed.")], "80.0 %"),
        ([], "got no measurement"),
        ([Reading("accuracy", "1.", Outcome.failed("No memory."))], "no measurement: accuracy failed (No memory.)"),
    ):
        with pytest.raises(RequirementFailed) as caught:
            check_requirements([robust], readings)
        assert words in str(caught.value) and not str(caught.value).endswith("..")


# RobustBench's record


def test_record_has_robustbenchs_fields_and_null_for_what_is_not_known(tmp_path: Path) -> None:
    path = looked(linear(1), tmp_path, threat="linf:8/255")
    record = json.loads((path / "robustbench.json").read_text())
    assert tuple(record) == FIELDS
    (found,) = RunDirectory(path).readings()
    assert record["clean_acc"] == f"{round(100 * found['clean accuracy'].value, 2):g}"
    assert (record["dataset"], record["architecture"], record["eps"]) == ("arrays", "Sequential", "8/255")
    assert record["autoattack_acc"] is None, "PGD is not AutoAttack"
    assert "pgd" in record["footnote"] and "of 60 images" in record["footnote"]
    unknown = ("link", "name", "authors", "additional_data", "number_forward_passes", "venue", "reported")
    assert all(record[field] is None for field in unknown)


def test_autoattack_alone_fills_its_field() -> None:
    kind = {"dataset": "cifar10", "architecture": "Net", "threat": Lp("l2", 0.5)}
    full = dataclasses.replace(reading(0.59534, lens="standard-accuracy"), settings={"effort": 1.0})
    record = robustbench_record([reading(0.62), full], **kind)
    assert (record["autoattack_acc"], record["clean_acc"], record["eps"]) == ("59.53", "90", "0.5")
    assert "pgd: 62.0 %" in record["footnote"] and "AutoAttack-standard: 59.5 %" in record["footnote"]
    half = dataclasses.replace(full, settings={"effort": 0.5})
    assert robustbench_record([half], **kind)["autoattack_acc"] is None
    masked = robustbench_record([reading(0.9, status="unreliable", why="Why.")], **kind)
    assert "unreliable: Why." in masked["footnote"]
    assert robustbench_record([], **kind)["footnote"] is None


def test_radii_are_written_as_papers_do() -> None:
    radii = {
        "linf:8/255": "8/255",
        "linf:4/255": "4/255",
        "l2:0.5": "0.5",
        "linf:0.3": "0.3",
        "linf:0.2": "0.2",
        "l1:12": "12",
    }
    assert {text: fraction(Lp.parse(text).eps) for text in radii} == radii
