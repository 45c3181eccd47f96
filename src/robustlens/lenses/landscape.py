"""The loss, clean and under attack, as the weights are moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import numpy as np
from torch import Generator

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.rng import generator
from robustlens.core.types import WEIGHT_SCALE, Attack, Invariance, Split, Subject
from robustlens.lenses.curve_shape import fitted, half_width, resampled, widths
from robustlens.lenses.displaced import Displaced, Statistics
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import count, draw_seed, require_split, sample
from robustlens.linalg.directions import (
    Weights,
    cosine,
    filter_normalised,
    gaussian,
    in_relative_ball,
    moved,
    moving_weights,
    orthogonal_to,
)
from robustlens.results.errors import InputError, require_at_least
from robustlens.results.panels import Curve, Floats, Heatmap, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

#: More than this share of examples with next to no gradient makes a reading unreliable.
TOLERATED = 0.05
PER_DIRECTION = ("direction", "slope at 0", "curvature at 0", "standard error of the fit", "width")


@dataclass(frozen=True, kw_only=True)
class WeightLandscape:
    """g(α) = mean over examples of max_η ℓ(x + η, y, w + α h), cross-entropy, along random directions h in the weights.

    h is Gaussian and each of its filters is rescaled to the norm of the network's filter (``linalg.directions``), so
    α = 0.5 changes every filter by half of its own size, and a ReLU network that only distributes its scale
    differently over its layers gives the same numbers. Biases and BatchNorm's weights stay.

    The attack is run anew at every α, always with the same random numbers, and an example's robust loss is the larger
    of its losses before and after: a lower bound of the maximum. The curve "attack of α = 0 kept" scores the images
    found at α = 0 again; it is flatter because the adversary does not answer.

    Curvature is g''(0), twice the leading coefficient of the parabola that fits g best on |α| ≤ ``fit_within``,
    averaged over directions. Width is the length of the interval around 0 on which g stays below g(0) + 0.1, by linear
    interpolation between the α; a lower bound where g does not rise so far on both sides. Robust flatness (Stutz, Hein
    and Schiele 2021) is the mean robust loss at w + ν minus that at w, with ‖ν_l‖ ≤ ξ ‖w_l‖ for every layer's weights:
    averaged over uniform ν, and at the worst ν that a few ascent steps find. Larger is sharper in all but width.

    Intervals are ± 1.96 standard errors from resampling examples and directions together (examples alone where there
    is one direction, and for the worst ν).

    Where the input gradient of the cross-entropy nearly vanishes (‖g‖₂ ≤ 1e-12, as margins from about 27 on make it,
    and from 100 on float32 rounds it to zero) an attack that follows it is blind: ℓ2 steps shrink with it, and what is
    left of its direction leaves out the right class, whose probability rounds to 1. Moving the weights may open its
    eyes, and g then rises for a wrong reason. The reading is unreliable when that holds for more than 5 % of the
    examples at w, whatever the attack.

    Cost, in passes over the ``n_examples``: about (1 + 2 · points · directions + draws + ascent_steps) · (attack + 1),
    and plane² · (attack + 1) for the plane. With the defaults about 130 passes over 100 images: 20 s of one core for a
    28×28 network of four convolutions.

    Attributes:
        alphas: the α > 0 to visit, ascending; −α and 0 are visited as well.
        fit_within: largest α that the curvature is fitted on; at least two of ``alphas`` must reach no further.
        directions: random directions.
        attack: None is PGD on the cross-entropy, 3 steps, in the subject's threat; the figures of the papers took 20
            steps or more.
        split: "train", "valid" or "test".
        n_examples: a fixed random sample of the split; None takes all.
        batch_norm: "frozen" keeps the stored statistics at all weights; "re-estimated" measures them anew on the clean
            images at all weights (also at w, so g(0) is then not the loss with the stored ones).
        average_radius, worst_radius: ξ of the two kinds of flatness, with the authors' values. In their code biases
            move as well, and random ν lie on the sphere, which in so many dimensions is nearly the ball.
        draws: random ν; the authors take 10, and 1,000 examples.
        ascent_steps: steps to the worst ν; the authors take 20 of size 0.01 ‖w_l‖ from random points in the ball.
        plane: points of each axis of a heat map over a plane of two directions, made orthogonal before they are
            normalised; None draws none. The cosine that the normalisation leaves between them is that of two weight
            vectors, and does see how scale is distributed over the layers.
        batch_size: examples attacked together.

    Raises:
        InputError: α that are not positive and ascending or of which fewer than two lie within ``fit_within``, a split
            that does not exist, or less than one direction, draw or step.
    """

    name: ClassVar[str] = "weight-landscape"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = (
        "Yamada et al. 2021, arXiv 2102.02950, eq. 5–6; Li et al. 2018, arXiv 1712.09913, §4; "
        "Stutz, Hein and Schiele 2021, arXiv 2104.04448, §3"
    )

    alphas: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    fit_within: float = 0.25
    directions: int = 3
    attack: Attack | None = None
    split: str = "test"
    n_examples: int | None = 100
    batch_norm: Statistics = "frozen"
    average_radius: float = 0.5
    worst_radius: float = 0.003
    draws: int = 3
    ascent_steps: int = 3
    plane: int | None = None
    batch_size: int = 100

    def __post_init__(self) -> None:
        if list(self.alphas) != sorted(set(self.alphas)) or min(self.alphas, default=0) <= 0:
            raise InputError(
                "weight-landscape alphas",
                expected="numbers > 0, ascending",
                got=str(self.alphas),
                fix="Leave out 0 and the negative ones: both are added.",
            )
        if sum(alpha <= self.fit_within for alpha in self.alphas) < 2:
            raise InputError(
                "weight-landscape fit_within",
                expected="a radius that two of the alphas lie in",
                got=f"{self.fit_within:g} with {self.alphas}",
                fix="Raise it, or add smaller alphas.",
            )
        require_at_least(self, directions=1, draws=1, ascent_steps=1, plane=2)
        require_split(self)

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=2)
        return [
            cls(n_examples=10, directions=2, alphas=(0.1, 0.2), attack=quick, draws=2, ascent_steps=1, batch_size=4),
            cls(n_examples=8, directions=1, alphas=(0.1, 0.2, 1.0), attack=quick, batch_norm="re-estimated", plane=2),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=500, directions=10, draws=10, ascent_steps=10, plane=15)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack = self.attack or PGD(threat=subject.threat, steps=3)
        points = (
            1 + 2 * 2 * len(self.alphas) * self.directions + self.draws + self.ascent_steps + (self.plane or 0) ** 2
        )
        n = count(getattr(subject.splits, self.split), self.n_examples)
        return (attack.passes + Passes(forward=1)) * (points * n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Margins m and an attack that takes 4 · eps off each: g(0) is the mean of log(1 + e^{−(m − 4 eps)})."""
        shifts = [0.4, 0.3, 0.3, -0.1]
        subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
        exact = LinearExact(threat=subject.threat)

        def mean_loss(radius: float) -> float:
            return sum(math.log1p(math.exp(-4 * (s - radius))) for s in shifts) / len(shifts)

        expected = {"loss": (mean_loss(0), 1e-6), "robust loss": (mean_loss(subject.threat.eps), 1e-6)}
        return [Oracle(subject, cls(attack=exact), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat, steps=3, loss="ce")
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}

        def failed(why: str) -> Reading:
            return Reading(self.name, "No loss was measured.", Outcome.failed(why), settings=settings)

        split: Split = getattr(subject.splits, self.split)
        weights = moving_weights(subject.model)
        if len(split) == 0:
            return failed(f"There are no {self.split} images; choose another split.")
        if not weights:
            return failed("The model has no weights with two or more dimensions, and only those are moved.")
        order, seed = sample(split, self.n_examples), draw_seed(gen)
        scene = Displaced(subject, split, order, attack, self.batch_size, seed, self.batch_norm)
        try:
            found = self._measured(scene, weights)
        except AttackBroken as error:
            return failed(f"{error} Smaller alphas keep the loss finite, if it is finite for the network itself.")
        if not all(np.isfinite(values).all() for values in (found.robust, found.clean, found.flat, found.worst)):
            return failed("The loss of some images is not a finite number; smaller alphas may keep it finite.")
        blind = scene.blind()
        quantities = [
            *self._quantities(found, seed),
            Quantity("share of vanishing gradients", blind, "fraction", n=len(order)),
        ]
        panels = self._panels(found, seed)
        if self.plane is not None:
            heatmap, angle = self._plane(scene, weights)
            quantities.append(Quantity("cosine between the plane's directions", angle, n=1, nature="exact"))
            panels.append(heatmap)
        return Reading(
            lens=self.name,
            says=self._sentence(found),
            outcome=_outcome(blind),
            quantities=tuple(quantities),
            headline=("curvature at 0", "average robust flatness", "worst robust flatness"),
            panels=tuple(panels),
            settings=settings,
        )

    def _measured(self, scene: Displaced, weights: Weights) -> _Found:
        base = scene.at(weights)
        grid = [sign * alpha for sign in (-1, 1) for alpha in self.alphas]
        grid = sorted([0.0, *grid])
        curves = []
        for k in range(self.directions):
            h = filter_normalised(gaussian(weights, generator("cpu", scene.seed, "direction", k)), weights)
            at = (scene.at(moved(weights, (alpha, h)), base.x_adv) if alpha else base for alpha in grid)
            curves.append([[losses.robust, losses.clean, losses.given] for losses in at])
        robust, clean, kept = np.asarray(curves).transpose(2, 0, 1, 3)
        flat = []
        for k in range(self.draws):
            gen = generator("cpu", scene.seed, "ball", k)
            nu = in_relative_ball(gaussian(weights, gen), weights, self.average_radius, gen)
            flat.append(scene.at(moved(weights, (1.0, nu))).robust - base.robust)
        worst = scene.climb(base, self.worst_radius, self.ascent_steps) - base.robust
        return _Found(np.asarray(grid), robust, clean, kept, np.asarray(flat), worst)

    def _quantities(self, found: _Found, seed: int) -> list[Quantity]:
        n, grid = found.robust.shape[2], found.grid
        zero = len(grid) // 2

        def measured(name: str, of: _Curves, statistic: Callable[[Floats], Floats], unit: str = "nats") -> Quantity:
            values = statistic(of.mean)
            half = float(half_width(values, np.array([statistic(curves) for curves in of.resampled])))
            value = float(values.mean())
            return Quantity(name, value, unit, value - half, value + half, n)

        # Each of these is (directions,) for curves (directions, α).

        def start(curves: Floats) -> Floats:
            return np.asarray(curves[:, zero])

        def curvature(curves: Floats) -> Floats:
            near = np.abs(grid) <= self.fit_within
            return fitted(grid[near], curves[:, near])[1]

        def rise(alpha: float, curves: Floats) -> Floats:
            return np.asarray((curves[:, np.abs(grid) == alpha] - curves[:, [zero]]).mean(1))

        def width(curves: Floats) -> Floats:
            return widths(grid, curves)[0]

        def mean(curves: Floats) -> Floats:
            return np.asarray(curves.mean(1))

        robust, clean, flat, worst = (
            _Curves(losses.mean(2), resampled(losses, seed))
            for losses in (found.robust, found.clean, found.flat[:, None], found.worst[None, None])
        )
        wide = measured("width", robust, width, "")
        if not widths(grid, robust.mean)[1].all():
            wide = Quantity(wide.name, wide.value, n=n, nature="lower bound")
        return [
            measured("loss", clean, start),
            measured("robust loss", robust, start),
            measured("curvature at 0", robust, curvature),
            measured("curvature at 0, clean", clean, curvature),
            *(measured(f"rise at ±{alpha:g}", robust, partial(rise, alpha)) for alpha in self.alphas),
            wide,
            measured("average robust flatness", flat, mean),
            measured("worst robust flatness", worst, mean),
        ]

    def _panels(self, found: _Found, seed: int) -> list[Panel]:
        def series(name: str, values: Floats, *, band: bool) -> Series:
            middle = values.mean((0, 2))
            if not band:
                return Series(name, found.grid, middle)
            spread = half_width(values.mean(2), np.array(resampled(values, seed)))
            return Series(name, found.grid, middle, middle - spread, middle + spread)

        lines = (
            series("under attack", found.robust, band=True),
            series("clean", found.clean, band=True),
            series("attack of α = 0 kept", found.kept, band=False),
        )
        label = "step α along random directions (1 = the size of every filter)"
        curve = Curve("Loss against a step in the weights", label, "mean cross-entropy, nats", lines)
        near = np.abs(found.grid) <= self.fit_within
        curves = found.robust.mean(2)
        slope, bend, error = fitted(found.grid[near], curves[:, near])
        wide, _ = widths(found.grid, curves)
        rows = tuple(
            (f"random {k + 1}", float(slope[k]), float(bend[k]), float(error[k]), float(wide[k]))
            for k in range(self.directions)
        )
        return [curve, Table("Directions in the weights, loss under attack", PER_DIRECTION, rows)]

    def _plane(self, scene: Displaced, weights: Weights) -> tuple[Heatmap, float]:
        """Mean robust loss over w + α h₁ + β h₂, and the cosine between h₁ and h₂ after normalisation."""
        assert self.plane is not None
        a, b = (gaussian(weights, generator("cpu", scene.seed, "plane", k)) for k in range(2))
        first, second = (filter_normalised(h, weights) for h in (a, orthogonal_to(a, b)))
        axis = np.linspace(-self.alphas[-1], self.alphas[-1], self.plane)
        z = [
            [scene.at(moved(weights, (float(u), first), (float(v), second))).robust.mean() for u in axis] for v in axis
        ]
        title = "Loss under attack over a plane in the weights"
        heatmap = Heatmap(title, "step along the first direction", "step along the second", axis, axis, np.asarray(z))
        return heatmap, cosine(first, second)

    def _sentence(self, found: _Found) -> str:
        alpha = min(self.alphas, key=lambda a: abs(a - 0.5))
        start = found.robust[0, len(found.grid) // 2].mean()
        there = found.robust[:, np.abs(found.grid) == alpha].mean()
        k = self.directions
        return (
            f"Moving every filter by {alpha:g} of its own size in a random direction takes the loss under attack from "
            f"{start:.3g} to {there:.3g} ({k} direction{'s' if k > 1 else ''}, {found.robust.shape[2]} images)."
        )


def _outcome(blind: float) -> Outcome:
    if blind <= TOLERATED:
        return Outcome()
    return Outcome.unreliable(
        f"For {blind:.0%} of the images the loss of the unmoved network has almost no slope: the network is very sure "
        "of itself there, or answers all images alike. An attack that follows the loss is blind there and sees more "
        "once the weights are moved, so the rise of the loss under attack is partly an artefact."
    )


class _Curves(NamedTuple):
    """Mean curves (directions, α), and what they are for resampled examples."""

    mean: Floats
    resampled: list[Floats]


@dataclass(frozen=True, eq=False)
class _Found:
    """Losses of every example: ``robust``, ``clean`` and ``kept`` (directions, α, n) at ``grid`` (α,).

    ``flat`` (draws, n) and ``worst`` (n,) are differences of robust losses to those at w.
    """

    grid: Floats
    robust: Floats
    clean: Floats
    kept: Floats
    flat: Floats
    worst: Floats
