"""How sure the network is of the right answer, and how much of that a small change takes away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, evaluate
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.types import WEIGHT_SCALE, Attack, Invariance, Split, Subject, Threat
from robustlens.lenses.accuracy import at_radius
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.results.errors import InputError
from robustlens.results.intervals import Interval, bootstrap_mean, wilson
from robustlens.results.panels import Curve, Floats, Histogram, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading, spelled
from robustlens.threats.lp import Lp

#: Probabilities that count as middle, and that the enlarged histograms show; their losses are −log of them.
MIDDLE = (0.1, 0.9)
HEADER = ("radius", "mean", "low", "high", "standard deviation", "low", "high", "n")


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """p = softmax(z)_y and ℓ = −log p of every example, clean and attacked, on training and on test images.

    Attacked is the worse of the image and what ``attack`` made of it, so p is an upper and ℓ a lower bound of the worst
    case in the threat. Beside each histogram stands one of its middle, p in [0.1, 0.9] or ℓ in [0.105, 2.30]:
    most predictions lie at the ends and hide what training for robustness changes.

    The loss variation of a test image is max_{‖δ‖ ≤ ε} ℓ(x + δ) − ℓ(x) ≥ 0, in the norm of the threat and in the box;
    the probability variation is what p falls by at the same δ. The paper's table 1 prints numbers below 1 with
    deviations below 0.3 and calls the loss a proxy to confidence: they fit the second. Reported are mean and standard
    deviation over images, at every radius. The attack is run at each radius and
    its best kept at the larger ones, whose balls hold it. What an attack finds is a lower bound of each maximum, and
    so is the mean.

    All numbers stay when a constant is added to the logits of an image. They change with the logits' scale: a network
    can be less confident and no more robust. Compare beside "logit-margins", which has measures free of scale.

    Cost: n_examples · (2 + number of radii) attacks. 200 images, 3 radii and 10 steps are 10,000 forward and
    backward passes, about 15 s for mnist-cnn on one core.

    Attributes:
        n_examples: examples of each split (a fixed random sample); None takes all.
        attack: None is PGD on the cross-entropy, 10 steps, in the subject's threat. Attack the loss and not only the
            answer, or the loss variation means little.
        radii: where the loss variation is measured; None is 1, 2 and 4 / 255 for an ℓ∞ threat (the paper's), else ¼, ½
            and 1 times the radius.
        bins: bins of a histogram.
        batch_size: examples attacked together.

    Raises:
        InputError: no radii or one ≤ 0, no bins, fewer than one example.
    """

    name: ClassVar[str] = "confidence"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = "Wen, Li and Jia 2020, arXiv 2011.07478, figures 5a and 5b; figure 7 and table 1"

    n_examples: int | None = 200
    attack: Attack | None = None
    radii: tuple[float, ...] | None = None
    bins: int = 50
    batch_size: int = 100

    def __post_init__(self) -> None:
        for field, right, expected in (
            ("radii", self.radii is None or (self.radii and min(self.radii) > 0), "numbers > 0"),
            ("bins", self.bins >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        ):
            if not right:
                what, got = f"confidence {field}", str(getattr(self, field))
                raise InputError(what, expected=expected, got=got, fix="Leave it out for the default.")

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(n_examples=20, attack=quick, batch_size=8),
            cls(n_examples=None, radii=(0.05,), bins=10, attack=quick),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=2000)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack, splits = self.attack or PGD(threat=subject.threat), subject.splits
        radii = 3 if self.radii is None else len(self.radii)
        n = count(splits.train, self.n_examples) + (1 + radii) * count(splits.test, self.n_examples)
        return attack.passes * n + Passes(forward=2 * n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Two classes with margins m: ℓ = log(1 + e^{−m}), p = e^{−ℓ}, and an attack takes 4 ε off each margin."""
        train, test = [0.4, 0.4, 0.3, 0.3], [0.4, 0.3, 0.1, -0.1]
        sided = two_sided_subject(train_shifts=train, test_shifts=test)

        def expected(eps: float, radii: tuple[float, ...]) -> dict[str, tuple[float, float]]:
            found = {}
            for split, shifts in (("train", train), ("test", test)):
                for state, radius in (("clean", 0.0), ("attacked", eps)):
                    loss = _two_class_losses(shifts, radius)
                    found[f"mean probability, {split}, {state}"] = (float(np.exp(-loss).mean()), 1e-5)
                    found[f"mean loss, {split}, {state}"] = (float(loss.mean()), 1e-5)
                    found[f"spread of losses, {split}, {state}"] = (float(loss.std()), 1e-5)
            for radius in radii:
                variation = _two_class_losses(test, radius) - _two_class_losses(test, 0.0)
                found[f"mean loss variation at {radius:.4g}"] = (float(variation.mean()), 1e-5)
                found[f"spread of loss variation at {radius:.4g}"] = (float(variation.std()), 1e-5)
                fall = np.exp(-_two_class_losses(test, 0.0)) - np.exp(-_two_class_losses(test, radius))
                found[f"mean probability variation at {radius:.4g}"] = (float(fall.mean()), 1e-5)
                found[f"spread of probability variation at {radius:.4g}"] = (float(fall.std()), 1e-5)
            return found

        l2, linf = sided.threat, Lp("linf", 8 / 255)
        straight = PGD(threat=l2, steps=10, random_start=False)
        return [
            Oracle(sided, cls(attack=straight), expected(0.2, (0.05, 0.1, 0.2))),
            Oracle(Subject(sided.model, sided.splits, linf), cls(), expected(8 / 255, (1 / 255, 2 / 255, 4 / 255))),
        ]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat, steps=10, loss="ce")
        radii = _radii(attack.threat, self.radii)
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack), "radii used": radii}
        losses: dict[str, Floats] = {}
        try:
            for name, split in (("test", subject.splits.test), ("train", subject.splits.train)):
                if len(split) == 0:
                    continue  # a network of somebody else's may come without its training images
                order = sample(split, self.n_examples)
                z, y = logits(subject, split, order, self.batch_size)
                clean = F.cross_entropy(z, y, reduction="none")
                losses[f"{name}, clean"] = clean.numpy()
                losses[f"{name}, attacked"] = self._worst(subject, split, order, attack, clean, gen).numpy()
            test, variations = subject.splits.test, {}
            order, clean = sample(test, self.n_examples), torch.from_numpy(losses["test, clean"])
            worst = clean
            for radius in radii:
                worst = self._worst(subject, test, order, at_radius(attack, radius), worst, gen)
                variations[radius] = (worst - clean).numpy()
        except AttackBroken as error:
            return Reading(self.name, "No confidence was measured.", Outcome.failed(str(error)), settings=settings)
        if not all(np.isfinite(values).all() for values in (*losses.values(), *variations.values())):
            why = "The loss of some images is not a finite number."
            return Reading(self.name, "No confidence was measured.", Outcome.failed(why), settings=settings)
        seed = draw_seed(gen)
        levels = [quantity for name, values in losses.items() for quantity in _levels(name, values, seed)]
        chances = np.exp(-losses["test, clean"])
        changes = [
            quantity
            for radius, values in variations.items()
            for what, unit, each in (
                ("loss", "nats", values),
                ("probability", "fraction", chances * -np.expm1(-values)),
            )
            for quantity in _changes(radius, what, unit, each, seed)
        ]
        before, after = (np.exp(-losses[f"test, {state}"]).mean() for state in ("clean", "attacked"))
        largest = spelled(str(attack.threat), radii[-1])
        return Reading(
            lens=self.name,
            says=(
                f"The network gives the right class of a test image a probability of {before:.1%} on average, "
                f"and of at most {after:.1%} under attack; a change within {largest} can raise the loss by at "
                f"least {variations[radii[-1]].mean():.3g} on average."
            ),
            quantities=(*levels, *changes),
            headline=("mean probability, test, clean", f"mean loss variation at {radii[-1]:.4g}"),
            panels=(*self._histograms(losses), *_variation_panels(changes, radii, attack.threat)),
            settings=settings,
        )

    def _worst(
        self, subject: Subject, split: Split, order: Tensor, attack: Attack, least: Tensor, gen: Generator
    ) -> Tensor:
        """The larger of the losses ``least`` (N,) and those after ``attack``."""
        found = [
            F.cross_entropy(evaluate(attack, subject.model, batch, gen=gen).logits.double(), batch.y, reduction="none")
            for batch in batches(subject, split, order, self.batch_size)
        ]
        return torch.maximum(least, torch.cat(found).cpu())

    def _histograms(self, losses: Mapping[str, Floats]) -> tuple[Histogram, ...]:
        """Probabilities and losses, each whole and in its middle."""
        chances = {name: np.exp(-values) for name, values in losses.items()}
        low, high = MIDDLE
        top = max(float(values.max()) for values in losses.values())
        panels = []
        for title, label, values, ends in (
            ("Probability of the right class", "probability", chances, (0.0, 1.0)),
            ("Probability of the right class, middle values", "probability", chances, MIDDLE),
            ("Loss", "cross-entropy (nats)", losses, (0.0, max(top, 1e-9))),
            ("Loss, middle values", "cross-entropy (nats)", losses, (-math.log(high), -math.log(low))),
        ):
            edges = np.linspace(*ends, self.bins + 1)
            counts = {name: np.histogram(v, bins=edges)[0].astype(np.float64) for name, v in values.items()}
            panels.append(Histogram(title, label, edges, counts))
        return tuple(panels)


def _radii(threat: Threat, wanted: tuple[float, ...] | None) -> list[float]:
    if wanted is not None:
        return sorted(set(wanted))
    if str(threat).startswith("linf"):
        return [1 / 255, 2 / 255, 4 / 255]
    if threat.eps == 0:
        fix = "Give a threat with a radius, or radii."
        raise InputError("confidence threat", expected="a radius > 0", got=str(threat), fix=fix)
    return [threat.eps / 4, threat.eps / 2, threat.eps]


def _levels(name: str, losses: Floats, seed: int) -> list[Quantity]:
    """Of one split, clean or attacked."""
    n, chances = len(losses), np.exp(-losses)
    middle = int(((chances > MIDDLE[0]) & (chances < MIDDLE[1])).sum())
    bound = name.endswith("attacked")
    return [
        Quantity(
            f"mean probability, {name}",
            float(chances.mean()),
            "fraction",
            *bootstrap_mean(chances, seed=seed),
            n,
            nature="upper bound" if bound else "estimate",
        ),
        Quantity(
            f"mean loss, {name}",
            float(losses.mean()),
            "nats",
            *bootstrap_mean(losses, seed=seed),
            n,
            nature="lower bound" if bound else "estimate",
        ),
        Quantity(f"spread of losses, {name}", float(losses.std()), "nats", *spread_interval(losses), n),
        Quantity(f"share of middle probabilities, {name}", middle / n, "fraction", *wilson(middle, n), n),
    ]


def _changes(radius: float, what: str, unit: str, variation: Floats, seed: int) -> list[Quantity]:
    name, n = f"{what} variation at {radius:.4g}", len(variation)
    ends, spread = bootstrap_mean(variation, seed=seed), float(variation.std())
    return [
        Quantity(f"mean {name}", float(variation.mean()), unit, *ends, n, nature="lower bound"),
        Quantity(f"spread of {name}", spread, unit, *spread_interval(variation), n),
    ]


def spread_interval(values: Floats) -> Interval:
    """Normal 95 % interval of the standard deviation s of ``values`` (n,), s ± 1.96 √((m₄ − s⁴) / n) / (2 s), m₄ the
    fourth central moment; at least 0.
    """
    centred = values - values.mean()
    variance, fourth = float((centred**2).mean()), float((centred**4).mean())
    if variance == 0:
        return 0.0, 0.0
    spread = math.sqrt(variance)
    half = 1.96 * math.sqrt(max(fourth - variance**2, 0.0) / len(values)) / (2 * spread)
    return max(0.0, spread - half), spread + half


def _variation_panels(changes: list[Quantity], radii: list[float], threat: Threat) -> list[Curve | Table]:
    """A curve and a table of the variation of the loss, and of the probability."""
    norm, panels = str(threat).partition(":")[0], list[Curve | Table]()
    for what, label in (("loss", "ℓ(x + δ) − ℓ(x) (nats)"), ("probability", "p(x) − p(x + δ)")):
        means, spreads = (
            [each for each in changes if each.name.startswith(f"{kind} {what} variation")]
            for kind in ("mean", "spread of")
        )
        lines = [
            Series(name, np.array(radii), *np.array([(q.value, q.low, q.high) for q in found], dtype=np.float64).T)
            for name, found in (("mean", means), ("standard deviation", spreads))
        ]
        title = f"{what.capitalize()} variation"
        rows = tuple(
            (radius, m.value, m.low, m.high, s.value, s.low, s.high, m.n)
            for radius, m, s in zip(radii, means, spreads, strict=True)
        )
        panels.append(Curve(title, f"radius ε ({norm}, pixels in [0, 1])", label, tuple(lines)))
        panels.append(Table(f"{title} by radius", HEADER, rows))
    return panels


def _two_class_losses(shifts: list[float], radius: float) -> Floats:
    """log(1 + e^{−4 (shift − radius)}), in float64."""
    return np.logaddexp(0.0, -4.0 * (np.asarray(shifts) - radius))
