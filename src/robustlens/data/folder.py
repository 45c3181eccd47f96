"""A directory of images with one subdirectory per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from robustlens.data.decode import Encoded, decide_grey, read_image
from robustlens.data.raw import RawSplit, Source
from robustlens.data.tables import SPLIT_NAMES
from robustlens.results.errors import InputError, printable, unknown_name

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"})


def read_folder(directory: Path) -> Source:
    """``class/image`` or ``train/class/image``, ``test/class/image`` (``valid`` and its synonyms as well).

    Classes are numbered by the sorted names of the training split's directories.

    Raises:
        InputError: no images, or a class that the training split does not have.
    """
    inner = [path for path in sorted(directory.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    roots = {SPLIT_NAMES[path.name.lower()]: path for path in inner if path.name.lower() in SPLIT_NAMES}
    if "train" not in roots:
        roots = {"train": directory}
    found = {split: _images(root) for split, root in roots.items()}
    classes = sorted({name for name, _ in found["train"]})
    if not classes:
        raise InputError(
            f"image folder {roots['train']}",
            expected="a subdirectory of images for each class (or parquet files)",
            got="none",
            fix="Arrange the images as class-name/image.png.",
        )
    splits = {}
    for split, items in found.items():
        for name, _ in items:
            if name not in classes:
                raise unknown_name(f"class directory in {roots[split]}", name, classes)
        labels = torch.tensor([classes.index(name) for name, _ in items], dtype=torch.int64)
        splits[split] = labels, [path for _, path in items]
    grey = decide_grey(directory.name, {split: (_read(files), len(files)) for split, (_, files) in splits.items()})
    raw = {
        split: RawSplit(labels, Encoded(_read(files), _where(files), grey)) for split, (labels, files) in splits.items()
    }
    return Source(directory.name, raw, tuple(map(printable, classes)))


def _images(root: Path) -> list[tuple[str, Path]]:
    """(class, file) of every image below ``root``, sorted."""
    return [
        (path.relative_to(root).parts[0], path)
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
        and path.parent != root
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def _read(files: Sequence[Path]) -> Callable[[int], bytes]:
    return lambda row: read_image(files[row])


def _where(files: Sequence[Path]) -> Callable[[int], str]:
    return lambda row: str(files[row])
