"""The cross-entropy of each image as a function of the image: its slope there, and its value nearby.

All passes are made in the mode that the model is in, so that the surface is the one the step trains on: in train mode
BatchNorm normalises by the batch at hand (which couples its examples), and neighbours share the dropout masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.core.modes import still
from robustlens.core.types import Crafted, Terms


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(logits)_y (B,), one per example."""
    return F.cross_entropy(logits, y, reduction="none")


def slope(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """∇_x ℓ(x, y) (B, C, H, W) and ℓ(x, y) (B,), both detached; the model is left as it was. One input pass."""
    point = x.detach().requires_grad_()
    with torch.enable_grad(), still(model):
        height = losses(model(point), y)
        (grad,) = torch.autograd.grad(height.sum(), point)
    return grad, height.detach()


def clean_logits(model: nn.Module, crafted: Crafted, terms: Terms) -> Tensor:
    """Logits (B, K) of the clean images: the objective's, or those of a pass of one's own that leaves no trace."""
    if terms.clean_logits is not None:
        return terms.clean_logits
    with still(model):
        logits: Tensor = model(crafted.batch.x)
    return logits


def nearby_and_clean_logits(model: nn.Module, near: Tensor, crafted: Crafted, terms: Terms) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of ``near`` (B, C, H, W) and of the clean images under the same dropout masks.

    Other masks would make a difference that does not vanish as ``near`` approaches x. The objective's clean logits
    serve where the network draws nothing at random; otherwise the clean images go through it again.
    """
    with still(model):
        before = _random_state(near)
        logits: Tensor = model(near)
        drew = not torch.equal(before, _random_state(near))
    if terms.clean_logits is not None and not drew:
        return logits, terms.clean_logits
    with still(model):
        clean: Tensor = model(crafted.batch.x)
    return logits, clean


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ (B,) of images (B, C, H, W)."""
    return (a * b).flatten(1).sum(1)


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
