"""``python -m tests.fuzz --minutes 10 [--only page]``: fuzz each target for that long; the first failure is printed."""

from __future__ import annotations

import argparse
import time

from hypothesis import HealthCheck, Phase, given, settings

from .targets import TARGETS, Target

#: Made-up inputs between two looks at the clock.
ROUND = 100


def fuzz(target: Target, minutes: float) -> int:
    """Try made-up inputs for ``minutes``; returns how many."""
    tried, end = 0, time.monotonic() + 60 * minutes

    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],  # a failure is printed as it was found: shrinking it can take longer than the search
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy)
    def one_round(made_up: object) -> None:
        nonlocal tried
        tried += 1
        target.check(made_up)

    while time.monotonic() < end:
        one_round()
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--only", choices=TARGETS, action="append")
    arguments = parser.parse_args()
    for name in arguments.only or TARGETS:
        started = time.monotonic()
        tried = fuzz(TARGETS[name], arguments.minutes)
        print(f"{name}: {tried:,} inputs in {(time.monotonic() - started) / 60:.1f} minutes, none failed", flush=True)


if __name__ == "__main__":
    main()
