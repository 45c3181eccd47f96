"""What the processes of a training run tell each other: gradients after each step, sums after a validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlens.attacks.verify import evaluate
from robustlens.core.modes import untouched
from robustlens.core.signals import Terminated, asked
from robustlens.core.types import Attack, Split, Terms
from robustlens.core.world import World

ROBUST = "valid_robust_accuracy"


@dataclass(frozen=True)
class Stepped:
    """A step on a whole batch: its mean loss, its share of right answers, the loss's parts.

    ``asked`` says whether a process asked for something, such as a checkpoint, which all then do; ``ends`` whether a
    signal asked one of several processes to end, which all then do too.
    """

    loss: float
    accuracy: float
    parts: dict[str, float]
    asked: bool
    ends: bool


def exchange(world: World, model: nn.Module, terms: Terms, y: Tensor, *, asks: bool) -> Stepped:
    """Replace gradients and BatchNorm's statistics by their means over the processes, and say what the step found."""
    right = float((terms.logits.detach().argmax(1) == y).sum()) / len(y)
    told = [float(asks), float(world.size > 1 and asked())]
    found = [terms.loss.item(), right, *told, *(float(part.detach()) for part in terms.parts.values())]
    if world.size > 1:
        weights = [p for p in model.parameters() if p.requires_grad]
        reached = [p.grad is not None for p in weights]
        numbers = torch.tensor([*found, *reached], dtype=torch.float64, device=y.device)
        for p in weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        statistics = [
            buffer
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")
        ]
        world.average([*(p.grad for p in weights if p.grad is not None), *statistics, numbers])
        found, anywhere = numbers[: len(found)].tolist(), numbers[len(found) :].tolist()
        for p, share in zip(weights, anywhere, strict=True):
            p.grad = p.grad if share else None
    loss, accuracy, checkpoint, end, *parts = found
    return Stepped(loss, accuracy, dict(zip(terms.parts, parts, strict=True)), checkpoint > 0, end > 0)


def validate(
    model: nn.Module, split: Split, attack: Attack, *, seed: int, epoch: int, batch_size: int, world: World
) -> dict[str, float]:
    """Clean loss, clean accuracy and robust accuracy (right before and after ``attack``) on ``split``.

    Raises:
        Terminated: a signal asked one of several processes to end; raised in all of them, before the same batch.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=split.labels.device)
    with untouched(model):
        for number, index in enumerate(torch.split(torch.arange(len(split)), batch_size)):
            if world.size > 1:
                ends = torch.tensor([float(asked())], device=split.labels.device)
                world.average([ends])
                if ends.item() > 0:
                    raise Terminated
            batch = split.batch(world.share(index))
            gen = world.generator(split.labels.device, seed, "validate", epoch, number, examples=len(index))
            found = evaluate(attack, model, batch, gen=gen)
            loss = nn.functional.cross_entropy(found.clean_logits, batch.y, reduction="sum")
            sums += torch.stack((loss.double(), found.clean_correct.sum().double(), found.robust.sum().double()))
    world.average([sums])
    mean_loss, clean, robust = (sums * world.size / len(split)).tolist()
    return {"valid_loss": mean_loss, "valid_accuracy": clean, ROBUST: robust}
