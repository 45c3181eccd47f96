"""Where a training run stands, and who watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Watch(Protocol):
    """Someone who watches a run: called after every step and every epoch."""

    def step(self, done: int, total: int, loss: float) -> None: ...

    def epoch(self, record: Mapping[str, Any]) -> None: ...


class Silent:
    """Watches nothing."""

    def step(self, done: int, total: int, loss: float) -> None:
        return None

    def epoch(self, record: Mapping[str, Any]) -> None:
        return None


@dataclass
class Progress:
    """Where a run stands; everything else about it follows from its seed."""

    epoch: int = 0
    step: int = 0
    constrained: bool = False  # by what is applied at the epoch's end
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0
    since_best: int = 0
    stopped: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
