"""A study as typed settings: data × model × methods × seeds × lenses, read from TOML."""

from __future__ import annotations

import copy
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from robustlens.core.discovery import discover
from robustlens.data.config import DataConfig
from robustlens.methods.preset import find_preset, presets
from robustlens.results.errors import InputError, printable, unknown_name, wanted
from robustlens.results.files import DEEPEST, require_shallow
from robustlens.train.config import Settings, TrainingConfig

Plugin = str | dict[str, Any]

#: Bytes of the largest study file.
LARGEST = 2**20
_LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{DEEPEST}}}""")

#: The lenses of a study that names none.
LENSES: tuple[Plugin, ...] = ("accuracy", "generalisation-gap", "logit-margins", "layer-spectra")


def _shown(name: str) -> str:
    if printable(name) != name:
        raise ValueError("text without control characters")
    return name


#: What tables, pages and directories are named by.
Name = Annotated[str, Field(min_length=1, max_length=80), AfterValidator(_shown)]


class MethodConfig(Settings):
    """One way to train: a label for tables and charts, and the parts it is made of.

    Attributes:
        preset: a method as a paper used it, such as "trades/cifar10" or "trades/cifar10@paper"; what is given beside
            it takes the place of the preset's own.
        objective, regularizers, update, constraints: the parts; any combination is a method.
        training: overrides single fields of the study's training settings for this method.
        start: where training starts from: the label of a method further up, whose last weights are taken, or a file of
            weights. Without it, from fresh weights.
        threat: what the robustness of this method's networks is measured against (and what picks their best epoch),
            where that is not the study's threat: the radius that each was trained for, say.
    """

    label: Name
    preset: str | None = None
    objective: Plugin = "standard"
    regularizers: tuple[Plugin, ...] = ()
    update: Plugin = "descend"
    constraints: tuple[Plugin, ...] = ()
    training: dict[str, Any] = Field(default_factory=dict)
    start: str | None = None
    threat: str | None = None

    def resolved(self) -> MethodConfig:
        """The same method with the settings of its preset written out.

        Raises:
            InputError: an unknown preset, or one that fine-tunes without a start.
        """
        if self.preset is None:
            return self
        preset, protocol = find_preset(self.preset)
        if preset.fine_tunes and self.start is None:
            raise InputError(
                f"method {self.label!r}",
                expected=f"start, because {preset.name} goes on from trained weights",
                got="none",
                fix='Set start = "<label of a method above>" or start = "<file of weights>".',
            )
        given = {name: getattr(self, name) for name in self.model_fields_set - {"preset", "training"}}
        settings = preset.settings(protocol)
        training = merged(settings.pop("training", {}), self.training)
        return MethodConfig.model_validate({**settings, **given, "training": training})


class StudyConfig(Settings):
    """Everything a study does.

    Attributes:
        name: names the study in pages and tables.
        data, model, training: shared by all methods.
        threat: what robustness is measured against ("l2:1.5", "linf:8/255"); methods name their own.
        validation: the attack that picks the best epoch, on validation images; None is PGD with 10 steps on ``threat``.
        methods: what is compared.
        seeds: each method is trained once per seed.
        lenses: what is measured on each trained network; ``when = "epochs:1,10,20"`` among a lens's settings measures
            it after those epochs instead of at the end.
        weights: which checkpoint is examined: the last, or the best by robust accuracy on validation images (early
            stopping against robust overfitting; of a network that is not robust it tends to pick an early epoch).
    """

    name: Name = "study"
    data: DataConfig
    model: Plugin
    threat: str
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    validation: dict[str, Any] | None = None
    seeds: tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...] = Field((0,), min_length=1)
    lenses: tuple[Plugin, ...] = LENSES
    weights: Literal["last", "best"] = "last"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, field by field; a choice that is renamed (another optimizer) is replaced whole."""
    found = dict(base)
    for key, value in changes.items():
        old = found.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, old.get("name")):
            found[key] = merged(old, value)
        else:
            found[key] = value
    return found


def read_study(path: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """The study in the TOML file ``path``, with ``key.path=value`` overrides applied.

    Raises:
        InputError: no such file, not TOML, an unknown key (with the nearest one), or a value that does not fit.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError(
                f"study file {path}", expected=f"at most {LARGEST:,} bytes", got="more", fix="Write several studies."
            )
        settings = _parsed(content.decode())
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            "study file", expected="a TOML file", got=f"{path}: {error.strerror}", fix="Check the path."
        ) from error
    except ValueError as error:
        raise InputError(
            f"study file {path}", expected="valid TOML", got=str(error), fix="Correct that line."
        ) from error
    return make_study(settings, overrides)


def _parsed(text: str) -> dict[str, Any]:
    """TOML of few levels; raises ValueError for other text."""
    if _LONG_KEY.search(text):  # the parser takes quadratic time for them
        raise ValueError(f"a key of more than {DEEPEST} parts")
    try:
        settings = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    require_shallow(settings)
    return settings


def make_study(settings: Mapping[str, Any], overrides: Iterable[str] = ()) -> StudyConfig:
    """Validate plain settings as a study; errors name the field, what was expected, what came and what to do."""
    plain = copy.deepcopy(dict(settings))
    for override in overrides:
        _override(plain, override)
    return validated(StudyConfig, plain, "study")


def write_study(study: StudyConfig) -> str:
    """The study as TOML text, which ``read_study`` reads back equal.

    It holds what was given and no defaults: a default beside a preset would take the place of what the preset sets.
    """
    return tomli_w.dumps(study.model_dump(mode="json", exclude_none=True, exclude_unset=True))


S = TypeVar("S", bound=BaseModel)

#: Settings that are one of several kinds, told apart by their name.
CHOICES = ("optimizer", "schedule")


def validated(cls: type[S], settings: Mapping[str, Any], what: str) -> S:
    """``settings`` as a ``cls``; raises InputError for the first thing that does not fit."""
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        # A misspelt key comes first: where it is a required one, it is missed as well.
        problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        loc = problem["loc"]  # pydantic puts the name of the one chosen behind a choice
        either = problem["type"] == "string_type" and loc[-1] == "str"  # a name, or a table with one
        loc = loc[:-1] if either else loc
        where = ".".join(str(part) for k, part in enumerate(loc) if k == 0 or loc[k - 1] not in CHOICES)
        if problem["type"] == "extra_forbidden":
            place, _, field = where.rpartition(".")
            raise unknown_name(f"field of {place or what}", field, _fields(cls, problem["loc"][:-1])) from error
        got = "nothing" if problem["type"] == "missing" else repr(problem["input"])
        expected = "a name in quotes or a table with one" if either else wanted(problem)
        if problem["type"] == "union_tag_not_found":
            expected, where = "a name", f"{where}.name"
        raise InputError(
            f"{what} {where}", expected=expected, got=got, fix=f"Set {where} to a fitting value."
        ) from error


def _fields(cls: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Field names of the settings at ``path``; a choice (of optimizer, say) is followed by its name."""
    here: list[type[BaseModel]] = [cls]
    for part in path:
        names = [m for m in here if m.model_fields.get("name") and m.model_fields["name"].default == part]
        found = [m for c in here if part in c.model_fields for m in _models(c.model_fields[str(part)].annotation)]
        here = names or found or here  # a position in a list changes nothing
    return sorted({name for model in here for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _override(settings: dict[str, Any], text: str) -> None:
    """Apply ``training.epochs=3``; list positions are numbers (``methods.0.label=…``)."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise InputError("--set", expected="key.path=value", got=repr(text), fix="For example training.epochs=3.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value  # a bare word is text
    *parents, last = path.strip().split(".")
    place: Any = settings
    for key in parents:
        place = place[_position(place, key)] if isinstance(place, list) else place.setdefault(key, {})
        if not isinstance(place, (dict, list)):
            raise InputError("--set", expected=f"{key} to have fields", got=repr(place), fix="Check the path.")
    place[_position(place, last) if isinstance(place, list) else last] = parsed


def _position(items: Sequence[Any], key: str) -> int:
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    expected = f"a position in the list, 0 to {len(items) - 1}"
    raise InputError("--set", expected=expected, got=repr(key), fix="Count from 0.")


def single_run(
    *,
    data: str | None = None,
    model: str | None = None,
    method: str = "pgd",
    threat: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
) -> StudyConfig:
    """The study that trains one network.

    ``method`` is "standard", "noise", an attack to train against, or a preset ("trades/mnist"), which brings the data,
    model, threat and number of epochs of its paper where none are given.
    """
    usual: dict[str, Any] = {"model": "lenet-small", "threat": "l2:1.5"}
    chosen: dict[str, Any]
    kept: dict[str, Any] = {"source": "mnist5k"}
    if "/" in method:
        preset, _ = find_preset(method)
        usual = {"model": preset.model, "threat": preset.threat}
        kept = {"source": preset.data} | ({"classes": list(preset.classes)} if preset.classes else {})
        chosen = {"label": method, "preset": method, "training": {} if epochs is None else {"epochs": epochs}}
        overrides = [f"methods.0.{each}" if each.startswith("training.") else each for each in overrides]
    threat = usual["threat"] if threat is None else threat
    if "/" not in method:
        chosen = {
            "label": method if method == "standard" else f"{method} {threat}",
            "objective": _against(method, threat),
        }
    settings = {
        "name": "train",
        "data": {"source": data} if data is not None else kept,
        "model": usual["model"] if model is None else model,
        "threat": threat,
        "methods": [chosen],
        "training": {} if epochs is None else {"epochs": epochs},
        "seeds": [seed],
    }
    return make_study(settings, overrides)


def _against(method: str, threat: str) -> Plugin:
    known = {"standard", "noise", *discover("attack")}
    if method not in known and ":" not in method:
        published = [each for each in presets() if each.partition("/")[0] == method]
        raise unknown_name("method", method, published or known)
    if method == "standard":
        return method
    if method == "noise":
        return {"name": method, "threat": threat}
    return {"name": "adversarial", "attack": {"name": method, "threat": threat}}
