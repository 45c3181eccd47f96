"""The optimizer that the settings describe, and the running average of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from robustlens.train.config import SGD, TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The torch optimizer that ``config.optimizer`` describes; ``scale`` of a group multiplies its learning rate."""
    choice = config.optimizer
    fields = choice.model_dump(exclude={"name", "scalar_lr"})
    weights = list(model.parameters())
    if isinstance(choice, SGD) and choice.scalar_lr != 1:
        scalars = [p for p in weights if p.numel() == 1]
        groups = [
            {"params": [p for p in weights if p.numel() > 1], "scale": 1.0},
            {"params": scalars, "scale": choice.scalar_lr},
        ]
        return torch.optim.SGD([group for group in groups if group["params"]], **fields)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    return kinds[choice.name]([{"params": weights, "scale": 1.0}], **fields)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights; buffers are copied."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
