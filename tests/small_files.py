"""Small data sets in parquet files, in the schema that Hugging Face writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(n: int, h: int = 6, w: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (n, h, w) if channels == 1 else (n, h, w, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path,
    images: list[bytes] | np.ndarray,
    labels: list[Any],
    *,
    columns: tuple[str, str] = ("image", "label"),
    names: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """A parquet file in the schema that Hugging Face writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": i if isinstance(i, bytes) else png(i), "path": None} for i in images]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({columns[0]: pa.array(cells, kind), columns[1]: labels, **(extra or {})})
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def small(directory: Path, n: int = 40, channels: int = 3, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """A set of ``n`` training and ten test images of two classes; returns the training images and labels."""
    x, y = pixels(n, channels=channels), np.arange(n) % 2
    write(directory / "train-00000-of-00001.parquet", x, y.tolist(), **more)
    write(directory / "test-00000-of-00001.parquet", pixels(10, channels=channels, seed=1), [0, 1] * 5, **more)
    return x, y
