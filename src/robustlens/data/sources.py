"""From the settings of a data set to its splits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from robustlens.core.types import Splits
from robustlens.data.config import DataConfig
from robustlens.data.embedded import EMBEDDED
from robustlens.data.folder import read_folder
from robustlens.data.hub import WELL_KNOWN, read_hub
from robustlens.data.raw import Source
from robustlens.data.splitting import assemble
from robustlens.data.tables import read_parquet
from robustlens.results.errors import InputError, unknown_name

#: The environment variable that names a directory of data sets.
ROOT = "ROBUSTLENS_DATA"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def load(config: DataConfig | str) -> Splits:
    """The splits that ``config`` describes, or of the data set that it names; only images that are kept are decoded.

    Nothing but a Hub id that is not yet cached touches the network.

    Raises:
        InputError: an unknown source or class, damaged files or images, images of different sizes, an empty split.
    """
    config = DataConfig(source=config) if isinstance(config, str) else config
    return assemble(config, open_source(config))


def open_source(config: DataConfig) -> Source:
    """The data set that ``config.source`` names, unsplit and in the order of its files, labels read, images not yet.

    Raises:
        InputError: the source is unknown or its files cannot be used.
    """
    name = config.source
    if name in EMBEDDED:
        return EMBEDDED[name]()
    columns = config.image_column, config.label_column
    root = os.environ.get(ROOT)
    is_bare = re.fullmatch(r"[\w-][\w.-]*", name) is not None
    if is_bare and root and os.path.isdir(Path(root, name)):
        return read_directory(Path(root, name), *columns)
    if is_bare and name in WELL_KNOWN:
        return read_hub(WELL_KNOWN[name], *columns)
    if os.path.isdir(path := os.path.expanduser(name)):  # unlike pathlib's, false for what no path can be
        return read_directory(Path(path).resolve(), *columns)
    if _HUB_ID.fullmatch(name):
        return read_hub(name, *columns)
    if is_bare:
        local = [path.name for path in Path(root).iterdir() if path.is_dir()] if root and Path(root).is_dir() else []
        raise unknown_name("data set", name, {*EMBEDDED, *WELL_KNOWN, *local})
    got, fix = repr(name), "There is no such directory: check the path."
    if os.path.isfile(path):
        got, fix = f"the file {got}", "Give its directory."
    raise InputError("data set", expected="a directory, a Hub id (owner/name) or a known name", got=got, fix=fix)


def read_directory(directory: Path, image_column: str | None, label_column: str | None) -> Source:
    """A directory of parquet files if it holds any, otherwise an image folder."""
    if next(directory.rglob("*.parquet"), None) is not None:
        return read_parquet(directory, image_column, label_column)
    return read_folder(directory)
