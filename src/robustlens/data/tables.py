"""Tables of encoded images and labels (Hugging Face parquet files, Hub data sets) as a source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from robustlens.data.decode import Encoded, decide_grey, read_image
from robustlens.data.raw import RawSplit, Source
from robustlens.results.errors import InputError, printable, unknown_name
from robustlens.results.files import parse_json, read_table

#: A file that would become this many times its own size in memory is refused (small ones may): encoded images hardly
#: compress, so that it was made to fill the memory.
EXPANSION, SMALL = 100, 2**28

#: How a split is called, by the words that data sets use for it.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}


def read_parquet(directory: Path, image_column: str | None, label_column: str | None) -> Source:
    """A directory of parquet files as the Hugging Face Hub keeps them.

    The split of a file is in its name (``train-00000-of-00004.parquet``) or in its directory's
    (``train/0000.parquet``). Files that name none of training, validation and test are left out, unless no file does:
    then all of them are training data.

    Raises:
        InputError: a damaged file, files of several configurations, or no such column.
    """
    files: dict[str, list[Path]] = {}
    homes: set[Path] = set()
    for path in sorted(directory.rglob("*.parquet")):
        if not path.is_file():  # a pipe would wait for ever
            continue
        inside = path.parent != directory and path.parent.name.lower() in SPLIT_NAMES
        homes.add(path.parent.parent if inside else path.parent)
        named = path.parent.name if inside else re.split(r"[-_.]", path.name)[0]
        files.setdefault(SPLIT_NAMES.get(named.lower(), "other"), []).append(path)
    if files.keys() == {"other"}:
        files = {"train": files["other"]}
    if len(homes) > 1:
        names = sorted(str(home.relative_to(directory)) for home in homes)
        raise InputError(
            f"data set {directory}",
            expected="the parquet files of one configuration",
            got=f"several directories: {', '.join(names)}",
            fix=f"Give one of them, for example {directory / names[-1]}.",
        )
    tables: dict[str, pa.Table] = {}
    names_of: dict[str, list[str]] = {}
    for split in ("train", "valid", "test"):
        if split in files:
            parts = [_read_file(path, image_column, label_column) for path in files[split]]
            names_of |= _class_names(parts[0].schema.metadata)
            tables[split] = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
    return from_tables(directory.name, tables, names_of, image_column, label_column, (directory,))


def _read_file(path: Path, image_column: str | None, label_column: str | None) -> pa.Table:
    try:
        image, label = pick_columns(str(path), pq.read_schema(path).names, image_column, label_column)
        return read_table(path, [image, label], limit=max(SMALL, EXPANSION * path.stat().st_size))
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise InputError(
            str(path),
            expected="a readable parquet file",
            got=" ".join(str(error).split())[:160],
            fix="It is damaged or incomplete: copy or download it again.",
        ) from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column → class names, from the features that Hugging Face writes into a parquet file."""
    try:
        features = parse_json((metadata or {}).get(b"huggingface", b"{}").decode())["info"]["features"]
        return {
            column: [printable(str(name)) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, LookupError, TypeError, AttributeError):  # no names there: the labels' values name the classes
        return {}


def pick_columns(where: str, columns: Iterable[str], image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the image and the label column, given or found.

    Raises:
        InputError: there is none; names the columns that there are.
    """
    columns = list(columns)
    found = []
    for kind, given, usual in (("image", image, ("image", "img")), ("label", label, ("label", "fine_label"))):
        wanted = (given,) if given is not None else usual
        column = next((name for name in wanted if name in columns), None)
        if column is None:
            raise InputError(
                where,
                expected=f"{_article(kind)} {kind} column {' or '.join(map(repr, wanted))}",
                got=f"the columns {', '.join(map(repr, columns))}",
                fix=f"Set {kind}_column to the right one.",
            )
        found.append(column)
    return found[0], found[1]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def from_tables(
    name: str,
    tables: Mapping[str, pa.Table],
    names_of: Mapping[str, list[str]],
    image_column: str | None,
    label_column: str | None,
    homes: Sequence[Path],
) -> Source:
    """A source from one arrow table a split.

    ``names_of`` gives the class names of a label column; without them the classes are the values of the training
    split, sorted. Images that a table names by their path are read where that lies below one of ``homes``.

    Raises:
        InputError: no training split, no such column, labels that are missing or of no class, images of another type.
    """
    if "train" not in tables or not len(tables["train"]):
        raise InputError(
            f"data set {name}",
            expected="a training split with examples",
            got=f"the splits {', '.join(tables) or 'none'}" if "train" not in tables else "an empty one",
            fix="Name its files train-….parquet, or choose another data set.",
        )
    image, label = pick_columns(f"data set {name}", tables["train"].column_names, image_column, label_column)
    names = names_of.get(label)
    values = list(range(len(names))) if names else _values(name, tables["train"][label])
    reads = {split: _reader(name, table[image], homes) for split, table in tables.items()}
    grey = decide_grey(name, {split: (read, len(tables[split])) for split, read in reads.items()})
    splits = {}
    for split, table in tables.items():
        labels = _numbered(f"data set {name}, split {split}, column {label!r}", table[label], values)
        where = _where(name, split)
        splits[split] = RawSplit(labels, Encoded(reads[split], where, grey))
    return Source(name, splits, tuple(names or (printable(str(value)) for value in values)))


def _where(name: str, split: str) -> Any:
    return lambda row: f"data set {name}, split {split}, image {row}"


def _values(name: str, column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(
            f"data set {name}",
            expected="class numbers or names as labels",
            got=f"labels of type {kind}",
            fix="Set label_column to a column of integers or strings.",
        )
    values = sorted(pc.unique(column).drop_null().to_pylist())
    if values and not isinstance(values[0], str) and values[0] < 0:
        raise InputError(
            f"data set {name}",
            expected="class numbers from 0 on",
            got=f"the label {values[0]}",
            fix="It often means that an image has no label: remove those rows.",
        )
    return values


def _numbered(what: str, column: pa.ChunkedArray, values: list[Any]) -> Tensor:
    """Positions in ``values`` as int64 (N,)."""
    numbers = pc.index_in(column, value_set=pa.array(values, column.type))
    if numbers.null_count:
        row = int(np.flatnonzero(numbers.is_null().to_numpy())[0])
        value = column[row].as_py()
        if isinstance(value, str):
            raise unknown_name(f"label in {what}", value, values)
        raise InputError(
            what,
            expected=f"one of {len(values)} classes (from {values[0]} to {values[-1]})" if values else "labels",
            got=f"{value!r} in row {row}",
            fix="Correct or remove the row.",
        )
    return torch.from_numpy(numbers.to_numpy().astype(np.int64))


def _reader(name: str, column: pa.ChunkedArray, homes: Sequence[Path]) -> Any:
    """``row -> bytes`` of a column of ``{bytes, path}`` or of bytes."""
    kind = column.type
    paths = None
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        paths = pc.struct_field(column, "path") if kind.get_field_index("path") >= 0 else None
        column = pc.struct_field(column, "bytes")
        kind = column.type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(
            f"data set {name}",
            expected="an image column of encoded images ({bytes, path} or bytes)",
            got=f"type {kind}",
            fix="Set image_column to the column that holds them, or use from_arrays.",
        )

    def read(row: int) -> bytes:
        data = column[row].as_py()
        if data is None and paths is not None and paths[row].as_py() is not None:
            named = [(home, (home / paths[row].as_py()).resolve()) for home in homes]
            inside = [path for home, path in named if path.is_relative_to(home.resolve())]
            if not inside:
                raise ValueError("its path leads out of the data set")
            return read_image(inside[0])
        if data is None:
            raise ValueError("no bytes")
        return bytes(data)

    return read
