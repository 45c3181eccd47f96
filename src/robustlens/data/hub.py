"""Data sets of the Hugging Face Hub, through `datasets`, which downloads once and keeps a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustlens.data.raw import Source
from robustlens.data.tables import SPLIT_NAMES, from_tables
from robustlens.results.errors import InputError

#: Bare name → Hub id (and configuration) of the sets that the papers use.
WELL_KNOWN = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}


def read_hub(name: str, image_column: str | None, label_column: str | None) -> Source:
    """The data set ``owner/name`` or ``owner/name:configuration``.

    Raises:
        InputError: no such data set, no data files in it, a configuration that is missing or unknown, or the Hub cannot
            be reached.
    """
    import datasets  # here, because it is slow to import and most sources do without it
    import huggingface_hub

    identifier, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(identifier, configuration or None)
    except FileNotFoundError as error:
        raise InputError(
            f"data set {identifier!r}",
            expected="the id of a public data set on the Hugging Face Hub, with data files in it",
            got=_line(error),
            fix="Check the spelling; for a local directory write its path, such as ./my-images.",
        ) from error
    except ValueError as error:  # a configuration that is missing or unknown
        raise InputError(
            f"data set {identifier!r}",
            expected="a configuration that it has",
            got=_line(error),
            fix=f"Write {identifier}:configuration.",
        ) from error
    except Exception as error:  # the network fails in many ways, and each library has its own word for it
        raise InputError(
            f"data set {identifier!r}",
            expected="the Hugging Face Hub to answer",
            got=f"{type(error).__name__} ({_line(error)})",
            fix="Without a network, give the path of a directory of its parquet files, or put it in ROBUSTLENS_DATA.",
        ) from error
    tables: dict[str, Any] = {}
    names_of: dict[str, list[str]] = {}
    for split, data in found.items():
        if split in SPLIT_NAMES:
            tables[SPLIT_NAMES[split]] = data.with_format("arrow")[:]
            names_of |= {c: f.names for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)]
    return from_tables(name, tables, names_of, image_column, label_column, caches)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
