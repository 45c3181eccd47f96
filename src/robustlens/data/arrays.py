"""Somebody's own arrays as a data set, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlens.core.rng import generator
from robustlens.core.types import Split, Splits
from robustlens.data.splitting import SPLIT_SEED, share, stratified_order
from robustlens.results.errors import InputError

#: More classes than any data set has; a label beyond them is a mistake.
MOST_CLASSES = 100_000
#: Part of the training arrays that becomes the validation split where none is given.
VALID_FRACTION = 0.1


def from_arrays(
    train: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None,
    *,
    valid: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> Splits:
    """Splits of (images, labels) pairs, numpy or torch.

    Images are (N, C, H, W), (N, H, W, C) with 1 or 3 channels, or (N, H, W); uint8 from 0 to 255, or floating point in
    [0, 1], kept as float32. Labels (N,) are whole numbers from 0 to K-1, where K is the number of ``classes``, or one
    more than the largest training label (test label without ``train``). Examples stay in their order.

    Without ``valid``, a tenth of the training examples, stratified by class and always the same, becomes the
    validation split. Without ``train`` the training split is empty, and so is the validation split unless given:
    enough for what looks at test images alone.

    Raises:
        InputError: one line that says what was expected, what came and what to do.
    """
    if test is None:
        raise InputError("test", expected="a pair (images, labels)", got="none", fix="Give test = (images, labels).")
    given = {"train": train, "test": test, "valid": valid}
    pairs = {split: pair for split, pair in given.items() if pair is not None}
    images = {split: _images(f"{split} images", pair[0]) for split, pair in pairs.items()}
    count = len(classes) if classes is not None else None
    labels: dict[str, Tensor] = {}
    for split, pair in pairs.items():
        labels[split] = _labels(f"{split} labels", pair[1], len(images[split]), count)
        count = int(labels[split].max()) + 1 if count is None else count
    if classes is None and "train" in labels:
        _all_used(labels["train"])
    for split in images:
        if images[split].shape[1:] != images["test"].shape[1:]:
            raise InputError(
                f"{split} images",
                expected=f"channels × height × width {tuple(images['test'].shape[1:])} as the test images have",
                got=str(tuple(images[split].shape[1:])),
                fix="Bring all splits to one size.",
            )
    splits = {split: Split(images[split], labels[split]) for split in images}
    nothing = Split(images["test"][:0], labels["test"][:0])
    if train is None:
        splits = {"train": nothing, "valid": nothing} | splits
    elif valid is None:
        order = stratified_order(labels["train"], generator("cpu", SPLIT_SEED, "data", "train"))
        cut = share(len(order), VALID_FRACTION, name)
        splits["valid"] = _rows(splits["train"], order[:cut])
        splits["train"] = _rows(splits["train"], order[cut:])
    names = tuple(map(str, classes if classes is not None else range(count or 0)))
    return Splits(name, splits["train"], splits["valid"], splits["test"], names)


def _rows(split: Split, rows: Tensor) -> Split:
    rows = rows.sort().values
    return Split(split.images[rows], split.labels[rows])


def _tensor(what: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise InputError(
            what,
            expected="a numpy array or torch tensor of numbers",
            got=f"{type(values).__name__} ({' '.join(str(error).split())[:100]})",
            fix="Stack them into one array first.",
        ) from error


def _images(what: str, values: Any) -> Tensor:
    """Checked images (N, C, H, W), uint8 or float32."""
    x = _tensor(what, values)
    shape = tuple(x.shape)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise InputError(
            what,
            expected="shape (N, C, H, W), (N, H, W, C) or (N, H, W)",
            got=str(shape),
            fix="Reshape flat rows to images, for example images.reshape(-1, 1, 28, 28).",
        )
    if not x.numel():
        raise InputError(what, expected="at least one image", got=f"shape {shape}", fix="Give a split with examples.")
    first, last = shape[1] in (1, 3) or len(shape) == 3, len(shape) == 4 and shape[3] in (1, 3)
    if first == last:
        raise InputError(
            what,
            expected="1 or 3 channels in second or in last place" + (", not in both" if first else ""),
            got=f"shape {shape}",
            fix="Transpose to (N, C, H, W)." if first else "Give grey-scale or RGB images.",
        )
    x = (x if first else x.permute(0, 3, 1, 2)).contiguous()
    _check_range(what, x)
    return x if x.dtype == torch.uint8 else x.float()


def _check_range(what: str, x: Tensor) -> None:
    if x.dtype == torch.uint8:
        if int(x.max()) == 1:
            raise InputError(
                what,
                expected="uint8 pixels from 0 to 255",
                got="a maximum of 1",
                fix="Multiply by 255, or give floating point in [0, 1].",
            )
        return
    if not x.is_floating_point():
        raise InputError(
            what, expected="uint8 or floating point", got=str(x.dtype), fix="Convert 0–255 pixels to uint8."
        )
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise InputError(what, expected="finite pixels", got=f"NaN or infinity in image {bad}", fix="Clean the images.")
    low, high = float(x.min()), float(x.max())
    if low < 0:
        fix = "They look normalised: give pixels in [0, 1], and put the normalisation into the model."
    elif high > 2:
        fix = "They look like 0–255: divide by 255, or convert to uint8."
    else:
        fix = "Clip them to [0, 1]."
    if low < 0 or high > 1:
        raise InputError(what, expected="pixels in [0, 1]", got=f"values from {low:.4g} to {high:.4g}", fix=fix)


def _labels(what: str, values: Any, images: int, count: int | None) -> Tensor:
    """Checked labels (N,) int64."""
    y = _tensor(what, values)
    if y.ndim != 1:
        raise InputError(
            what, expected="shape (N,)", got=str(tuple(y.shape)), fix="One-hot labels: give labels.argmax(axis=1)."
        )
    if len(y) != images:
        raise InputError(
            what, expected=f"{images} labels, one for each image", got=str(len(y)), fix="Give both in the same order."
        )
    whole = y.to(torch.int64)
    if y.is_complex() or y.dtype == torch.bool or not bool((whole == y).all()):
        raise InputError(
            what,
            expected="whole numbers",
            got=f"{y.dtype}" if y.dtype == torch.bool else f"values such as {y[whole != y][0].item()}",
            fix="Number the classes 0, 1, ….",
        )
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or high >= (MOST_CLASSES if count is None else count):
        last = str(count - 1) if count is not None else "K-1" if low < 0 else f"{MOST_CLASSES - 1:,} at most"
        raise InputError(
            what,
            expected=f"labels from 0 to {last}",
            got=f"values from {low} to {high}",
            fix="Renumber the classes 0, 1, …, or give the names of all classes.",
        )
    return whole


def _all_used(labels: Tensor) -> None:
    missing = (torch.bincount(labels) == 0).nonzero().flatten().tolist()
    if missing:
        raise InputError(
            "train labels",
            expected="an example of every class from 0 to the largest label",
            got=f"none of class {missing[0]}",
            fix="Renumber the classes 0, 1, …, or give the names of all classes.",
        )
