"""The words of the house as types: what travels between data, attacks, objectives, updates and lenses."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.world import World
from robustlens.results.reading import Reading

#: How names in a moment's memory begin that hold one row for each example of a batch.
ROWS = "rows/"


@dataclass(frozen=True, eq=False)
class Moment:
    """Where in a training run a batch stands, and what plug-ins carry from one step to the next.

    Attributes:
        epoch: epochs done, fractional; 0 at the start.
        epochs: where the run ends.
        examples: how many training images there are; ``Batch.index`` counts in them.
        memory: "<plug-in>/<what>" → tensor, part of every checkpoint. A plug-in replaces a tensor there; it never
            changes one in place, because an update that tries a step first works on a copy of this mapping. A name
            that starts with "rows/" holds a row for each example of the batch, the others what all processes share.
        world: the processes that share the batch; a gradient that a step is judged by is averaged over them.
    """

    epoch: float = 0.0
    epochs: float = 1.0
    examples: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    world: World = field(default_factory=World)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images ``x`` (B, C, H, W) float in [0, 1], labels ``y`` (B,) int64, positions ``index`` (B,) in the split."""

    x: Tensor
    y: Tensor
    index: Tensor
    moment: Moment = field(default_factory=Moment)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Crafted:
    """What one training step learns from: the clean batch and the inputs ``x_adv`` (B, C, H, W) crafted from it.

    ``x_adv`` is ``batch.x`` itself where nothing was crafted. ``notes`` are per-example facts (B,) that the objective's
    ``craft`` found and its ``loss`` needs.
    """

    batch: Batch
    x_adv: Tensor
    notes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Terms:
    """A differentiable ``loss`` (scalar), the ``logits`` (B, K) of ``x_adv``, and the loss's named parts for the log.

    ``clean_logits`` (B, K) are those of the clean images, where the objective computed them.
    """

    loss: Tensor
    logits: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    clean_logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """A whole data split in memory, on one device.

    ``images`` is uint8 (N, C, H, W), or float32 in [0, 1] where the source was; ``labels`` is int64 (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Batch:
        """The examples at ``index`` (B,), as float images in [0, 1]."""
        index = index.to(self.labels.device)
        x = self.images[index]
        x = x / 255 if x.dtype == torch.uint8 else x
        return Batch(x, self.labels[index], index)

    def batches(self, size: int, *, order: Tensor | None = None) -> Iterator[Batch]:
        """Consecutive batches of at most ``size``, in file order or in ``order`` (a permutation)."""
        order = torch.arange(len(self)) if order is None else order
        for part in torch.split(order, size):
            yield self.batch(part)

    def first(self, n: int | None) -> Split:
        """The first ``n`` examples (all of them for None)."""
        return self if n is None or n >= len(self) else Split(self.images[:n], self.labels[:n])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 over pixels and labels."""
        sha = hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes())
        sha.update(self.labels.cpu().numpy().tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: its training, validation and test split, and the names of its classes."""

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        c, h, w = self.test.images.shape[1:]
        return c, h, w

    def to(self, device: torch.device | str) -> Splits:
        return Splits(self.name, self.train.to(device), self.valid.to(device), self.test.to(device), self.classes)

    def as_tested(self) -> Splits:
        """With the middle of training images that are larger than the test images, to be cropped at random."""
        (_, h, w), (height, width) = self.shape, self.train.images.shape[2:]
        top, left = (height - h) // 2, (width - w) // 2
        if min(top, left) < 0 or (height, width) == (h, w):
            return self
        middle = self.train.images[..., top : top + h, left : left + w]
        return dataclasses.replace(self, train=Split(middle, self.train.labels))


@runtime_checkable
class Threat(Protocol):
    """What the adversary may do to an image ``x`` in the box: stay within ``eps`` of it in one norm, and in the box."""

    @property
    def eps(self) -> float: ...

    def with_eps(self, eps: float) -> Self:
        """The same kind of threat at another radius."""
        ...

    def start(self, x: Tensor, gen: Generator) -> Tensor:
        """A random allowed point for each example."""
        ...

    def noise(self, x: Tensor, gen: Generator) -> Tensor:
        """A uniform draw from the ball around zero, shaped like ``x``; the box is not applied."""
        ...

    def ascend(self, grad: Tensor, *, floor: float = ...) -> Tensor:
        """The steepest-ascent direction of unit size for a gradient (B, C, H, W)."""
        ...

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest allowed point to ``x_adv``."""
        ...

    def support(self, grad: Tensor, x: Tensor) -> Tensor:
        """The allowed point with the largest inner product with ``grad``."""
        ...

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Distance (B,) in the threat's norm."""
        ...


@runtime_checkable
class Attack(Protocol):
    """A search inside ``threat``. Called only through ``attacks.verify``, which checks whatever it returns."""

    name: ClassVar[str]

    @property
    def threat(self) -> Threat: ...

    @property
    def passes(self) -> Passes:
        """What one call costs."""
        ...

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """What one step minimises: ``craft`` makes the inputs, ``loss`` can be evaluated on them at any weights.

    It may have ``check(model, x)``, called once with a network and a few images before training starts; it raises
    InputError where the network lacks something that the method needs. So may a regularizer. ``needs_craft = True``
    says that ``loss`` takes what its own ``craft`` made alone; an update that crafts by itself refuses it in its
    ``check_objective(objective)``.
    """

    name: ClassVar[str]

    @property
    def passes(self) -> Passes:
        """What a step costs: crafting, and the loss with its gradient."""
        ...

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted: ...

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms: ...


@runtime_checkable
class Regularizer(Protocol):
    """A weighted term that any objective can carry; ``penalty`` includes its weight.

    ``terms`` is what the objective computed in this step. A regularizer that differentiates with respect to the clean
    images says ``differentiates_input = True``: ``crafted.batch.x`` then requires a gradient, and where ``terms`` has
    ``clean_logits`` their graph reaches it. One that first searches for directions without gradient splits its
    ``penalty`` into ``search(model, crafted, *, gen)`` and ``value(model, crafted, terms, found)``.
    """

    name: ClassVar[str]

    @property
    def passes(self) -> Passes:
        """What it adds to a step of an objective that has the clean logits."""
        ...

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor: ...


@runtime_checkable
class Update(Protocol):
    """How a step is taken: leaves the gradient of the step in ``.grad`` and returns the terms at the old weights.

    Every batch is stepped on ``replays`` times.
    """

    name: ClassVar[str]

    @property
    def replays(self) -> int: ...

    def passes(self, objective: Passes, regularizers: Passes) -> Passes:
        """What all steps on one batch cost."""
        ...

    def backward(
        self,
        model: nn.Module,
        objective: Objective,
        regularizers: tuple[Regularizer, ...],
        batch: Batch,
        *,
        gen: Generator,
    ) -> Terms: ...


@runtime_checkable
class Constraint(Protocol):
    """A projection of the weights, after every step or at every epoch's end.

    ``x`` (1, C, H, W) is an image, from which the layers' sizes are learnt. Returned are facts for the epoch's record,
    such as the norm that was reached.
    """

    name: ClassVar[str]

    @property
    def every(self) -> Literal["step", "epoch"]: ...

    def apply(self, model: nn.Module, x: Tensor) -> Mapping[str, float]: ...


@runtime_checkable
class Architecture(Protocol):
    """A family of networks: ``build`` makes one with fresh weights, drawn from the global random state.

    ``shape`` is (channels, height, width) of an image in [0, 1]; the module maps (B, C, H, W) to logits (B, classes).
    Raises InputError for a shape or a number of classes that it cannot take.
    """

    name: ClassVar[str]

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module: ...


@runtime_checkable
class Augmentation(Protocol):
    """A random change of training images (B, C, H, W) float, on their device, drawn from ``gen``."""

    name: ClassVar[str]

    def augment(self, x: Tensor, *, gen: Generator) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Subject:
    """What a lens looks at: a model (in eval mode), the data it is measured on, and the threat that is assumed."""

    model: nn.Module
    splits: Splits
    threat: Threat
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


#: What may change without changing a measurement: all logits by a factor, z → c z, or how scale is shared between two
#: layers, (W₁, b₁, W₂) → (c W₁, c b₁, W₂ / c).
Invariance = Literal["logit scale", "weight rescaling"]
WEIGHT_SCALE: Final[frozenset[Invariance]] = frozenset(("weight rescaling",))
EITHER_SCALE: Final[frozenset[Invariance]] = WEIGHT_SCALE | {"logit scale"}


@runtime_checkable
class Lens(Protocol):
    """One measurement on a subject.

    ``invariances``, where it has them, are what its headline numbers do not depend on.
    """

    name: ClassVar[str]

    def look(self, subject: Subject, *, gen: Generator) -> Reading: ...


@runtime_checkable
class Resumable(Protocol):
    """A lens of long work, which keeps what it has done in the directory ``state`` and goes on from there."""

    def look_resumably(
        self, subject: Subject, *, gen: Generator, state: Path | None, told: Callable[..., None] | None
    ) -> Reading: ...


@runtime_checkable
class Followed(Protocol):
    """A lens whose readings after several epochs say more together: what they say, its quantities and its panels."""

    def follow(self, found: Sequence[tuple[int, Reading]]) -> Reading | None: ...
