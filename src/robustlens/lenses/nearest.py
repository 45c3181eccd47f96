"""The training image nearest to the decision boundary, as far as an attack can tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from robustlens.attacks.pgd import PGD
from robustlens.attacks.smallest import nearest_on_segment
from robustlens.attacks.verify import craft
from robustlens.core.criterion import logit_margin
from robustlens.core.modes import untouched
from robustlens.core.types import Split, Subject
from robustlens.lenses.passes import batches
from robustlens.threats.lp import Lp

#: Images that are attacked, those with the smallest linearised distance.
CANDIDATES = 20
#: Halvings of the segment between an image and what changes its answer.
HALVINGS = 40


class Nearest(NamedTuple):
    """Image ``x`` (1, C, H, W), the point ``beyond`` (1, C, H, W) across the boundary, and their ℓ2 ``distance``."""

    x: Tensor
    beyond: Tensor
    distance: float


def nearest_boundary(subject: Subject, split: Split, order: Tensor, size: int, gen: Generator) -> Nearest | None:
    """An upper bound of the smallest ℓ2 distance from the images at ``order`` to where the *predicted* class is a tie.

    The images with the smallest margin / ‖∇ margin‖ are attacked (PGD on the margin, 20 steps) in balls that double
    until one answer changes or ties; each segment to a point found is then halved down to the boundary. None: not even
    a ball of the box's diameter changes an answer.

    Raises:
        AttackBroken: the attack returned NaN.
    """
    model, images, reach = subject.model, [], []
    with untouched(model):
        for batch in batches(subject, split, order, size):
            point = batch.x.detach().clone().requires_grad_()
            with torch.enable_grad():
                logits = model(point)
                margin = logit_margin(logits, logits.argmax(1))
            (slope,) = torch.autograd.grad(margin.sum(), point)
            images.append(batch.x)
            reach.append(margin.detach() / slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny))
        steep = torch.cat(reach)
        chosen = steep.argsort()[:CANDIDATES]
        x = torch.cat(images)[chosen]
        with torch.no_grad():
            answer = model(x).argmax(1)
        diameter = x[0].numel() ** 0.5
        radius = min(max(float(steep.min()), 1e-6 * diameter), diameter)
        while True:
            attack = PGD(threat=Lp("l2", radius), steps=20, loss="margin", random_start=False, early_stop=True)
            x_adv = craft(attack, model, x, answer, gen=gen)
            with torch.no_grad():
                changed = logit_margin(model(x_adv), answer) <= 0
            if bool(changed.any()) or radius == diameter:
                break
            radius = min(2 * radius, diameter)
        if not bool(changed.any()):
            return None
        x, beyond = x[changed], nearest_on_segment(model, x[changed], x_adv[changed], answer[changed], steps=HALVINGS)
    distance = (beyond - x).flatten(1).norm(dim=1)
    best = int(distance.argmin())
    return Nearest(x[[best]], beyond[[best]], float(distance[best]))
