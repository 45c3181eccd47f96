"""Fields below their least value and unknown names are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from robustlens.results.errors import InputError, require_at_least, unknown_name


@dataclass
class Part:
    name = "part"
    weight: float = 1.0
    steps: int | None = 1


def test_least_values() -> None:
    require_at_least(Part(weight=0.0, steps=1), weight=0, steps=1)
    require_at_least(Part(steps=None), steps=1)
    for weight, steps, said in (
        (-0.5, 1, "part weight: expected at least 0, got -0.5. Raise it."),
        (float("nan"), 1, "part weight: expected at least 0, got nan. Raise it."),
        (0.0, 0, "part steps: expected at least 1, got 0. Raise it."),
    ):
        with pytest.raises(InputError) as caught:
            require_at_least(Part(weight, steps), weight=0, steps=1)
        assert str(caught.value) == said


def test_the_nearest_name_may_have_been_begun_only() -> None:
    known = ["003-table1-mnist-cnn", "003-table1-mnist-mlp", "004-table1", "health"]
    for name, nearest in (
        ("003-tabel1", "003-table1-mnist-cnn"),
        ("003-table1-mnist-mpl", "003-table1-mnist-mlp"),
        ("004-tabel1", "004-table1"),
        ("helth", "health"),
    ):
        assert str(unknown_name("recipe", name, known)).endswith(f"Did you mean {nearest!r}?")


def test_a_terminal_without_our_letters() -> None:
    """What it cannot show becomes a question mark."""
    done = subprocess.run(
        [sys.executable, "-m", "robustlens", "list", "attack"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"apgd" in done.stdout and b"?" in done.stdout and not done.stderr
