"""Whether the number that an attack gives can be believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.rng import generator
from robustlens.core.types import EITHER_SCALE, Attack, Invariance, Split, Subject
from robustlens.lenses.health_attacks import (
    Finding,
    Judged,
    blind_search,
    more_starts,
    more_steps,
    no_limit,
    other_losses,
    share,
    transfer,
)
from robustlens.lenses.health_gradients import PIECES, Way, gradients, in_company, same_answer, surface
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, logits, require_split, sample
from robustlens.results.errors import require_at_least
from robustlens.results.panels import Curve, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class Health:
    """Is the robust accuracy that attack A reports the model's, or only what A failed to break?

    Checks, each with its number:

    * more steps, more restarts, other losses (cross-entropy, margin, dlr; no floor under gradients) with the same
      path, a random search that sees no gradients (Square), and images crafted on an imitation of the model
      ("transfer"): which images that A left standing do they break? Every one of them is proof that A's number is too
      high.
    * no limit: A must break every image where it may change all of it.
    * gradients: of A's own loss where its search failed (tested: zero or not finite; told: below A's own floor), and
      of the cross-entropy at the images (told: zero; below 1e-6, where common ℓ2 attacks stall).
    * bumps and slopes: the margin along the straight way from an image to what A made of it. A point on the way that is
      wrong breaks the image too; and the gradients must tell how the margin changes (Σ|real − predicted| ≤ ½ Σ|real|).
    * same answer, in company: the same image twice, and alone or among others.

    A check that counts images alarms where more than 2 % of all images are concerned, beyond chance: the paired exact
    test P(Binomial(n, 0.02) ≥ count) ≤ 0.05 / 11, which for n = 200 takes 11 images (5.5 %), for n = 1000 takes 33
    (3.3 %). At most 11 such tests are made, so that the chance of any alarm is at most 5 % where no share exceeds 2 %
    in the population. The two checks of determinism alarm above what rounding explains. The reading is `unreliable`
    with one sentence per alarm.

    Measured on honest networks, the default attack: lenet-small of mnist5k, standard and PGD-trained in ℓ∞ and ℓ2, five
    seeds, five disjoint samples of 200 test images: no alarm in 90 looks (95 % interval of the rate: 0 to 4.1 %;
    ``python -m benchmarks.false_alarms``). A look at lenet-small takes 5 to 18 seconds of one core.

    A model that gives one answer to all images of several classes, and to noise, hides nothing; it is not checked.

    "robust accuracy after all checks" counts an image only where neither A nor any check broke it; it is the better
    upper bound.

    Attributes:
        attack: A. None is what the lens `accuracy` runs: PGD on the logit margin, 50 steps, 1 random start, which
            leaves an example alone once it is wrong.
        split: "train", "valid" or "test".
        n_examples: a fixed random sample of the split; None takes all.
        times: factor on A's steps.
        restarts: further runs of A.
        queries: of the random search.
        imitated: images whose answers the imitation is fitted to, of the training split where there is one.
        batch_size: images that go through the network together.

    Raises:
        InputError: a split that does not exist, or a count below 1.
    """

    name: ClassVar[str] = "health"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = (
        "Carlini et al. 2019, arXiv 1902.06705, §4–5; Athalye et al. 2018, arXiv 1802.00420, §3.1; Croce et al. 2022, "
        "arXiv 2202.13711"
    )
    unsteady: ClassVar[bool] = True

    attack: Attack | None = None
    split: Literal["train", "valid", "test"] = "test"
    n_examples: int | None = 200
    times: int = 4
    restarts: int = 3
    queries: int = 500
    imitated: int = 1000
    batch_size: int = 250

    def __post_init__(self) -> None:
        require_at_least(self, times=1, restarts=1, queries=1, imitated=2, batch_size=1)
        require_split(self)

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(n_examples=24, batch_size=8, attack=quick, queries=20, imitated=20),
            cls(n_examples=10, split="train", attack=quick, times=2, restarts=1, queries=5),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=1000, times=10, restarts=10, queries=5000, imitated=2000)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack, n = self._attack(subject), count(getattr(subject.splits, self.split), self.n_examples)
        losses, limits = (2 if isinstance(attack, PGD) else 3), 1
        runs = attack.passes * ((1 + self.times + self.restarts + losses + limits) * n)
        looks = Passes(inputs=(PIECES + 5) * n, forward=(10 + self.queries) * n + self.imitated)
        return runs + looks

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Attacks on a linear model find all there is: nothing is left to be broken, and its gradient is constant."""
        shifts = [0.05, 0.12, 0.18, 0.3, 0.4, -0.1, 0.07, 0.35]
        subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
        names = ("more steps", "more restarts", "the ce loss", "random search", "transfer", "points on the way")
        expected = {f"lost to {name}": (0.0, 0.0) for name in names}
        expected |= {
            "clean accuracy": (7 / 8, 0.0),
            "robust accuracy": (3 / 8, 0.0),
            "robust accuracy after all checks": (3 / 8, 0.0),
            "left without a limit": (0.0, 0.0),
            "stuck without a gradient": (0.0, 0.0),
            "gradients of the cross-entropy that are zero or not finite": (0.0, 0.0),
            "misled by gradients": (0.0, 0.0),
            "wrong way": (0.0, 1e-6),
            "unexplained change": (0.0, 1e-4),
            "difference of two answers": (0.0, 0.0),
            "gradients that depend on the company": (0.0, 0.0),
        }
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self._attack(subject)
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}
        split: Split = getattr(subject.splits, self.split)
        order = sample(split, self.n_examples)
        z, _ = logits(subject, split, order, self.batch_size)
        if not bool(torch.isfinite(z).all()):
            why = "The model answers some images with logits that are not finite numbers."
            return Reading(self.name, "Nothing was checked.", Outcome.failed(why), settings=settings)
        (images,) = batches(subject, split, order, len(order))
        if bool((images.y != images.y[0]).any()) and _gives_one_answer(subject.model, images.x[: self.batch_size], z):
            why = (
                "The model gives one answer to all images, though they are of several classes, and to noise: there is "
                "nothing to attack. Its training may have collapsed, or what it is given does not reach its last layer."
            )
            return Reading(self.name, "Nothing was checked.", Outcome.failed(why), settings=settings)
        try:
            judged = Judged.by(attack, subject.model, images, size=self.batch_size, gen=gen)
            found, left, way = self._checked(judged, self._known(subject, split), gen)
        except AttackBroken as error:
            return Reading(self.name, "Nothing was checked.", Outcome.failed(str(error)), settings=settings)
        standing = judged.standing.clone()
        for finding in found:
            if finding.fallen is not None:
                standing &= ~finding.fallen
        before, after = _accuracies(judged, standing)
        alarms = [finding.alarm for finding in found if finding.alarm]
        return Reading(
            lens=self.name,
            says=_sentence(len(judged), before[1].value, after.value, len(found), len(alarms)),
            outcome=Outcome.unreliable(" ".join(alarms)) if alarms else Outcome(),
            quantities=(*before, after, *(q for finding in found for q in finding.quantities)),
            headline=("robust accuracy after all checks",),
            panels=(_table(found), *_curves(judged, left, way)),
            settings=settings,
        )

    def _attack(self, subject: Subject) -> Attack:
        return self.attack or PGD(threat=subject.threat, steps=50, loss="margin", early_stop=True)

    def _known(self, subject: Subject, split: Split) -> Tensor:
        """Images (N, C, H, W) whose answers are imitated."""
        source = subject.splits.train if len(subject.splits.train) > 1 else split
        order = sample(source, min(self.imitated, len(source)))
        return source.batch(order).x.to(subject.device)

    def _checked(self, judged: Judged, known: Tensor, gen: Generator) -> tuple[list[Finding], list[float], Way]:
        way = Way.of(judged)
        restarted, left = more_starts(judged, self.restarts, gen)
        found = [
            more_steps(judged, self.times, gen),
            restarted,
            *other_losses(judged, gen),
            blind_search(judged, self.queries, gen),
            transfer(judged, known, gen),
            no_limit(judged, gen),
            gradients(judged),
            *surface(judged, way),
            same_answer(judged),
            in_company(judged),
        ]
        return found, left, way


def _gives_one_answer(model: nn.Module, x: Tensor, z: Tensor) -> bool:
    """Whether all images, of logits ``z`` (N, K), and noise like ``x`` (B, C, H, W) are of one class to the model."""
    noise = torch.rand(x.shape, generator=generator("cpu", 0, "noise")).to(x)
    with untouched(model), torch.no_grad():
        answers = torch.cat([z.argmax(1), model(noise).argmax(1).cpu()])
    return bool((answers == answers[0]).all())


def _accuracies(judged: Judged, standing: Tensor) -> tuple[list[Quantity], Quantity]:
    n = len(judged)
    clean = share("clean accuracy", int(judged.right.sum()), n)
    robust, rest = (
        share(name, int(which.sum()), n, nature="upper bound")
        for name, which in (("robust accuracy", judged.standing), ("robust accuracy after all checks", standing))
    )
    return [clean, robust], rest


def _sentence(n: int, before: float, after: float, checks: int, alarms: int) -> str:
    said = f"Of {n} images the attack leaves {before:.1%} right"
    if alarms:
        return f"{said}, but {alarms} of {checks} checks object: at most {after:.1%} are."
    return f"{said}, and none of {checks} checks objects: all of them together leave {after:.1%}."


def _table(found: list[Finding]) -> Table:
    rows = []
    for finding in found:
        q, *_ = finding.quantities
        rows.append((finding.check, q.name, q.value, q.low, q.high, q.n, "alarm" if finding.alarm else "ok"))
    return Table("Health checks", ("check", "number", "value", "low", "high", "n", "verdict"), tuple(rows))


def _curves(judged: Judged, left: list[float], way: Way) -> tuple[Panel, ...]:
    runs = np.arange(1, len(left) + 1, dtype=np.float64)
    restarts = Curve(
        "Accuracy that several runs of the attack leave",
        "runs",
        "share right under attack",
        (Series("after all runs so far", runs, np.asarray(left)),),
        (0.0, 1.0),
    )
    stands = judged.standing[judged.right].cpu()
    at = np.linspace(0, 1, PIECES + 1)
    groups = {"left standing": way.f[stands], "broken": way.f[~stands]}
    series = tuple(Series(name, at, f.mean(0).numpy()) for name, f in groups.items() if len(f))
    if not series:
        return (restarts,)
    title = "Margin on the way to the adversarial image"
    return restarts, Curve(title, "share of the way", "mean logit margin", series)
