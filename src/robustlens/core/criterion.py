"""Cross-entropy and the logit margin, shared by objectives, attacks and lenses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the batch of −log softmax(logits)_y (scalar); logits (B, K), labels (B,)."""
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − max_{j≠y} z_j (B,): positive exactly where the prediction is right and unique."""
    true = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf)
    return true - others.amax(1)
