"""The training loop: one for every method, resumable to the bit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robustlens.attacks.verify import AttackBroken
from robustlens.core import discovery
from robustlens.core.rng import derive, forked, generator, seed_torch
from robustlens.core.signals import Terminated, whole
from robustlens.core.types import ROWS, Attack, Augmentation, Batch, Moment, Splits
from robustlens.core.world import World, one_batch
from robustlens.models.adapter import load_weights
from robustlens.results.errors import InputError, TrainingStopped
from robustlens.results.store import RunDirectory
from robustlens.train.checkpoint import require_finite, resume, save_state, save_weights
from robustlens.train.config import TrainingConfig
from robustlens.train.optimizer import make_optimizer, update_average
from robustlens.train.progress import Progress, Silent, Watch
from robustlens.train.recipe import Recipe
from robustlens.train.together import exchange, validate


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
    world: World | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return its per-epoch records; a run that was killed goes on where it stopped.

    At the end ``last.safetensors`` holds the final weights, ``best.safetensors`` those of the best robust accuracy
    under ``validation`` on the validation split (the test split is never read), ``epoch-<number>.safetensors`` those
    after the epochs in ``keep``, ``metrics.jsonl`` the records, of which
    the last says "stopped" and why where training ended early. The model is left with its last weights, in eval mode.
    Every random draw comes from ``seed`` and the step's number, so on one machine the result does not depend on
    interruptions. The processes of ``world`` share every batch; their leader alone writes, in a directory that all
    can read.

    Raises:
        TrainingStopped: the loss or a weight is not finite; the last good checkpoint is kept.
        InputError: no training or no validation examples, a network that lacks what the recipe needs, a checkpoint
            of another architecture, or a batch that the processes cannot share.
    """
    world = world or World()
    if config.batch_size % world.size or min(config.batch_size, len(splits.train)) < 2 * world.size > 2:
        raise InputError(
            "training.batch_size",
            expected=f"a multiple of {world.size} processes, two training images or more for each",
            got=str(config.batch_size),
            fix=f"Set it to {max(2, round(config.batch_size / world.size)) * world.size}, or start other processes.",
        )
    for name, split in (("training", splits.train), ("validation", splits.valid)):
        if not len(split):
            raise InputError(f"{name} split", expected="examples", got="none", fix="Give training images.")
    recipe.check(model, splits.train.batch(torch.arange(min(4, len(splits.train)))).x)
    return _Trainer(model, splits, recipe, config, seed, run, validation, keep, watch or Silent(), world).run_all()


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
        world: World,
    ) -> None:
        self.model, self.data, self.recipe, self.config = model, splits, recipe, config
        self.seed, self.run, self.validation, self.keep, self.watch = seed, run, validation, keep, watch
        self.world, self.due, self.ends = world, False, False
        self.batch: Batch | None = None  # at hand; that of full-batch training is made once
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
            self.memory |= {name: rows[self.world.rank :: self.world.size] for name, rows in self._rows().items()}
        self.world.same(self.model)
        synchronised = self.config.batch_norm == "synchronised"
        together = whole() if self.world.size > 1 else nullcontext()  # a signal ends all of them at the same step
        with (
            forked(),
            one_batch(self.model, self.world, synchronised=synchronised),
            together,
        ):
            try:
                while self.now.epoch < self.config.epochs and not self.now.stopped:
                    self._epoch()
            except (KeyboardInterrupt, Terminated) as error:
                everyone = self.world.size == 1 or isinstance(error, Terminated)
                if self.between_steps and (everyone or not self._rows()):  # rows need everyone
                    with whole():
                        self._save()
                raise
            self.world.wait()
        load_weights(self.model, self.run.path / "last.safetensors")
        self.model.eval()
        return self.now.records

    @contextmanager
    def _unit(self) -> Iterator[None]:
        """What is inside is done to its end, or no state is saved: nothing can go on from the middle of it."""
        with whole():
            self.between_steps = False
            yield
            self.between_steps = True

    def _epoch(self) -> None:
        now, size = self.now, self.config.batch_size
        gen = generator("cpu", self.seed, "order", now.epoch)
        n = len(self.data.train)
        parts = torch.split(torch.randperm(n, generator=gen) if size < n else torch.arange(n), size)
        if len(parts) > 1 and len(parts[-1]) < 2 * self.world.size <= size:
            parts = parts[:-1]  # BatchNorm has no variance over a single example
        total = len(parts) * self.config.epochs
        started = time.monotonic()
        before = now.seconds
        self.model.train()
        if now.step == len(parts):  # it was stopped before the epoch's end was done
            last = self.world.divisible(parts[-1])
            self._prepared(last, now.epoch + (now.step - 1) / len(parts), number=now.step - 1)
        for step in range(now.step, len(parts)):
            with self._unit():
                self._steps(parts[step], now.epoch + step / len(parts), number=step)
                now.step = step + 1
                now.seconds = before + time.monotonic() - started
            if self.ends:
                raise Terminated
            self.watch.step(now.epoch * len(parts) + now.step, total, now.loss_sum / now.seen)
            if self.due and now.step < len(parts):
                self._save()
        self._finish_epoch(before + time.monotonic() - started)

    def _steps(self, index: Tensor, progress: float, *, number: int) -> None:
        """Every step that the update takes on the batch ``index`` (B,), of which this process has its share."""
        index = self.world.divisible(index)
        batch, gen = self._prepared(index, progress, number=number)
        for _ in range(self.recipe.update.replays):
            self._step(batch, gen, len(index), number=number)

    def _prepared(self, index: Tensor, progress: float, *, number: int) -> tuple[Batch, torch.Generator]:
        """The share of the batch as it is learned from, the step's generator, and the step's learning rate set."""
        config, now = self.config, self.now
        if self.batch is None or len(index) < len(self.data.train):
            self.batch = self.data.train.batch(self.world.share(index))
        batch = self.batch
        gen = self.world.generator(self.device, self.seed, "step", now.epoch, number, examples=len(index))
        seed_torch(self.device, derive(self.seed, "dropout", now.epoch, number))
        x = batch.x
        for augmentation in self.augment:
            x = augmentation.augment(x, gen=gen)
        self.image = x[:1]
        moment = Moment(progress, config.epochs, len(self.data.train), self.memory, self.world)
        rate = config.optimizer.lr * config.schedule.scale(progress, config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return Batch(x, batch.y, batch.index, moment), gen

    def _step(self, batch: Batch, gen: torch.Generator, n: int, *, number: int) -> None:
        config, now = self.config, self.now
        self.optimizer.zero_grad(set_to_none=True)
        recipe = self.recipe
        try:
            terms = recipe.update.backward(self.model, recipe.objective, recipe.regularizers, batch, gen=gen)
        except AttackBroken as error:
            raise self._stopped(f"the attack failed ({error})", number) from error
        asks = self.world.leads and time.monotonic() - self.saved >= config.checkpoint_seconds
        found = exchange(self.world, self.model, terms, batch.y, asks=asks)
        self.due, self.ends = found.asked, found.ends
        if not math.isfinite(found.loss):
            raise self._stopped(f"the loss is {found.loss}", number)
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self._constrain("step", now.facts)
        if self.average is not None:
            update_average(self.average, self.model, config.averaging or 0.0)
        now.loss_sum += found.loss * n
        now.correct += round(found.accuracy * n)
        now.seen += n
        for name, value in found.parts.items():
            now.parts[name] = now.parts.get(name, 0.0) + value * n

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
        with self._unit():
            require_finite(self.model, f"epoch {now.epoch + 1}, step {now.step}")
            if not now.constrained:  # else it was stopped during the validation
                self._constrain("epoch", now.facts)
                now.constrained = True
        validated = self._validate() if config.validates(now.epoch + 1) else {}  # may be broken off, and begun again
        told = bool(validated) or config.validate_every != "log"
        with self._unit():
            if told:
                self._record(seconds, validated)
            now.epoch, now.step, now.loss_sum, now.correct, now.seen, now.parts = now.epoch + 1, 0, 0.0, 0, 0, {}
            now.constrained = False
            if now.epoch in self.keep or (config.snapshots and validated):
                self._keep(f"epoch-{now.epoch}", now.epoch)
            now.seconds = 0.0 if told else seconds
            if told and self.world.leads:
                self.run.write_metrics(now.records)
            if told or self.due:
                self._save()
        if told:
            self.watch.epoch(now.records[-1])

    def _record(self, seconds: float, validated: dict[str, float]) -> None:
        """Write down the epoch and what its validation found, keep weights, and decide whether to stop."""
        now = self.now
        record: dict[str, Any] = {
            "epoch": now.epoch + 1,
            "loss": now.loss_sum / now.seen,
            "accuracy": now.correct / now.seen,
            **{name: value / now.seen for name, value in now.parts.items()},
            **now.facts,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        now.records.append(record)
        for name in now.judge(record, validated, self.config) if validated else ["last"]:
            self._keep(name, now.epoch + 1)

    def _keep(self, name: str, epoch: int) -> None:
        if self.world.leads:
            save_weights(self.kept, self.run.path / f"{name}.safetensors", {"epoch": epoch})

    def _validate(self) -> dict[str, float]:
        seed_torch(self.device, derive(self.seed, "validate", self.now.epoch))  # of a network that draws at random
        split, size = self.data.valid.first(self.config.validation_examples), max(self.config.batch_size, 250)
        return validate(
            self.kept, split, self.validation, seed=self.seed, epoch=self.now.epoch, batch_size=size, world=self.world
        )

    def _rows(self) -> dict[str, Tensor]:
        """What plug-ins remember for each example of a batch."""
        return {name: rows for name, rows in self.memory.items() if name.startswith(ROWS)}

    def _save(self) -> None:
        require_finite(self.model, f"epoch {self.now.epoch + 1}, step {self.now.step}")
        memory = self.memory | {name: self.world.gather(rows) for name, rows in self._rows().items()}
        if self.world.leads:
            save_state(
                self.state_file,
                model=self.model,
                optimizer=self.optimizer,
                average=self.average,
                memory=memory,
                facts=vars(self.now),
            )
        self.saved = time.monotonic()
