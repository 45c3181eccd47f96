"""A few seconds of every fuzz target, and what its corpus keeps; for long: ``python -m tests.fuzz --minutes 10``."""

from __future__ import annotations

import pytest
from fuzz.corpus import CORPUS
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings

from robustlens.results.errors import InputError

#: Made-up inputs of each target in the normal suite.
TRIED = {"study": 60, "directory": 30, "page": 12}


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_failed_is_a_result_or_one_error(name: str) -> None:
    for kept in CORPUS[name]:
        TARGETS[name].check(kept)


@pytest.mark.parametrize("name", TARGETS)
def test_made_up_inputs_are_a_result_or_one_error(name: str) -> None:
    @settings(
        max_examples=TRIED[name],
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(TARGETS[name].strategy)
    def one(made_up: object) -> None:
        TARGETS[name].check(made_up)

    one()


@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_find_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is none of ours, one of two lines, or a file that nobody asked for fails a target."""
    reader = {"study": "make_plan", "directory": "read_runs", "page": "write_page"}[name]

    def raising(error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(f"fuzz.targets.{reader}", fail)

    escaping = InputError("a", expected="b", got="c", fix="d")
    escaping.args = ("two\nlines",)
    for error in (KeyError("a"), escaping):
        raising(error)
        with pytest.raises((KeyError, AssertionError)):
            TARGETS[name].check(CORPUS[name][0])
