"""Singular values of the Jacobian of the logits, at images and at what an attack makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Generator, Tensor

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, craft
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.second_derivative import differentiating_twice
from robustlens.core.types import WEIGHT_SCALE, Attack, Invariance, Split, Subject
from robustlens.lenses.bands import averaged, band
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.lenses.passes import batches, count, draw_seed, sample
from robustlens.lenses.shared_bins import histogram
from robustlens.linalg.jacobian import at_once, decompose, jacobian_rows, power_method, require_derivative, residual
from robustlens.linalg.regression import MOST, regressed_jacobian
from robustlens.results.errors import require_at_least
from robustlens.results.panels import Curve, Floats, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

UNIT = "logits per unit of ℓ2 change"
#: What float32 may add to the difference of two ways to the same singular value, relative to it.
ROUNDING = 1e-3
#: A regression that differs by more from the derivative contradicts it.
CONTRADICTED = 0.05
#: Title and axis of the histogram.
LARGEST = "Largest singular value of each image", f"largest singular value ({UNIT})"
BINS = 30


@dataclass(frozen=True, kw_only=True)
class JacobianSpectrum:
    """All singular values σ_1 ≥ … ≥ σ_r of J = ∂f(x)/∂x (K, n), at test images x and at attacked images x_adv.

    σ_1 is by how much the logits f can move, per unit of ℓ2 length, under a small change of this image. Every row of J
    is computed, and decomposed in float64; J itself has the rounding of the model's arithmetic, so values below about
    1e-6 σ_1 are noise in float32. Multiplying the logits multiplies all values and leaves the stable rank
    ‖J‖_F² / σ_1² alone, which is 1 where one direction has all the sensitivity and K where all are equal.

    Two other ways to the same numbers, on the first few images. The power method gives (u, σ, v) with the residual
    max(‖Jv − σu‖, ‖Jᵀu − σv‖) / σ, so that a singular value has to lie within it. Linear regression of the logits on
    perturbed images with the activation functions held gives J without any derivative (A.5). The reading is
    unreliable where the first finds no singular value within its residual and rounding, or the second differs
    by more than 5 %: then the backward pass is not the derivative of the forward pass, as in networks that round
    their input and pretend not to.

    Cost for each image: the attack and 2·K backward passes; for a cross-checked one 3 backward passes a step of
    the power method, or 1.5 (n + 1) forward passes in float64 for a regression. With the defaults about 10 s of one
    core for mnist-cnn.

    Attributes:
        attack: what makes x_adv; None is PGD on the cross-entropy, 10 steps, in the subject's threat.
        n_examples: a fixed random sample of the test split; None takes all.
        powered: images on which the power method is run; it needs second derivatives of every layer.
        iterations: of the power method.
        regressed: images for the regression, at most ``linalg.regression.MOST`` pixels each; larger ones are left out.
        batch_size: images at a time, fewer where their Jacobians would exceed ``linalg.jacobian.CHUNK``.

    Raises:
        InputError: fewer than one example, iteration or image at a time, a negative number of images to check; a
            network whose images see each other, or that cannot be differentiated (twice, for the power method).
    """

    name: ClassVar[str] = "jacobian-spectrum"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = "Roth, Kilcher and Hofmann 2020, arXiv 1906.01527, §5.2, figure 1 (left) and A.5"

    attack: Attack | None = None
    n_examples: int | None = 200
    powered: int = 10
    iterations: int = 30
    regressed: int = 1
    batch_size: int = 200

    def __post_init__(self) -> None:
        require_at_least(self, powered=0, regressed=0, iterations=1, batch_size=1)

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(n_examples=8, attack=quick, powered=4),
            cls(n_examples=5, attack=quick, powered=0, regressed=0, batch_size=2),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=1000, powered=50, iterations=100, regressed=5)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack, n = self.attack or PGD(threat=subject.threat), count(subject.splits.test, self.n_examples)
        backward = 2 * len(subject.splits.classes) * n + 3 * self.iterations * self.powered
        answers = 1.5 * math.prod(subject.splits.shape) * self.regressed
        return attack.passes * n + Passes(forward=2 * n + answers, inputs=backward / 2)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear model z = Wx has the singular values of W everywhere: here 3 and 1, so ‖W‖_F = √10."""
        split = Split(torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 2)
        weight = torch.zeros(2, 4)
        weight[0, 0], weight[1, 1] = 3.0, 1.0
        subject = linear_subject(weight, torch.zeros(2), train=split, test=split)
        expected = {
            "largest singular value, clean": (3.0, 1e-6),
            "largest singular value, attacked": (3.0, 1e-6),
            "growth under attack": (1.0, 1e-6),
            "Frobenius norm, clean": (math.sqrt(10), 1e-6),
            "stable rank, clean": (10 / 9, 1e-6),
            "power method: distance from the decomposition": (0.0, 1e-6),
            "regression: distance from the derivative": (0.0, 1e-6),
        }
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat)
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}
        split = subject.splits.test
        order = sample(split, self.n_examples)
        size = min(self.batch_size, at_once(len(subject.splits.classes), math.prod(subject.splits.shape)))
        require_derivative(subject.model, split.batch(order[:8]).x.to(subject.device), self.name)
        parts: dict[str, list[Tensor]] = {"clean": [], "attacked": []}
        try:
            for batch in batches(subject, split, order, size):
                x_adv = craft(attack, subject.model, batch.x, batch.y, gen=gen)
                for at, x in (("clean", batch.x), ("attacked", x_adv)):
                    with untouched(subject.model):
                        jacobian = jacobian_rows(subject.model, x)
                    if not bool(torch.isfinite(jacobian).all()):
                        return self._failed("The derivative of some images is not a finite number.", settings)
                    parts[at].append(decompose(jacobian).s)
        except AttackBroken as error:
            return self._failed(str(error), settings)
        values = {at: torch.cat(found).cpu().numpy() for at, found in parts.items()}
        seed = draw_seed(gen)
        checks = self._checks(subject, order, size, gen)
        return Reading(
            lens=self.name,
            says=_sentence(values),
            outcome=Outcome.unreliable(" ".join(checks.problems)) if checks.problems else Outcome(),
            quantities=(*_quantities(values, seed), *checks.quantities),
            headline=("largest singular value, clean", "largest singular value, attacked"),
            panels=(
                _curve(values, seed),
                histogram(*LARGEST, {at: s[:, 0] for at, s in values.items()}, BINS),
                *checks.tables,
            ),
            settings=settings,
        )

    def _failed(self, why: str, settings: dict[str, object]) -> Reading:
        return Reading(self.name, "No singular value was measured.", Outcome.failed(why), settings=settings)

    def _checks(self, subject: Subject, order: Tensor, size: int, gen: Generator) -> _Checks:
        """The cross-checks at clean images, at most ``size`` at a time."""
        found = _Checks([], [], [])
        rows: list[tuple[str | float | None, ...]] = []
        split = subject.splits.test
        if self.powered:
            pairs = [
                self._power(subject, batch.x, gen) for batch in batches(subject, split, order[: self.powered], size)
            ]
            away, left = (torch.cat(part).cpu().numpy() for part in zip(*pairs, strict=True))
            label, most = "power method: distance from the decomposition", float(left.max())
            found.quantities.append(Quantity(label, float(away.max()), n=len(away), residual=most))
            rows.append(("power method", len(away), float(np.median(away)), float(away.max()), most))
            if bool((away > left + ROUNDING).any()):
                found.problems.append(
                    f"Products with the derivative do not fit its matrix: the power method ends {away.max():.1%} away "
                    f"from every singular value, although its own error is at most {most:.1%}."
                )
        if self.regressed and math.prod(subject.splits.shape) <= MOST:
            chosen = order[: self.regressed]
            apart = [_regression(subject, batch.x, gen) for batch in batches(subject, split, chosen, size)]
            away = torch.cat(apart).cpu().numpy()
            found.quantities.append(
                Quantity("regression: distance from the derivative", float(away.max()), n=len(away))
            )
            rows.append(("regression", len(away), float(np.median(away)), float(away.max()), None))
            if away.max() > CONTRADICTED:
                found.problems.append(
                    f"The answers to slightly changed images differ by {away.max():.0%} from what the derivative "
                    "predicts, so the derivative, and every attack that uses it, is misled."
                )
        if rows:
            header = ("way", "images", "relative difference: median", "largest", "largest residual")
            found.tables.append(Table("The same numbers in other ways", header, tuple(rows)))
        return found

    def _power(self, subject: Subject, x: Tensor, gen: Generator) -> tuple[Tensor, Tensor]:
        """min_i |σ − σ_i| / σ (B,) for σ of the power method, and its residual (B,); 0 where J is zero."""
        start = torch.empty_like(x).normal_(generator=gen)
        with untouched(subject.model):
            exact = decompose(jacobian_rows(subject.model, x)).s
            with differentiating_twice(f"the power method of {self.name}", fix="Set powered = 0."):
                u, v, sigma = power_method(subject.model, x, start, self.iterations)
                left = residual(subject.model, x, u, v, sigma)
        away = (sigma[:, None].double() - exact).abs().amin(1)
        return torch.where(sigma > 0, away / sigma.double(), (exact[:, 0] > 0).double()), left.double()


def _regression(subject: Subject, x: Tensor, gen: Generator) -> Tensor:
    """‖W − J‖_F / ‖J‖_F (B,) for the regressed W; where J is zero, 1 or 0 as W is not or is."""
    with untouched(subject.model):
        exact = jacobian_rows(subject.model, x).double().flatten(1)
        guess = regressed_jacobian(subject.model, x, gen=gen).flatten(1)
    size, away = exact.norm(dim=1), (guess - exact).norm(dim=1)
    return torch.where(size > 0, away / size.clamp_min(1e-300), (away > 0).double())


class _Checks(NamedTuple):
    quantities: list[Quantity]
    problems: list[str]
    tables: list[Table]


def _quantities(values: dict[str, Floats], seed: int) -> list[Quantity]:
    found: list[Quantity] = []
    for at, s in values.items():
        found += averaged(f"largest singular value, {at}", s[:, 0], seed=seed, unit=UNIT)
    clean, attacked = values["clean"], values["attacked"]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(clean[:, 0] > 0, attacked[:, 0] / clean[:, 0], np.nan)
        ranks = {at: (s**2).sum(1) / s[:, 0] ** 2 for at, s in values.items()}
    found += averaged("growth under attack", growth, seed=seed)
    for at, s in values.items():
        found += averaged(f"Frobenius norm, {at}", np.sqrt((s**2).sum(1)), seed=seed, unit=UNIT)
        found += averaged(f"stable rank, {at}", ranks[at], seed=seed)
    return found


def _curve(values: dict[str, Floats], seed: int) -> Curve:
    ranks = np.arange(1.0, 1 + values["clean"].shape[1])
    series = tuple(band(at, ranks, s, seed=seed) for at, s in values.items())
    return Curve("Singular values of the Jacobian", "rank", f"singular value ({UNIT})", series)


def _sentence(values: dict[str, Floats]) -> str:
    n, clean, attacked = len(values["clean"]), values["clean"][:, 0].mean(), values["attacked"][:, 0].mean()
    return (
        f"A small change of an image is stretched at most {clean:.3g} times on its way to the logits, on average over "
        f"{n} test images, and at most {attacked:.3g} times around the same images after the attack."
    )
