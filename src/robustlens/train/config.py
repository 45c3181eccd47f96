"""How a network is trained, as typed settings with safe defaults."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


#: Numbers as they are: neither true nor "3" is one; whole ones as far as torch counts.
Whole = Annotated[int, Strict(), Field(lt=2**63)]
Real = Annotated[float, Strict()]
Share = Annotated[Real, Field(ge=0, lt=1)]


class SGD(Settings):
    """Stochastic gradient descent with (Nesterov) momentum.

    ``scalar_lr`` multiplies the learning rate of parameters that are a single number: Fixup trains its scalar biases
    with 0.1 (Zhang et al. 2019, arXiv 1901.09321, the authors' code).
    """

    name: Literal["sgd"] = "sgd"
    lr: Real = Field(0.05, gt=0)
    momentum: Real = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: Real = Field(0.0, ge=0)
    scalar_lr: Real = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("a momentum > 0 with nesterov")
        return self


class Adam(Settings):
    """Adam; ``weight_decay`` is added to the gradient."""

    name: Literal["adam"] = "adam"
    lr: Real = Field(1e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Real = Field(0.0, ge=0)


class AdamW(Settings):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: Real = Field(1e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Real = Field(0.01, ge=0)


class RMSprop(Settings):
    """RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    lr: Real = Field(1e-4, gt=0)
    alpha: Real = Field(0.99, gt=0, lt=1)
    momentum: Real = Field(0.0, ge=0, lt=1)
    weight_decay: Real = Field(0.0, ge=0)


class Constant(Settings):
    """The learning rate as it is."""

    name: Literal["constant"] = "constant"

    def scale(self, progress: float, epochs: int) -> float:
        return 1.0


class Step(Settings):
    """Multiply by ``gamma`` every ``every`` epochs."""

    name: Literal["step"] = "step"
    every: Whole = Field(30, ge=1)
    gamma: Real = Field(0.1, gt=0)

    def scale(self, progress: float, epochs: int) -> float:
        return self.gamma ** (int(progress) // self.every)


class MultiStep(Settings):
    """Multiply by ``gamma`` at each of the epochs ``milestones``."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[Real, ...]
    gamma: Real = Field(0.1, gt=0)

    def scale(self, progress: float, epochs: int) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)


class Cosine(Settings):
    """Half a cosine from 1 to 0, after ``warmup`` epochs of linear growth."""

    name: Literal["cosine"] = "cosine"
    warmup: Real = Field(0.0, ge=0)

    def scale(self, progress: float, epochs: int) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        span = max(epochs - self.warmup, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / span))


class OneCycle(Settings):
    """Linear from 0 up to 1 at ``peak`` (a share of all epochs) and down to 0 at the end."""

    name: Literal["one-cycle"] = "one-cycle"
    peak: Real = Field(0.4, gt=0, lt=1)

    def scale(self, progress: float, epochs: int) -> float:
        share = progress / epochs
        return share / self.peak if share < self.peak else (1 - share) / (1 - self.peak)


Optimizer = Annotated[SGD | Adam | AdamW | RMSprop, Field(discriminator="name")]
Schedule = Annotated[Constant | Step | MultiStep | Cosine | OneCycle, Field(discriminator="name")]


class TrainingConfig(Settings):
    """One training run.

    Attributes:
        epochs, batch_size: the last, smaller batch of an epoch is used too, unless it is a single example.
        optimizer: sgd, adam, adamw or rmsprop with its own fields; sgd where no name is given.
        schedule: of the learning rate, as a function of the (fractional) epoch.
        grad_clip: largest ℓ2 norm of the whole gradient; None leaves it alone.
        averaging: decay of an exponential moving average of the weights, which is then what is validated and kept.
        augment: augmentations by name or settings, in order.
        validate_every: epochs between validations (the last epoch is always validated). "log" validates after 1, 2, 5,
            10, 20, 50, … epochs and writes nothing in between, for gradient descent over very many epochs.
        snapshots: keep the weights of every validated epoch, as ``epoch-<number>.safetensors``.
        patience: stop after that many validations without a better robust accuracy (early stopping).
        collapse_watch: stop when the robust accuracy on validation images falls by more than this share from one
            validation to the next, and keep the weights before (catastrophic overfitting of single-step training).
        validation_examples: how many validation images the attack is run on.
        batch_norm: on several processes, "local" normalises by the examples of each, "synchronised" by the whole batch,
            as one process would. While an attack crafts, its objective's ``craft_mode`` decides: "eval" freezes it.
        checkpoint_seconds: time between checkpoints inside an epoch; there is one at every epoch's end anyway.
    """

    epochs: Whole = Field(10, ge=1)
    batch_size: Whole = Field(128, ge=1)
    optimizer: Optimizer = SGD()
    schedule: Schedule = Constant()
    grad_clip: Real | None = Field(None, gt=0)
    averaging: Real | None = Field(None, gt=0, lt=1)
    augment: tuple[str | dict[str, object], ...] = ()
    validate_every: Annotated[Whole, Field(ge=1)] | Literal["log"] = 1
    snapshots: bool = False
    patience: Whole | None = Field(None, ge=1)
    collapse_watch: Real | None = Field(None, gt=0, lt=1)
    validation_examples: Whole = Field(1000, ge=1)
    batch_norm: Literal["local", "synchronised"] = "local"
    checkpoint_seconds: Real = Field(60.0, ge=0)

    def validates(self, epoch: int) -> bool:
        """Whether there is a validation after ``epoch`` epochs."""
        if epoch == self.epochs:
            return True
        if self.validate_every == "log":
            leading = str(epoch).rstrip("0")
            return leading in ("1", "2", "5")
        return epoch % self.validate_every == 0

    @field_validator("optimizer", mode="before")
    @classmethod
    def _sgd_where_unnamed(cls, value: Any) -> Any:
        return {"name": "sgd", **value} if isinstance(value, dict) else value
