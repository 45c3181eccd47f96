"""Presets: each is a method that trains, has a source, and can be named in a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_study import settings as two_seeds

from robustlens.core import discovery
from robustlens.core.types import Batch, Moment
from robustlens.methods.preset import find_preset, presets
from robustlens.results.errors import InputError
from robustlens.show import catalogue
from robustlens.studies.config import make_study, read_study, single_run, write_study
from robustlens.studies.plan import make_plan, make_recipe
from robustlens.studies.run import run_study

EVERY = [
    (name, protocol) for name, preset in presets().items() for protocol in ("paper", "sound")[: 1 + bool(preset.sound)]
]


def settings(**changes: Any) -> dict[str, Any]:
    return two_seeds(**{"seeds": [0], **changes})


def study_of(name: str, protocol: str) -> Any:
    preset = presets()[name]
    method = {"label": "it", "preset": f"{name}@{protocol}"} | ({"start": __file__} if preset.fine_tunes else {})
    model = preset.model if isinstance(preset.model, str) else dict(preset.model)
    return make_study({"data": {"source": preset.data}, "model": model, "threat": preset.threat, "methods": [method]})


@pytest.mark.parametrize(("name", "protocol"), EVERY)
def test_every_preset_is_planned_as_it_says(name: str, protocol: str) -> None:
    preset = presets()[name]
    (run,) = make_plan(study_of(name, protocol)).runs
    settings = preset.settings(protocol)
    assert run.settings["training"]["epochs"] == settings["training"]["epochs"]
    for part in ("objective", "update"):
        wanted = settings.get(part, {"objective": "standard", "update": "descend"}[part])
        assert run.settings[part]["name"] == (wanted if isinstance(wanted, str) else wanted["name"])
    assert "/" in name and len(preset.reference) > 10 and bool(preset.sound) == bool(preset.differs)
    assert str(run.recipe.passes)


@pytest.mark.parametrize(("name", "protocol"), EVERY)
def test_every_preset_takes_a_step(name: str, protocol: str) -> None:
    """On a small network in place of the paper's, with attacks of two steps: parts and threats fit together."""
    preset = presets()[name]
    channels = 1 if preset.data.startswith("mnist") else 3
    logistic = preset.model == "logistic"
    shape, classes = (channels, 16, 16), 2 if logistic else 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = discovery.build("model", "logistic" if logistic else "lenet-small").build(shape, classes)
    method = make_plan(study_of(name, protocol)).study.methods[0].resolved()
    recipe = make_recipe(method)
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(4, *shape, generator=gen)
    batch = Batch(x, torch.arange(4) % classes, torch.arange(4), Moment(epoch=20.0, epochs=40.0, examples=4))
    recipe.check(model, x)
    for _ in range(min(2, recipe.update.replays)):
        model.zero_grad()
        terms = recipe.update.backward(model, recipe.objective, recipe.regularizers, batch, gen=gen)
        assert torch.isfinite(terms.loss)
    for constraint in recipe.constraints:
        assert all(isinstance(v, float) for v in constraint.apply(model, x[:1]).values())


def test_sound_is_the_default_and_paper_is_there() -> None:
    name = next(name for name, preset in presets().items() if preset.sound)
    assert find_preset(name) == (presets()[name], "sound")
    assert find_preset(f"{name}@paper") == (presets()[name], "paper")
    assert presets()[name].settings("paper") != presets()[name].settings("sound")


@pytest.mark.parametrize("wrong", ["trades/mnits", "trades/mnist@sond"])
def test_unknown_presets_are_refused(wrong: str) -> None:
    with pytest.raises(InputError) as error:
        make_plan(make_study(settings(methods=[{"label": "a", "preset": wrong}])))
    assert "trades/mnist" in str(error.value) and error.value.exit_code == 2


def test_what_is_given_takes_the_place_of_the_presets() -> None:
    method = {"label": "a", "preset": "trades/mnist", "training": {"epochs": 3}, "regularizers": ["orthogonality"]}
    study = make_study(settings(methods=[method]))
    (run,) = make_plan(study).runs
    assert run.training.epochs == 3 and run.settings["objective"]["name"] == "trades"
    assert run.settings["regularizers"][0]["name"] == "orthogonality"
    assert run.training.optimizer.lr == presets()["trades/mnist"].paper["training"]["optimizer"]["lr"]


def test_a_preset_survives_the_study_file(tmp_path: Path) -> None:
    study = make_study(settings(methods=[{"label": "a", "preset": "trades/mnist@paper", "training": {"epochs": 3}}]))
    (tmp_path / "study.toml").write_text(write_study(study))
    back = read_study(tmp_path / "study.toml")
    (run,), (again,) = make_plan(study).runs, make_plan(back).runs
    assert back == study and again.settings == run.settings and again.training == run.training


def test_training_by_preset_brings_its_data_model_and_threat() -> None:
    preset = presets()["trades/mnist"]
    study = single_run(method="trades/mnist", epochs=1)
    assert (study.data.source, study.model, study.threat) == (preset.data, preset.model, preset.threat)
    (run,) = make_plan(study).runs
    assert run.training.epochs == 1 and run.label == "trades/mnist"
    (changed,) = make_plan(single_run(method="trades/mnist", overrides=["training.epochs=2"])).runs
    assert changed.training.epochs == 2
    assert single_run(method="trades/mnist", data="digits", model="mlp", threat="l2:1").data.source == "digits"
    assert make_plan(single_run(method="trades/mnist")).runs[0].training.epochs == preset.paper["training"]["epochs"]


def test_a_method_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    methods = [
        {"label": "plain"},
        {"label": "on", "start": "plain", "training": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-12}}},
        {"label": "file", "start": "", "training": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-12}}},
    ]
    plain, on = run_study(make_study(settings(methods=methods[:2], lenses=["logit-margins"])), tmp_path)
    first, second = (load_file(run.path / "last.safetensors") for run in (plain, on))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    methods[2]["start"] = str(plain.path / "last.safetensors")
    (third,) = run_study(make_study(settings(methods=methods[2:], lenses=["logit-margins"])), tmp_path)
    assert all(torch.allclose(first[k], v, atol=1e-6) for k, v in load_file(third.path / "last.safetensors").items())
    assert len({plain.path.name, on.path.name, third.path.name}) == 3


def test_a_start_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="'plain'"):
        make_plan(make_study(settings(methods=[{"label": "plain"}, {"label": "b", "start": "pain"}])))


def test_fine_tuning_presets_ask_for_a_start() -> None:
    name = next(name for name, preset in presets().items() if preset.fine_tunes)
    with pytest.raises(InputError, match="start"):
        make_plan(make_study(settings(methods=[{"label": "a", "preset": name}])))


@pytest.mark.parametrize("kind", ["regularizers", "constraints"])
def test_one_part_twice_is_refused(kind: str) -> None:
    name = {"regularizers": "orthogonality", "constraints": "parseval"}[kind]
    with pytest.raises(InputError, match="each"):
        make_plan(make_study(settings(methods=[{"label": "a", kind: [name, {"name": name}], "objective": "standard"}])))


def test_constraints_are_part_of_the_address() -> None:
    methods = [{"label": "a"}, {"label": "b", "constraints": ["spectral-clip"]}]
    one, other = make_plan(make_study(settings(methods=methods))).runs
    assert one.hash != other.hash


def test_list_methods_shows_every_preset_with_cost_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=400)
    catalogue(console, "methods")
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for name, preset in presets().items():
        at = next(k for k, line in enumerate(lines) if line.startswith(f"{name}  "))
        assert "weight" in lines[at] and ("@sound" in lines[at]) == bool(preset.sound)
        assert lines[at + 1].strip() == preset.reference


def test_readings_of_the_text_that_weaken_the_attack() -> None:
    attacks = {
        name: discovery.build("objective", presets()[f"pgd-8{name}/cifar10"].settings("paper")["objective"])
        for name in ("", "-normalised", "-half-clean")
    }
    assert [round(each.attack.threat.eps * 255, 9) for each in attacks.values()] == [8, 2, 8]
    assert [round(each.attack.step_size * 255, 9) for each in attacks.values()] == [2, 0.5, 2]
    assert [each.clean_weight for each in attacks.values()] == [0, 0, 0.5]
