"""Losses that an attack climbs, one value (B,) per example: summed, never averaged, so that B does not matter."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from robustlens.core.criterion import logit_margin
from robustlens.results.errors import InputError

LossName = Literal["ce", "margin", "dlr", "kl", "squared", "label-flip"]

#: Losses that compare with the logits of the clean image. They have zero gradient there: start at random.
RELATIVE: frozenset[LossName] = frozenset({"kl", "squared"})


def attack_loss(
    name: LossName, logits: Tensor, y: Tensor, clean: Tensor | None = None, *, inverse_temperature: float = 1.0
) -> Tensor:
    """The loss ``name`` (B,) of ``logits`` (B, K); ``clean`` (B, K) are the logits at x, for the relative ones.

    ce          −log softmax(βz)_y, β = ``inverse_temperature``
    margin      max_{j≠y} z_j − z_y (Carlini & Wagner 2017), whose gradient cannot saturate
    dlr         −(z_y − max_{j≠y} z_j) / (z_(1) − z_(3)), invariant to shift and scale (Croce & Hein 2020, eq. 6)
    kl          KL(softmax(z_clean) ‖ softmax(z)) (Zhang et al. 2019)
    squared     ½ ‖z − z_clean‖₂² (Roth et al. 2020, Theorem 1)
    label-flip  max_j z_j − z_y, the limit of ce / β for β → ∞: its gradient is e_max − e_y (Roth et al. 2020, A.3),
                zero where y is predicted; there the direction of ce's gradient tends to that of margin

    Raises:
        InputError: dlr with fewer than 3 classes.
    """
    logits = logits.float() if logits.element_size() < 4 else logits
    if name == "ce":
        scaled = logits if inverse_temperature == 1 else inverse_temperature * logits
        return F.cross_entropy(scaled, y, reduction="none")
    if name == "margin":
        return -logit_margin(logits, y)
    if name == "label-flip":
        return logits.max(1).values - logits.gather(1, y[:, None])[:, 0]
    if name == "dlr":
        if logits.shape[1] < 3:
            raise InputError(
                "attack loss dlr",
                expected="at least 3 classes",
                got=str(logits.shape[1]),
                fix='Use loss = "margin", which is the same up to scale.',
            )
        ranked = logits.topk(3, dim=1).values
        return -logit_margin(logits, y) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
    assert clean is not None
    if name == "kl":
        return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none").sum(1)
    return 0.5 * (logits - clean).square().sum(1)


def targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_(1) − ½ (z_(3) + z_(4))) (B,); ``labels`` (B, 2) are y and t (Croce & Hein 2020, eq. 7).

    With 3 classes the divisor is z_(1) − z_(3). With 2 it is 1: no logit is left to measure the scale by.
    """
    logits = logits.float() if logits.element_size() < 4 else logits
    lead = logits.gather(1, labels[:, :1]) - logits.gather(1, labels[:, 1:])
    ranked = logits.topk(min(4, logits.shape[1]), dim=1).values
    if ranked.shape[1] < 3:
        return -lead[:, 0]
    return -lead[:, 0] / (ranked[:, 0] - (ranked[:, 2] + ranked[:, -1]) / 2 + 1e-12)
