"""What several uses of one lens are called: by the settings that differ between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from robustlens.results.reading import spelled
from robustlens.results.runs import seedless

#: A setting's name, below those of the settings that it is in: ("attack", "steps").
Field = tuple[str, ...]

#: What costs time alone, and what follows from other settings: named only where uses would be called alike without.
MINOR = {"batch_size", "chunk", "bins", "pictures", "step_size", "grad_floor", "line-up"}


def labels(lens: str, uses: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each use of ``lens``, given its settings; no two names are alike, and the order changes none.

    A name tells only what differs: "accuracy, l2:1 (steps 10, margin loss)". Seeds are no difference.
    """
    name = lens.replace("_", " ").replace("-", " ")
    leaves = [_leaves(use) for use in uses]
    order = sorted(range(len(uses)), key=lambda i: seedless(uses[i]))
    fields = list(dict.fromkeys(field for i in order for field in leaves[i]))

    def differs(field: Field, among: Sequence[int]) -> bool:
        return len({seedless([leaves[i].get(field)]) for i in among}) > 1

    major = [f for f in fields if not _minor(f, fields) and differs(f, [i for i in order if f in leaves[i]])]
    shown = [[field for field in major if field in own] for own in leaves]
    found = [_label(name, own, chosen) for own, chosen in zip(leaves, shown, strict=True)]
    for i, chosen in enumerate(shown):
        alike = [j for j in order if found[j] == found[i]]
        chosen += [field for field in fields if field not in chosen and differs(field, alike)]
    found = [_label(name, own, chosen) for own, chosen in zip(leaves, shown, strict=True)]
    return [
        f"{label} · {hashlib.sha256(seedless(use).encode()).hexdigest()[:6]}" if found.count(label) > 1 else label
        for label, use in zip(found, uses, strict=True)
    ]


def _leaves(settings: Mapping[str, Any]) -> dict[Field, Any]:
    """The settings one by one; what is in "attack used" stands for "attack", of which ("", "attack") is the name."""
    used = {key.removesuffix(" used"): value for key, value in settings.items() if key.endswith(" used")}
    found: dict[Field, Any] = {}
    for key, value in settings.items():
        if key in used:
            found["", key] = value.get("name") if isinstance(value, Mapping) else value
        key, value = key.removesuffix(" used"), used.get(key, value)
        if key == "seed":
            continue
        if isinstance(value, Mapping):
            found |= {(key, *field): leaf for field, leaf in _leaves(value).items()}
        else:
            found[key,] = value
    return found


def _minor(field: Field, fields: Sequence[Field]) -> bool:
    repeated = len(field) > 1 and field[-1] == "threat" and ("threat",) in fields
    return repeated or field[-1] in MINOR or field[:-1] == ("",)


def _label(name: str, own: Mapping[Field, Any], shown: Sequence[Field]) -> str:
    lasts = [field[-1] for field in shown]
    texts = [_text(f[-1:] if lasts.count(f[-1]) == 1 else f, own.get(f)) for f in shown]
    threats = dict.fromkeys(text for text, last in zip(texts, lasts, strict=True) if last == "threat")
    others = [text for text, last in zip(texts, lasts, strict=True) if last != "threat"]
    return ", ".join([name, *threats]) + (f" ({', '.join(others)})" if others else "")


def _text(field: Field, value: Any) -> str:
    """A setting as people say it: "steps 10", "margin loss", "all examples"."""
    last = field[-1]
    words = " ".join(field).strip().replace("_", " ").removeprefix("n ")
    if value is None:
        return f"{'all' if last == 'n_examples' else 'default'} {words}"
    if last in ("name", "threat", "when"):
        return spelled(str(value))
    if isinstance(value, bool):
        return f"{words} {'yes' if value else 'no'}"
    before = isinstance(value, str) or last.startswith("n_") or value in ([], ())
    return f"{_brief(value)} {words}" if before else f"{words} {_brief(value)}"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name"))
    if isinstance(value, list | tuple):
        each = [_brief(part) for part in value]
        return f"{each[0]} to {each[-1]} ({len(each)})" if len(each) > 2 else " and ".join(each) or "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
