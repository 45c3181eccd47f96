"""What generalisation bounds say about a network, factor by factor and in logarithms."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Generator, Tensor

from robustlens.attacks.verify import AttackBroken
from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, WEIGHT_SCALE, Invariance, Split, Subject
from robustlens.lenses.capacity import (
    Cover,
    Layer,
    bartlett,
    intrinsic_dimension,
    layer_facts,
    log10,
    log_sum,
    second_term,
    smallest_row_distance,
    sokolic,
)
from robustlens.lenses.nearest import Nearest, nearest_boundary
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.linalg.layers import LinearOperator, Skipped, operators
from robustlens.linalg.segments import Walk, walk
from robustlens.results.errors import InputError
from robustlens.results.intervals import bootstrap_difference
from robustlens.results.panels import Floats, Panel, Table
from robustlens.results.reading import Outcome, Quantity, Reading, spelled

FACTORS = ("factor", "value", "log10", "what it is here")
BOUNDS = ("bound on the gap", "log10", "vacuous by a factor of 10^", "what it is here")
WEAK: tuple[tuple[str, str], ...] = (
    (
        "product of the smallest singular values",
        "The proof takes ∏ σ_min(W_i) for a lower bound of the product of the W_i with rows set to zero. Interlacing "
        "bounds single wide matrices on part of the space; for products it is false. Biases, branches and pooling are "
        "left out. So the first term is no certificate.",
    ),
    (
        "size of the balls",
        "Two points of a ball of radius ε can be 2ε apart, but robustness is only assumed within ε; the argument needs "
        "ε ≤ ε₀ / 2, and the count of balls a factor for the number of labels.",
    ),
    (
        "factor 2 lost",
        "The line after equation 17 has max{0, 2 (1 − u_min / γ)}; the theorem has max{0, 1 − u_min / γ}, which "
        "equation 16 supports.",
    ),
    (
        "robustness everywhere",
        "Definition 2 asks for no change of the predicted class within ε of any possible image. Near a boundary this "
        "is false by definition, unless no image lies there.",
    ),
    (
        "unknown constants",
        "C_X and the dimension k of the set of images are not known; here they are estimated, and the number of balls "
        "grows like (1/ε)^k.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class GeneralizationBound:
    """With probability 1 − η over m training images, for the ramp loss ℓ_γ of the margin (Theorem 4.1):

        |risk − training risk| ≤ max{0, 1 − u_min / γ} + √(2 log 2 · (C_X / ε)^k / m + 2 log(1/η) / m),
        u_min = min_{y≠y'} ‖w_y − w_y'‖₂ · ∏_{i<L} σ_min(W_i) · v_min.

    A diagnosis, not a certificate: the gap is at most 1, a bound above 1 is vacuous, and the proof has weak steps,
    which a table names. What is not known is chosen or measured so that the bound comes out small: v_min is the
    smallest ℓ2 distance to the boundary that an attack finds from a training image, σ_min the smallest of the min(r, c)
    singular values of an r × c operator (convolutions as ``layer-spectra`` measures them, BatchNorm not folded in), k
    the Levina–Bickel estimate from 10 neighbours, which is low for few images, C_X half of the largest distance seen, ε
    the threat's radius in its own norm. "At the very least" needs none of that: images more than 2ε apart lie in
    different balls, so the second term cannot be smaller than counting those makes it.

    Beside it, with the same choices: Bartlett, Foster and Telgarsky 2017, Theorem 1.1, leading terms, the constants and
    logarithms inside its Õ left out: ‖X‖_F R ln(W) / (γ m) + √(ln(1/η) / m) with
    R = ∏ ‖W_i‖ (Σ (‖W_iᵀ‖_{2,1} / ‖W_i‖)^{2/3})^{3/2} (equation 1.2 with reference matrices 0 and activations of
    slope at most 1) and W the most values that a layer takes or gives; it is what the error may exceed the share of
    training margins up to γ by. And Sokolić et al. 2017, Corollary 2:
    √(2 log 2 · classes · (2 C_M / v)^k / m) + √(2 log(1/η) / m) with v = smallest margin / (√2 ∏ ‖W_i‖), over the
    training images that are right (it is undefined where one is wrong).

    Lemma 4.1 is checked on the way from that image to the boundary: the sum over the linear pieces against the
    difference of the logits, in a float64 copy.

    Multiplying the last layer and γ by c > 0 changes nothing (by default γ grows with the logits). Cost: all singular
    values of all layers, distances between ``n_examples`` images, and some 150 passes
    over at most 20 images: 5 s of one core for a 28×28 network of four convolutions.

    Attributes:
        gamma: γ, in logits; None is the median of the absolute training margins.
        eta: η, the probability that the bound fails.
        dimension, constant: k and C_X (also C_M); None estimates them.
        n_examples: training images (a fixed random sample) for margins, distances and the attack; None takes all. The
            distances between them need n² numbers.
        pieces: linear pieces of the segment on which the lemma is checked.
        batch_size: examples of a forward pass.

    Raises:
        InputError: γ, dimension or constant ≤ 0, or η outside (0, 1).
    """

    name: ClassVar[str] = "generalization-bound"
    reference: ClassVar[str] = (
        "Wen, Li and Jia 2020, arXiv 2011.07478, Theorem 4.1; Bartlett, Foster and Telgarsky 2017, arXiv 1706.08498, "
        "Theorem 1.1; Sokolić et al. 2017, arXiv 1605.08254, Corollary 2; Levina and Bickel 2004"
    )

    gamma: float | None = None
    eta: float = 0.05
    dimension: float | None = None
    constant: float | None = None
    n_examples: int | None = 500
    pieces: int = 50
    batch_size: int = 250

    def __post_init__(self) -> None:
        for field in ("gamma", "dimension", "constant"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise InputError(
                    f"generalization-bound {field}",
                    expected="a number > 0",
                    got=str(value),
                    fix="Leave it out to have it estimated.",
                )
        if not 0 < self.eta < 1:
            raise InputError(
                "generalization-bound eta", expected="a probability", got=str(self.eta), fix="0.05 is usual."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(n_examples=20, pieces=5), cls(gamma=2.0, dimension=3.0, constant=1.0, n_examples=10, pieces=2)]

    @property
    def invariances(self) -> frozenset[Invariance]:
        return WEIGHT_SCALE if self.gamma else EITHER_SCALE

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=5000)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        n = count(subject.splits.train, self.n_examples)
        return Passes(forward=n, inputs=150 * min(20, n))

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """z = (0, 4 (x₁ − ½)): rows 4 apart, norm 4, margins 4 · shift, so every factor is known."""
        subject = two_sided_subject(train_shifts=[0.1, 0.2, 0.3, 0.4], test_shifts=[0.1, 0.1, 0.3, 0.3])
        size = math.sqrt(sum(0.75 + (0.5 + s * (-1) ** (i + 1)) ** 2 for i, s in enumerate([0.1, 0.2, 0.3, 0.4])))
        balls, seldom = (1 / 0.2) ** 2, math.log(20)
        second = math.sqrt((2 * math.log(2) * balls + 2 * seldom) / 4)
        sokolic = math.sqrt(2 * math.log(2) * 2 * (2 / (0.4 / (math.sqrt(2) * 4))) ** 2 / 4) + math.sqrt(2 * seldom / 4)
        bartlett = size * 4 * math.log(4) / (1.0 * 4) + math.sqrt(seldom / 4)
        expected = {
            "log10 u_min": (math.log10(0.4), 1e-5),
            "log10 covering number": (math.log10(balls), 1e-12),
            "log10 bound": (math.log10(0.6 + second), 1e-5),
            "log10 bound, Bartlett 2017": (math.log10(bartlett), 1e-6),
            "log10 bound, Sokolić 2017": (math.log10(sokolic), 1e-6),
            "measured gap of the ramp loss": (0.1, 1e-6),
        }
        return [Oracle(subject, cls(gamma=1.0, dimension=2.0, constant=1.0), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        settings = describe(self) | {"threat": str(subject.threat)}
        try:
            return self._looked(subject, gen, settings)
        except (Unmeasurable, AttackBroken) as why:
            return Reading(self.name, "No bound was computed.", Outcome.failed(str(why)), settings=settings)

    def _looked(self, subject: Subject, gen: Generator, settings: dict[str, object]) -> Reading:
        train = subject.splits.train
        if len(train) == 0:
            raise Unmeasurable("A bound on the gap needs training images; none were given.")
        if subject.threat.eps == 0:
            raise Unmeasurable("At radius 0 there are no covering balls; choose a threat with a radius.")
        order = sample(train, self.n_examples)
        margins = _margins(subject, train, order, self.batch_size)
        gamma = self.gamma or float(np.median(np.abs(margins)))
        if gamma == 0:
            raise Unmeasurable("Half of the training images have a margin of 0; give gamma.")
        layers, between = _chain(subject, train)
        near = nearest_boundary(subject, train, order, self.batch_size, gen)
        if near is None:
            raise Unmeasurable("No change of any size that was tried changes the model's answer.")
        cover, m = self._cover(subject, train, order), len(train)
        sigma = sum(log10(layer.smallest) for layer in layers[:-1])
        u_min = log10(between) + sigma + log10(near.distance)
        first = max(0.0, 1 - 10 ** min(300.0, u_min - log10(gamma)))
        second, least = second_term(cover.balls, m, self.eta), second_term(log10(cover.apart), m, self.eta)
        total = log_sum([log10(first), second])
        size = _norm_of_inputs(subject, train, order, self.batch_size)
        right = margins[margins > 0]
        bounds = {
            "Theorem 4.1": total,
            "Theorem 4.1, at the very least": least,
            "Bartlett 2017": bartlett(layers, size, gamma, m, self.eta),
        }
        if len(right):
            classes = len(subject.splits.classes)
            bounds["Sokolić 2017"] = sokolic(layers, float(right.min()), cover, classes, m, self.eta)
        inside = float(subject.threat.distance(near.beyond, near.x)[0]) <= subject.threat.eps
        lemma = self._lemma(subject, near)
        gap = self._gap(subject, margins, gamma, draw_seed(gen))
        n = len(order)
        quantities = [
            Quantity("log10 bound", total, n=m),
            Quantity("log10 bound, at the very least", least, n=n, nature="lower bound"),
            *([Quantity("log10 u_min", u_min, n=n)] if u_min > -math.inf else []),
            Quantity("log10 covering number", cover.balls, n=n),
            *(Quantity(f"log10 bound, {name}", value, n=m) for name, value in list(bounds.items())[2:]),
            gap,
            Quantity("relative residual of Lemma 4.1", lemma.residual, n=len(lemma.bends) + 1, residual=lemma.residual),
        ]
        notes = (
            "both terms of the table above",
            f"{cover.apart} of {n} images are more than 2ε apart and need a ball each; the first term is left out",
            "leading terms without their constants",
            f"over the {len(right)} of {n} images that are right",
        )
        compared = tuple((*pair, max(0.0, pair[1]), note) for pair, note in zip(bounds.items(), notes, strict=False))
        factors: tuple[tuple[str, float, str], ...] = (
            ("min ‖w_y − w_y'‖₂", log10(between), "nearest two rows of the last layer"),
            *((f"σ_min of {x.name}", log10(x.smallest), _versus(x)) for x in layers[:-1]),
            ("∏ σ_min", sigma, "over all layers but the last"),
            ("v_min", log10(near.distance), _robustness(inside)),
            ("u_min", u_min, "product of the above"),
            ("γ", log10(gamma), "given" if self.gamma else "median absolute training margin"),
            ("first term", log10(first), "max{0, 1 − u_min / γ}"),
            ("k", log10(cover.k), "given" if self.dimension else "estimated from neighbours"),
            ("C_X", log10(cover.constant), "given" if self.constant else "half of the largest distance seen"),
            ("ε", log10(cover.eps), f"radius of the threat {spelled(str(subject.threat))}"),
            ("(C_X / ε)^k", cover.balls, "balls that cover the images"),
            ("m", log10(m), "training images"),
            ("second term", second, f"with η = {self.eta:g}"),
            ("bound", total, _verdict(total)),
        )
        rows = tuple((name, _value(log), log if log > -math.inf else None, note) for name, log, note in factors)
        panels: list[Panel] = [
            Table("The bound of Theorem 4.1, factor by factor", FACTORS, rows),
            Table("Generalisation bounds beside each other", BOUNDS, compared),
            Table("Why the theorem is a diagnosis only", ("step of the proof", "what is weak about it"), WEAK),
            _lemma_table(lemma, near, layers),
        ]
        return Reading(
            lens=self.name,
            says=f"Theorem 4.1 bounds the generalisation gap by {_written(total)}: {_verdict(total)} The measured gap "
            f"of the same loss is {gap.value:.3g}.",
            quantities=tuple(quantities),
            headline=("log10 bound", gap.name),
            panels=tuple(panels),
            settings=settings,
        )

    def _gap(self, subject: Subject, margins: Floats, gamma: float, seed: int) -> Quantity:
        """Mean test ramp loss − mean training ramp loss."""
        test = subject.splits.test
        others = _margins(subject, test, sample(test, self.n_examples), self.batch_size)
        train, new = (np.clip(1 - values / gamma, 0, 1) for values in (margins, others))
        gap = float(new.mean() - train.mean())
        low, high = bootstrap_difference(train, new, seed=seed)
        return Quantity("measured gap of the ramp loss", gap, "", min(low, gap), max(high, gap), len(others))

    def _cover(self, subject: Subject, train: Split, order: Tensor) -> Cover:
        """How many balls of the threat's radius the images need, estimated and counted."""
        x = torch.cat([b.x for b in batches(subject, train, order, self.batch_size)])
        eps = subject.threat.eps
        straight = torch.cdist(x.flatten(1).double(), x.flatten(1).double())
        own = torch.stack([subject.threat.distance(x, image[None].expand_as(x)) for image in x])
        k = self.dimension or intrinsic_dimension(straight)
        constant = self.constant or float(own.max()) / 2
        kept: list[int] = []
        apart = (own > 2 * eps).cpu()
        for i in range(len(x)):
            if bool(apart[i, kept].all()):
                kept.append(i)
        balls = max(0.0, k * (log10(constant) - log10(eps)))
        return Cover(k, constant, self.constant or float(straight.max()) / 2, balls, len(kept), eps)

    def _lemma(self, subject: Subject, near: Nearest) -> Walk:
        x = near.x.double()
        return walk(copy.deepcopy(subject.model).double(), x, near.beyond.double() - x, pieces=self.pieces)


class Unmeasurable(Exception):
    """A sentence that says why there is no bound."""


def _margins(subject: Subject, split: Split, order: Tensor, size: int) -> Floats:
    z, y = logits(subject, split, order, size)
    if not bool(torch.isfinite(z).all()):
        raise Unmeasurable("The model answers some images with logits that are not finite numbers.")
    margins: Floats = logit_margin(z, y).numpy()
    return margins


def _chain(subject: Subject, train: Split) -> tuple[list[Layer], float]:
    """The layers' numbers, and the smallest distance of two rows of the last one."""
    (batch,) = batches(subject, train, torch.tensor([0]), 1)
    found = operators(subject.model, batch.x, as_called=True)
    used = [operator for operator in found if not isinstance(operator, Skipped)]
    left_out = [operator.name for operator in found if isinstance(operator, Skipped)]
    if left_out:
        raise Unmeasurable(f"The bound needs every layer's singular values; those of {left_out[0]} are not known.")
    if not used or not isinstance(used[-1], LinearOperator):
        raise Unmeasurable("The theorem is about networks whose last layer is linear, and this one's is not.")
    return [layer_facts(operator) for operator in used], smallest_row_distance(used[-1].weight)


def _norm_of_inputs(subject: Subject, train: Split, order: Tensor, size: int) -> float:
    """‖X‖_F over all training images, from the mean square of those at ``order``."""
    squares = sum(float(b.x.double().square().sum()) for b in batches(subject, train, order, size))
    return math.sqrt(squares / len(order) * len(train))


def _versus(layer: Layer) -> str:
    return f"of at most {layer.largest:.3g}" if layer.smallest else "0 to rounding: u_min is 0 and the first term 1"


def _robustness(inside: bool) -> str:
    said = "smallest ℓ2 distance to the boundary that an attack finds"
    return f"{said}; it lies inside the threat, so the theorem does not apply" if inside else said


def _verdict(log: float) -> str:
    return f"vacuous by a factor of 10^{log:.1f}, as a gap is at most 1." if log > 0 else "not vacuous, being below 1."


def _value(log: float) -> float | None:
    """10^log where it is a number that one can read."""
    return 10**log if log < 6 else None


def _written(log: float) -> str:
    return f"10^{log:.1f}" if log > 3 else f"{10**log:.3g}"


def _lemma_table(lemma: Walk, near: Nearest, layers: Sequence[Layer]) -> Table:
    length = lemma.reached * float((near.beyond - near.x).norm())
    rows: tuple[tuple[str | float | None, ...], ...] = (
        ("linear pieces", len(lemma.bends) + 1),
        ("part of the way to the boundary", lemma.reached),
        ("relative residual", lemma.residual),
        (
            "log10 of: change of the logits / change of the image",
            log10(float(lemma.direct.norm()) / length) if length else None,
        ),
        ("log10 of the product of the largest singular values", sum(log10(layer.largest) for layer in layers)),
    )
    return Table("Lemma 4.1 on the way to the nearest boundary", ("measure", "value"), rows)
