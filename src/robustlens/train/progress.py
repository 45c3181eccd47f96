"""Where a training run stands, and who watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from robustlens.train.config import TrainingConfig
from robustlens.train.together import ROBUST


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

    def judge(self, record: dict[str, Any], validated: Mapping[str, float], config: TrainingConfig) -> list[str]:
        """Add what a validation found to the epoch's last ``record``; say which weights it is time to keep.

        Decides which epoch is the best so far, and whether training stops here.
        """
        before = next((r[ROBUST] for r in reversed(self.records) if ROBUST in r), None)
        record |= validated
        epoch, robust = record["epoch"], record[ROBUST]
        if config.collapse_watch is not None:
            record["collapse_gap"] = record["accuracy"] - robust
            if before is not None and before - robust > config.collapse_watch:
                record["stopped"] = self.stopped = (
                    f"catastrophic overfitting: the robust accuracy on validation images fell from {before:.1%} to "
                    f"{robust:.1%}; the weights before epoch {epoch} are kept"
                )
                return []
        better = robust > self.best
        if better:
            self.best, self.best_epoch, self.since_best = robust, epoch, 0
        else:
            self.since_best += 1
        if self.since_best == config.patience and epoch < config.epochs:
            record["stopped"] = self.stopped = (
                f"early stopping: no better robust accuracy on validation images since epoch {self.best_epoch}"
            )
        return ["best", "last"] if better else ["last"]
