"""Clean and robust accuracy as the adversary's radius grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, evaluate
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.steady import COMPANY, unsteadiness
from robustlens.core.types import EITHER_SCALE, Attack, Batch, Invariance, Split, Subject, Threat
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, require_split, sample, useless_gradients
from robustlens.lenses.pictures import class_name, compared
from robustlens.results.errors import InputError
from robustlens.results.intervals import wilson
from robustlens.results.panels import Curve, Gallery, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading, spelled
from robustlens.threats.lp import Lp

#: More than this share of examples with a useless gradient, or that nothing can break, makes a reading unreliable.
TOLERATED = 0.05
#: Survivors that are attacked without a limit.
CHECKED = 100

PER_RADIUS = (
    "radius",
    "robust / all",
    "low",
    "high",
    "robust / right before",
    "right before: low",
    "right before: high",
    "n",
    "n right before",
)
PER_CLASS = ("class", "n", "clean accuracy", "robust accuracy", "robust / right before")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of examples that are right, and that stay right under attack, at growing radii ε.

    Robust accuracy at ε is #(right before and after) / n, and conditional robust accuracy is
    #(right before and after) / #(right before). They are different numbers: some papers print the second, in which a
    model with fewer right answers can look more robust. Both come with 95 % Wilson intervals.

    The radii are visited upwards and each attack is run only on the examples that survived the smaller
    radii: an adversarial image in a ball lies in every larger ball too, so an example that fell stays fallen. The
    curve can therefore not rise, and costs little more than its survivors. As any attack can
    miss, these accuracies are upper bounds of the truth.

    The reading is unreliable when the model answers the same image differently, when the input gradient of the
    cross-entropy is exactly zero or not finite for more than 5 % of the examples, or when more than 5 % of
    all examples resist even an attack that may change the image without limit (estimated on up to 100 survivors).

    Attributes:
        radii: None is 0, ¼, ½, ¾ and 1 times the radius of the threat; 0 is always measured. The quantity
            "robust accuracy" is the one at the largest radius.
        attack: what is run at every radius, its step size scaled with the radius where it has one. None is PGD on the
            logit margin, 50 steps, 1 random start, which leaves an example alone once it is wrong.
        split: "train", "valid" or "test".
        n_examples: a fixed random sample of the split; None takes all.
        batch_size: examples attacked together.
        pictures: rows of the gallery, the first examples that the model gets right.

    Raises:
        InputError: a negative radius, or a split that does not exist.
    """

    name: ClassVar[str] = "accuracy"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083, §5; Carlini et al. 2019, arXiv 1902.06705"
    unsteady: ClassVar[bool] = True

    radii: tuple[float, ...] | None = None
    attack: Attack | None = None
    split: Literal["train", "valid", "test"] = "test"
    n_examples: int | None = 1000
    batch_size: int = 250
    pictures: int = 8

    def __post_init__(self) -> None:
        if self.radii is not None and (not self.radii or min(self.radii) < 0):
            raise InputError(
                "accuracy radii", expected="numbers ≥ 0", got=str(self.radii), fix="Leave them out for quarters of eps."
            )
        require_split(self)

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(n_examples=24, batch_size=8, pictures=2, attack=quick),
            cls(n_examples=10, radii=(0.1,), split="train", pictures=0, attack=quick),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=None)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack = self.attack or PGD(threat=subject.threat, steps=50)
        radii = 4 if self.radii is None else len(self.radii)
        n = count(getattr(subject.splits, self.split), self.n_examples)
        return attack.passes * (radii * n) + Passes(forward=(radii + 1) * n, inputs=n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear model holds exactly the examples that are farther from its boundary than ε."""
        shifts = [0.05, 0.12, 0.18, 0.3, 0.4, -0.1, 0.07, 0.35]
        subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
        expected = {
            "clean accuracy": (7 / 8, 0.0),
            "robust accuracy": (3 / 8, 0.0),
            "conditional robust accuracy": (3 / 7, 1e-12),
            "robust accuracy at 0.1": (5 / 8, 0.0),
            "share of useless gradients": (0.0, 0.0),
            "accuracy without limit": (0.0, 0.0),
        }
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat, steps=50, loss="margin", early_stop=True)
        radii = self._radii(attack.threat.eps)
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}
        split: Split = getattr(subject.splits, self.split)
        order = sample(split, self.n_examples)
        record = _Record(radii, self.pictures)
        try:
            for batch in batches(subject, split, order, self.batch_size):
                record.add(subject.model, attack, batch, gen)
            beyond = self._without_limit(subject, attack, split, order[record.survivors()[:CHECKED]], gen)
        except AttackBroken as error:
            return Reading(self.name, "No accuracy was measured.", Outcome.failed(str(error)), settings=settings)
        y = split.labels[order.to(split.labels.device)].cpu()
        quantities, unlimited = _quantities(record, beyond)
        return Reading(
            lens=self.name,
            says=_sentence(record, attack.threat),
            outcome=_outcome(record, unlimited),
            quantities=tuple(quantities),
            headline=("clean accuracy", "robust accuracy"),
            panels=_panels(record, y, subject.splits.classes, attack.threat),
            settings=settings,
            examples=record.examples(),
        )

    def _without_limit(
        self, subject: Subject, attack: Attack, split: Split, order: Tensor, gen: Generator
    ) -> float | None:
        """Share of the survivors at ``order`` that resist the attack with the whole box; None without survivors."""
        if len(order) == 0:
            return None
        held = 0
        for batch in batches(subject, split, order, self.batch_size):
            corner = torch.ones_like(batch.x[:1])
            across = float(attack.threat.distance(corner, torch.zeros_like(corner))[0])
            held += int(evaluate(at_radius(attack, across), subject.model, batch, gen=gen).robust.sum())
        return held / len(order)

    def _radii(self, eps: float) -> list[float]:
        chosen = [eps * k / 4 for k in range(5)] if self.radii is None else self.radii
        return sorted({0.0, *map(float, chosen)})


class _Record:
    """What happened to the examples seen so far.

    ``fell`` (N,) is the position in ``radii`` at which an example was first wrong, len(radii) if it never was, and
    ``index`` (N,) its position in the split.
    ``useless`` counts zero or non-finite gradients; ``stable`` says whether an image got one
    answer, among others and among copies.
    ``shown`` holds (clean, adversarial, label, prediction after, distance, whether it held) of the pictures.
    """

    def __init__(self, radii: Sequence[float], pictures: int) -> None:
        self.radii, self.pictures = list(radii), pictures
        self.fell = torch.empty(0, dtype=torch.int64)
        self.index = torch.empty(0, dtype=torch.int64)
        self.useless, self.stable = 0, True
        self.shown: list[tuple[Tensor, Tensor, int, int, float, bool]] = []

    def add(self, model: nn.Module, attack: Attack, batch: Batch, gen: Generator) -> None:
        self.stable = self.stable and unsteadiness(model, batch.x) <= COMPANY
        self.useless += useless_gradients(model, batch)
        fell = torch.full((len(batch),), len(self.radii), device=batch.y.device)
        last, distance = batch.x.clone(), torch.zeros(len(batch), device=batch.y.device)
        after = batch.y.clone()
        for position, radius in enumerate(self.radii):
            alive = (fell == len(self.radii)).nonzero()[:, 0]
            if len(alive) == 0:
                break
            part = Batch(batch.x[alive], batch.y[alive], batch.index[alive])
            seen = evaluate(at_radius(attack, radius), model, part, gen=gen)
            fell[alive[~seen.robust]] = position
            last[alive], distance[alive], after[alive] = seen.x_adv, seen.distance, seen.logits.argmax(1)
        right = (fell > 0).nonzero()[:, 0][: self.pictures - len(self.shown)]
        for i in right.tolist():
            holds = int(fell[i]) == len(self.radii)
            pair = batch.x[i].cpu(), last[i].cpu()
            self.shown.append((*pair, int(batch.y[i]), int(after[i]), float(distance[i]), holds))
        self.fell = torch.cat([self.fell, fell.cpu()])
        self.index = torch.cat([self.index, batch.index.cpu()])

    def __len__(self) -> int:
        return len(self.fell)

    def right(self, position: int) -> Tensor:
        """Which examples (N,) are right at ``radii[position]`` and at every smaller radius."""
        return self.fell > position

    def examples(self) -> dict[str, NDArray[Any]]:
        """Position, and whether it was right before and at the largest radius, of every example."""
        clean, robust = self.right(0), self.right(len(self.radii) - 1)
        return {"index": self.index.numpy(), "clean": clean.numpy(), "robust": robust.numpy()}

    def survivors(self) -> Tensor:
        """Positions of the examples that no radius broke."""
        return self.right(len(self.radii) - 1).nonzero()[:, 0]


def at_radius(attack: Attack, eps: float) -> Attack:
    """The same attack with its threat at another radius; a ``step_size`` in pixels is scaled along with it."""
    changes: dict[str, Any] = {"threat": dataclasses.replace(cast(Any, attack.threat), eps=eps)}
    step = getattr(attack, "step_size", None)
    if step is not None and eps > 0 and attack.threat.eps > 0:
        changes["step_size"] = step * eps / attack.threat.eps
    return cast(Attack, dataclasses.replace(cast(Any, attack), **changes))


def _quantities(record: _Record, beyond: float | None) -> tuple[list[Quantity], float]:
    """The numbers to report, and the estimated accuracy under an attack without limit."""
    n, last = len(record), len(record.radii) - 1
    before = int(record.right(0).sum())
    unlimited = 0.0 if beyond is None else beyond * len(record.survivors()) / n

    def share(name: str, count: int, of: int, nature: Literal["exact", "estimate", "upper bound"]) -> Quantity:
        return Quantity(name, count / of, "fraction", *wilson(count, of), of, nature=nature)

    def robust(position: int) -> int:
        return int(record.right(position).sum())

    found = [
        share("clean accuracy", before, n, "estimate"),
        share("robust accuracy", robust(last), n, "upper bound"),
    ]
    if before:
        found.append(share("conditional robust accuracy", robust(last), before, "upper bound"))
    for position, radius in list(enumerate(record.radii))[1:-1]:
        found.append(share(f"robust accuracy at {radius:g}", robust(position), n, "upper bound"))
    found.append(share("share of useless gradients", record.useless, n, "exact"))
    found.append(Quantity("accuracy without limit", unlimited, "fraction", n=min(CHECKED, len(record.survivors()))))
    return found, unlimited


def _outcome(record: _Record, unlimited: float) -> Outcome:
    problems = []
    if not record.stable:
        problems.append(
            "The model gives different answers to the same image, by chance or by what else is in its batch, so an "
            "attack that failed once may succeed next time."
        )
    share = record.useless / len(record)
    if share > TOLERATED:
        problems.append(
            f"For {share:.0%} of the images the model gives attacks no usable direction (its gradient is zero or not a "
            "number), so attacks may fail although harmful changes exist; this is called gradient masking."
        )
    if unlimited > TOLERATED:
        problems.append(
            f"About {unlimited:.0%} of the images keep their answer even when the attack may change every pixel "
            "freely; a working attack should then nearly always win, so it probably misses attacks at small radii too."
        )
    return Outcome.unreliable(" ".join(problems)) if problems else Outcome()


def _sentence(record: _Record, threat: Threat) -> str:
    n, last = len(record), len(record.radii) - 1
    before, after = int(record.right(0).sum()), int(record.right(last).sum())
    radius = spelled(str(threat), record.radii[last])
    return f"The model gets {before / n:.1%} of {n} images right, and at most {after / n:.1%} within {radius} of them."


def _panels(record: _Record, y: Tensor, classes: tuple[str, ...], threat: Threat) -> tuple[Panel, ...]:
    n, before = len(record), int(record.right(0).sum())
    counts = [int(record.right(i).sum()) for i in range(len(record.radii))]
    bands = [wilson(c, n) for c in counts]
    given = [wilson(c, before) for c in counts]
    x = np.asarray(record.radii)
    series = [Series("of all", x, np.asarray(counts) / n, *np.asarray(bands).T)]
    if before:
        series.append(Series("of those right before", x, np.asarray(counts) / before, *np.asarray(given).T))
    norm = str(threat).partition(":")[0]
    label = f"radius ε ({norm}, pixels in [0, 1])"
    curve = Curve("Accuracy against radius", label, "share right under attack", tuple(series), (0.0, 1.0))
    rows = tuple(
        (r, c / n, *band, c / before if before else None, *(cond if before else (None, None)), n, before)
        for r, c, band, cond in zip(record.radii, counts, bands, given, strict=True)
    )
    table = Table("Accuracy by radius", PER_RADIUS, rows)
    panels: list[Panel] = [curve, table, _per_class(record, y, classes)]
    return (*panels, *_gallery(record, classes))


def _per_class(record: _Record, y: Tensor, classes: tuple[str, ...]) -> Table:
    """Counts of every class that occurs, at no radius and at the largest."""
    clean, robust = record.right(0), record.right(len(record.radii) - 1)
    rows: list[tuple[str | float | None, ...]] = []
    for k in sorted(set(y.tolist())):
        mine = y == k
        n, before, after = int(mine.sum()), int((clean & mine).sum()), int((robust & mine).sum())
        rows.append((class_name(classes, k), n, before / n, after / n, after / before if before else None))
    return Table(f"Accuracy by class at radius {record.radii[-1]:.4g}", PER_CLASS, tuple(rows))


def _gallery(record: _Record, classes: tuple[str, ...]) -> list[Gallery]:
    clean, x_adv = [shown[0] for shown in record.shown], [shown[1] for shown in record.shown]
    captions = [
        f"{class_name(classes, label)} → {class_name(classes, after)}{' (holds)' if holds else ''}, distance {d:.3g}"
        for _, _, label, after, d, holds in record.shown
    ]
    return compared("What the attack did", "attacked", clean, x_adv, captions)
