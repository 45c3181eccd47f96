"""A method as a paper used it on one data set: settings with their source, to be named in a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from robustlens.core.discovery import modules
from robustlens.results.errors import InputError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a method, as a study writes them.

    Attributes:
        name: "<method>/<data>", such as "trades/cifar10"; a study picks a protocol with "trades/cifar10@paper".
        reference: paper, and the table, section or script that the settings come from.
        data, model, threat: what the paper used them for; a study may use others.
        classes: those of the data that are kept; all where it is empty.
        paper: objective, regularizers, update, constraints and training as printed, or as the authors' code ran it.
        sound: the same where something in ``paper`` undermines its own purpose (a step budget that cannot cross the
            ball, a penalty counted twice): only the parts that differ, merged over ``paper``; empty where it is sound.
        differs: what ``sound`` changes, and why; a sentence.
        fine_tunes: whether it starts from trained weights, which the study's ``start`` then has to name.
    """

    name: str
    reference: str
    data: str
    model: str | Mapping[str, Any]
    threat: str
    classes: tuple[int, ...] = ()
    paper: Mapping[str, Any]
    sound: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""
    fine_tunes: bool = False

    @property
    def method(self) -> str:
        """What trains, without the data."""
        return self.name.partition("/")[0]

    def settings(self, protocol: str) -> dict[str, Any]:
        """The fields of a study's method under ``protocol``, "paper" or "sound"."""
        found = dict(self.paper)
        if protocol == "sound":
            for key, value in self.sound.items():
                merge = key == "training" and key in found
                found[key] = {**found[key], **value} if merge else value
        return found


@cache
def presets() -> Mapping[str, Preset]:
    """Name → preset, of every paper."""
    found = [preset for module in modules("methods") for preset in getattr(module, "PRESETS", ())]
    return {preset.name: preset for preset in sorted(found, key=lambda each: each.name)}


def find_preset(name: str) -> tuple[Preset, str]:
    """The preset and the protocol that ``name`` means: "trades/cifar10" (sound) or "trades/cifar10@paper".

    Raises:
        InputError: an unknown name, with the nearest one, or another protocol.
    """
    wanted, _, protocol = name.partition("@")
    known = presets()
    if wanted not in known:
        raise unknown_name("preset", wanted, known)
    if protocol not in ("", "paper", "sound"):
        raise InputError(
            f"preset {name!r}", expected="@paper or @sound", got=f"@{protocol}", fix="Without it, sound is taken."
        )
    return known[wanted], protocol or "sound"
