"""How far images are from a decision boundary: what is certain, what is likely, and what an attack has shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import dual_size, nearest_on_segment
from robustlens.attacks.verify import evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.modes import untouched
from robustlens.core.types import Attack, Batch
from robustlens.linalg.lipschitz import Uncertified, pairwise_constants
from robustlens.linalg.rivals import rivals, strongest
from robustlens.results.panels import Floats
from robustlens.threats.lp import Lp

#: Radii of the balls that gradients are sampled in, as shares of the attack's distance.
SHARES = (0.25, 0.5, 0.75, 1.0)
#: Points at which gradients are computed together.
TOGETHER = 256
#: Halvings of the segment to the nearest adversarial image: a relative error of 2^−16.
HALVINGS = 16


class Nearest(NamedTuple):
    """An image (C, H, W), the nearest adversarial one, its label, the class it became, and their distance."""

    clean: Tensor
    adversarial: Tensor
    label: int
    became: int
    distance: float


@dataclass(frozen=True, eq=False)
class Distances:
    """Of every example, arrays (N,): whether it is ``right``, how far its class leads in logits, and its distance.

    ``lower`` is certified (NaN where nothing is), ``estimate`` rests on sampled gradients, ``upper`` on an adversarial
    image (NaN where no attack found one).
    """

    right: np.ndarray
    lead: Floats
    lower: Floats
    estimate: Floats
    upper: Floats

    @classmethod
    def joined(cls, parts: Sequence[Distances]) -> Distances:
        names = ("right", "lead", "lower", "estimate", "upper")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def signed(self) -> Floats:
        """The margin that attacks found: ``upper``, negative where the answer is wrong."""
        return np.where(self.right, self.upper, -self.upper)


def distances(
    model: nn.Module,
    batch: Batch,
    attacks: Sequence[Attack],
    constants: Tensor | None,
    *,
    most: int,
    samples: int,
    gen: Generator,
) -> tuple[Distances, list[Nearest]]:
    """Distances from the images of ``batch`` to the boundary of the class that the model *predicts*, and the pictures.

    ``attacks`` share one threat, whose radius spans the box; ``constants`` (K, K) come from ``certificate``.
    """
    x, threat = batch.x, attacks[0].threat
    assert isinstance(threat, Lp)
    with untouched(model), torch.no_grad():
        logits = model(x)
    top = logits.argmax(1)
    upper, x_adv = _upper(model, Batch(x, top, batch.index), attacks, gen)
    radius = torch.nan_to_num(upper, nan=threat.eps)
    with untouched(model):
        estimated = estimate(model, x, top, threat, radius, most, samples, gen)
        with torch.no_grad():
            became = model(x_adv).argmax(1)
    lower = torch.full_like(upper, torch.nan, dtype=torch.float64)
    if constants is not None:
        lower = _certified(logits.double(), top, constants.to(x.device)).clamp_max(threat.eps)
    right = top == batch.y
    nearest = [
        Nearest(x[i].cpu(), x_adv[i].cpu(), int(batch.y[i]), int(became[i]), float(upper[i]))
        for i in (right & ~upper.isnan()).nonzero()[:, 0].tolist()
    ]
    columns = (right, logit_margin(logits, top), lower, estimated, upper)
    right_, *rest = (column.cpu().numpy() for column in columns)
    return Distances(right_, *(values.astype(np.float64) for values in rest)), nearest


def certificate(model: nn.Module, x: Tensor, norm: str) -> Tensor | Uncertified:
    """Lipschitz constants (K, K) of the differences of logits in ``norm``, "l2" or "linf".

    For ℓ∞ the smaller of two: the network's own in ℓ∞, and √n times its constants in ℓ2, because ‖δ‖₂ ≤ √n ‖δ‖_∞.
    """
    spectral = pairwise_constants(model, x, 2)
    if norm == "l2":
        return spectral
    sums = pairwise_constants(model, x, math.inf)
    if isinstance(spectral, Uncertified):
        return sums
    wider = spectral * math.sqrt(x[0].numel())
    return wider if isinstance(sums, Uncertified) else sums.minimum(wider)


def _certified(logits: Tensor, top: Tensor, constants: Tensor) -> Tensor:
    """min_k (f_ŷ − f_k)(x) / L_ŷk (B,), ∞ for a rival whose lead cannot change."""
    leads = logits.gather(1, top[:, None]) - logits
    ratio = torch.where(leads > 0, leads / constants[top], 0.0)
    return ratio.scatter(1, top[:, None], torch.inf).amin(1)


def _upper(model: nn.Module, batch: Batch, attacks: Sequence[Attack], gen: Generator) -> tuple[Tensor, Tensor]:
    """The distance (B,) to the nearest adversarial image found, NaN for none, and that image (B, C, H, W)."""
    x, threat = batch.x, attacks[0].threat
    upper, nearest = torch.full_like(x[:, 0, 0, 0], torch.nan), x.clone()
    for attack in attacks:
        seen = evaluate(attack, model, batch, gen=gen)
        better = ~seen.robust & ~(seen.distance >= upper)
        upper, nearest = _where(better, seen.distance, upper), _where(better, seen.x_adv, nearest)
    with untouched(model), torch.no_grad():
        found = ~upper.isnan()
        point = nearest_on_segment(model, x, nearest, batch.y, steps=HALVINGS)
        point = threat.project(point, x)
        verified = found & (logit_margin(model(point), batch.y) <= 0)
        size = threat.distance(point, x)
    better = verified & (size < upper)
    return _where(better, size, upper), _where(better, point, nearest)


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (new.ndim - 1)), new, old)


def estimate(
    model: nn.Module, x: Tensor, top: Tensor, threat: Lp, radius: Tensor, most: int, samples: int, gen: Generator
) -> Tensor:
    """max_R min(min_k (f_ŷ − f_k)(x) / L_k(R), R) (B,) over the balls of SHARES · ``radius`` (B,).

    L_k(R) is the largest dual norm of ∇(f_ŷ − f_k) at x and at samples of that ball and of the smaller ones, which
    lie in it. Rivals are the ``most`` strongest at x. Samples leave the box, as the paper's do.
    """
    with torch.no_grad():
        logits = model(x)
    order = strongest(logits, top, most)
    leads = logits.gather(1, top[:, None]) - logits.gather(1, order)
    unit = threat.with_eps(1.0)
    steepest = _slope_sizes(model, x, top, order, threat)
    best = torch.zeros_like(radius)
    for share in SHARES:
        reach = share * radius
        left = max(1, samples // len(SHARES))
        while left:
            copies = min(left, max(1, TOGETHER // len(x)))
            point = x.repeat(copies, 1, 1, 1)
            point += reach.repeat(copies)[:, None, None, None] * unit.noise(point, gen)
            sizes = _slope_sizes(model, point, top.repeat(copies), order.repeat(copies, 1), threat)
            steepest = steepest.maximum(sizes.view(copies, *steepest.shape).amax(0))
            left -= copies
        flat = torch.where(leads > 0, leads / steepest, 0.0).amin(1)
        best = best.maximum(flat.minimum(reach))
    return best


def _slope_sizes(model: nn.Module, x: Tensor, top: Tensor, order: Tensor, threat: Lp) -> Tensor:
    """‖∇(f_ŷ − f_k)(x)‖_q (B, R) for the rivals k in ``order`` (B, R)."""
    _, slopes = rivals(model, x, top, order.shape[1], order)
    return dual_size(threat, slopes.flatten(0, 1)).view(order.shape)
