"""The choke point: every attack is called through here, and nothing it claims is believed.

``craft`` guards, re-projects and checks the inputs that training learns from; ``evaluate`` also scores them with a
fresh forward pass in eval mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.modes import CraftMode, Precision, precision, untouched
from robustlens.core.rng import detour
from robustlens.core.types import Attack, Batch
from robustlens.linalg.frozen_convolutions import quick_gradients
from robustlens.linalg.frozen_linears import quick_linears
from robustlens.results.errors import RobustlensError

#: Rounding that a re-projected point may show, relative to eps (float32 norms over thousands of pixels).
SLACK = 1e-5


class AttackBroken(RobustlensError):
    """An attack returned something that no projection can mend (NaN, a wrong shape)."""


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack did to a batch, as measured from outside.

    ``x_adv`` (B, C, H, W) lies in the threat; ``distance`` (B,) is measured in its norm; ``clean_logits`` and
    ``logits`` (B, K) come from fresh forward passes in eval mode. ``clean_correct`` and ``robust`` (B,) are booleans;
    an example is robust when it is right before and after.
    """

    x_adv: Tensor
    distance: Tensor
    clean_logits: Tensor
    logits: Tensor
    clean_correct: Tensor
    robust: Tensor


def craft(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    gen: Generator,
    mode: CraftMode = "eval",
    precise: Precision = "float32",
) -> Tensor:
    """Adversarial inputs (B, C, H, W) for training: projected again, checked, detached; the model is untouched.

    ``mode`` is the model's mode while crafting (BatchNorm statistics are restored after "train"), ``precise`` the
    arithmetic of the attack's forward and backward passes. The forward pass that learns from the result scores it.
    """
    if attack.threat.eps == 0 or len(x) == 0:
        return x
    with (
        untouched(model, mode=mode),
        precision(precise, x.device),
        quick_gradients(model),
        quick_linears(model),
        detour(gen),
    ):
        x_adv = attack.perturb(model, x, y, gen=gen)
    return _checked(attack, x_adv, x)


def evaluate(attack: Attack, model: nn.Module, batch: Batch, *, gen: Generator) -> Attacked:
    """Attack ``batch`` and measure the outcome with the model in eval mode.

    Raises:
        AttackBroken: the attack returned NaN or another shape.
    """
    x, y = batch.x, batch.y
    x_adv = craft(attack, model, x, y, gen=gen)
    with untouched(model), torch.no_grad():
        clean_logits = model(x)
        logits = model(x_adv)
    clean_correct = logit_margin(clean_logits, y) > 0
    robust = clean_correct & (logit_margin(logits, y) > 0)
    return Attacked(x_adv, attack.threat.distance(x_adv, x), clean_logits, logits, clean_correct, robust)


@torch.no_grad()
def _checked(attack: Attack, x_adv: Tensor, x: Tensor) -> Tensor:
    threat, who = attack.threat, type(attack).__name__
    if x_adv.shape != x.shape:
        raise AttackBroken(f"{who} returned shape {tuple(x_adv.shape)} for images of shape {tuple(x.shape)}.")
    x_adv = threat.project(x_adv.detach().to(x.dtype), x)
    if not bool(torch.isfinite(x_adv).all()):
        raise AttackBroken(f"{who} returned NaN or infinite pixels; the model's gradients are probably not finite.")
    far = float((threat.distance(x_adv, x) - threat.eps).max())
    if far > SLACK * threat.eps + torch.finfo(x.dtype).eps:  # x + δ is rounded too, by what x's size asks for
        raise AttackBroken(f"{who}: a projected point lies {far:.2e} outside the radius {threat.eps}.")
    return x_adv
