"""How far images are from the decision boundary, in between a certificate and an adversarial image."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from robustlens.attacks.fmn import FMN
from robustlens.attacks.superdeepfool import SuperDeepFool
from robustlens.attacks.verify import AttackBroken
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, Invariance, Split, Subject
from robustlens.lenses.distances import Distances, Nearest, certificate, distances
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.lenses.pictures import class_name, compared
from robustlens.lenses.shared_bins import histogram
from robustlens.linalg.lipschitz import Uncertified
from robustlens.results.correlation import bootstrap_spearman, spearman
from robustlens.results.errors import require_at_least
from robustlens.results.intervals import bootstrap_mean
from robustlens.results.panels import Curve, Floats, Gallery, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

#: More than this share of examples without an adversarial image makes the averages unreliable.
TOLERATED = 0.05
#: Rounding in float32 that a lower bound may show above the distance of an image: relative, and in pixel units.
ROUNDING = (1e-4, 1e-6)

#: Rivals that SuperDeepFool looks at: on 40 digits all nine came 0.5 % nearer in ℓ2, at twice the cost.
SEARCHED = 4

Nature = Literal["exact", "estimate", "lower bound", "upper bound"]


@dataclass(frozen=True, kw_only=True)
class BoundaryDistance:
    """d(x) = min ‖z − x‖ over the images z that the model answers otherwise than x, in the norm of the threat (ℓ2, ℓ∞).

    Computing d is NP-hard, so three numbers stand for it, certified ≤ estimate ≤ upper:

    * certified lower bound: min_k (f_ŷ − f_k)(x) / L_ŷk with L from the product of the exact layer norms, where the
      network's layers are known (``linalg.lipschitz``). No image at all lies nearer.
    * estimate: max_R min(min_k (f_ŷ − f_k)(x) / L_k(R), R), with L_k(R) the largest dual gradient norm of f_ŷ − f_k
      over random points of the ball of radius R. It would be a bound with the true L_k; sampling finds less, so it may
      lie above d. R is ¼, ½, ¾ and 1 times the upper bound, because a larger ball cannot tell more.
    * upper bound: the nearest adversarial image that SuperDeepFool and FMN find, the segment to it bisected, checked
      with a fresh forward pass. It lies in the pixel box; the other two also hold without it.

    The margin is +d where the answer is right and −d where it is wrong (there d is what it takes to change the
    answer). The average margin is mean d, the minimum margin the smallest margin of the n examples: its interval is
    what the certificate and the attacks leave open. For a linear model all three numbers are d, unless the box is in
    the way. The scale of the logits changes none.

    Where no adversarial image is found an example is counted as failed and left out of the averages of the upper
    bound; the reading is unreliable above 5 % of them, or when any bound is crossed.

    Costs at most 5 · ``steps`` + ``samples`` · ``rivals`` input passes an example, less where SuperDeepFool ends early;
    for the default 2 × 40 examples of mnist-cnn, about 20 seconds of one core.

    Attributes:
        n_examples: examples of each split, a fixed random sample; None takes all.
        steps: gradient evaluations of SuperDeepFool, and steps of FMN.
        samples: points at which the gradients of an example are sampled, over the four balls.
        rivals: wrong classes that the estimate looks at, those with the highest logits; with fewer than all it leaves
            some out.
        pictures: rows of the gallery.
        bins: bins of the histograms.
        batch_size: examples measured together.

    Raises:
        InputError: no steps, samples or rivals.
    """

    name: ClassVar[str] = "boundary-distance"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = (
        "Wu and Yu 2019, arXiv 1907.11780, §2 (margins) and Theorem 3 (estimate, after Hein and Andriushchenko 2017, "
        "arXiv 1705.08475)"
    )

    n_examples: int | None = 40
    steps: int = 30
    samples: int = 8
    rivals: int = 9
    pictures: int = 8
    bins: int = 40
    batch_size: int = 40

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, samples=1, rivals=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(n_examples=6, steps=5, samples=4, pictures=2, bins=5), cls(n_examples=4, steps=4, rivals=1)]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=500, steps=100, samples=64)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        n = count(subject.splits.train, self.n_examples) + count(subject.splits.test, self.n_examples)
        return Passes(inputs=(5 * self.steps + self.samples * self.rivals) * n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear model of two classes: every distance is |shift|, and all three numbers are equal to it."""
        train, test = [0.4, 0.35, 0.3, 0.15], [0.3, 0.2, 0.1, -0.25]
        subject = two_sided_subject(train_shifts=train, test_shifts=test)
        expected = {}
        for split, shifts in (("train", train), ("test", test)):
            average = sum(map(abs, shifts)) / len(shifts)
            for kind in ("average margin", "estimated average margin", "certified average margin"):
                expected[f"{kind}, {split}"] = (average, 2e-5)
            expected[f"mean signed margin, {split}"] = (sum(shifts) / len(shifts), 2e-5)
            expected[f"minimum margin, {split}"] = (min(shifts), 2e-5)
            expected[f"failed attacks, {split}"] = (0.0, 0.0)
            expected[f"crossed bounds, {split}"] = (0.0, 0.0)
            expected[f"rank correlation of logit margin and distance, {split}"] = (1.0, 1e-12)
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        threat = subject.threat
        settings = describe(self) | {"threat": str(threat)}
        if not isinstance(threat, Lp) or threat.norm == "l1":
            return self._failed('Distances are measured in ℓ2 or ℓ∞: take a threat such as "l2:1".', settings)
        image = subject.splits.test.batch(torch.tensor([0])).x.to(subject.device)
        corners = torch.full_like(image, threat.high), torch.full_like(image, threat.low)
        whole = threat.with_eps(float(threat.distance(*corners)[0]))
        splits = {"test": subject.splits.test, "train": subject.splits.train}
        splits = {name: split for name, split in splits.items() if len(split)}  # an audited network may come without
        for name, split in splits.items():
            z, _ = logits(subject, split, sample(split, self.n_examples), self.batch_size)
            if not bool(torch.isfinite(z).all()):
                why = f"The model answers some {name} images with logits that are not finite numbers."
                return self._failed(why, settings)
        constants = certificate(subject.model, image, threat.norm)
        try:
            measured = {name: self._measure(subject, split, whole, constants, gen) for name, split in splits.items()}
        except AttackBroken as error:
            return self._failed(str(error), settings)
        if all(bool(np.isnan(d.upper).all()) for d, _ in measured.values()):
            why = "No attack changed a single answer, so nothing is known about the boundary: is the model constant?"
            return self._failed(why, settings)
        seed = draw_seed(gen)
        found = {name: d for name, (d, _) in measured.items()}
        quantities = [q for name, d in found.items() for q in _quantities(d, name, threat.norm, seed)]
        gallery = _gallery(measured["test"][1], subject.splits.classes)
        return Reading(
            lens=self.name,
            says=_sentence(found["test"], constants, threat.norm),
            outcome=_outcome(found),
            quantities=tuple(quantities),
            headline=tuple(q.name for q in quantities if q.name in ("average margin, test", "minimum margin, test")),
            panels=(*_charts(found, threat, self.bins), _table(quantities, found), *gallery),
            settings=settings,
            examples=_kept({name: (sample(split, self.n_examples), found[name]) for name, split in splits.items()}),
        )

    def _measure(
        self, subject: Subject, split: Split, whole: Lp, constants: Tensor | Uncertified, gen: Generator
    ) -> tuple[Distances, list[Nearest]]:
        """The distances of a sample of ``split``, and its nearest pictures."""
        attacks = (
            SuperDeepFool(threat=whole, steps=self.steps, rivals=min(self.rivals, SEARCHED)),
            FMN(threat=whole, steps=self.steps),
        )
        known = constants if isinstance(constants, Tensor) else None
        parts: list[Distances] = []
        nearest: list[Nearest] = []
        for batch in batches(subject, split, sample(split, self.n_examples), self.batch_size):
            part, pictures = distances(
                subject.model, batch, attacks, known, most=self.rivals, samples=self.samples, gen=gen
            )
            parts.append(part)
            nearest = heapq.nsmallest(self.pictures, [*nearest, *pictures], key=lambda picture: picture.distance)
        return Distances.joined(parts), nearest

    def _failed(self, why: str, settings: dict[str, object]) -> Reading:
        return Reading(self.name, "No distance was measured.", Outcome.failed(why), settings=settings)


def _quantities(d: Distances, split: str, unit: str, seed: int) -> list[Quantity]:
    n, found = len(d.upper), ~np.isnan(d.upper)

    def mean(name: str, values: Floats, nature: Nature) -> Quantity:
        interval = bootstrap_mean(values, seed=seed)
        return Quantity(f"{name}, {split}", float(values.mean()), unit, *interval, len(values), nature=nature)

    numbers = []
    if found.any():
        numbers += [mean("average margin", d.upper[found], "upper bound"), _minimum(d, split, unit)]
        numbers.append(mean("mean signed margin", d.signed[found], "estimate"))
    numbers.append(mean("estimated average margin", d.estimate, "estimate"))
    signed = np.where(d.right, d.estimate, -d.estimate)
    numbers.append(Quantity(f"estimated minimum margin, {split}", float(signed.min()), unit, n=n))
    if not np.isnan(d.lower).any():
        numbers.append(mean("certified average margin", d.lower, "lower bound"))
    numbers.append(Quantity(f"failed attacks, {split}", float((~found).sum()), "examples", n=n, nature="exact"))
    numbers.append(Quantity(f"crossed bounds, {split}", float(crossed(d)), "examples", n=n, nature="exact"))
    lead, upper = d.lead[found], d.upper[found]
    if len(upper) > 1:
        rho = spearman(lead, upper)
        if not np.isnan(rho):
            name = f"rank correlation of logit margin and distance, {split}"
            low, high = bootstrap_spearman(lead, upper, seed=seed)
            numbers.append(Quantity(name, rho, "", min(low, rho), max(high, rho), len(upper)))
    return numbers


def _kept(measured: dict[str, tuple[Tensor, Distances]]) -> dict[str, NDArray[Any]]:
    """The distances behind the averages; upper bounds only where there is one for every example."""
    kept: dict[str, NDArray[Any]] = {}
    for split, (order, d) in measured.items():
        kept |= {f"index, {split}": order.numpy(), f"estimated average margin, {split}": d.estimate}
        if not np.isnan(d.upper).any():
            kept[f"average margin, {split}"] = d.upper
    return kept


def _minimum(d: Distances, split: str, unit: str) -> Quantity:
    """The smallest margin that was found, and the interval that the bounds leave for the true one.

    Without mistakes it is an upper bound. With mistakes it is minus their largest distance, a lower bound.
    """
    found = ~np.isnan(d.upper)
    value = float(d.signed[found].min())
    mistakes = bool((~d.right).any())
    nature: Nature = "upper bound" if not mistakes else "lower bound" if found[~d.right].all() else "estimate"
    low = high = None
    if not np.isnan(d.lower).any() and nature != "estimate":
        low = value if mistakes else min(value, float(d.lower.min()))
        high = max(value, -float(d.lower[~d.right].max())) if mistakes else value
    return Quantity(f"minimum margin, {split}", value, unit, low, high, len(d.upper), nature=nature)


def crossed(d: Distances) -> int:
    """Examples whose certified bound lies above the distance of an adversarial image, which cannot be."""
    return int((d.lower > d.upper * (1 + ROUNDING[0]) + ROUNDING[1]).sum())


def _outcome(found: dict[str, Distances]) -> Outcome:
    problems = []
    wrong = sum(crossed(d) for d in found.values())
    if wrong:
        problems.append(
            f"For {wrong} images an adversarial image lies nearer than the certified distance: the numbers contradict "
            "each other, so the certificate or the model's arithmetic cannot be trusted."
        )
    lost = max(float(np.isnan(d.upper).mean()) for d in found.values())
    if lost > TOLERATED:
        problems.append(
            f"For {lost:.0%} of the images no attack found another answer, so their distance is not known and they are "
            "missing in the averages; more steps, or a look at the model's gradients, may help."
        )
    return Outcome.unreliable(" ".join(problems)) if problems else Outcome()


def _sentence(d: Distances, constants: Tensor | Uncertified, norm: str) -> str:
    found = ~np.isnan(d.upper)
    if not found.any():
        return f"No attack changed the answer to any of {len(found)} test images."
    said = (
        f"To change the answer to a test image, a change of {float(d.upper[found].mean()):.3g} ({norm}) is enough on "
        f"average, and of {float(d.upper[found].min()):.3g} for the nearest of {int(found.sum())}"
    )
    if isinstance(constants, Uncertified):
        return f"{said}; nothing is certified, because {constants.why}."
    return f"{said}; no change below {float(d.lower.mean()):.3g} is, on average, as the layers' norms certify."


def _charts(found: dict[str, Distances], threat: Lp, bins: int) -> list[Panel]:
    label = f"({threat.norm}, pixels in [0, 1])"
    signed = {name: d.signed[~np.isnan(d.upper)] for name, d in found.items()}
    test = found["test"]
    kinds = {"certified": test.lower, "estimate": test.estimate, "upper": test.upper}
    kinds = {name: values[~np.isnan(values)] for name, values in kinds.items() if not np.isnan(values).all()}
    radii = np.linspace(0, float(np.nanmax(test.upper, initial=threat.eps)), 101)
    sure = np.nan_to_num(test.lower, nan=0.0)
    held = np.nan_to_num(test.upper, nan=np.inf)
    series = [Series("no attack succeeds", radii, np.array([(test.right & (held > r)).mean() for r in radii]))]
    if "certified" in kinds:
        series.append(Series("certified", radii, np.array([(test.right & (sure > r)).mean() for r in radii])))
    return [
        histogram("Margins", f"distance to the boundary, negative for wrong answers {label}", signed, bins),
        histogram("Three views of the distance, test", f"distance to the boundary {label}", kinds, bins),
        Curve("Accuracy that the distances leave", f"radius {label}", "share right", tuple(series), (0.0, 1.0)),
    ]


def _table(quantities: list[Quantity], found: dict[str, Distances]) -> Table:
    """One row a measure, one column a split, and what the measure is."""
    by_name = {q.name: q for q in quantities}
    measures = list(dict.fromkeys(name.rpartition(", ")[0] for name in by_name))
    rows: list[tuple[str | float | None, ...]] = [("examples", "", *(len(d.upper) for d in found.values()))]
    for measure in measures:
        each = [by_name.get(f"{measure}, {split}") for split in found]
        nature = next(q.nature for q in each if q is not None)
        rows.append((measure, nature, *(None if q is None else q.value for q in each)))
    return Table("Distances in numbers", ("measure", "is", *found), tuple(rows))


def _gallery(nearest: list[Nearest], classes: tuple[str, ...]) -> list[Gallery]:
    """The right test images that are nearest to another answer."""
    clean, x_adv = [each.clean for each in nearest], [each.adversarial for each in nearest]
    captions = [
        f"{class_name(classes, each.label)} → {class_name(classes, each.became)}, distance {each.distance:.3g}"
        for each in nearest
    ]
    return compared("Nearest adversarial images", "nearest", clean, x_adv, captions)
