"""Studies: a piece is computed once, an address says what was run, and bad settings are refused before anything."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import robustlens.studies.run
from robustlens.core.discovery import build
from robustlens.core.rng import derive
from robustlens.core.world import World
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.results.errors import InputError, RunInUse
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory
from robustlens.studies.config import make_study, read_study, single_run, write_study
from robustlens.studies.plan import make_plan
from robustlens.studies.run import rehearse, run_study
from robustlens.studies.watch import SilentStudy

FGSM = {"name": "fgsm", "threat": "linf:0.1"}


@dataclass(frozen=True, kw_only=True)
class Fails:
    """A lens that cannot do its work."""

    name: ClassVar[str] = "fails"

    def look(self, subject: Any, *, gen: Any) -> Reading:
        raise InputError("the network", expected="a head", got="none", fix="Give it one.")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """A lens that tells what it drew at random, and the weights that it saw."""

    name: ClassVar[str] = "draws"

    def look(self, subject: Any, *, gen: Any) -> Reading:
        weight = float(subject.model.fc2.weight.detach().double().sum())
        return Reading("draws", f"{torch.rand(1, generator=gen).item()} {weight} {subject.model.training}")


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "My study",
        "data": {"source": "digits", "train": 60, "valid": 20, "test": 30},
        "model": {"name": "mlp", "hidden": 8},
        "threat": "linf:0.1",
        "methods": [
            {"label": "plain"},
            {"label": "fast ℓ∞", "objective": {"name": "adversarial", "attack": FGSM}},
        ],
        "training": {"epochs": 2, "batch_size": 20},
        "validation": {"name": "fgsm"},
        "seeds": [0, 1],
        "lenses": [{"name": "logit-margins", "bins": 5}],
    }
    return {**base, **changes}


class Log(SilentStudy):
    """Remembers what was done, and what had been done already."""

    def __init__(self, stop: str = "") -> None:
        self.new: list[str] = []
        self.old: list[str] = []
        self.stop = stop

    def begin(self, piece: int, pieces: int, label: str, what: str) -> None:
        if f"{piece}/{pieces}" == self.stop:
            raise KeyboardInterrupt

    def done(self, label: str, what: str, *, already: bool) -> None:
        (self.old if already else self.new).append(f"{label}: {what}")


def times(out: Path) -> dict[str, int]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in ("lock", "study.log")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


def carry_out(out: Path, log: Log | None = None, **changes: Any) -> tuple[list[RunDirectory], Log]:
    log = log or Log()
    return run_study(make_study(settings(**changes)), out, device="cpu", watch=log), log


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunDirectory]]:
    out = tmp_path_factory.mktemp("study")
    runs, log = carry_out(out)
    assert log.old == [] and len(log.new) == 8
    return out, runs


def test_a_study_leaves_what_it_says(done: tuple[Path, list[RunDirectory]]) -> None:
    out, runs = done
    assert len({run.path for run in runs}) == 4
    assert {path.name for path in out.iterdir()} == {"my-study"}
    splits = load(make_study(settings()).data)
    for run, (label, seed) in zip(runs, [("plain", 0), ("plain", 1), ("fast ℓ∞", 0), ("fast ℓ∞", 1)], strict=True):
        record = run.read_json("run.json")
        assert (record["label"], record["seed"], record["finished"]) == (label, seed, True)
        assert run.path.name.endswith(f"-seed{seed}-{record['hash']}")
        assert record["provenance"]["data"]["test"] == splits.test.fingerprint()
        assert {path.name for path in run.path.iterdir()} == {
            *("run.json", "metrics.jsonl", "readings", "lock"),
            *("last.safetensors", "best.safetensors"),
        }
        assert [reading.lens for reading in run.readings()] == ["logit-margins"]
        assert [record["epoch"] for record in run.metrics()] == [1, 2]


def test_again_computes_nothing(done: tuple[Path, list[RunDirectory]]) -> None:
    out, runs = done
    before = times(out)
    again, log = carry_out(out)
    assert [run.path for run in again] == [run.path for run in runs]
    assert log.new == [] and len(log.old) == 8
    assert times(out) == before


def test_changes_that_train_nothing(done: tuple[Path, list[RunDirectory]]) -> None:
    out, runs = done
    before = times(out)
    lenses = [{"name": "logit-margins", "bins": 5}, f"{__name__}:Draws", f"{__name__}:Fails"]
    methods = [{"label": "renamed"}, settings()["methods"][1]]
    _, log = carry_out(out, lenses=lenses, methods=methods)
    assert log.new == [
        f"{label}: {lens}" for label in ("renamed", "fast ℓ∞") for _ in "01" for lens in ("draws", "fails")
    ]
    after = times(out)
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {str(run.path.relative_to(out) / "run.json") for run in runs[:2]}, "only their labels"
    assert [run.read_json("run.json")["label"] for run in runs] == ["renamed", "renamed", "fast ℓ∞", "fast ℓ∞"]
    for run in runs:
        readings = {reading.lens: reading for reading in run.readings()}
        assert readings["fails"].outcome.status == "failed"
        assert "expected a head, got none" in readings["fails"].outcome.why
        weight = load_file(run.path / "last.safetensors")["fc2.weight"].double().sum()
        assert readings["draws"].says.split()[1:] == [str(float(weight)), "False"]
    drawn = [run.readings()[0].says.split()[0] for run in runs]
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3], "what a lens draws follows from the seed"


def test_more_epochs_are_other_runs(done: tuple[Path, list[RunDirectory]]) -> None:
    out, runs = done
    before = times(out)
    others, log = carry_out(out, training={"epochs": 1, "batch_size": 20}, seeds=[0])
    assert log.old == [] and len(log.new) == 4
    assert not {run.path for run in others} & {run.path for run in runs}
    assert {file: time for file, time in times(out).items() if file in before} == before


def test_the_best_checkpoint_is_another_reading(done: tuple[Path, list[RunDirectory]]) -> None:
    out, _ = done
    _, log = carry_out(out, weights="best", lenses=[f"{__name__}:Draws"], seeds=[0])
    assert {line.split(": ")[1] for line in log.new} == {"draws"}


@pytest.mark.parametrize("stop", ["0/8", "1/8", "2/8", "5/8", "7/8"])
def test_an_interrupted_study_goes_on(stop: str, done: tuple[Path, list[RunDirectory]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path, Log(stop))
    pieces = int(stop[0])
    runs, log = carry_out(tmp_path)
    assert (len(log.old), len(log.new)) == (pieces, 8 - pieces)
    for mine, other in zip(runs, done[1], strict=True):
        for file in ("last.safetensors", "best.safetensors"):
            assert (mine.path / file).read_bytes() == (other.path / file).read_bytes()


def test_runs_in_use_and_places_that_cannot_be_used(done: tuple[Path, list[RunDirectory]], tmp_path: Path) -> None:
    out, runs = done
    with runs[2].lock(), pytest.raises(RunInUse, match="no other process"):
        carry_out(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be written to"):
        carry_out(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_other_images_in_the_same_place_are_noticed(
    part: str, done: tuple[Path, list[RunDirectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(make_study(settings()).data)
    getattr(splits, part).images[0, 0, 0, 0] += 0.01
    monkeypatch.setattr("robustlens.studies.run.load", lambda config: splits)
    before = times(done[0])
    with pytest.raises(InputError, match="the data that the run was trained on, got digits with other images"):
        carry_out(done[0])
    assert times(done[0]) == before


@pytest.mark.parametrize("content", ["[1, 2]", "null", '{"hash": "x"}', '{"provenance": {}}', "{"])
def test_a_run_json_of_somebody_else(content: str, tmp_path: Path) -> None:
    runs, _ = carry_out(tmp_path, seeds=[0])
    (runs[0].path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json") as caught:
        carry_out(tmp_path, seeds=[0])
    assert "\n" not in str(caught.value)


def hashes(**changes: Any) -> list[str]:
    return [run.hash for run in make_plan(make_study(settings(**changes))).runs]


PLAIN = {"label": "a"}
CHANGES: list[dict[str, Any]] = [
    {"data": {"source": "digits", "train": 61, "valid": 20, "test": 30}},
    {"data": {"source": "digits", "train": 60, "valid": 20, "test": 30, "classes": [1, 2]}},
    {"model": {"name": "mlp", "hidden": 9}},
    {"model": "lenet-small"},
    {"training": {"epochs": 3, "batch_size": 20}},
    {"training": {"epochs": 2, "batch_size": 20, "optimizer": {"lr": 0.04}}},
    {"training": {"epochs": 2, "batch_size": 20, "augment": ["flip"]}},
    {"validation": {"name": "fgsm", "threat": "linf:0.3"}},
    {"threat": "linf:0.2"},  # that of the validation
    {"seeds": [2, 3]},
    {"methods": [{"label": "a", "objective": {"name": "standard", "label_smoothing": 0.1}}]},
    {"methods": [{**PLAIN, "regularizers": ["orthogonality"]}]},
    {"methods": [{**PLAIN, "training": {"epochs": 4}}]},
    {"methods": [{**PLAIN, "objective": {"name": "adversarial", "attack": {"name": "pgd", "threat": "linf:0.1"}}}]},
]


def test_addresses_tell_runs_apart() -> None:
    seen = set(hashes())
    assert len(seen) == 4
    for change in CHANGES:
        new = set(hashes(**change))
        assert new and not new & seen, change
        seen |= new


def test_runs_that_are_one_and_the_same_are_refused() -> None:
    for change in ({"methods": [{"label": "a"}, {"label": "b", "objective": "standard"}]}, {"seeds": [1, 1]}):
        with pytest.raises(InputError, match="differ in more than their label"):
            hashes(**change)


def test_addresses_ignore_what_changes_no_weights() -> None:
    base = hashes()
    explicit = {"label_smoothing": 0.0, "name": "standard"}
    methods = [{"objective": explicit, "label": "other"}, settings()["methods"][1]]
    training = {"checkpoint_seconds": 1.0, "batch_size": 20, "optimizer": {"name": "sgd"}, "epochs": 2}
    assert hashes(methods=methods, training=training, lenses=[], name="x", weights="best") == base
    assert hashes(seeds=[1, 0]) == [base[k] for k in (1, 0, 3, 2)]


def test_addresses_are_those_of_another_process() -> None:
    code = (
        "import json, sys\nfrom robustlens.studies.config import make_study\n"
        "from robustlens.studies.plan import make_plan\n"
        "print(json.dumps([r.hash for r in make_plan(make_study(json.loads(sys.argv[1]))).runs]))"
    )
    backwards = dict(reversed(settings().items()))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(backwards)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == hashes()


def test_training_of_one_method() -> None:
    methods = [
        {"label": "a", "training": {"epochs": 5, "optimizer": {"lr": 0.5}}},
        {"label": "b", "training": {"optimizer": {"name": "adam"}, "schedule": {"name": "cosine"}}},
        {"label": "c"},
    ]
    training = {"epochs": 2, "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.1}, "grad_clip": 1.0}
    a, b, c = (r.training for r in make_plan(make_study(settings(methods=methods, training=training, seeds=[0]))).runs)
    assert a.optimizer.model_dump() == {**c.optimizer.model_dump(), "lr": 0.5} and a.epochs == 5 and a.grad_clip == 1
    assert a.optimizer.model_dump()["momentum"] == 0.1
    assert b.optimizer.model_dump() == {"name": "adam", "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0}
    assert (b.schedule.name, b.epochs, c.schedule.name) == ("cosine", 2, "constant")


def test_validation_attacks() -> None:
    def attack(validation: Any) -> Any:
        return make_plan(make_study(settings(validation=validation))).runs[0].validation

    usual = attack(None)
    assert (usual.name, usual.steps, str(usual.threat), usual.early_stop) == ("pgd", 10, "linf:0.1", True)
    assert (attack({"steps": 3}).steps, attack({"early_stop": False}).early_stop) == (3, False)
    assert str(attack({"name": "fgsm"}).threat) == "linf:0.1"
    assert str(attack({"name": "uniform-noise", "threat": "l2:2"}).threat) == "l2:2.0"


def test_toml_round_trip_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    methods = [{"label": "ℓ2 „quoted“\n", "training": {"optimizer": {"lr": 0.5}}}, {"label": "b", "update": "descend"}]
    study = make_study(settings(methods=methods, data={"source": "digits", "classes": [3, "5"], "train": 9}))
    file.write_text(write_study(study))
    assert read_study(file) == study
    overrides = [
        "training.epochs=7",
        "training.optimizer.lr = 0.25",
        "seeds=[4,5]",
        "seeds.1=6",
        "methods.1.label=B is = new",
        "methods.1.training.grad_clip=2",
        "data.source=mnist5k",
        'model="lenet-small"',
        "lenses=[]",
    ]
    new = read_study(file, overrides)
    assert (new.training.epochs, new.training.optimizer.lr, new.seeds) == (7, 0.25, (4, 6))
    assert (new.methods[1].label, new.methods[1].training) == ("B is = new", {"grad_clip": 2})
    assert (new.data.source, new.data.train, new.model, new.lenses) == ("mnist5k", 9, "lenet-small", ())
    assert new.methods[0] == study.methods[0]


def test_single_runs() -> None:
    def objective(method: str) -> Any:
        return (
            single_run(data="digits", model="mlp", method=method, threat="l2:1", epochs=1, seed=0).methods[0].objective
        )

    assert objective("standard") == "standard"
    assert objective("noise") == {"name": "noise", "threat": "l2:1"}
    assert objective("fgsm") == {"name": "adversarial", "attack": {"name": "fgsm", "threat": "l2:1"}}
    with pytest.raises(InputError, match=r"method: expected one of .*standard.* Did you mean 'standard'"):
        objective("standart")


def test_weights_start_from_the_seed_whatever_the_method(tmp_path: Path) -> None:
    """Methods with one seed start at the same weights: differences are theirs."""
    training = {"epochs": 1, "batch_size": 20, "optimizer": {"lr": 1e-30}}
    runs, _ = carry_out(tmp_path, training=training, lenses=[])
    weights = [load_file(run.path / "last.safetensors")["fc1.weight"] for run in runs]
    assert weights[0].equal(weights[2]) and weights[1].equal(weights[3]) and not weights[0].equal(weights[1])
    with torch.random.fork_rng():
        torch.manual_seed(derive(0, "weights"))
        assert weights[0].equal(torch.nn.Linear(64, 8).weight.detach())


def test_a_dictionary_is_a_study_and_a_name_is_data(tmp_path: Path) -> None:
    (run,) = run_study(settings(seeds=[0], methods=[{"label": "plain"}]), tmp_path, device="cpu")
    assert run.read_json("run.json")["label"] == "plain"
    assert load("digits").train.fingerprint() == load(DataConfig(source="digits")).train.fingerprint()


def test_lenses_see_the_middle_of_training_images_that_training_crops(tmp_path: Path) -> None:
    """A network for 20×20 images, which training cuts out of 28×28 at random."""
    data = {"source": "mnist5k", "train": 60, "valid": 20, "test": 60, "size": 20, "train_size": 28}
    training = {"epochs": 1, "batch_size": 20, "augment": [{"name": "random-resized-crop", "size": 20}]}
    gap = {"name": "generalisation-gap", "n_examples": 100}
    changes = {"data": data, "training": training, "lenses": [gap], "seeds": [0], "methods": [{"label": "plain"}]}
    ((run,), _) = carry_out(tmp_path, **changes, model="lenet-small")
    (reading,) = run.readings()
    splits = load(DataConfig(**data))
    middle = splits.as_tested().train.images
    assert torch.equal(middle, splits.train.images[:, :, 4:24, 4:24]) and splits.test.images.shape[1:] == (1, 20, 20)
    model = build("model", "lenet-small").build((1, 20, 20), 10)
    model.load_state_dict(load_file(run.path / "last.safetensors"))
    wrong = (model.eval()(middle / 255).argmax(1) != splits.train.labels).double().mean()
    assert reading.outcome.status == "ok" and reading["error, train"].value == pytest.approx(float(wrong))


def test_a_batch_norm_that_cannot_be_synchronised_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class Flat:
        def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

    monkeypatch.setattr(robustlens.studies.run, "joined", lambda: World(0, 2))
    study = make_study(settings(training={"epochs": 1, "batch_size": 20, "batch_norm": "synchronised"}))
    plan = make_plan(study)
    with pytest.raises(InputError, match=r"with the layer '2': expected torch\.nn\.BatchNorm2d itself"):
        rehearse(dataclasses.replace(plan.runs[0], model=Flat()), load(study.data), plan.lenses)


def test_a_field_that_is_called_as_a_type_is_a_wrong_field() -> None:
    with pytest.raises(InputError, match=r"field of methods\.0: expected one of .*, got 'str'"):
        make_study({**settings(), "methods": [{"label": "a", "str": 1}]})
