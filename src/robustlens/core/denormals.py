"""Gradients too small to matter, which cost a CPU many times what others do.

Where a network is sure of its answer, the cross-entropy's gradient at the logits is as small as e⁻⁹⁰. Numbers below
1.2·10⁻³⁸ are denormal in float32, and a convolution that goes backward over them takes several times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Below this an entry of the gradient at the logits is set to zero: ten decades above the first denormal number, so
#: that what the layers make of the rest stays normal, and far below what moves a float32 weight.
NEGLIGIBLE = 1e-28


def drop_denormals(logits: Tensor) -> None:
    """Let no entry below ``NEGLIGIBLE`` of the gradient at float32 ``logits`` (B, K) on a CPU go on backward."""
    if logits.requires_grad and logits.dtype == torch.float32 and logits.device.type == "cpu":
        logits.register_hook(_normal)  # type: ignore[no-untyped-call]


def _normal(grad: Tensor) -> Tensor:
    return grad.masked_fill(grad.abs() < NEGLIGIBLE, 0.0)
