"""Logit margins on training and test data, raw and free of scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, Invariance, Subject
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.lenses.shared_bins import histogram
from robustlens.linalg.layers import Skipped, linear_head, operators
from robustlens.results.intervals import bootstrap_mean, wilson
from robustlens.results.panels import Floats, Histogram, Table
from robustlens.results.reading import Outcome, Quantity, Reading


@dataclass(frozen=True, kw_only=True)
class LogitMargins:
    """The logit margin M(z, y) = z_y − max_{j≠y} z_j of every example: positive exactly where the answer is right.

    Raw margins grow with the scale of the logits, which changes neither an answer nor a boundary: a method that
    shrinks the logits shrinks margins without coming closer to anything. So beside them stand margins that do
    not change when the logits are multiplied: M / ‖z − z̄‖₂ (between −√2 and √2), and, on request, M over the
    spectral complexity ∏ᵢ σ_max(W_i), which makes the scale of all the weights drop out for a plain chain of layers
    without biases. The scale-free measure of spread is standard deviation / |mean|.

    Where the network has ``features`` Φ and a linear ``head``, so does the feature-space margin of Wu and Yu (eq. 14),
    min_{k≠y} (ŵ_y − ŵ_k)ᵀ Φ(x) with rows ŵ of norm 1 and no bias: it is positive where these rows would be right.

    Skewness is the third standardised moment m₃ / m₂^{3/2} (0 where all margins are equal).

    Attributes:
        n_examples: examples of each split; None takes all.
        near: an example is near the boundary where |M| is below it, in logits.
        bins: bins of the histograms; train and test share their edges.
        by_complexity: also divide by the spectral complexity (computes the norm of every layer).
        batch_size: examples of a forward pass.
    """

    name: ClassVar[str] = "logit-margins"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = (
        "Bartlett, Foster and Telgarsky 2017, arXiv 1706.08498, §1 (margins over complexity); Wu & Yu 2019, "
        "arXiv 1907.11780, eq. 14 (in feature space)"
    )

    n_examples: int | None = None
    near: float = 1.0
    bins: int = 60
    by_complexity: bool = False
    batch_size: int = 500

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(n_examples=40), cls(near=0.5, bins=10, by_complexity=True, batch_size=16)]

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        splits = subject.splits
        passes = 2 if hasattr(subject.model, "features") else 1
        return Passes(forward=passes * (count(splits.train, self.n_examples) + count(splits.test, self.n_examples)))

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Two classes with margins 4 · shift; with z = (0, t) the centred norm is |t| / √2, so M over it is ±√2."""
        subject = two_sided_subject(train_shifts=[0.5, 0.5, 0.25, 0.25], test_shifts=[0.5, 0.25, 0.125, -0.125])
        expected = {
            "mean margin, train": (1.5, 1e-6),
            "mean margin, test": (0.75, 1e-6),
            "spread of margins, train": (0.5, 1e-6),
            "share near the boundary, train": (0.0, 0.0),
            "share near the boundary, test": (0.5, 0.0),
            "smallest margin, test": (-0.5, 1e-6),
            "mean normalised margin, train": (math.sqrt(2), 1e-6),
            "mean normalised margin, test": (math.sqrt(2) / 2, 1e-6),
            "mean margin / complexity, test": (0.75 / 4, 1e-6),
        }
        return [Oracle(subject, cls(by_complexity=True), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        settings = describe(self)
        raw: dict[str, Floats] = {}
        free: dict[str, Floats] = {}
        inside: dict[str, Floats] = {}
        few = torch.arange(min(2, len(subject.splits.test)))
        by_features = _in_feature_space(subject.model, next(batches(subject, subject.splits.test, few, 2)).x)
        for name, split in (("test", subject.splits.test), ("train", subject.splits.train)):
            if len(split) == 0:
                continue  # a network of somebody else's may come without its training images
            order = sample(split, self.n_examples)
            z, y = logits(subject, split, order, self.batch_size)
            if not bool(torch.isfinite(z).all()):
                why = f"The model answers some {name} images with logits that are not finite numbers."
                return Reading(self.name, "No margin was measured.", Outcome.failed(why), settings=settings)
            raw[name], free[name] = logit_margin(z, y).numpy(), normalised_margin(z, y).numpy()
            if by_features is not None:
                z, _ = logits(subject, split, order, self.batch_size, by_features)
                inside[name] = logit_margin(z, y).numpy()
        seed = draw_seed(gen)
        quantities: list[Quantity] = []
        for name in raw:
            quantities += self._summary(raw[name], free[name], name, seed)
        panels: list[Histogram | Table] = [
            histogram("Logit margins", "logit margin", raw, self.bins),
            histogram("Normalised logit margins", "logit margin / norm of the centred logits", free, self.bins),
        ]
        for name, values in inside.items():
            ends = bootstrap_mean(values, seed=seed)
            quantities.append(Quantity(f"mean feature margin, {name}", float(values.mean()), "", *ends, len(values)))
        if inside:
            panels.append(histogram("Feature-space margins", "margin with rows of norm 1", inside, self.bins))
        if self.by_complexity:
            complexity = _log_complexity(subject)
            if math.isfinite(complexity) and abs(complexity) < 300:
                divided = {name: values / 10**complexity for name, values in raw.items()}
                for name, values in divided.items():
                    mean = float(values.mean())
                    quantities.append(Quantity(f"mean margin / complexity, {name}", mean, n=len(values)))
                title = "Logit margins over spectral complexity"
                panels.append(histogram(title, "logit margin / spectral complexity", divided, self.bins))
        panels.append(_table(raw, free, quantities))
        middle, share = float(raw["test"].mean()), float((np.abs(raw["test"]) < self.near).mean())
        return Reading(
            lens=self.name,
            says=(
                f"On test images the right answer {'leads' if middle >= 0 else 'trails'} the best wrong one by "
                f"{abs(middle):.3g} logits on average; for {share:.1%} of the images they are within {self.near:g}."
            ),
            quantities=tuple(quantities),
            headline=("mean normalised margin, test",),
            panels=tuple(panels),
            settings=settings,
        )

    def _summary(self, raw: Floats, free: Floats, split: str, seed: int) -> list[Quantity]:
        n, near = len(raw), int((np.abs(raw) < self.near).sum())
        std, middle = float(raw.std()), float(raw.mean())

        def mean(name: str, values: Floats, unit: str) -> Quantity:
            low, high = bootstrap_mean(values, seed=seed)
            return Quantity(f"{name}, {split}", float(values.mean()), unit, low, high, n)

        found = [
            mean("mean margin", raw, "logits"),
            mean("mean normalised margin", free, ""),
            Quantity(f"spread of margins, {split}", std, "logits", n=n),
        ]
        if middle != 0:
            found.append(Quantity(f"relative spread, {split}", std / abs(middle), n=n))
        found += [
            Quantity(f"skewness of margins, {split}", skewness(raw), n=n),
            Quantity(f"share near the boundary, {split}", near / n, "fraction", *wilson(near, n), n),
            Quantity(f"smallest margin, {split}", float(raw.min()), "logits", n=n, nature="exact"),
        ]
        return found


def _in_feature_space(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """x → the products of Φ(x) with the head's rows of norm 1 (B, K); None where there is no Φ or no linear head."""
    head, features = linear_head(model, x), getattr(model, "features", None)
    if head is None or features is None:
        return None
    rows = F.normalize(head.weight.detach(), dim=1)
    return lambda x: features(x) @ rows.T


def normalised_margin(z: Tensor, y: Tensor) -> Tensor:
    """(z_y − max_{j≠y} z_j) / ‖z − mean(z)‖₂ (B,) for logits (B, K); 0 where all logits are equal.

    Unchanged when z is multiplied by a positive number or shifted by a constant.
    """
    size = (z - z.mean(1, keepdim=True)).norm(dim=1)
    return torch.where(size > 0, logit_margin(z, y) / size.clamp_min(torch.finfo(z.dtype).tiny), torch.zeros_like(size))


def skewness(values: Floats) -> float:
    """m₃ / m₂^{3/2} with central moments m_k; 0 for equal values."""
    centred = values - values.mean()
    spread = float((centred**2).mean())
    return float((centred**3).mean()) / spread**1.5 if spread > 0 else 0.0


def _log_complexity(subject: Subject) -> float:
    """log10 of ∏ σ_max over the Linear and Conv2d layers, −inf where one of them is zero."""
    (batch,) = batches(subject, subject.splits.test, torch.tensor([0]), 1)
    norms = [layer.norm() for layer in operators(subject.model, batch.x) if not isinstance(layer, Skipped)]
    return sum(math.log10(v) if v > 0 else -math.inf for v in norms) if norms else math.nan


def _table(raw: Mapping[str, Floats], free: Mapping[str, Floats], quantities: list[Quantity]) -> Table:
    """One row a measure, one column a split."""
    value = {q.name: q.value for q in quantities}
    measures = list(dict.fromkeys(name.rpartition(", ")[0] for name in value))
    splits = list(raw)
    rows: list[tuple[str | float | None, ...]] = [("examples", *(len(raw[s]) for s in splits))]
    rows += [(measure, *(value.get(f"{measure}, {s}") for s in splits)) for measure in measures]
    rows.append(("share right", *(float((free[s] > 0).mean()) for s in splits)))
    return Table("Margins in numbers", ("measure", *splits), tuple(rows))
