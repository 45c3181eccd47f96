"""The Fast Adaptive Boundary attack (FAB): projections on the linearised boundary, drawn towards the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.smallest import nearest_on_segment, rounding
from robustlens.attacks.tries import together
from robustlens.core.criterion import logit_margin
from robustlens.core.passes import Passes
from robustlens.core.rng import for_part
from robustlens.core.types import Threat
from robustlens.linalg.hyperplane import step_to_hyperplane
from robustlens.linalg.regions import DUAL
from robustlens.linalg.rivals import rivals, strongest
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp

#: The wrong classes that the untargeted attack looks at in every step, those with the highest logits.
RIVALS = 9


@dataclass(frozen=True, kw_only=True)
class FAB:
    """min_z ‖z − x‖_p such that some f_k(z) ≥ f_y(z), z in the box: the smallest change, or one within eps.

    With π the plane (f_k − f_y)(z) + ⟨∇(f_k − f_y)(z), · − z⟩ = 0 of the rival k whose plane is the nearest to z, of
    the nine with the highest logits there, and δ(v) the shortest step in the box from v to π, every step is

        v ← x + β (z − x) where z is wrong, z where it is right
        α = min(‖δ(v)‖_p / (‖δ(v)‖_p + ‖δ(x)‖_p), alpha_max)
        z ← box((1 − α) (v + η δ(v)) + α (x + η δ(x)))

    ``targets`` = m gives FAB-T: k is the class with the highest logit at x among the wrong ones, in a second run the
    one with the second highest, and so on; one backward pass a step instead of one for each rival. Where few images are
    left, several targets share a batch (``attacks.tries``).

    Of all wrong z the nearest is kept. An image leaves once it is broken within eps; at the end of a run it is also
    tried at the nearest point of the threat. Of one that is broken at a larger distance the segment to x is bisected
    in the end, in the place of the paper's final search. Where nothing wrong was
    met, the last z comes back; the choke point sees that it is right. An image that is wrong already stays as it is.

    The paper has π at v. It is at z here: one forward pass then tells whether z is wrong and linearises the boundary,
    next to z instead of a step back from it. Where the network is affine between z and v, both are the same plane.

    Costs at most ``steps`` input passes (9 ``steps``, untargeted) and two forward passes for each target and restart,
    and ``bisections`` + 2 forward passes.

    Attributes:
        threat: norm, radius and box.
        steps: of a run.
        restarts: runs for each target; after the first from a random point at half of eps from x, or half of the
            smallest distance so far.
        alpha_max: the most that x draws z to itself.
        eta: η, how much farther than the plane a step goes.
        beta: β, how much of the way from x a wrong z keeps.
        targets: None for the untargeted attack, or how many classes to run towards; 9 in AutoAttack, and fewer where
            there are no more.
        minimal: go on where an image is broken within eps, for the smallest change. Take for eps the diameter of the
            box to measure distances.
        bisections: halvings of the segment from x to the result.

    Raises:
        InputError: fewer than one step, restart or target, η < 1, β or alpha_max outside [0, 1], or a negative number
            of halvings.
    """

    name: ClassVar[str] = "fab"
    reference: ClassVar[str] = "Croce and Hein 2020, arXiv 1907.02044, algorithm 1; targeted: arXiv 2003.01690, §4"

    threat: Threat
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    targets: int | None = None
    minimal: bool = False
    bisections: int = 10

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, restarts=1, eta=1, targets=1, bisections=0, alpha_max=0, beta=0)
        for field in ("alpha_max", "beta"):
            if getattr(self, field) > 1:
                raise InputError(
                    f"fab {field}", expected="at most 1", got=str(getattr(self, field)), fix="Leave it out."
                )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 0.1), steps=10),
            cls(threat=Lp("l2", 1.0), steps=10, targets=9, restarts=2),
            cls(threat=Lp("l1", 5.0), steps=10, targets=2),
            cls(threat=Lp("l2", 8.0), steps=10, restarts=2, minimal=True),
        ]

    @property
    def passes(self) -> Passes:
        runs = self.restarts * (self.targets or 1)
        backward = self.restarts * (self.targets or RIVALS)
        return Passes(
            inputs=self.steps * backward,
            forward=(1 if self.minimal else 2) * runs + self.bisections + 2,
        )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        threat = self.threat
        assert isinstance(threat, Lp)
        nearest, smallest = x.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf)
        with torch.no_grad():
            logits = model(x)
        room = rounding(logits)
        targets = None if self.targets is None else strongest(logits, y, self.targets)  # one run after the other
        tries, done = self.restarts * (1 if targets is None else targets.shape[1]), 0
        while done < tries:
            todo = (smallest > self._enough).nonzero()[:, 0]
            if len(todo) == 0:
                return nearest
            first, restart = divmod(done, self.restarts)
            count = 1 if self.restarts > 1 else min(together(x, len(todo), done), tries - done)
            start = x[todo]
            if restart:
                distance = smallest[todo].clamp_max(threat.eps) / 2
                start = _around(threat, start, distance, for_part(gen, todo, len(x)))
            rows = todo.repeat(count)
            towards = None if targets is None else targets[todo, first : first + count].T.flatten()
            found = self._search(threat, model, start.repeat(count, 1, 1, 1), x[rows], y[rows], towards, room[rows])
            if not self.minimal:
                found = _drawn_in(threat, model, *found, x[rows], y[rows], room[rows])
            for point, distance in zip(found[0].chunk(count), found[1].chunk(count), strict=True):
                known = smallest[todo]
                better = ((distance < known) & (known > self._enough)) | known.isinf()
                nearest[todo[better]], smallest[todo[better]] = point[better], distance[better]
            done += count
        far = (smallest.isfinite() & (smallest > self._enough)).nonzero()[:, 0]
        if len(far):
            nearest[far] = nearest_on_segment(model, x[far], nearest[far], y[far], steps=self.bisections)
        return nearest

    @property
    def _enough(self) -> float:
        """The distance at which an image leaves."""
        return 0.0 if self.minimal else self.threat.eps

    def _search(
        self, threat: Lp, model: nn.Module, start: Tensor, x: Tensor, y: Tensor, target: Tensor | None, room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One run: the nearest wrong z (B, C, H, W) and its distance (B,); the last z and ∞ where none was wrong."""
        nearest, smallest = start.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf)
        alive, point = torch.arange(len(x), device=x.device), start
        for _ in range(self.steps):
            margin, ahead, slope = _plane(threat, model, point, y, target, room)
            wrong, size = margin <= 0, threat.distance(point, x)
            better = wrong & (size < smallest[alive])
            nearest[alive[better]], smallest[alive[better]] = point[better], size[better]
            going = ~(wrong & (size <= self._enough))
            if not bool(going.all()):
                alive, point, x, y, wrong = alive[going], point[going], x[going], y[going], wrong[going]
                ahead, slope, room = ahead[going], slope[going], room[going]
                target = None if target is None else target[going]
                if len(alive) == 0:
                    return nearest, smallest
            point = self._moved(threat, point, x, wrong, ahead, slope)
        with torch.no_grad():
            wrong, size = logit_margin(model(point), y) <= -room, threat.distance(point, x)
        better = wrong & (size < smallest[alive])
        nearest[alive[better]], smallest[alive[better]] = point[better], size[better]
        never = smallest[alive].isinf()
        nearest[alive[never]] = point[never]
        return nearest, smallest

    def _moved(self, threat: Lp, z: Tensor, x: Tensor, wrong: Tensor, ahead: Tensor, slope: Tensor) -> Tensor:
        """The next z (B, C, H, W) with the plane where ``ahead`` (B,) + ⟨``slope``, · − z⟩ is 0."""
        kept = torch.where(wrong, self.beta, 1.0).to(z.dtype)
        back = torch.lerp(x, z, kept[:, None, None, None])
        ends, w = torch.stack([back, x]).flatten(2), slope.flatten(1)
        height = ahead + (w * (ends - z.flatten(1))).sum(2)
        delta = step_to_hyperplane(ends, w, height, threat.norm, low=threat.low, high=threat.high)
        size = threat.size(delta.flatten(0, 1)).view(2, -1)
        alpha = (size[0] / size.sum(0).clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(self.alpha_max)
        near, drawn = (ends + self.eta * delta).unbind()
        return torch.lerp(near, drawn, alpha[:, None]).clamp_(threat.low, threat.high).view_as(z)


def _drawn_in(
    threat: Lp, model: nn.Module, z: Tensor, size: Tensor, x: Tensor, y: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest allowed point to ``z`` and its distance where the model is wrong there, else ``z`` and ``size``."""
    with torch.no_grad():
        inside = threat.project(z, x)
        wrong = logit_margin(model(inside), y) <= -room
    return torch.where(wrong[:, None, None, None], inside, z), torch.where(wrong, threat.distance(inside, x), size)


def _plane(
    threat: Lp, model: nn.Module, z: Tensor, y: Tensor, target: Tensor | None, room: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The margin (B,) of the right class, and (f_k − f_y)(z) (B,), less ``room`` (B,), and its gradient (B, C, H, W).

    k is ``target`` (B,), or for None the rival whose plane is the nearest: |f_k − f_y| / ‖∇(f_k − f_y)‖_q is smallest.
    """
    if target is None:
        leads, slopes = rivals(model, z, y, RIVALS)
        leads = leads + room[:, None]
        flat = slopes.flatten(2)
        largest = flat.abs().amax(2).clamp_min(torch.finfo(z.dtype).tiny)
        sizes = torch.linalg.vector_norm(flat / largest[..., None], ord=DUAL[threat.norm], dim=2)
        k = torch.where(sizes > 0, leads.abs() / largest / sizes, torch.inf).argmin(1)
        each = torch.arange(len(z), device=z.device)
        return leads[:, 0], -leads[each, k], slopes[each, k]
    point = z.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        ahead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    (slope,) = torch.autograd.grad(ahead.sum(), point)
    return logit_margin(logits.detach(), y) + room, ahead.detach() - room, slope


def _around(threat: Lp, x: Tensor, distance: Tensor, gen: Generator) -> Tensor:
    """A random point (B, C, H, W) at ``distance`` (B,) from x, moved into the box."""
    noise = threat.noise(x, gen)
    length = distance / threat.size(noise).clamp_min(torch.finfo(x.dtype).tiny)
    return (x + length[:, None, None, None] * noise).clamp(threat.low, threat.high)
