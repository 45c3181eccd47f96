"""Files that anybody may have written, read within bounds: a small file can neither hang a reader nor fill its memory.

Callers turn OSError, ValueError and pyarrow's errors into an InputError that says what the file is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Bytes of the largest JSON file.
LARGEST = 2**26
#: Bytes in memory of the largest table of a panel.
LARGEST_TABLE = 2**28
#: Levels of the deepest settings: far more than any have, far fewer than Python's recursion allows.
DEEPEST = 64
#: Most rows of a table that are looked at together, and bytes that a row is counted as at least.
_PIECE, _ROW = 256, 32
#: JSON's way to write a control character other than white space, behind an even number of backslashes.
_CONTROL = re.compile(r"(?<!\\)((?:\\\\)*)\\u00(?:0[0-8bBeEfF]|1[0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])")


def read_json(path: Path) -> Any:
    """The JSON file ``path``, as ``parse_json`` reads it; raises OSError or ValueError."""
    return parse_json(read_text(path))


def read_text(path: Path) -> str:
    """The regular file ``path`` (a pipe would wait for ever) as UTF-8, at most LARGEST bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no regular file {path.name}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} is larger than {LARGEST:,} bytes")
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Plain values whose strings can be shown and written again.

    Control characters, which could steer a terminal, become "�"; whole numbers beyond a double are infinite.

    Raises:
        ValueError: no JSON, more than DEEPEST levels, or half a surrogate pair.
    """
    text = _CONTROL.sub(r"\1�", text)
    try:
        value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    require_shallow(value)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def require_shallow(value: Any) -> None:
    """Raise ValueError if lists and mappings are nested more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def read_table(path: Path, columns: Sequence[str] | None = None, *, limit: int = LARGEST_TABLE) -> pa.Table:
    """The parquet file ``path``, at most ``limit`` bytes of it in memory, whatever it claims and however it is packed.

    Raises:
        OSError, ValueError, pa.ArrowException: no regular file, a damaged one, or one that becomes larger.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no regular file {path.name}")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where it has some
        facts = file.metadata
        claimed = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
        pieces, size = [], max(claimed, _ROW * facts.num_rows)
        if size <= limit:
            rows, size = max(1, min(_PIECE, limit // max(claimed, 1))), 0  # one value can be all that is claimed
            for piece in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                pieces.append(piece)
                size += piece.nbytes
                if size > limit:
                    break
        if size > limit:
            raise ValueError(f"its {path.stat().st_size:,} bytes would become more than {limit:,} in memory")
        schema = file.schema_arrow
        kept = schema if columns is None else pa.schema([schema.field(name) for name in columns], schema.metadata)
        return pa.Table.from_batches(pieces, kept)
