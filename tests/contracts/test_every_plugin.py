"""What every discovered plug-in must hold, and the walls of the house."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest

import robustlens
from robustlens.core.discovery import KINDS, build, describe, discover
from robustlens.results.errors import InputError

HOME = Path(robustlens.__file__).parent
PLUGINS = [(kind, cls) for kind in KINDS for cls in discover(kind).values()]

#: Each room and the rooms that it may import from.
LOWER = {"results"}
CORE = LOWER | {"core"}
GROUND = CORE | {"linalg", "threats", "data", "models"}
TRAINING = {"objectives", "regularizers", "updates", "constraints"}
WALLS = {
    "results": LOWER,
    "core": CORE,
    "linalg": CORE | {"linalg"},
    "threats": CORE | {"threats"},
    "data": CORE | {"data"},
    "models": CORE | {"models"},
    "methods": CORE | {"threats", "methods"},
    "attacks": GROUND | {"attacks"},
    **dict.fromkeys(TRAINING, GROUND | {"attacks"} | TRAINING),
    "train": GROUND | {"attacks", "train"} | TRAINING,
    "lenses": CORE | {"linalg", "threats", "attacks", "lenses"},
    "report": {"results", "report"},
    "claims": {"results", "claims"},
}


@pytest.mark.parametrize(("kind", "cls"), PLUGINS, ids=lambda v: getattr(v, "name", str(v)))
def test_plugin_is_a_frozen_documented_dataclass(kind: str, cls: type) -> None:
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.name == cls.name.lower()
    assert len(inspect.getdoc(cls) or "") > 20
    assert isinstance(cls.reference, str) and cls.reference


@pytest.mark.parametrize(("kind", "cls"), PLUGINS, ids=lambda v: getattr(v, "name", str(v)))
def test_plugin_follows_its_protocol(kind: str, cls: type) -> None:
    protocol = KINDS[kind][1]
    for name, member in inspect.getmembers(protocol, inspect.isfunction):
        if not name.startswith("_"):
            wanted = list(inspect.signature(member).parameters)
            assert list(inspect.signature(getattr(cls, name)).parameters) == wanted, name


@pytest.mark.parametrize(("kind", "cls"), PLUGINS, ids=lambda v: getattr(v, "name", str(v)))
def test_examples_describe_themselves_in_plain_json(kind: str, cls: type) -> None:
    for example in cls.examples() if hasattr(cls, "examples") else []:
        settings = describe(example)
        assert json.loads(json.dumps(settings)) == settings
        assert build(kind, settings) == example


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_members_and_names_the_nearest_one(kind: str) -> None:
    names = list(discover(kind))
    assert names
    with pytest.raises(InputError, match=f"Did you mean '{names[0]}'"):
        build(kind, names[0] + "x")


def imports(file: Path) -> set[str]:
    """The rooms of robustlens that a file imports from, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            targets = [node.module]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
        for target in targets:
            parts = target.split(".")
            if parts[0] == "robustlens" and len(parts) > 1:
                found.add(parts[1])
    return found


def test_walls() -> None:
    rooms = {path.name for path in HOME.iterdir() if path.is_dir() and path.name != "__pycache__"}
    top = {"studies", "recipes"}
    assert rooms - top <= set(WALLS), "a room without walls"
    for room in rooms - top:
        for file in (HOME / room).rglob("*.py"):
            assert imports(file) <= WALLS[room], f"{file.relative_to(HOME)} reaches through a wall"


def test_results_report_and_claims_know_nothing_of_torch() -> None:
    for room in ("results", "report", "claims"):
        for file in (HOME / room).rglob("*.py"):
            names = {
                n.name
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Import)
                for n in node.names
            }
            assert "torch" not in names, file


def test_no_file_is_longer_than_400_lines() -> None:
    for file in [*HOME.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= 400, file
