"""Whether projected gradient ascent in small balls is the power method: Theorem 1 on the user's own network."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, craft
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, Batch, Invariance, Split, Subject
from robustlens.lenses.bands import averaged, band
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.lenses.passes import batches, count, draw_seed, sample
from robustlens.linalg.jacobian import jvp, power_method
from robustlens.results.errors import InputError, require_at_least
from robustlens.results.intervals import wilson
from robustlens.results.panels import Curve, Floats, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

#: α → ∞, in pixel units.
FAR = 1e8
#: Step sizes in the smallest ball, in radii, beside α → ∞ and the 2 / iterations that the paper trains with.
STEPS = (1.0, 10.0, 100.0)
#: Radii from the smallest to the threat's.
RADII = 6
#: Two unit vectors that are no farther apart are one: float64 leaves about 1e-8 in balls of radius 1e-5.
ONE = 1e-6
SMALL, WHOLE = "small balls", "the threat's ball"


@dataclass(frozen=True, kw_only=True)
class PowerIteration:
    """‖(x_k − x)/ε − v_k‖₂ for k = ``iterations`` steps of two methods that start in the same direction v_0:

        x_k = Π(x_{k−1} + α ∇/‖∇‖₂) with ∇ = ∇_x ½ ‖f(x_{k−1}) − f(x)‖₂², x_0 = x + ε v_0    (ascent in the ℓ2 ball)
        v_k = Jᵀu/‖Jᵀu‖₂ with u = J v_{k−1}, J = ∂f(x)/∂x                                    (the power method)

    Where f is affine in the ball of radius ε, and for α → ∞, x_k = x + ε v_k (Theorem 1), so adversarial training with
    that loss is data-dependent spectral norm regularization: ½ ‖f(x_k) − f(x)‖² and ½ ‖f(x + ε v_k) − f(x)‖² agree.
    An image agrees where the distance is at most 1e-6. It is never above 2, and about √2 for unrelated directions.

    Computed in a float64 copy of the model, without the pixel box, which the theorem doesn't know. Scaling the
    logits changes nothing. Images with J = 0 are left out. An image that sits on a kink of the network, as where
    max-pooling windows tie on a black background, has no ball in which the theorem holds.

    Cost for each image: 10 attacks of ``iterations`` steps and the power method, in float64.

    Attributes:
        small: radius of the smallest balls, in ℓ2; pixel units. Six radii go from here to the threat's; those of an ℓ∞
            threat count times √n, of an ℓ1 threat by √n, in n pixels.
        iterations: steps of both methods.
        n_examples: a fixed random sample of the test split; None takes all.
        batch_size: images at a time.

    Raises:
        InputError: a radius that is not positive or not below the threat's, fewer than one example or iteration.
    """

    name: ClassVar[str] = "pga-power-iteration"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = "Roth, Kilcher and Hofmann 2020, arXiv 1906.01527, Theorem 1, eq. 7, 12 and 32"

    small: float = 1e-5
    iterations: int = 10
    n_examples: int | None = 100
    batch_size: int = 50

    def __post_init__(self) -> None:
        if not self.small > 0:
            raise InputError(f"{self.name} small", expected="a number > 0", got=str(self.small), fix="Leave it out.")
        require_at_least(self, iterations=1, batch_size=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(n_examples=8), cls(n_examples=5, iterations=3, small=1e-3, batch_size=2)]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=500)

    def cost(self, subject: Subject) -> Passes:
        n = count(subject.splits.test, self.n_examples)
        settings = RADII + len(STEPS) + 1
        attack = PGD(threat=Lp("l2", self.small), loss="squared", steps=self.iterations)
        return attack.passes * (settings * n) + Passes(forward=2 * settings * n, inputs=(1 + self.iterations) * n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear network is affine in every ball."""
        split = Split(torch.full((6, 1, 2, 2), 0.5), torch.arange(6) % 2)
        weight = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -2.0]])
        subject = linear_subject(weight, torch.tensor([0.0, 1.0]), train=split, test=split)
        expected = {f"distance, {ball}": (0.0, 1e-8) for ball in (SMALL, WHOLE)}
        expected |= {f"relative difference of the objectives, {ball}": (0.0, 1e-8) for ball in (SMALL, WHOLE)}
        expected |= {f"cosine, {WHOLE}": (1.0, 1e-8), f"share that agrees, {SMALL}": (1.0, 0.0)}
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        settings = describe(self) | {"threat": str(subject.threat)}
        largest = _radius(subject)
        if not self.small < largest:
            expected, fix = f"less than {largest:g}, the threat's radius", "Leave it out, or give a larger threat."
            raise InputError(f"{self.name} small", expected=expected, got=str(self.small), fix=fix)
        double = copy.deepcopy(subject.model).double().eval().requires_grad_(False)
        order = sample(subject.splits.test, self.n_examples)
        problem = _problem(subject, double, order)
        if problem:
            return self._failed(problem, settings)
        radii = np.geomspace(self.small, largest, RADII)
        pairs = [(float(radius), FAR) for radius in radii]
        pairs += [(self.small, self.small * step) for step in (2 / self.iterations, *STEPS)]
        rows: list[list[_Apart]] = []
        try:
            for batch in batches(subject, subject.splits.test, order, self.batch_size):
                rows.append(self._apart(double, batch, pairs, draw_seed(gen)))
        except AttackBroken as error:
            return self._failed(str(error), settings)
        found = [_Apart(*(torch.cat(part) for part in zip(*each, strict=True))) for each in zip(*rows, strict=True)]
        distances = torch.stack([each.distance for each in found], 1).cpu().numpy()
        if np.isnan(distances).all():
            return self._failed("The logits do not move with the images, so there is no direction to find.", settings)
        return self._reading(found, distances, radii, draw_seed(gen), settings)

    def _failed(self, why: str, settings: dict[str, object]) -> Reading:
        return Reading(self.name, "Nothing was compared.", Outcome.failed(why), settings=settings)

    def _apart(self, double: nn.Module, batch: Batch, pairs: list[tuple[float, float]], seed: int) -> list[_Apart]:
        """For every radius and step size, how the two methods end; the images are those of ``batch`` in float64."""
        x, y = batch.x.double(), batch.y
        v0 = _ball(pairs[0][0]).noise(x, Generator(x.device).manual_seed(seed))  # the attack's first draw
        with untouched(double):
            _, v, sigma = power_method(double, x, v0, self.iterations)
        here, found = _answers(double, x), []
        for eps, alpha in pairs:
            attack = PGD(
                threat=_ball(eps),
                loss="squared",
                steps=self.iterations,
                step_size=alpha,
                grad_floor=torch.finfo(torch.float64).tiny,
            )
            x_adv = craft(attack, double, x, y, gen=Generator(x.device).manual_seed(seed))
            way = ((x_adv - x) / eps).flatten(1)
            attacked, regularized = ((_answers(double, z) - here).square().sum(1) for z in (x_adv, x + eps * v))
            measured = (
                (way - v.flatten(1)).norm(dim=1),
                (way * v.flatten(1)).sum(1) / way.norm(dim=1),
                (attacked - regularized).abs() / attacked,
            )
            found.append(_Apart(*(torch.where(sigma > 0, each, torch.nan) for each in measured)))
        return found

    def _reading(
        self, found: list[_Apart], distances: Floats, radii: Floats, seed: int, settings: dict[str, object]
    ) -> Reading:
        quantities: list[Quantity] = []
        for ball, at in ((SMALL, 0), (WHOLE, RADII - 1)):
            quantities += averaged(f"distance, {ball}", distances[:, at], seed=seed)
            away = found[at].objectives.cpu().numpy()
            quantities += averaged(f"relative difference of the objectives, {ball}", away, seed=seed)
            quantities += averaged(f"cosine, {ball}", found[at].cosine.cpu().numpy(), seed=seed)
        quantities += averaged(f"distance, {SMALL}, the paper's steps", distances[:, RADII], seed=seed)
        there = distances[~np.isnan(distances[:, 0]), 0]
        n, agree = len(there), int((there <= ONE).sum())
        quantities.append(Quantity(f"share that agrees, {SMALL}", agree / n, "fraction", *wilson(agree, n), n))
        value = {q.name: q.value for q in quantities}
        steps = np.array([2 / self.iterations, *STEPS, FAR / self.small])
        by_step = np.concatenate([distances[:, RADII:], distances[:, :1]], 1)
        label = "‖(x_k − x)/ε − v_k‖₂"
        rows = tuple((q.name, q.value, q.low, q.high, q.n) for q in quantities)
        return Reading(
            lens=self.name,
            says=(
                f"In balls of radius {self.small:g}, an attack with huge steps ends where the power method does on "
                f"{agree} of {n} images; in balls of radius {radii[-1]:.3g} the cosine of both directions is "
                f"{value[f'cosine, {WHOLE}']:.2f} on average."
            ),
            quantities=tuple(quantities),
            headline=(f"share that agrees, {SMALL}", f"cosine, {WHOLE}"),
            panels=(
                Curve(
                    "Distance of attack and power method over the radius",
                    "log10 of the radius ε (ℓ2)",
                    label,
                    (band("α → ∞", np.log10(radii), distances[:, :RADII], seed=seed),),
                ),
                Curve(
                    "Distance of attack and power method over the step size",
                    "log10 of α / ε",
                    label,
                    (band(f"ε = {self.small:g}", np.log10(steps), by_step, seed=seed),),
                ),
                Table("Attack and power method in numbers", ("measure", "mean", "low", "high", "images"), rows),
            ),
            settings=settings,
        )


class _Apart(NamedTuple):
    """Distance and cosine of the directions, relative difference of the objectives: all (B,), NaN where J = 0."""

    distance: Tensor
    cosine: Tensor
    objectives: Tensor


def _ball(eps: float) -> Lp:
    return Lp("l2", eps, low=-math.inf, high=math.inf)


def _radius(subject: Subject) -> float:
    """The threat's radius in ℓ2."""
    norm, _, eps = str(subject.threat).partition(":")
    side = math.sqrt(math.prod(subject.splits.shape))
    return float(eps) * {"l2": 1.0, "linf": side, "l1": 1 / side}[norm]


def _answers(model: nn.Module, x: Tensor) -> Tensor:
    with untouched(model), torch.no_grad():
        logits: Tensor = model(x)
        return logits


def _problem(subject: Subject, double: nn.Module, order: Tensor) -> str | None:
    """Why the network cannot be measured, found out on one image."""
    (batch,) = batches(subject, subject.splits.test, order[:1], 1)
    x = batch.x.double()
    try:
        with untouched(double):
            moved = jvp(double, x, x)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        return f"The network must run in float64 and be differentiable twice; it answers: {said}"
    if moved.dtype != torch.float64:
        return "The network turns float64 images into numbers of less precision."
    return None if bool(torch.isfinite(moved).all()) else "The derivative of some image is not a finite number."
