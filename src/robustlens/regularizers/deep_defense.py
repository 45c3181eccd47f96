"""Deep Defense: a penalty on how short the steps of DeepFool are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.modes import evaluating, untouched
from robustlens.core.passes import Passes
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Terms
from robustlens.results.errors import require_at_least


class Route(NamedTuple):
    """Which boundary each iteration of DeepFool steps to: from class ``away`` to class ``toward``, all (I, B).

    Only examples that are still ``moving`` do. ``right`` (B,) are those that were classified correctly.
    """

    toward: Tensor
    away: Tensor
    moving: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class DeepDefense:
    """λ/B [ Σ_right exp(−c ‖Δ(x)‖/‖x‖) + Σ_wrong exp(d ‖Δ(x)‖/‖x‖) ], ℓ2 norms, differentiated through Δ.

    Δ = (1 + overshoot) Σ_i r_i is DeepFool's perturbation: r_i = |g| w / ‖w‖² with g = f_k − f_l and w = ∇g at
    x + r_1 + … + r_{i−1}. Right examples start from their label l and take in each iteration the k ≠ l with the
    smallest |g| / ‖w‖; wrong ones go from the class l that is predicted there to k = y. An example stops once x + Δ
    left its label (right) or reached it (wrong). The gradient goes through all iterations, that is through w and
    through the points at which later ones are taken.

    As in the authors' code, ‖w‖ is the norm of w + ``guard``, component by component. Unlike there, a wrong example
    uses one pair of classes for g and for w (theirs takes g with the class predicted one iteration earlier), images
    are not mean-subtracted before ‖x‖ is taken, and only these passes run in eval mode (they freeze BatchNorm
    in the whole step). Made for fine-tuning: far from the boundary of a flat network exp(d ‖Δ‖/‖x‖) overflows.

    The classes are searched first, without gradients of the weights; by the envelope theorem the gradient of the
    minimum is that of its minimiser, so that one row an iteration has to be differentiated, and the result is exact.

    Cost a step, for I iterations: 2 I forward passes and, counting a backward pass to the images from each of K
    classes as one, K I input passes for the search; then I weight passes with double backward. ``passes`` says it for
    K = 10 and all iterations.

    Attributes:
        weight: λ.
        c, d: how fast the penalty falls with the distance of right examples, and grows with that of wrong ones.
        iterations: most of DeepFool's.
        overshoot: how far beyond the boundary Δ ends, relative to its size.
        guard: added to each component of w under the norm (5e-6 on MNIST, 1e-5 on CIFAR-10).

    Raises:
        InputError: a negative setting, no iterations, no guard; a network that cannot be differentiated twice.
    """

    name: ClassVar[str] = "deep-defense"
    reference: ClassVar[str] = "Yan, Guo & Zhang 2018, arXiv 1803.00404, §3 (regularizer R), and the authors' code"

    weight: float = 15.0
    c: float = 25.0
    d: float = 5.0
    iterations: int = 5
    overshoot: float = 0.02
    guard: float = 5e-6

    def __post_init__(self) -> None:
        require_at_least(self, weight=0, c=0, d=0, iterations=1, overshoot=0, guard=1e-30)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(iterations=1), cls(weight=1.0, c=10.0, d=0.1)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        n = self.iterations
        return Passes(forward=2 * n, inputs=10 * n, weights=n, double=n)

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Refuse a network whose gradient cannot be differentiated."""
        require_second_derivative(model, x, self.name)

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> Route:
        """Run DeepFool and note where it goes."""
        x, y = crafted.batch.x.detach(), crafted.batch.y
        total = torch.zeros_like(x)
        moving, right = torch.ones_like(y, dtype=torch.bool), torch.empty_like(y, dtype=torch.bool)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        with untouched(model), torch.enable_grad():
            while len(steps) < self.iterations and bool(moving.any()):
                point = (x + total).requires_grad_()
                logits = model(point)
                if not steps:
                    right = logits.argmax(1) == y
                away = torch.where(right, y, logits.argmax(1))
                rows = _rows(logits, point)
                gaps = (logits - logits.gather(1, away[:, None])).detach()
                rows = rows - rows[torch.arange(len(x)), away, None]
                sizes = (rows + self.guard).flatten(2).norm(dim=2)
                distance = (gaps.abs() / sizes).scatter(1, away[:, None], torch.inf)
                toward = torch.where(right, distance.argmin(1), y)
                steps.append((toward, away, moving))
                w = rows[torch.arange(len(x)), toward]
                total = total + self._step(gaps.gather(1, toward[:, None])[:, 0], w, moving)
                with torch.no_grad():
                    predicted = model(x + (1 + self.overshoot) * total).argmax(1)
                moving = moving & ((predicted == y) == right)
        toward, away, moved = (torch.stack(each) for each in zip(*steps, strict=True))
        return Route(toward, away, moved, right)

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: Route) -> Tensor:
        """The penalty (scalar) along the route ``found``."""
        x = crafted.batch.x.detach()
        relative = (1 + self.overshoot) * _size(self.perturbation(model, x, found)) / _size(x)
        return self.weight * torch.where(found.right, -self.c * relative, self.d * relative).exp().mean()

    def perturbation(self, model: nn.Module, x: Tensor, found: Route) -> Tensor:
        """Σ r_i (B, C, H, W), before the overshoot, as a differentiable function of the weights."""
        total = torch.zeros_like(x, requires_grad=True)
        with evaluating(model):
            for toward, away, moving in zip(found.toward, found.away, found.moving, strict=True):
                point = x + total
                logits = model(point)
                gap = (logits.gather(1, toward[:, None]) - logits.gather(1, away[:, None]))[:, 0]
                (w,) = torch.autograd.grad(gap.sum(), point, create_graph=True)
                total = total + self._step(gap, w, moving)
        return total

    def _step(self, gap: Tensor, w: Tensor, moving: Tensor) -> Tensor:
        """|g| w / ‖w‖² for the examples that still move (B, C, H, W)."""
        length = moving * gap.abs() / _size(w + self.guard).square()
        return length.view(-1, 1, 1, 1) * w


def _rows(logits: Tensor, point: Tensor) -> Tensor:
    """The gradients of all logits with respect to the images (B, K, C, H, W)."""
    columns = logits.sum(0)
    return torch.stack([torch.autograd.grad(each, point, retain_graph=True)[0] for each in columns], 1)


def _size(t: Tensor) -> Tensor:
    """‖t‖₂ (B,)."""
    size: Tensor = t.flatten(1).norm(dim=1)
    return size
