"""Finding and building plug-ins: a new method, lens or attack is one new file, and nobody edits a list.

A plug-in is a frozen dataclass with a ``name``. ``build`` makes one from plain settings such as
``{"name": "pgd", "threat": "l2:1.5", "steps": 20}``; ``describe`` is its inverse, and its result, with every default
written out, is what a run's address is computed from.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from robustlens.core.types import (
    Architecture,
    Attack,
    Augmentation,
    Constraint,
    Lens,
    Objective,
    Regularizer,
    Threat,
    Update,
)
from robustlens.results.errors import InputError, unknown_name, wanted

#: Package of each kind of plug-in, and the protocol its members follow.
KINDS: dict[str, tuple[str, type]] = {
    "attack": ("attacks", Attack),
    "objective": ("objectives", Objective),
    "regularizer": ("regularizers", Regularizer),
    "update": ("updates", Update),
    "constraint": ("constraints", Constraint),
    "lens": ("lenses", Lens),
    "model": ("models", Architecture),
    "augmentation": ("data", Augmentation),
}


def modules(package: str) -> Iterator[types.ModuleType]:
    """Every module of ``robustlens.<package>``."""
    home = importlib.import_module(f"robustlens.{package}")
    for info in pkgutil.iter_modules(home.__path__, home.__name__ + "."):
        yield importlib.import_module(info.name)


@cache
def discover(kind: str) -> Mapping[str, type]:
    """Name → class of every plug-in of ``kind`` (a key of KINDS)."""
    package, _ = KINDS[kind]
    found: dict[str, type] = {}
    for module in modules(package):
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and "name" in vars(cls) and dataclasses.is_dataclass(cls):
                found[vars(cls)["name"]] = cls
    return dict(sorted(found.items()))


def find(kind: str, name: str) -> type:
    """The class called ``name``; ``pkg.module:Class`` names one of the user's own."""
    if ":" in name:
        found = load_attribute(name)
        if not (inspect.isclass(found) and dataclasses.is_dataclass(found)):
            raise InputError(kind, expected="a frozen dataclass", got=repr(found), fix="See docs/write-a-plugin.md.")
        return found
    known = discover(kind)
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]


def load_attribute(path: str) -> Any:
    """The object that ``pkg.module:attribute`` names; raises InputError if it cannot be imported."""
    module, _, attribute = path.partition(":")
    fix = "Check the spelling, and that its directory is on PYTHONPATH."
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        named = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if isinstance(error, SystemExit):
            fix = f'Put what runs at {raised_at(error)} under if __name__ == "__main__".'
        elif not named and raised_at(error):
            fix = f"It is raised at {raised_at(error)}."
        raise InputError(
            path,
            expected="pkg.module:attribute that can be imported",
            got=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from error


def raised_at(error: BaseException) -> str:
    """File and line of the user's code that raised ``error``; "" where none of it did."""
    foreign = (str(Path(__file__).parents[1]), str(importlib.__file__), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(foreign)]
    theirs = [f for f in frames if "site-packages" not in f.filename]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""


def build(kind: str, settings: Mapping[str, Any] | str) -> Any:
    """Make the plug-in of ``kind`` that ``settings`` describes (a bare name takes every default).

    Raises:
        InputError: an unknown name or field, or a value that does not fit, with what was expected.
    """
    given = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise InputError(kind, expected='settings with a "name"', got=repr(settings), fix='Add name = "…".')
    cls = find(kind, name)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            raise unknown_name(f"field of {kind} {name!r}", key, fields)
    for key, value in given.items():
        given[key] = _coerce(hints[key], value)
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in given
    ]
    if missing:
        raise InputError(
            f"{kind} {name!r}", expected=f"a value for {missing[0]}", got="none", fix=f"Add {missing[0]} = …."
        )
    for key, value in given.items():
        given[key] = _validated(f"{kind} {name!r}, field {key}", hints[key], value)
    return cls(**given)


def _coerce(hint: Any, value: Any) -> Any:
    """Build nested plug-ins and threats; leave other values for validation."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    lp = importlib.import_module("robustlens.threats.lp").Lp
    if any(option in (Threat, lp) for option in options) and isinstance(value, str):
        return lp.parse(value)
    for kind, (_, protocol) in KINDS.items():
        if any(option is protocol for option in options) and isinstance(value, (str, Mapping)):
            return build(kind, value)
    return value


def _validated(what: str, hint: Any, value: Any) -> Any:
    if isinstance(value, bool) and hint in (int, float, int | None, float | None):
        raise InputError(what, expected="a number", got=repr(value), fix="Correct the value; see `robustlens list`.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(what, expected="a number of 64 bits", got=f"{value:.3e}", fix="Correct the value.")
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            what, expected=wanted(problem), got=repr(value), fix="Correct the value; see `robustlens list`."
        ) from error


def describe(plugin: Any) -> dict[str, Any]:
    """The settings that ``build`` makes ``plugin`` from, defaults included, as plain JSON values."""
    cls = type(plugin)
    builtin = cls.__module__.startswith("robustlens.")
    name = cls.name if builtin else f"{cls.__module__}:{cls.__qualname__}"
    settings = {f.name: _plain(getattr(plugin, f.name)) for f in dataclasses.fields(plugin)}
    return {"name": name, **settings}


def _plain(value: Any) -> Any:
    if isinstance(value, Threat):
        return str(value)
    if dataclasses.is_dataclass(value):
        return describe(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
