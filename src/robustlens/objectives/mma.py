"""Max-margin adversarial training: every example is attacked as far as its own distance to the boundary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.verify import craft
from robustlens.core.criterion import cross_entropy
from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Terms, Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp

#: Where ``memory`` keeps every training example's last distance.
MEMORY = "mma/eps"

#: How much farther than d_max the boundary is looked for.
REACH = 1.05


@dataclass(frozen=True, kw_only=True)
class MMA:
    """min_θ (1 − c) · (1/B) [Σ_{right, d < d_max} CE(f_θ(x + d u), y) + Σ_{wrong} CE(f_θ(x), y)] + c · CE(f_θ(x), y)

    (the last term a mean over the batch), where u is the direction in which an attack moves x, of unit size, and d
    the distance along it to the boundary SLM = 0 of the soft logit margin SLM(z, y) = log Σ_{k≠y} e^{z_k} − z_y.
    Lowering the loss at the nearest boundary point raises the distance; an example whose distance is d_max or more is
    far enough and leaves the sum. An example is right where SLM(f(x), y) < 0, that is p_y > ½.

    u comes from PGD on SLM in the ball of the example's own last distance (at least ``min_eps``), with steps of
    2.5 · radius / ``steps`` from a random start; d from ``search_steps`` bisections in [0, 1.05 d_max], which leaves an
    error of 1.05 d_max / 2^search_steps. Points along u are moved into the box. The distances are kept for each
    training example in the moment's memory, 0 for the wrong ones; without training set (``moment.examples`` = 0)
    every search starts from ``min_eps``.

    Choices: who is right is judged by the network in eval mode, in which the search runs too; the authors' code
    takes the train-mode pass that it has at hand. It divides by the radius given to PGD where u here has unit size, and
    leaves the last point outside the box. The loss runs two train-mode passes, clean images first, as that code does.

    A step costs at most ``steps`` input passes and ``search_steps`` + 1 forward passes to craft (wrong examples drop
    out), and two weight passes to learn (one for c = 0 or 1).

    Attributes:
        threat: norm, box, and d_max as its radius.
        min_eps: smallest radius of the attack; 0.005 for CIFAR ℓ∞, 0.5 for ℓ2, 0.1 for MNIST ℓ∞ in the authors' code.
        steps: of PGD.
        search_steps: of the bisection.
        clean_weight: c; 0 is the paper's OMMA.

    Raises:
        InputError: no ℓp ball, d_max = 0, ``min_eps`` outside (0, 1.05 d_max], no steps, or c outside [0, 1].
    """

    name: ClassVar[str] = "mma"
    reference: ClassVar[str] = "Ding et al. 2020, arXiv 1812.02637, Algorithms 1 and 2"

    #: An update that makes its own inputs has no distances to judge them by.
    needs_craft: ClassVar[bool] = True

    threat: Threat
    min_eps: float = 0.005
    steps: int = 10
    search_steps: int = 10
    clean_weight: float = 1 / 3

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Lp):
            raise InputError(
                "mma threat",
                expected="an ℓp ball, which can be scaled for each example",
                got=type(self.threat).__name__,
                fix='Write for example "linf:12/255".',
            )
        if self.threat.eps == 0:
            raise InputError("mma threat", expected="a radius > 0, which is d_max", got="0", fix="Raise it.")
        if not 0 < self.min_eps <= REACH * self.threat.eps:
            raise InputError(
                "mma min_eps",
                expected=f"a radius in (0, {REACH * self.threat.eps:g}]",
                got=str(self.min_eps),
                fix="Take about a tenth of the threat's radius.",
            )
        require_at_least(self, steps=1, search_steps=1)
        if not 0 <= self.clean_weight <= 1:
            raise InputError(
                "mma clean_weight",
                expected="a share in [0, 1]",
                got=str(self.clean_weight),
                fix="The paper uses 1/3; 0 leaves the clean images out.",
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 0.2), min_eps=0.05, steps=3),
            cls(threat=Lp("l2", 1.0), min_eps=0.1, steps=3, clean_weight=0.0),
        ]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(threat=Lp("l2", 1.0), clean_weight=1.0)

    @property
    def passes(self) -> Passes:
        if self.clean_weight == 1:
            return Passes(weights=1)
        return Passes(inputs=self.steps, forward=1 + self.search_steps, weights=2 if self.clean_weight else 1)

    def craft(self, model: nn.Module, batch: Batch, *, gen: Generator) -> Crafted:
        if self.clean_weight == 1:
            return Crafted(batch, batch.x)
        moment = batch.moment
        last = batch.x.new_zeros(len(batch))
        if moment.examples:
            everyone = moment.memory.get(MEMORY, batch.x.new_zeros(moment.examples))
            last = everyone[batch.index]
        assert isinstance(self.threat, Lp)
        search = _BoundarySearch(self.threat, last.clamp_min(self.min_eps), self.steps, self.search_steps)
        x_adv = craft(search, model, batch.x, batch.y, gen=gen)
        if moment.examples:
            seen, distance = moment.world.gather(batch.index), moment.world.gather(search.distance)
            moment.memory[MEMORY] = everyone.index_copy(0, seen, distance)
        return Crafted(batch, x_adv, {"distance": search.distance})

    def loss(self, model: nn.Module, crafted: Crafted) -> Terms:
        y, c = crafted.batch.y, self.clean_weight
        clean_logits, clean = None, crafted.x_adv.new_zeros(())
        if c > 0:
            clean_logits = model(crafted.batch.x)
            clean = cross_entropy(clean_logits, y)
            if c == 1:
                return Terms(clean, clean_logits, clean_logits=clean_logits)
        logits = model(crafted.x_adv)
        counts = crafted.notes["distance"] < self.threat.eps  # wrong examples have distance 0
        margin = (F.cross_entropy(logits, y, reduction="none") * counts).sum() / len(y)
        parts = {"mma_loss": margin, "clean_loss": clean} if c else {}
        return Terms((1 - c) * margin + c * clean, logits, parts, clean_logits)


class _BoundarySearch:
    """AN-PGD: a PGD direction for every right example, and the point on it where the soft logit margin is 0.

    ``farthest`` has the radius d_max, ``radius`` (B,) are the balls that PGD searches; ``perturb`` leaves in
    ``distance`` (B,) how far along its direction it moved an example, 0 for those that were wrong already.
    """

    name: ClassVar[str] = "an-pgd"

    def __init__(self, farthest: Lp, radius: Tensor, steps: int, search_steps: int) -> None:
        self.radius, self.distance = radius, torch.zeros_like(radius)
        self.steps, self.search_steps = steps, search_steps
        self.threat = farthest.with_eps(REACH * farthest.eps)
        # Balls of different radii are one ball after a division by them; the box is applied afterwards, which only
        # brings a point nearer.
        self.unit = dataclasses.replace(farthest, eps=1.0, low=-1.0, high=1.0)

    @property
    def passes(self) -> Passes:
        return Passes(inputs=self.steps, forward=1 + self.search_steps)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            right = (soft_logit_margin(model(x), y) < 0).nonzero()[:, 0]
        noise = self.unit.noise(x, gen)  # for the wrong ones too: what an example draws depends on no other
        if len(right) == 0:
            return x
        direction, size = self._direction(model, x[right], y[right], self.radius[right], noise[right])
        distance = self._bisect(model, x[right], y[right], direction, size)
        self.distance = self.distance.index_copy(0, right, distance)
        return x.index_copy(0, right, self._along(x[right], direction, distance))

    def _direction(
        self, model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where PGD moves each x in its own ball from its ``noise``: a direction of unit size, and how far (B,)."""
        r = radius[:, None, None, None]
        origin = torch.zeros_like(x)
        point = self._boxed(x + r * noise)
        for _ in range(self.steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                margin = soft_logit_margin(model(point), y).sum()
            (grad,) = torch.autograd.grad(margin, point)
            with torch.no_grad():
                delta = (point - x) / r + 2.5 / self.steps * self.unit.ascend(grad)
                point = self._boxed(x + r * self.unit.project(delta, origin))
        size = self.unit.size(point - x)
        return (point - x) / size.clamp_min(torch.finfo(x.dtype).tiny)[:, None, None, None], size

    @torch.no_grad()
    def _bisect(self, model: nn.Module, x: Tensor, y: Tensor, direction: Tensor, first: Tensor) -> Tensor:
        """The distance (B,) in [0, 1.05 d_max] at which SLM changes its sign; the first one tried is ``first``."""
        low, high, distance = torch.zeros_like(first), torch.full_like(first, self.threat.eps), first
        for _ in range(self.search_steps):
            inside = soft_logit_margin(model(self._along(x, direction, distance)), y) < 0
            low = torch.where(inside, distance, low)
            high = torch.where(inside, high, distance)
            distance = (low + high) / 2
        return distance

    def _along(self, x: Tensor, direction: Tensor, distance: Tensor) -> Tensor:
        return self._boxed(x + distance[:, None, None, None] * direction)

    def _boxed(self, x: Tensor) -> Tensor:
        return x.clamp(self.threat.low, self.threat.high)


def soft_logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """SLM = log Σ_{k≠y} e^{z_k} − z_y (B,): negative where p_y > ½."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
