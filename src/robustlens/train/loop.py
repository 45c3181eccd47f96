"""The training loop: one for every method, resumable to the bit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustlens.attacks.verify import AttackBroken, evaluate
from robustlens.core import discovery
from robustlens.core.modes import untouched
from robustlens.core.rng import derive, generator
from robustlens.core.signals import Terminated, whole
from robustlens.core.types import Attack, Augmentation, Batch, Moment, Split, Splits
from robustlens.models.adapter import load_weights
from robustlens.results.errors import InputError, TrainingStopped
from robustlens.results.store import RunDirectory
from robustlens.train.checkpoint import require_finite, resume, save_state, save_weights
from robustlens.train.config import TrainingConfig
from robustlens.train.optimizer import make_optimizer, update_average
from robustlens.train.recipe import Recipe

ROBUST = "valid_robust_accuracy"


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


def train(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    config: TrainingConfig,
    *,
    seed: int,
    run: RunDirectory,
    validation: Attack,
    keep: Collection[int] = (),
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return its per-epoch records; a run that was killed goes on where it stopped.

    At the end ``last.safetensors`` holds the final weights, ``best.safetensors`` those of the best robust accuracy
    under ``validation`` on the validation split (the test split is never read), ``epoch-<number>.safetensors`` those
    after the epochs in ``keep``, ``metrics.jsonl`` the records, of which
    the last says "stopped" and why where training ended early. The model is left with its last weights, in eval mode.
    Every random draw comes from ``seed`` and the step's number, so on one machine the result does not depend on
    interruptions.

    Raises:
        TrainingStopped: the loss or a weight is not finite; the last good checkpoint is kept.
        InputError: no training or no validation examples, a network that lacks what the recipe needs, or a checkpoint
            of another architecture.
    """
    for name, split in (("training", splits.train), ("validation", splits.valid)):
        if not len(split):
            raise InputError(f"{name} split", expected="examples", got="none", fix="Give training images.")
    recipe.check(model, splits.train.batch(torch.arange(min(4, len(splits.train)))).x)
    return _Trainer(model, splits, recipe, config, seed, run, validation, keep, watch or Silent()).run_all()


class _Trainer:
    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        recipe: Recipe,
        config: TrainingConfig,
        seed: int,
        run: RunDirectory,
        validation: Attack,
        keep: Collection[int],
        watch: Watch,
    ) -> None:
        self.model, self.data, self.recipe, self.config = model, splits, recipe, config
        self.seed, self.run, self.validation, self.keep, self.watch = seed, run, validation, keep, watch
        self.device = splits.train.labels.device
        self.optimizer = make_optimizer(model, config)
        self.average = copy.deepcopy(model).requires_grad_(False) if config.averaging else None
        self.augment: list[Augmentation] = [discovery.build("augmentation", a) for a in config.augment]
        self.state_file = run.path / "state.safetensors"
        self.now = Progress()
        self.memory: dict[str, Tensor] = {}
        self.between_steps = True
        self.saved = time.monotonic()

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and stored."""
        return self.model if self.average is None else self.average

    def run_all(self) -> list[dict[str, Any]]:
        there = resume(self.state_file, model=self.model, optimizer=self.optimizer, average=self.average)
        if there is not None:
            facts, self.memory = there
            self.now = Progress(**facts)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            try:
                while self.now.epoch < self.config.epochs and not self.now.stopped:
                    self._epoch()
            except (KeyboardInterrupt, Terminated):
                if self.between_steps:
                    with whole():
                        self._save()
                raise
        load_weights(self.model, self.run.path / "last.safetensors")
        self.model.eval()
        return self.now.records

    def _epoch(self) -> None:
        now, size = self.now, self.config.batch_size
        gen = generator("cpu", self.seed, "order", now.epoch)
        parts = torch.split(torch.randperm(len(self.data.train), generator=gen), size)
        if len(parts) > 1 and len(parts[-1]) == 1 < size:  # BatchNorm has no variance over a single example
            parts = parts[:-1]
        total = len(parts) * self.config.epochs
        started = time.monotonic()
        before = now.seconds
        self.model.train()
        if now.step == len(parts):  # it was stopped before the epoch's end was done
            self._prepared(
                self.data.train.batch(parts[-1]), now.epoch + (now.step - 1) / len(parts), number=now.step - 1
            )
        for step in range(now.step, len(parts)):
            with whole():
                self.between_steps = False
                self._steps(self.data.train.batch(parts[step]), now.epoch + step / len(parts), number=step)
                now.step = step + 1
                now.seconds = before + time.monotonic() - started
                self.between_steps = True
            self.watch.step(now.epoch * len(parts) + now.step, total, now.loss_sum / now.seen)
            if time.monotonic() - self.saved >= self.config.checkpoint_seconds and now.step < len(parts):
                self._save()
        self.between_steps = False
        self._finish_epoch(before + time.monotonic() - started)
        self.between_steps = True

    def _steps(self, batch: Batch, progress: float, *, number: int) -> None:
        """Every step that the update takes on one batch."""
        batch, gen = self._prepared(batch, progress, number=number)
        for _ in range(self.recipe.update.replays):
            self._step(batch, gen, number=number)

    def _prepared(self, batch: Batch, progress: float, *, number: int) -> tuple[Batch, torch.Generator]:
        """The batch as it is learned from, the step's generator, and the step's learning rate set."""
        config, now = self.config, self.now
        gen = generator(self.device, self.seed, "step", now.epoch, number)
        torch.manual_seed(derive(self.seed, "dropout", now.epoch, number))
        x = batch.x
        for augmentation in self.augment:
            x = augmentation.augment(x, gen=gen)
        self.image = x[:1]
        moment = Moment(progress, config.epochs, len(self.data.train), self.memory)
        rate = config.optimizer.lr * config.schedule.scale(progress, config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return Batch(x, batch.y, batch.index, moment), gen

    def _step(self, batch: Batch, gen: torch.Generator, *, number: int) -> None:
        config, now = self.config, self.now
        self.optimizer.zero_grad(set_to_none=True)
        recipe = self.recipe
        try:
            terms = recipe.update.backward(self.model, recipe.objective, recipe.regularizers, batch, gen=gen)
        except AttackBroken as error:
            raise self._stopped(f"the attack failed ({error})", number) from error
        loss = terms.loss.item()
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}", number)
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self._constrain("step", now.facts)
        if self.average is not None:
            update_average(self.average, self.model, config.averaging or 0.0)
        now.loss_sum += loss * len(batch)
        now.correct += int((terms.logits.detach().argmax(1) == batch.y).sum())
        now.seen += len(batch)
        for name, value in terms.parts.items():
            now.parts[name] = now.parts.get(name, 0.0) + float(value.detach()) * len(batch)

    def _stopped(self, why: str, number: int) -> TrainingStopped:
        return TrainingStopped(
            f"Training stopped: {why} in epoch {self.now.epoch + 1}, step {number + 1}. The last good checkpoint is "
            "kept. Try a smaller learning rate, training.grad_clip = 1.0, or a smaller radius."
        )

    def _constrain(self, moment: str, facts: dict[str, float]) -> None:
        for constraint in self.recipe.constraints:
            if constraint.every == moment:
                facts |= constraint.apply(self.model, self.image)

    def _finish_epoch(self, seconds: float) -> None:
        now, config = self.now, self.config
        require_finite(self.model, f"epoch {now.epoch + 1}, step {now.step}")
        self._constrain("epoch", now.facts)
        told = config.validates(now.epoch + 1) or config.validate_every != "log"
        if told:
            self._record(seconds)
        now.epoch, now.step, now.loss_sum, now.correct, now.seen, now.parts = now.epoch + 1, 0, 0.0, 0, 0, {}
        if now.epoch in self.keep or (config.snapshots and config.validates(now.epoch)):
            save_weights(self.kept, self.run.path / f"epoch-{now.epoch}.safetensors", {"epoch": now.epoch})
        now.seconds = 0.0 if told else seconds
        if told:
            self.run.write_metrics(now.records)
        if told or time.monotonic() - self.saved >= config.checkpoint_seconds:
            self._save()
        if told:
            self.watch.epoch(now.records[-1])

    def _record(self, seconds: float) -> None:
        """Validate where it is time, keep weights, and decide whether to stop."""
        now, config = self.now, self.config
        epoch = now.epoch + 1
        record: dict[str, Any] = {
            "epoch": epoch,
            "loss": now.loss_sum / now.seen,
            "accuracy": now.correct / now.seen,
            **{name: value / now.seen for name, value in now.parts.items()},
            **now.facts,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        now.records.append(record)
        if config.validates(epoch):
            before = next((r[ROBUST] for r in reversed(now.records) if ROBUST in r), None)
            record |= self._validate()
            if config.collapse_watch is not None:
                record["collapse_gap"] = record["accuracy"] - record[ROBUST]
                if before is not None and before - record[ROBUST] > config.collapse_watch:
                    record["stopped"] = now.stopped = (
                        f"catastrophic overfitting: the robust accuracy on validation images fell from {before:.1%} to "
                        f"{record[ROBUST]:.1%}; the weights before epoch {epoch} are kept"
                    )
                    return
            if record[ROBUST] > now.best:
                now.best, now.best_epoch, now.since_best = record[ROBUST], epoch, 0
                save_weights(self.kept, self.run.path / "best.safetensors", {"epoch": epoch})
            else:
                now.since_best += 1
            if now.since_best == config.patience and epoch < config.epochs:
                record["stopped"] = now.stopped = (
                    f"early stopping: no better robust accuracy on validation images since epoch {now.best_epoch}"
                )
        save_weights(self.kept, self.run.path / "last.safetensors", {"epoch": epoch})

    def _validate(self) -> dict[str, float]:
        gen = generator(self.device, self.seed, "validate", self.now.epoch)
        torch.manual_seed(derive(self.seed, "validate", self.now.epoch))  # of a network that draws at random
        split = self.data.valid.first(self.config.validation_examples)
        return validate(self.kept, split, self.validation, gen=gen, batch_size=max(self.config.batch_size, 250))

    def _save(self) -> None:
        require_finite(self.model, f"epoch {self.now.epoch + 1}, step {self.now.step}")
        save_state(
            self.state_file,
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            memory=self.memory,
            facts=vars(self.now),
        )
        self.saved = time.monotonic()


def validate(
    model: nn.Module, split: Split, attack: Attack, *, gen: torch.Generator, batch_size: int
) -> dict[str, float]:
    """Clean loss, clean accuracy and robust accuracy (right before and after ``attack``) on ``split``."""
    loss = clean = robust = 0.0
    with untouched(model):
        for batch in split.batches(batch_size):
            found = evaluate(attack, model, batch, gen=gen)
            loss += float(nn.functional.cross_entropy(found.clean_logits, batch.y, reduction="sum"))
            clean += int(found.clean_correct.sum())
            robust += int(found.robust.sum())
    n = len(split)
    return {"valid_loss": loss / n, "valid_accuracy": clean / n, ROBUST: robust / n}
