"""The Hessian of an adversarial loss, with the adversary's answer to a change of the weights.

Let L(w) = (1/N) Σ_i max_δ ℓ(w, x_i + δ) with maximisers δ_i. By Danskin's theorem the gradient of L is that at frozen
δ_i. The Hessian is not: as w moves, δ_i follows, and (implicit function theorem, with the constraint in it)

    ∇²L = (1/N) Σ_i  ℓ_ww − ℓ_wδ P [P (ℓ_δδ − μ I) P]⁻¹ P ℓ_δw.

P projects on what the constraint leaves free: the pixels that neither the box nor an ℓ∞ ball holds, and in an ℓ2 ball
that is met the directions orthogonal to δ among them; there the sphere's curvature enters through its multiplier
μ = ⟨ℓ_δ, δ⟩ / ‖δ‖² over those pixels. At a strict maximum the bracket is negative definite, so the second
term only adds. An ℓ∞ adversary in a corner leaves nothing free, and both Hessians agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.verify import craft
from robustlens.core.types import Attack
from robustlens.linalg.directions import Moved
from robustlens.linalg.hessian import LossHessian, Weights, cross_entropy_sum, dot, flat, shaped, slopes
from robustlens.threats.lp import Lp


class FollowingHessian:
    """v ↦ ∇²L v (d,) with crafted images ``x_adv`` (N, C, H, W) as the maximisers, in chunks.

    The bracket is inverted by conjugate gradients, for all images at once; ReLU networks have at most K − 1 curved
    directions an image, so it takes about K products. Where an image shows no strict maximum (the bracket is
    not negative definite, as in the flat or convex pieces of a ReLU network) its second term is left out. ``loose`` is
    the share of such images in the last product.
    """

    def __init__(
        self,
        model: nn.Module,
        at: Weights,
        x: Tensor,
        x_adv: Tensor,
        y: Tensor,
        threat: Lp,
        *,
        chunk: int,
        iterations: int = 50,
        tolerance: float = 1e-6,
    ) -> None:
        self._model, self._at, self._threat = model, at, threat
        self._parts = list(zip(*(torch.split(t, chunk) for t in (x, x_adv, y)), strict=True))
        self._n, self._iterations, self._tolerance = len(y), iterations, tolerance
        self.loose = 0.0

    def __call__(self, v: Tensor) -> Tensor:
        along, total, loose = shaped(v, self._at), torch.zeros_like(v), 0
        for x, x_adv, y in self._parts:
            leaves, grads = slopes(self._model, self._at, x_adv, y, cross_entropy_sum, image=True)
            *grads, slope = grads
            image = leaves[-1]
            free = free_directions(self._threat, slope.detach(), x, x_adv)
            rise = dot(grads, along)
            *curved, mixed = torch.autograd.grad(rise, leaves, retain_graph=True, materialize_grads=True)
            answer, lost = self._solve(free, slope, image, free.project(mixed))
            back = torch.autograd.grad(slope, leaves[:-1], answer, materialize_grads=True)
            total += flat(c + b for c, b in zip(curved, back, strict=True))
            loose += lost
        self.loose = loose / self._n
        return total / self._n

    def _solve(self, free: FreeDirections, slope: Tensor, image: Tensor, right: Tensor) -> tuple[Tensor, int]:
        """t with (μ I − P ℓ_δδ P) t = right, and the number of images whose matrix is not positive definite: t = 0."""

        def bracket(p: Tensor) -> Tensor:
            (image_p,) = torch.autograd.grad(slope, image, p, retain_graph=True, materialize_grads=True)
            return free.multiplier.view(-1, 1, 1, 1) * p - free.project(image_p)

        start = _dot(right, right)
        active, strict = start > 0, torch.ones_like(start, dtype=torch.bool)
        t, r, p, size = torch.zeros_like(right), right, right, start
        for _ in range(self._iterations):
            if not bool(active.any()):
                break
            q = bracket(p)
            bend = _dot(p, q)
            strict &= ~active | (bend > 0)
            active &= strict
            step = torch.where(active, size / bend, 0.0).view(-1, 1, 1, 1)
            t, r = t + step * p, r - step * q
            new = _dot(r, r)
            p = r + torch.where(active, new / size, 0.0).view(-1, 1, 1, 1) * p
            size = new
            active &= size > self._tolerance**2 * start
        return torch.where(strict.view(-1, 1, 1, 1), t, 0.0), int((~strict).sum())


@dataclass(frozen=True, eq=False)
class FreeDirections:
    """``mask`` (B, C, H, W) of free pixels, ``normal`` of unit size (or 0) among them, ``multiplier`` μ (B,)."""

    mask: Tensor
    normal: Tensor
    multiplier: Tensor

    def project(self, p: Tensor) -> Tensor:
        inside = p * self.mask
        return inside - _dot(inside, self.normal).view(-1, 1, 1, 1) * self.normal


def free_directions(threat: Lp, slope: Tensor, x: Tensor, x_adv: Tensor, slack: float = 1e-4) -> FreeDirections:
    """Where ``x_adv`` can move to first order, for the gradient ``slope`` of the loss there, all (B, C, H, W).

    A bound holds a pixel that is within ``slack`` · eps of it and that the gradient pushes outwards.
    """
    near, delta = slack * threat.eps, x_adv - x
    held = ((x_adv <= threat.low + near) & (slope < 0)) | ((x_adv >= threat.high - near) & (slope > 0))
    if threat.norm == "linf":
        held |= (delta.abs() >= threat.eps - near) & (slope * delta > 0)
        mask, normal = (~held).to(x), torch.zeros_like(x)
        return FreeDirections(mask, normal, torch.zeros_like(x[:, 0, 0, 0]))
    mask = (~held).to(x)
    met = (threat.distance(x_adv, x) >= threat.eps - near).to(x).view(-1, 1, 1, 1)
    free = delta * mask * met
    square = _dot(free, free)
    tiny = torch.finfo(x.dtype).tiny
    multiplier = _dot(slope, free) / square.clamp_min(tiny)
    return FreeDirections(mask, free / square.sqrt().clamp_min(tiny).view(-1, 1, 1, 1), multiplier)


def reattacked_product(
    model: nn.Module, at: Weights, x: Tensor, y: Tensor, attack: Attack, v: Tensor, *, chunk: int, seed: int
) -> Tensor:
    """(g(w + h v) − g(w − h v)) / 2h (d,), g the gradient of the adversarial loss with the attack run anew there.

    The finite difference of the full gradient, for unit v and h = ε_machine^{1/3} ‖w‖ / 5; both attacks draw the same
    random numbers. Costs two attacks and two gradients.
    """
    w = flat(at.values())
    h = 0.2 * torch.finfo(w.dtype).eps ** (1 / 3) * float(w.norm())
    sides = []
    for moved in (w + h * v, w - h * v):
        there, gen = shaped(moved, at), Generator(device=x.device).manual_seed(seed)
        network = Moved(model, there)
        pairs = zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)
        crafted = torch.cat([craft(attack, network, a, b, gen=gen) for a, b in pairs])
        sides.append(LossHessian(model, there, crafted, y, chunk=chunk).gradient())
    bent: Tensor = (sides[0] - sides[1]) / (2 * h)
    return bent


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_i, b_i⟩ (B,)."""
    found: Tensor = (a * b).flatten(1).sum(1)
    return found
