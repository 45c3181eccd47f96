"""Several attacks one after the other, each on what is still right: the worst case per example, over any data.

An evaluation that was killed is not lost: with a ``state`` directory every finished batch is kept, with its adversarial
images, and the same call goes on from there. Draws are seeded by (seed, attack, chunk, batch), so that it ends where
the uninterrupted evaluation ends.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from robustlens.attacks.tries import room
from robustlens.attacks.verify import AttackBroken, evaluate
from robustlens.core.allocator import keep_freed_memory
from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import describe
from robustlens.core.modes import channels_last, untouched
from robustlens.core.rng import generator
from robustlens.core.types import Attack, Batch
from robustlens.core.world import World
from robustlens.results.errors import DamageWarning, InputError
from robustlens.results.seal import UNSEALED, is_damaged, sealed
from robustlens.results.store import digest, write_atomically

#: Values of ``broken_by`` beside the position of an attack in the line-up.
WRONG_BEFORE, STANDS = -1, -2

#: Told after every batch: (chunk, attack's name, batches done of it, its batches, examples of the chunk that stand).
Told = Callable[[int, str, int, int, int], None]


@dataclass(frozen=True, eq=False)
class WorstCase:
    """What became of n examples.

    Attributes:
        attacks: names in the order in which they ran.
        index: (n,) positions in the split.
        broken_by: (n,) position of the attack that broke an example, WRONG_BEFORE or STANDS.
        distance: (n,) to the adversarial image in the threat's norm, NaN where there is none.
    """

    attacks: tuple[str, ...]
    index: Tensor
    broken_by: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def right(self, attack: int) -> Tensor:
        """Which (n,) are right after the first ``attack`` + 1 attacks; −1 stands for the clean images."""
        return (self.broken_by == STANDS) | (self.broken_by > attack)

    def right_after(self, attack: int) -> int:
        """How many those are."""
        return int(self.right(attack).sum())


def worst_case(
    attacks: Sequence[Attack],
    model: nn.Module,
    chunks: Iterable[Batch],
    *,
    seed: int,
    batch_size: int = 250,
    state: Path | None = None,
    told: Told | None = None,
    world: World | None = None,
) -> WorstCase:
    """Run ``attacks`` in order over every chunk, each on the examples that nothing has broken yet.

    The process keeps memory that tensors have freed (``core.allocator``).

    Args:
        attacks: on one threat.
        chunks: batches of any size, from memory or from a stream; one is held at a time. A thousand examples keep the
            batches of the later attacks full.
        batch_size: examples attacked together.
        state: directory where every finished batch is kept. A chunk that is complete there is not computed again.
        told: called after every batch.

    Warns:
        DamageWarning: a chunk's file is damaged, and the chunk is begun again.

    Raises:
        InputError: the directory holds another evaluation.
        AttackBroken: an attack returned NaN or another shape, or the model answers NaN.
    """
    settings = {"attacks": [describe(attack) for attack in attacks], "seed": seed, "batch_size": batch_size}
    index, broken_by, distance = [], [], []
    world = world or World()
    keep_freed_memory()
    for number, batch in enumerate(chunks):
        if number % world.size != world.rank:
            continue
        with channels_last(model, batch.x), room(batch_size):
            chunk = _Chunk.begin(number, batch, model, settings, state)
            chunk.finish(attacks, model, seed, batch_size, told)
        index.append(chunk.index)
        broken_by.append(chunk.broken_by)
        distance.append(chunk.distance)
    names = tuple(name_of(attack) for attack in attacks)
    return WorstCase(names, *(torch.cat(parts) if parts else torch.empty(0) for parts in (index, broken_by, distance)))


def name_of(attack: Attack) -> str:
    """The attack's name, with its loss where it has a choice."""
    loss = getattr(attack, "loss", None)
    return attack.name if loss is None else f"{attack.name}-{loss}"


@dataclass(eq=False)
class _Chunk:
    """One chunk and how far its evaluation is: ``attack`` is the position of the next, ``batch`` that of its batch."""

    number: int
    batch: Batch
    broken_by: Tensor
    distance: Tensor
    x_adv: Tensor
    file: Path | None
    address: str
    position: int = 0
    done: int = 0

    @property
    def index(self) -> Tensor:
        return self.batch.index.cpu()

    @classmethod
    def begin(cls, number: int, batch: Batch, model: nn.Module, settings: dict[str, Any], state: Path | None) -> _Chunk:
        with untouched(model), torch.no_grad():
            logits = torch.cat([model(x) for x in torch.split(batch.x, settings["batch_size"])])
        if not bool(torch.isfinite(logits).all()):
            raise AttackBroken("The model's answers to the clean images are not finite numbers.")
        right = logit_margin(logits, batch.y) > 0
        broken_by = torch.where(right, STANDS, WRONG_BEFORE).cpu()
        address = digest(settings | {"images": _hash(batch.x), "labels": _hash(batch.y), "answers": _hash(logits)})
        file = None if state is None else state / f"chunk-{number:06}.safetensors"
        nowhere = torch.full((len(batch),), torch.nan)
        chunk = cls(number, batch, broken_by, nowhere, batch.x.cpu().clone(), file, address)
        chunk.restore()
        return chunk

    def finish(
        self, attacks: Sequence[Attack], model: nn.Module, seed: int, batch_size: int, told: Told | None
    ) -> None:
        """Attack what is left of it."""
        device = self.batch.x.device
        for position in range(self.position, len(attacks)):
            attack = attacks[position]
            # Those that this attack itself broke before a restart stood when it began: its batches stay the same.
            standing = ((self.broken_by == STANDS) | (self.broken_by == position)).nonzero()[:, 0]
            if len(standing) == 0:
                break
            parts = torch.split(standing, batch_size)
            for number, rows in enumerate(parts):
                if number < self.done:
                    continue
                gen = generator(device, seed, "worst-case", position, attack.name, self.number, number)
                there = rows.to(device)
                part = Batch(self.batch.x[there], self.batch.y[there], self.batch.index[there])
                seen = evaluate(attack, model, part, gen=gen)
                fell = ~seen.robust.cpu()
                self.broken_by[rows[fell]] = position
                self.distance[rows[fell]] = seen.distance.cpu()[fell].float()
                self.x_adv[rows[fell]] = seen.x_adv.cpu()[fell]
                self.position, self.done = position, number + 1
                self.save()
                if told is not None:
                    standing_now = int((self.broken_by == STANDS).sum())
                    told(self.number, name_of(attack), number + 1, len(parts), standing_now)
            self.position, self.done = position + 1, 0
        self.save()

    def save(self) -> None:
        """Keep what is known; adversarial images of broken examples alone."""
        if self.file is None:
            return
        broken = (self.broken_by >= 0).nonzero()[:, 0]
        tensors = {
            "index": self.index,
            "label": self.batch.y.cpu(),
            "broken_by": self.broken_by,
            "distance": self.distance,
            "broken": broken,
            "x_adv": self.x_adv[broken].contiguous(),
        }
        where = {"address": self.address, "position": self.position, "done": self.done}
        write_atomically(self.file, sealed(save(tensors, {"state": json.dumps({**UNSEALED, **where})})))

    def restore(self) -> None:
        """Take up what the file holds, if there is one."""
        if self.file is None or not self.file.is_file():
            return
        what = f"state file {self.file}"
        try:
            if is_damaged(self.file.read_bytes()):
                raise ValueError("other content than was written")
            with safe_open(self.file, framework="pt") as stored:
                where = json.loads(stored.metadata()["state"])
                tensors = {key: stored.get_tensor(key).clone() for key in ("broken_by", "distance", "broken", "x_adv")}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{what}: {error}. This chunk is evaluated again.", DamageWarning, stacklevel=2)
            return
        if where["address"] != self.address:
            raise InputError(
                what,
                expected="the same network, images, attacks, seed and batch size",
                got="those of another evaluation",
                fix="Choose another state directory, or delete this one to begin again.",
            )
        self.broken_by, self.distance = tensors["broken_by"], tensors["distance"]
        self.x_adv[tensors["broken"]] = tensors["x_adv"]
        self.position, self.done = where["position"], where["done"]


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
