"""Every lens, attack, training, study and audit on an emulated accelerator: what the CPU gives, on one device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, gen
from safetensors.torch import load_file
from shared_runs import carry_out, cases, require_same
from small_runs import Counting, config, fresh, small_splits
from torch import Generator, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.core.discovery import discover
from robustlens.core.rng import forked
from robustlens.core.types import Attack, Batch, Lens, Subject
from robustlens.core.world import World
from robustlens.data.arrays import from_arrays
from robustlens.objectives.adversarial import Adversarial
from robustlens.results.store import RunDirectory
from robustlens.studies.audit import audit
from robustlens.studies.config import make_study
from robustlens.studies.run import run_study
from robustlens.threats.lp import Lp
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe

#: One worker compiles the device, where tests are shared out (pytest-xdist, --dist loadgroup).
pytestmark = [pytest.mark.accelerator, pytest.mark.xdist_group("accelerator")]
LENSES = [lens for cls in discover("lens").values() for lens in cls.examples()]
ATTACKS = [attack for cls in discover("attack").values() for attack in cls.examples()]
CASES = {case: (recipe, settings) for case, recipe, settings in cases()}


def looked_at(device: torch.device | str) -> Subject:
    x, y = torch.rand(40, 1, 8, 8, generator=gen(1)), torch.arange(40) % 4
    with forked():
        torch.manual_seed(0)
        model = SmallNet().eval()
    splits = from_arrays(train=(x[:28], y[:28]), test=(x[28:], y[28:]))
    return Subject(model.to(device), splits.to(torch.device(device)), Lp("l2", 0.5), device=torch.device(device))


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.name)
def test_every_lens(lens: Lens, device: torch.device) -> None:
    there = lens.look(looked_at("cpu"), gen=gen(3))
    here = lens.look(looked_at(device), gen=Generator(device).manual_seed(3))
    assert [q.name for q in here.quantities] == [q.name for q in there.quantities]
    for ours, theirs in zip(here.quantities, there.quantities, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-3, abs=1e-5, nan_ok=True), ours.name
    assert here.outcome == there.outcome


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name}-{attack.threat}")
def test_every_attack(attack: Attack, net: nn.Module, linear: nn.Module, device: torch.device) -> None:
    model = linear if isinstance(attack, LinearExact) else net
    x, y = torch.rand(12, 1, 8, 8, generator=gen(1)), torch.arange(12) % 4
    there = evaluate(attack, model, Batch(x, y, torch.arange(12)), gen=gen(2))
    model, batch = copy.deepcopy(model).to(device), Batch(x.to(device), y.to(device), torch.arange(12, device=device))
    here = evaluate(attack, model, batch, gen=Generator(device).manual_seed(2))
    assert here.x_adv.device.type == device.type
    assert torch.equal(here.robust.cpu(), there.robust)
    torch.testing.assert_close(here.x_adv.cpu(), there.x_adv, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_training(case: str, device: torch.device, tmp_path: Path) -> None:
    """In float64: objectives, regularizers, updates, constraints, augmentation, averaging, checkpoints."""
    for place, where in (("there", "cpu"), ("here", device)):
        carry_out(case, *CASES[case], tmp_path / place, World(), batch=8, device=where)
    require_same(tmp_path / "there" / case, tmp_path / "here" / case, tolerance=1e-9)


def test_training_goes_on_where_it_stopped(device: torch.device, tmp_path: Path) -> None:
    """With the moments of the optimizer, averaged weights, and what the steps after it draw."""
    splits, attack = small_splits().to(device), FGSM(threat=Lp("linf", 0.02))
    recipe = Recipe(objective=Adversarial(attack=PGD(threat=Lp("l2", 0.5), steps=2)))
    settings = config(optimizer={"name": "adam", "lr": 3e-3}, averaging=0.8, augment=["flip"], checkpoint_seconds=0)

    def carry_on(place: Path, watch: Counting | None = None) -> None:
        model = fresh().to(device)
        train(model, splits, recipe, settings, seed=3, run=RunDirectory(place), validation=attack, watch=watch)

    def stop(what: str, number: int) -> None:
        if (what, number) == ("step", 7):
            raise KeyboardInterrupt

    carry_on(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        carry_on(tmp_path / "stopped", Counting(stop))
    carry_on(tmp_path / "stopped", after := Counting())
    assert after.steps[0] == 8
    whole, stopped = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_a_study_and_an_audit_of_what_it_trained(device: torch.device, tmp_path: Path) -> None:
    pgd = {"name": "adversarial", "attack": {"name": "pgd", "threat": "linf:0.1", "steps": 2}}
    study = {
        "name": "both",
        "data": {"source": "digits", "train": 60, "valid": 20, "test": 20},
        "model": "lenet-small",
        "threat": "linf:0.1",
        "methods": [{"label": "plain"}, {"label": "PGD", "objective": pgd}],
        "training": {"epochs": 2, "batch_size": 20},
        "lenses": ["accuracy", "layer-spectra"],
    }
    places = {name: run_study(make_study(study), tmp_path / name, device=name) for name in ("cpu", device.type)}
    for there, here in zip(*places.values(), strict=True):
        assert here.read_json("run.json")["provenance"]["device"] == device.type
        for theirs, ours in zip(there.readings(), here.readings(), strict=True):
            for a, b in zip(theirs.quantities, ours.quantities, strict=True):
                assert b.value == pytest.approx(a.value, rel=1e-3, abs=1e-4), (ours.lens, a.name)
    x, y = torch.rand(8, 1, 8, 8, generator=gen(1)), torch.arange(8) % 4
    run = audit(fresh(), (x, y), threat="linf:0.05", out=tmp_path / "audit", device=device.type, standard=True)
    states = {reading.lens: reading.outcome.status for reading in run.readings()}
    assert len(states) > 10 and {lens for lens, status in states.items() if status == "failed"} == {
        "generalisation-gap",
        "generalization-bound",
    }, "there are no training images"
