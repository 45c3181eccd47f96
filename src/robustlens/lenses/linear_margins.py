"""Exact distances to the boundary of a linear classifier, beside what the hard-margin SVM reaches on the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Generator, Tensor

from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, Batch, Invariance, Split, Subject
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.lenses.pictures import class_name, compared
from robustlens.lenses.shared_bins import histogram
from robustlens.linalg.hard_margin import HardMargin, hard_margin_svm
from robustlens.linalg.rivals import rivals
from robustlens.results.errors import InputError
from robustlens.results.intervals import bootstrap_mean, wilson
from robustlens.results.panels import Floats, Gallery, Table
from robustlens.results.reading import Outcome, Quantity, Reading

#: A lead that is left at the foot of the perpendicular, over the largest lead: what rounding explains.
ROUNDING = 1e-3
#: Classes in the gallery.
SHOWN = 4


class Seen(NamedTuple):
    """Signed margins (N,), and for every class two pictures: the image nearest to the boundary, and a usual one."""

    margins: Floats
    bend: float
    pictures: list[tuple[str, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LinearMargins:
    """Signed ℓ2 margins of all images of a classifier that is affine in the pixels, in closed form.

    d(x) = min_{k≠ŷ} (f_ŷ − f_k)(x) / ‖∇(f_ŷ − f_k)‖₂, for two classes |w·x + b| / ‖w‖, without the pixel box. The
    margin is +d where the answer is right and −d where it is wrong. The minimum margin is the smallest, the average
    margin the mean of d (wrong answers count as much as right ones); neither changes with the size of the weights. The
    foot of the perpendicular, x − (f_ŷ − f_k)(x) / ‖g‖² g with g = ∇(f_ŷ − f_k), is the nearest adversarial image.

    Gradient descent on the logistic loss of separable data turns w towards the hard-margin SVM, whose minimum margin
    is the largest there is. It is solved for two classes that a hyperplane separates, through the origin where the
    network answers the black image with a tie: some seconds for 12,000 digits, once for all epochs of a run.

    At every foot the network is asked whether the tie is there. Where it is not, the network bends on the way: the
    numbers are those of its tangents, and the reading is unreliable.

    Attributes:
        n_examples: examples of each split; None takes all.
        svm: solve for the hard-margin SVM of the training images where there are two classes.
        bins: bins of the histogram.
        batch_size: examples measured together.
    """

    name: ClassVar[str] = "linear-margins"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = "Wu and Yu 2019, arXiv 1907.11780, §2, §3 and eq. 7; Soudry et al. 2018"
    on_request: ClassVar[bool] = True

    n_examples: int | None = None
    svm: bool = True
    bins: int = 60
    batch_size: int = 500

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(n_examples=12), cls(n_examples=6, svm=False, bins=5, batch_size=4)]

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        n = count(subject.splits.train, self.n_examples) + count(subject.splits.test, self.n_examples)
        return Passes(inputs=max(1, len(subject.splits.classes) - 1) * n, forward=n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """w = (3, 4) on points of the plane, by hand.

        Of class 1 (0.5, 0) lies 1.5 / 5 and (0, 1) 4 / 5 in front of the boundary, of class 0 (0.1, 0.1) 0.7 / 5
        behind it. Second, (0, 0.5) of class 1 and (1, 0) of class 0 with w = (−1, 1): they lie 0.5 / √2 and 1 / √2 in
        front of the boundary. The SVM's w is the point of the segment from (0, 0.5) to (−1, 0) that is the nearest to
        0, which is (−1, 2) / 5.
        """

        def split(points: list[tuple[float, float]], labels: list[int]) -> Split:
            return Split(torch.tensor(points).view(-1, 1, 1, 2), torch.tensor(labels))

        weight, bias = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.zeros(2)
        mixed = split([(0.5, 0.0), (0.0, 1.0), (0.1, 0.1)], [1, 1, 0])
        first = linear_subject(weight, bias, train=mixed, test=split([(0.5, 0.0)], [1]))
        apart = split([(0.0, 0.5), (1.0, 0.0)], [1, 0])
        tilted = linear_subject(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), bias, train=apart, test=apart)
        largest, reached = 1 / math.sqrt(5), 0.5 / math.sqrt(2)
        return [
            Oracle(
                first,
                cls(),
                {
                    "minimum margin, train": (-0.14, 1e-6),
                    "average margin, train": (1.24 / 3, 1e-6),
                    "mean signed margin, train": (0.96 / 3, 1e-6),
                    "error, train": (1 / 3, 1e-12),
                    "minimum margin, test": (0.3, 1e-6),
                    "error, test": (0.0, 0.0),
                },
            ),
            Oracle(
                tilted,
                cls(),
                {
                    "minimum margin, train": (reached, 1e-6),
                    "average margin, train": (1.5 * reached, 1e-6),
                    "largest minimum margin": (largest, 1e-6),
                    "share of the largest minimum margin": (reached / largest, 1e-6),
                    "average margin of the SVM, train": (largest, 1e-6),
                    "cosine with the SVM": (3 / math.sqrt(10), 1e-6),
                },
            ),
        ]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        settings = describe(self)
        splits = {"train": subject.splits.train, "test": subject.splits.test}
        splits = {name: split for name, split in splits.items() if len(split)}
        for name, split in splits.items():
            z, _ = logits(subject, split, sample(split, self.n_examples), self.batch_size)
            if not bool(torch.isfinite(z).all()):
                why = f"The model answers some {name} images with logits that are not finite numbers."
                return Reading(self.name, "No margin was measured.", Outcome.failed(why), settings=settings)
        seen = {name: self._measure(subject, split) for name, split in splits.items()}
        if not all(np.isfinite(each.margins).all() for each in seen.values()):
            why = "The answer to some image is the same everywhere on its tangent: no boundary can be seen from there."
            return Reading(self.name, "No margin was measured.", Outcome.failed(why), settings=settings)
        bend = max(each.bend for each in seen.values())
        nature: Literal["exact", "estimate"] = "exact" if bend < ROUNDING else "estimate"
        seed = draw_seed(gen)
        quantities = [q for name, each in seen.items() for q in _quantities(each.margins, name, nature, seed)]
        margins = {name: each.margins for name, each in seen.items()}
        if self.svm and nature == "exact" and len(subject.splits.classes) == 2 and (svm := self._svm(subject)):
            theirs = {f"{name}, SVM": _of_svm(svm, split, self.n_examples) for name, split in splits.items()}
            least = float(seen["train"].margins.min())
            quantities += _beside(svm, least, _normal(subject), theirs)
            margins |= theirs
        found = seen["train" if "train" in seen else "test"]
        return Reading(
            lens=self.name,
            says=_sentence(found.margins, quantities),
            outcome=Outcome() if nature == "exact" else Outcome.unreliable(_bent(bend)),
            quantities=tuple(quantities),
            headline=tuple(
                q.name for q in quantities if q.name.startswith(("minimum", "average margin, ", "error", "share"))
            ),
            panels=(
                histogram(
                    "Signed margins", "distance to the boundary (ℓ2), negative for wrong answers", margins, self.bins
                ),
                _table(quantities),
                *_gallery(found, subject),
            ),
            settings=settings,
        )

    def _measure(self, subject: Subject, split: Split) -> Seen:
        """Margins of a sample of ``split``, by how much the network bends, and its pictures."""
        parts: list[Floats] = []
        left, largest = 0.0, 0.0
        order = sample(split, self.n_examples)
        for batch in batches(subject, split, order, self.batch_size):
            lead, distance, right, foot, remains = _perpendicular(subject, batch)
            parts.append(torch.where(right, distance, -distance).cpu().numpy())
            largest = max(largest, float(lead.abs().max()))
            left = max(left, float(remains.abs().nan_to_num(nan=torch.inf).max()))
        margins = np.concatenate(parts)
        labels = split.labels.cpu()[order].numpy()
        pictures = []
        for k in np.unique(labels)[:SHOWN]:
            mine = np.flatnonzero((labels == k) & (margins > 0))
            if len(mine) == 0:
                continue
            usual = mine[np.abs(margins[mine] - margins[mine].mean()).argmin()]
            for kind, at in (("nearest", mine[margins[mine].argmin()]), ("usual", usual)):
                (one,) = batches(subject, split, order[[int(at)]], 1)
                _, _, _, foot, _ = _perpendicular(subject, one)
                caption = f"{class_name(subject.splits.classes, int(k))}, {kind}: {margins[at]:.3g}"
                pictures.append((caption, one.x[0].cpu(), foot[0].cpu()))
        return Seen(margins, left / largest if largest else math.inf, pictures)

    def _svm(self, subject: Subject) -> HardMargin | None:
        train = subject.splits.train
        if (self.n_examples is not None and self.n_examples < len(train)) or set(train.labels.tolist()) != {0, 1}:
            return None
        black = torch.zeros_like(train.batch(torch.tensor([0])).x.to(subject.device))
        with untouched(subject.model), torch.no_grad():
            z = subject.model(black)[0]
        return _solved(train, bool(z[0] != z[1]))


@lru_cache(maxsize=2)
def _solved(train: Split, bias: bool) -> HardMargin | None:
    try:
        return hard_margin_svm(train, bias=bias)
    except InputError:
        return None  # no hyperplane separates the classes


def _perpendicular(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """To the nearest tie of the predicted class: lead (B,), distance (B,) float64, whether the answer is right (B,),
    the foot of the perpendicular (B, C, H, W), and the lead that the network has there (B,)."""
    model, x = subject.model, batch.x
    with untouched(model):
        with torch.no_grad():
            z = model(x)
        top = z.argmax(1)
        others = torch.arange(z.shape[1], device=x.device).expand(len(x), -1)
        others = others[others != top[:, None]].view(len(x), -1)
        leads, slopes = rivals(model, x, top, others.shape[1], others)
        sizes = slopes.flatten(2).double().norm(dim=2)
        distance, nearest = torch.where(sizes > 0, leads.double() / sizes, torch.inf).min(1)
        each = torch.arange(len(x), device=x.device)
        lead, size, slope = leads[each, nearest], sizes[each, nearest], slopes[each, nearest]
        way = (lead / size.clamp_min(torch.finfo(size.dtype).tiny) ** 2).nan_to_num(posinf=0.0).to(x.dtype)
        foot = x + way[:, None, None, None] * slope
        with torch.no_grad():
            there = model(foot)
    rival = others[each, nearest]
    return lead, distance, top == batch.y, foot, there[each, top] - there[each, rival]


def _normal(subject: Subject) -> Floats:
    """∇(f_1 − f_0) of a linear network of two classes, (d,)."""
    (batch,) = batches(subject, subject.splits.train, torch.tensor([0]), 1)
    with untouched(subject.model):
        _, slopes = rivals(subject.model, batch.x, torch.zeros_like(batch.y), 1)
    return slopes.flatten().double().cpu().numpy()


def _of_svm(svm: HardMargin, split: Split, n: int | None) -> Floats:
    """The SVM's signed margins."""
    batch = split.batch(sample(split, n))
    margins: Floats = (
        (batch.x.flatten(1).double().cpu() @ svm.direction + svm.bias) * (2.0 * batch.y.cpu() - 1)
    ).numpy()
    return margins


def _quantities(margins: Floats, split: str, nature: Literal["exact", "estimate"], seed: int) -> list[Quantity]:
    n, wrong = len(margins), int((margins <= 0).sum())

    def mean(name: str, values: Floats) -> Quantity:
        interval = bootstrap_mean(values, seed=seed)
        return Quantity(f"{name}, {split}", float(values.mean()), "l2", *interval, n, nature=nature)

    return [
        Quantity(f"minimum margin, {split}", float(margins.min()), "l2", n=n, nature=nature),
        mean("average margin", np.abs(margins)),
        mean("mean signed margin", margins),
        Quantity(f"error, {split}", wrong / n, "fraction", *wilson(wrong, n), n),
    ]


def _beside(svm: HardMargin, least: float, w: Floats, theirs: dict[str, Floats]) -> list[Quantity]:
    n = len(theirs["train, SVM"])
    cosine = float(w @ svm.direction.numpy() / np.linalg.norm(w))
    means = [
        Quantity(f"average margin of the SVM, {name.partition(',')[0]}", float(np.abs(m).mean()), "l2", n=len(m))
        for name, m in theirs.items()
    ]
    return [
        Quantity("largest minimum margin", svm.margin, "l2", svm.margin, max(svm.margin, svm.bound), n, nature="exact"),
        Quantity("share of the largest minimum margin", least / svm.margin, n=n, nature="exact"),
        *means,
        Quantity("cosine with the SVM", cosine, n=n, nature="exact"),
    ]


def _bent(bend: float) -> str:
    return (
        f"The network is not linear in the pixels: where its tangent puts the boundary, {bend:.0%} of the largest lead "
        "is left. These are the tangents' numbers, not distances; boundary-distance measures those."
    )


def _sentence(margins: Floats, quantities: list[Quantity]) -> str:
    said = (
        f"The smallest of {len(margins)} signed distances to the boundary is {float(margins.min()):.4g}, and an image "
        f"is {float(np.abs(margins).mean()):.4g} away on average (ℓ2)"
    )
    limit = next((q.value for q in quantities if q.name == "largest minimum margin"), None)
    return f"{said}." if limit is None else f"{said}; no hyperplane has a smallest one above {limit:.4g}."


def _table(quantities: list[Quantity]) -> Table:
    rows = tuple((q.name, q.value, q.low, q.high, q.n) for q in quantities)
    return Table("Margins in numbers", ("", "value", "low", "high", "n"), rows)


def _gallery(seen: Seen, subject: Subject) -> list[Gallery]:
    captions = [caption for caption, _, _ in seen.pictures]
    clean, foot = [x for _, x, _ in seen.pictures], [x for _, _, x in seen.pictures]
    return compared("Nearest points on the boundary", "on the boundary", clean, foot, captions)
