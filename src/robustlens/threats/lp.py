"""ℓp balls around an image, intersected with the pixel box."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Generator, Tensor

from robustlens.core.rng import drawn
from robustlens.results.errors import InputError, unknown_name

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")

#: The largest radius that can mean anything: the diameter of the box for a 3 × 1024 × 1024 image.
LARGEST = {"linf": 1.0, "l2": 3**0.5 * 1024, "l1": 3.0 * 1024**2}


@dataclass(frozen=True)
class Lp:
    """The set {z : ‖z − x‖_p ≤ eps, low ≤ z ≤ high} that an adversary may move an image x within.

    All methods take x inside the box, of shape (B, C, H, W). ``project`` returns the *nearest* point of the
    intersection, not the usual projection on the ball followed by clipping, which leaves part of the radius
    unused wherever the box is active (most pixels of a digit).

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: radius in pixel units of [0, 1].
        low, high: the box.

    Raises:
        InputError: a radius that is negative, not finite, or in 0–255 units.
    """

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", str(self.norm), NORMS)
        what = f"{self.norm} radius"
        if not isinstance(self.eps, int | float):
            raise InputError(
                what,
                expected="a number",
                got=repr(self.eps),
                fix=f'Lp.parse("{self.norm}:8/255") reads fractions.',
            )
        if not 0 <= self.eps < float("inf"):
            raise InputError(
                what, expected="a finite number ≥ 0", got=str(self.eps), fix='Write for example "linf:8/255".'
            )
        if self.norm == "linf" and self.eps > self.high - self.low:
            raise InputError(
                what,
                expected="pixel units in [0, 1]",
                got=f"{self.eps:g}",
                fix=f'If this is in 0–255 units, write "linf:{self.eps:g}/255".',
            )
        if self.eps > LARGEST[self.norm]:
            raise InputError(
                what,
                expected=f"at most {LARGEST[self.norm]:.0f}, the size of the box",
                got=f"{self.eps:g}",
                fix="Give the radius in units of pixels in [0, 1], not 0–255.",
            )

    def require_fits(self, shape: tuple[int, int, int]) -> None:
        """Refuse a radius beyond the diameter of the box for images (C, H, W) of ``shape``: it is in other units.

        Raises:
            InputError: says so.
        """
        side, values = self.high - self.low, math.prod(shape)
        diameter = {"linf": side, "l2": side * math.sqrt(values), "l1": side * values}[self.norm]
        if self.eps > diameter * (1 + 1e-6):
            raise InputError(
                f"{self.norm} radius",
                expected=f"at most {diameter:.4g}, the distance of two corners for images of {shape}",
                got=f"{self.eps:g}",
                fix=f'If this is in 0–255 units, write "{self.norm}:{self.eps:g}/255".',
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "linf:8/255", "l2:1.5" or "l1:12"."""
        norm, colon, radius = text.replace(" ", "").lower().partition(":")
        norm = {"inf": "linf", "ℓ∞": "linf", "ℓ2": "l2", "ℓ1": "l1"}.get(norm, norm)
        if not colon:
            raise InputError(
                "threat", expected='a norm and a radius, such as "linf:8/255"', got=repr(text), fix="Add the radius."
            )
        if norm not in NORMS:
            raise unknown_name("norm", norm, NORMS)
        return cls(norm, parse_radius(radius))

    def __str__(self) -> str:
        return f"{self.norm}:{self.eps!r}"

    def with_eps(self, eps: float) -> Self:
        """The same kind of threat at another radius."""
        return dataclasses.replace(self, eps=eps)

    def start(self, x: Tensor, gen: Generator) -> Tensor:
        """A point drawn uniformly from the ball (B, C, H, W), moved to the nearest point of the box."""
        return self.project(x + self.noise(x, gen), x)

    def noise(self, x: Tensor, gen: Generator) -> Tensor:
        """A uniform draw from the ball around zero (B, C, H, W).

        ℓ∞: uniform per pixel. ℓ2: Gaussian direction × eps · U^(1/d). ℓ1: signed Dirichlet direction × eps · U^(1/d).
        """
        if self.norm == "linf":
            return drawn(x, lambda t: t.uniform_(-self.eps, self.eps, generator=gen), gen)
        direction = drawn(x, lambda t: t.normal_(generator=gen), gen)
        if self.norm == "l1":
            direction = direction.sign() * drawn(x, lambda t: t.exponential_(generator=gen), gen)
        radius = drawn(x[:, 0, 0, 0], lambda t: t.uniform_(generator=gen), gen) ** (1 / x[0].numel())
        return direction * _each(self.eps * radius / self.size(direction), x)

    def ascend(self, grad: Tensor, *, floor: float = 1e-12) -> Tensor:
        """Direction of steepest ascent (B, C, H, W): the sign for ℓ∞, else the gradient at unit ℓ2 size.

        The gradient is divided by its largest component before its norm is taken: squares of components
        below 1e-19 underflow in float32, and an attack that stops there reports robustness that does not exist.
        A gradient with ‖g‖₂ < ``floor`` moves the image less than a unit step (‖g‖₂ / floor); exactly zero
        gradients give a zero direction.
        """
        if self.norm == "linf":
            return grad.sign()
        largest = grad.flatten(1).abs().amax(1)
        scaled = grad / _each(largest.clamp_min(torch.finfo(grad.dtype).tiny), grad)
        size = scaled.flatten(1).norm(dim=1)
        shrink = (size * largest / floor).clamp_max(1)
        return scaled * _each(shrink / size.clamp_min(torch.finfo(grad.dtype).tiny), grad)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """argmin_z ‖z − x_adv‖₂ over the ball around x and the box (B, C, H, W); x itself where eps is 0."""
        if self.norm == "linf":
            lower = (x - self.eps).clamp_min_(self.low)
            upper = (x + self.eps).clamp_max_(self.high)
            return x_adv.clamp(lower, upper)
        if self.eps == 0:
            return x + 0 * x_adv  # NaN in x_adv must stay visible
        inside = x_adv.clamp(self.low, self.high)
        return self._l2_nearest(x_adv, x, inside) if self.norm == "l2" else self._l1_nearest(x_adv, x, inside)

    def support(self, grad: Tensor, x: Tensor) -> Tensor:
        """argmax_z ⟨grad, z⟩ over the ball around x and the box (B, C, H, W), exactly."""
        room = self._room(grad, x)
        if self.norm == "linf":
            step = room.clamp_max(self.eps)
        elif self.norm == "l2":
            size = grad.abs() / _each(grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)
            square = size.square().flatten(1)
            scale = _scale_to(square, room.square().flatten(1), self.eps, square.sum(1))
            step = (_each(scale, x) * size).minimum(room)
        else:
            order = grad.abs().flatten(1).argsort(dim=1, descending=True)
            sorted_room = room.flatten(1).gather(1, order)
            before = sorted_room.cumsum(1) - sorted_room
            take = (self.eps - before).clamp_min(0).minimum(sorted_room)
            step = torch.zeros_like(take).scatter_(1, order, take).view_as(x)
        return self._keep(x + grad.sign() * step, x)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """‖x_adv − x‖_p (B,)."""
        return self.size(x_adv - x)

    def size(self, delta: Tensor) -> Tensor:
        """‖delta‖_p (B,)."""
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.norm(dim=1) if self.norm == "l2" else flat.abs().sum(1)

    def _l2_nearest(self, x_adv: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """The optimality conditions give z = clamp(x + s (x_adv − x)) with one s ≤ 1 per example."""
        delta = x_adv - x
        limit = (inside - x).square_().flatten(1)  # a pixel that meets the box at s ≤ 1 meets it at `inside`
        whole = limit.sum(1)
        far = whole > self.eps**2
        if not bool(far.any()):
            return inside
        scale = torch.where(far, _scale_to(delta.square().flatten(1), limit, self.eps, whole), 1.0)
        return torch.addcmul(x, delta, _each(scale, x)).clamp_(self.low, self.high)

    def _l1_nearest(self, x_adv: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """The optimality conditions give z − x = sign(δ) min(max(|δ| − t, 0), room) with one t ≥ 0 per example."""
        delta = x_adv - x
        far = self.distance(inside, x) > self.eps
        if not bool(far.any()):
            return inside
        step = _soft_threshold_to(delta.abs(), self._room(delta, x), self.eps)
        return torch.where(_each(far, x), self._keep(x + delta.sign() * step, x), inside)

    def _room(self, direction: Tensor, x: Tensor) -> Tensor:
        """How far each pixel can move along the sign of ``direction`` before it meets the box."""
        return torch.where(direction > 0, self.high - x, x - self.low)

    def _keep(self, z: Tensor, x: Tensor) -> Tensor:
        """Take back the last rounding error: inside the box, and not farther than eps."""
        z = z.clamp(self.low, self.high)
        if self.norm == "linf":
            return z
        far = self.distance(z, x)
        over = far > self.eps
        if bool(over.any()):
            z = torch.where(_each(over, x), x + (z - x) * _each(self.eps / far.clamp_min(1e-30), x), z)
        return z


def parse_radius(text: str) -> float:
    """Read "8/255", "25.5/255" or "0.03"."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            "radius", expected='a number or a fraction such as "8/255"', got=repr(text), fix="Correct it."
        ) from error


def _each(values: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1), to multiply images with."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _scale_to(square: Tensor, limit: Tensor, eps: float, total: Tensor) -> Tensor:
    """The s ≥ 0 (B,) for which Σ min(s² · square, limit) = eps², or the whole limit where that is less; both (B, d).

    The sum is concave, increasing and piecewise linear in u = s². Newton's method begins at eps² / ``total`` (B,).
    Where no limit exceeds its square and ``total`` is Σ limit, that is the root if every pixel either stays free or
    cannot move at all, and else above it. From above one step leads to the root or below it (eps² / Σ square is never
    above it), from where all steps climb without passing it, in finitely many: one to three in practice. It aims a few
    roundings below eps.
    """
    rounding = torch.finfo(square.dtype).eps
    target = limit.sum(1).clamp_max(eps**2) * (1 - 8 * rounding)
    u = target / total.clamp_min(1e-30)
    for number in range(50):
        reach = u[:, None] * square
        missing = target - torch.minimum(reach, limit).sum(1)
        off = missing.abs() if number == 0 else missing.clamp_min_(0)
        if bool((off <= 8 * rounding * target).all()):
            break
        free = (limit - reach).sign_().clamp_min_(0)  # 1 where a pixel still moves; comparisons are slower
        moving = free.mul_(reach).sum(1)  # u times the slope
        u = u * (1 + missing / moving.clamp_min_(1e-30))
        if number == 0:
            u = torch.maximum(u, target / square.sum(1).clamp_min(1e-30))
    return u.sqrt()


def _soft_threshold_to(magnitude: Tensor, room: Tensor, eps: float) -> Tensor:
    """min(max(magnitude − t, 0), room) with the t ≥ 0 for which its sum is eps; its sum at t = 0 exceeds eps.

    The sum is piecewise linear and decreasing in t, with a kink wherever a pixel starts to move (t = magnitude) or
    meets the box (t = magnitude − room): sort the kinks, add up, and interpolate.
    """
    a, c = magnitude.flatten(1).double(), room.flatten(1).double()
    kinks = torch.cat([a, a - c], 1)
    change = torch.cat([torch.ones_like(a), -torch.ones_like(a)], 1)
    kinks, order = kinks.sort(dim=1, descending=True)
    slope = change.gather(1, order).cumsum(1)
    total = torch.zeros_like(kinks)
    total[:, 1:] = (slope[:, :-1] * (kinks[:, :-1] - kinks[:, 1:])).cumsum(1)
    last = ((total <= eps).sum(1, keepdim=True) - 1).clamp_min(0)
    t = kinks.gather(1, last) - (eps - total.gather(1, last)) / slope.gather(1, last).clamp_min(1e-30)
    return (a - t).clamp_min(0).minimum(c).to(magnitude.dtype).view_as(magnitude)
