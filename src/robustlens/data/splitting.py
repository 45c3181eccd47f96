"""Which examples train, validate and test: fixed once, stratified by class."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from robustlens.core.rng import generator
from robustlens.core.types import Split, Splits
from robustlens.data.config import DataConfig
from robustlens.data.raw import Fit, RawSplit, Source
from robustlens.results.errors import InputError, unknown_name

#: The split belongs to the data, not to a run: it has one seed, whatever the seed of the run.
SPLIT_SEED = 0
#: Part of a training split that is held out for testing where the source has no other split.
TEST_FRACTION = 0.2

_log = logging.getLogger(__name__)


def stratified_order(labels: Tensor, gen: Generator) -> Tensor:
    """A random permutation (N,) of which every beginning has the class proportions of ``labels`` (N,).

    The j-th of the n_c examples of class c, in a random order, gets the key (j + u) / n_c with u uniform in [0, 1);
    the permutation sorts the keys. The first m hold, of each of K classes, m·n_c/N examples up to 1 + K·n_c/N.
    """
    keys = torch.rand(len(labels), generator=gen, dtype=torch.float64)
    shuffle = torch.randperm(len(labels), generator=gen)
    for c in range(int(labels.max()) + 1):
        members = shuffle[labels[shuffle] == c]
        keys[members] = (torch.arange(len(members)) + keys[members]) / len(members)
    return keys.argsort(stable=True)


def assemble(config: DataConfig, source: Source) -> Splits:
    """Choose classes and examples of ``source`` as ``config`` says, and decode those.

    Raises:
        InputError: an unknown or repeated class, or a split that has no examples left.
    """
    keep = class_numbers(source.classes, config.classes)
    raw = dict(source.splits)
    valid, test = raw.get("valid"), raw.get("test")
    if test is None and valid is not None:
        _log.warning("%s has no test split: its validation split is used as the test split", source.name)
        valid, test = None, valid
    rows, labels = _ordered("training", source, raw["train"], keep, "train")
    if test is None:
        cut = share(len(rows), TEST_FRACTION, source.name)
        parts = {"test": (raw["train"], rows[:cut], labels[:cut])}
        rows, labels = rows[cut:], labels[cut:]
    else:
        parts = {"test": (test, *_ordered("test", source, test, keep, "test"))}
    if valid is None:
        cut = share(len(rows), config.valid_fraction, source.name)
        parts["valid"] = (raw["train"], rows[:cut], labels[:cut])
        rows, labels = rows[cut:], labels[cut:]
    else:
        parts["valid"] = (valid, *_ordered("validation", source, valid, keep, "valid"))
    parts["train"] = (raw["train"], rows, labels)
    limits = {"train": config.train, "valid": config.valid, "test": config.test}
    fit = Fit(config.resize, config.size)
    fits = {"train": Fit(config.resize, config.train_size or config.size), "valid": fit, "test": fit}
    made = {
        name: Split(split.pixels(rows[: limits[name]], fits[name]), labels[: limits[name]].clone())
        for name, (split, rows, labels) in parts.items()
    }
    _same_shape(made, trained_larger=config.train_size is not None)
    return Splits(source.name, made["train"], made["valid"], made["test"], tuple(source.classes[k] for k in keep))


def class_numbers(names: Sequence[str], chosen: Sequence[int | str] | None) -> list[int]:
    """The numbers of the ``chosen`` classes (given by number or name), in their order; all of them for None.

    Raises:
        InputError: a class that does not exist, one that is named twice, or fewer than two.
    """
    if chosen is None:
        return list(range(len(names)))
    numbers = []
    for item in chosen:
        if isinstance(item, str) and item not in names:
            raise unknown_name("class", item, names)
        number = names.index(item) if isinstance(item, str) else item
        if not 0 <= number < len(names):
            raise InputError(
                "classes",
                expected=f"numbers from 0 to {len(names) - 1}, or names",
                got=repr(item),
                fix=f"The classes are {', '.join(names[:20])}{', …' if len(names) > 20 else ''}.",
            )
        numbers.append(number)
    if len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise InputError(
            "classes", expected="two or more different classes", got=repr(list(chosen)), fix="Name each class once."
        )
    return numbers


def _ordered(kind: str, source: Source, raw: RawSplit, keep: list[int], purpose: str) -> tuple[Tensor, Tensor]:
    """Rows (n,) of ``raw`` that are of a class in ``keep``, in stratified order, and their new labels (n,)."""
    renumbered = torch.full((len(source.classes),), -1, dtype=torch.int64)
    renumbered[torch.tensor(keep)] = torch.arange(len(keep))
    labels = renumbered[raw.labels]
    rows = (labels >= 0).nonzero().flatten()
    if not len(rows):
        whose = "its" if len(keep) == len(source.classes) else "the chosen"
        raise InputError(
            f"data set {source.name}",
            expected=f"examples of {whose} classes in the {kind} split",
            got="none",
            fix="Choose other classes, or add examples.",
        )
    labels = labels[rows]
    order = stratified_order(labels, generator("cpu", SPLIT_SEED, "data", purpose))
    return rows[order], labels[order]


def share(count: int, fraction: float, name: str) -> int:
    """How many of ``count`` examples are ``fraction``: at least one, and one at least is left.

    Raises:
        InputError: there are fewer than two.
    """
    if count < 2:
        raise InputError(
            f"data set {name}",
            expected="enough training examples to choose validation examples from",
            got=str(count),
            fix="Add images, or give separate splits.",
        )
    return min(max(1, round(fraction * count)), count - 1)


def _same_shape(made: Mapping[str, Split], *, trained_larger: bool) -> None:
    expected = tuple(made["test"].images.shape[1:])
    for name in ("valid",) if trained_larger else ("valid", "train"):
        got = tuple(made[name].images.shape[1:])
        if got != expected:
            raise InputError(
                f"{name} images",
                expected=f"channels × height × width {expected} as in the test split",
                got=str(got),
                fix="Set size (and resize) to bring all images to one size.",
            )
