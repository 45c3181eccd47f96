"""Errors that a user can act on: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any


class RobustlensError(Exception):
    """Base of every error that robustlens raises on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class InputError(RobustlensError, ValueError):
    """Something a user gave cannot be used.

    The message is one line: what it is about, what was expected, what came, and what to do.
    """

    exit_code = 2

    def __init__(self, what: str, *, expected: str, got: str, fix: str) -> None:
        what, got = shortened(what), shortened(got)
        super().__init__(
            printable(" ".join(f"{what}: expected {expected}, got {got.rstrip('.') or '.'}. {fix}".split()))
        )
        self.what, self.expected, self.got, self.fix = what, expected, got, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """How it travels between processes."""
        return partial(type(self), expected=self.expected, got=self.got, fix=self.fix), (self.what,)


#: Control characters other than tabs and new lines, which could steer a terminal, and what is shown in their place.
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")


def printable(text: str) -> str:
    """``text`` as it can be printed and written: no control characters, and no bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_CONTROL)


def shortened(text: str, length: int = 500) -> str:
    """``text``, or its beginning and end where it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 2 :]}"


def require_at_least(part: Any, **least: float) -> None:
    """Refuse a named ``part`` of which a field is below its ``least`` value or NaN; None is a field left out.

    Raises:
        InputError: about the first such field.
    """
    for field, bound in least.items():
        value = getattr(part, field)
        if value is not None and not value >= bound:
            raise InputError(f"{part.name} {field}", expected=f"at least {bound}", got=str(value), fix="Raise it.")


class DamageWarning(UserWarning):
    """A damaged file was found and what it held is taken from an older one, or made again."""


class TrainingStopped(RobustlensError):
    """Training cannot go on (a loss that is not a number); the last good checkpoint is kept."""


class RunInUse(InputError):
    """Another process holds the run directory."""


#: Names that an error message lists at most.
MANY = 40


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that nobody knows, with the nearest one that exists; of very many the first are named.

    A name may have been begun only.
    """
    names = sorted(known)
    begun = {each[: len(name)]: each for each in reversed(names)} | {each: each for each in names}
    near = difflib.get_close_matches(name, begun, n=1, cutoff=0.5) or difflib.get_close_matches(name.lower(), names)
    fix = f"Did you mean {begun[near[0]]!r}?" if near else "See `robustlens list`."
    more = f", … ({len(names)} in all)" if len(names) > MANY else ""
    return InputError(kind, expected=f"one of {', '.join(names[:MANY])}{more}", got=repr(name), fix=fix)


#: What somebody who writes TOML calls what pydantic wants, by the types of its errors.
PLAIN = {
    "bool": "true or false",
    "dict": "a table of settings",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a table of settings",
    "string": "text in quotes",
    "tuple": "a list",
}


def wanted(problem: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says that was expected, in the words of somebody who writes TOML."""
    kind = str(problem["type"])
    if kind == "union_tag_invalid":
        return f"one of {problem['ctx']['expected_tags']}"
    if kind == "too_short":
        return f"at least {problem['ctx']['min_length']} of them"
    if (plain := PLAIN.get(kind.partition("_")[0])) and kind.endswith(("_type", "_parsing", "_from_float")):
        return plain
    message = str(problem["msg"])
    for opening in ("Value error, ", "Input should be ", "Input should ", "Input "):
        message = message.removeprefix(opening)
    return "a value" if message == "Field required" else message[:1].lower() + message[1:]
