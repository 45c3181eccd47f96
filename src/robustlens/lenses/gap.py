"""How much worse a model does on images it has not learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator
from torch.nn import functional as F

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.types import WEIGHT_SCALE, Attack, Invariance, Split, Subject
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.overfitting import overfitting
from robustlens.lenses.passes import batches, count, draw_seed, logits, sample
from robustlens.results.intervals import bootstrap_difference, bootstrap_mean, difference_of_shares, wilson
from robustlens.results.panels import Floats, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

HEADER = ("measure", "train", "test", "gap (test − train)", "gap: low", "gap: high")


@dataclass(frozen=True, kw_only=True)
class GeneralisationGap:
    """Loss gap = mean test loss − mean training loss; error gap = test error − training error.

    The error gap equals training accuracy − test accuracy, so both are positive where the model does worse on new
    images. The loss is cross-entropy per example, in eval mode, on stored images without augmentation: the running
    loss of training is measured on augmented images and moving weights and is another number. Every gap has a 95 %
    bootstrap interval over the examples of both splits; its n is that of the smaller sample.

    The robust loss is max(ℓ(x), ℓ(x_adv)) with x_adv from ``attack``, a lower bound of the maximum of the loss over
    the threat; the robust error counts examples that are wrong before or after the attack. Attack for loss and not
    only for a wrong answer, or the robust loss means little: PGD on the cross-entropy does so.

    Attributes:
        n_examples: examples of each split (a fixed random sample), or all that it has; None takes all of both.
        robust: also measure the gaps under attack.
        attack: None is PGD on the cross-entropy, 20 steps, in the subject's threat.
        batch_size: examples of a forward pass.
    """

    name: ClassVar[str] = "generalisation-gap"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = "Schmidt et al. 2018, arXiv 1804.11285 (robust generalisation gap)"

    n_examples: int | None = 1000
    robust: bool = True
    attack: Attack | None = None
    batch_size: int = 250

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [cls(n_examples=20, attack=quick, batch_size=8), cls(n_examples=None, robust=False)]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=10_000)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack = self.attack or PGD(threat=subject.threat, steps=20)
        n = count(subject.splits.train, self.n_examples) + count(subject.splits.test, self.n_examples)
        return (attack.passes if self.robust else Passes()) * n + Passes(forward=2 * n)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Margins m and an attack that takes 4 · eps off each: losses log(1 + e^{−m}) and log(1 + e^{−(m − 4 eps)}).

        From the image itself every gradient points straight at the boundary; after a random start 20 steps leave
        some of the noise across it.
        """
        train, test = [0.4, 0.4, 0.3, 0.3], [0.4, 0.3, 0.1, -0.1]
        subject = two_sided_subject(train_shifts=train, test_shifts=test)
        eps = subject.threat.eps
        straight = PGD(threat=subject.threat, steps=20, random_start=False)

        def mean_loss(shifts: list[float], radius: float) -> float:
            return sum(math.log1p(math.exp(-4 * (s - radius))) for s in shifts) / len(shifts)

        expected = {
            "loss gap": (mean_loss(test, 0) - mean_loss(train, 0), 1e-6),
            "error gap": (0.25, 0.0),
            "robust loss gap": (mean_loss(test, eps) - mean_loss(train, eps), 1e-5),
            "robust error gap": (0.5, 0.0),
        }
        return [Oracle(subject, cls(attack=straight), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat, steps=20, loss="ce")
        settings = describe(self)
        if self.robust:
            settings |= {"threat": str(attack.threat), "attack used": describe(attack)}
        train, test = subject.splits.train, subject.splits.test
        if len(train) == 0 or len(test) == 0:
            why = "A gap needs training images beside the test images; none were given."
            return Reading(self.name, "No gap was measured.", Outcome.failed(why), settings=settings)
        try:
            measured = {
                name: self._measure(subject, split, attack, gen) for name, split in (("train", train), ("test", test))
            }
        except AttackBroken as error:
            return Reading(self.name, "No gap was measured.", Outcome.failed(str(error)), settings=settings)
        if not all(bool(torch.isfinite(torch.from_numpy(v)).all()) for m in measured.values() for v in m.values()):
            why = "The loss of some images is not a finite number."
            return Reading(self.name, "No gap was measured.", Outcome.failed(why), settings=settings)
        seed = draw_seed(gen)
        gaps: list[Quantity] = []
        levels: list[Quantity] = []
        rows: list[tuple[str | float | None, ...]] = []
        for measure in measured["train"]:
            a, b = measured["train"][measure], measured["test"][measure]
            gap = float(b.mean() - a.mean())
            shares = measure.endswith("error")
            low, high = (
                difference_of_shares(int(a.sum()), len(a), int(b.sum()), len(b))
                if shares
                else bootstrap_difference(a, b, seed=seed)
            )
            unit = "nats" if measure.endswith("loss") else "fraction"
            gaps.append(Quantity(f"{measure} gap", gap, unit, low, high, min(len(a), len(b))))
            rows.append((measure, float(a.mean()), float(b.mean()), gap, low, high))
            for split, values in (("train", a), ("test", b)):
                low, high = wilson(int(values.sum()), len(values)) if shares else bootstrap_mean(values, seed=seed)
                levels.append(Quantity(f"{measure}, {split}", float(values.mean()), unit, low, high, len(values)))
        return Reading(
            lens=self.name,
            says=self._sentence(gaps, count(train, self.n_examples)),
            quantities=(*gaps, *levels),
            headline=tuple(q.name for q in gaps if q.name != "robust error gap"),
            panels=(Table("Generalisation gaps", HEADER, tuple(rows)),),
            settings=settings,
            examples={
                "index, test": sample(test, self.n_examples).numpy(),
                **{f"{name}, test": v.astype(bool) for name, v in measured["test"].items() if name.endswith("error")},
            },
        )

    def follow(self, found: Sequence[tuple[int, Reading]]) -> Reading | None:
        """Whether the robust error rose again while training went on."""
        return overfitting(found)

    def _measure(self, subject: Subject, split: Split, attack: Attack, gen: Generator) -> dict[str, Floats]:
        """Per-example values (n,) of every measure on a sample of ``split``."""
        order = sample(split, self.n_examples)
        z, y = logits(subject, split, order, self.batch_size)
        loss, wrong = F.cross_entropy(z, y, reduction="none"), logit_margin(z, y) <= 0
        found = {"loss": loss.numpy(), "error": wrong.double().numpy()}
        if self.robust:
            losses, fallen = [], []
            for batch in batches(subject, split, order, self.batch_size):
                seen = evaluate(attack, subject.model, batch, gen=gen)
                losses.append(F.cross_entropy(seen.logits.double(), batch.y, reduction="none").cpu())
                fallen.append(~seen.robust.cpu())
            found["robust loss"] = torch.maximum(loss, torch.cat(losses)).numpy()
            found["robust error"] = torch.cat(fallen).double().numpy()
        return found

    def _sentence(self, gaps: list[Quantity], n: int) -> str:
        gap = {q.name: q.value for q in gaps}

        def compared(points: float) -> str:
            return f"{abs(points) * 100:.1f} points {'higher' if points >= 0 else 'lower'}"

        said = f"The error is {compared(gap['error gap'])} on new images than on {n} images of the training set"
        return f"{said}, under attack {compared(gap['robust error gap'])}." if self.robust else f"{said}."
