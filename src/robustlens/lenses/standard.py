"""Robust accuracy by AutoAttack-standard."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from torch import Generator

from robustlens.attacks.ensemble import AutoAttackStandard
from robustlens.attacks.verify import AttackBroken
from robustlens.attacks.worst_case import STANDS, Told, WorstCase, worst_case
from robustlens.core.discovery import describe
from robustlens.core.passes import Passes
from robustlens.core.steady import COMPANY, unsteadiness
from robustlens.core.types import EITHER_SCALE, Invariance, Split, Subject
from robustlens.core.world import World, joined
from robustlens.lenses.oracle import Oracle, two_sided_subject
from robustlens.lenses.passes import batches, count, draw_seed, require_split, sample
from robustlens.results.errors import require_at_least
from robustlens.results.intervals import wilson
from robustlens.results.panels import Curve, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading, spelled

#: More than this share of all examples that only Square broke says that the gradients mislead.
TOLERATED = 0.01


@dataclass(frozen=True, kw_only=True)
class StandardAccuracy:
    """#(right before and after every attack of AutoAttack-standard) / n at the threat's radius.

    The attacks run in the reference's order with its budgets, each on the examples that are still right; what each of
    them leaves is shown. Intervals are 95 % Wilson intervals. As any attack can miss, the accuracy is an upper bound of
    the truth. It is unreliable where Square, which sees no gradient, breaks more than 1 % of all examples
    after the attacks by gradient have left them: those then fail for another reason than robustness. So it is where the
    model's answer to an image changes by chance or with its batch, which the attacks do not expect.

    It is looked through on request alone (``robustlens audit --standard``): each example that holds costs some 7,000
    passes, which is minutes for a small network on a CPU and 1,000 digits.

    Attributes:
        split: "train", "valid" or "test".
        n_examples: a fixed random sample of the split; None takes all.
        batch_size: examples attacked together.
        chunk: examples that are held at a time.
        effort: share of the standard's steps and queries; only 1 is AutoAttack-standard.

    Raises:
        InputError: a split that does not exist, or no examples in a batch.
    """

    name: ClassVar[str] = "standard-accuracy"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = "Croce and Hein 2020, arXiv 2003.01690; Croce et al. 2021, arXiv 2010.09670"
    unsteady: ClassVar[bool] = True
    on_request: ClassVar[bool] = True

    split: Literal["train", "valid", "test"] = "test"
    n_examples: int | None = 1000
    batch_size: int = 250
    chunk: int = 1000
    effort: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(self, batch_size=1, chunk=1)
        require_split(self)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(n_examples=10, batch_size=4, effort=0.02),
            cls(n_examples=6, chunk=4, split="train", effort=0.02),
        ]

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack = AutoAttackStandard(threat=subject.threat, effort=self.effort)
        return attack.passes * count(getattr(subject.splits, self.split), self.n_examples)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear model holds exactly the examples that are farther from its boundary than ε."""
        shifts = [0.05, 0.12, 0.18, 0.3, 0.4, -0.1, 0.07, 0.35]
        subject = two_sided_subject(train_shifts=shifts, test_shifts=shifts)
        expected = {"clean accuracy": (7 / 8, 0.0), "robust accuracy": (3 / 8, 0.0), "broken by square": (0.0, 0.0)}
        return [Oracle(subject, cls(effort=0.1), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        return self.look_resumably(subject, gen=gen)

    def look_resumably(
        self, subject: Subject, *, gen: Generator, state: Path | None = None, told: Told | None = None
    ) -> Reading:
        """The reading; with a ``state`` directory it can be resumed, and the adversarial images are kept there."""
        attack = AutoAttackStandard(threat=subject.threat, effort=self.effort)
        split: Split = getattr(subject.splits, self.split)
        order = sample(split, self.n_examples)
        settings = describe(self) | {"threat": str(subject.threat), "line-up": list(map(describe, attack.line_up))}
        seed, size, together = draw_seed(gen), self.batch_size, joined()

        def attacked(world: World) -> WorstCase:
            chunks, model = batches(subject, split, order, self.chunk), subject.model
            return worst_case(
                attack.line_up, model, chunks, seed=seed, batch_size=size, state=state, told=told, world=world
            )

        try:
            if together.size > 1 and state is not None:
                with suppress(AttackBroken):  # it breaks again below, for everyone
                    attacked(together)
                together.wait()
            found = attacked(World())
        except AttackBroken as error:
            return Reading(self.name, "No accuracy was measured.", Outcome.failed(str(error)), settings=settings)
        n, clean, robust = len(found), found.right_after(-1), int((found.broken_by == STANDS).sum())
        return Reading(
            lens=self.name,
            says=(
                f"The model gets {clean / n:.1%} of {n} images right, and at most {robust / n:.1%} within "
                f"{spelled(str(subject.threat))} of them, by {self._what()}."
            ),
            outcome=_outcome(found, unsteadiness(subject.model, split.batch(order[:8]).x.to(subject.device))),
            quantities=_quantities(found, clean, robust),
            headline=("clean accuracy", "robust accuracy"),
            panels=_panels(found),
            settings=settings,
            examples={
                "index": found.index.numpy(),
                "clean": found.right(-1).numpy(),
                "robust": (found.broken_by == STANDS).numpy(),
            },
        )

    def _what(self) -> str:
        return "AutoAttack-standard" if self.effort == 1 else f"AutoAttack with {self.effort:.3g} of its effort"


def _quantities(found: WorstCase, clean: int, robust: int) -> tuple[Quantity, ...]:
    n = len(found)
    quantities = [
        Quantity("clean accuracy", clean / n, "fraction", *wilson(clean, n), n),
        Quantity("robust accuracy", robust / n, "fraction", *wilson(robust, n), n, nature="upper bound"),
    ]
    if clean:
        interval = wilson(robust, clean)
        name = "conditional robust accuracy"
        quantities.append(Quantity(name, robust / clean, "fraction", *interval, clean, nature="upper bound"))
    for position, attack in enumerate(found.attacks):
        broken = int((found.broken_by == position).sum())
        quantities.append(Quantity(f"broken by {attack}", broken / n, "fraction", n=n, nature="exact"))
    return tuple(quantities)


def _outcome(found: WorstCase, moved: float) -> Outcome:
    if moved > COMPANY:
        return Outcome.unreliable(
            f"The answer to an image moves by {moved:.1%} of the largest logit from one time to the next, or with what "
            "else is in its batch; each attack here takes one answer for the truth."
        )
    last = int((found.broken_by == found.attacks.index("square")).sum()) / len(found)
    if last <= TOLERATED:
        return Outcome()
    return Outcome.unreliable(
        f"An attack that only asks for answers broke {last:.1%} of the images after all attacks that follow the "
        "model's gradient had failed; the gradients mislead them, so a better attack would probably break more."
    )


def _panels(found: WorstCase) -> tuple[Panel, ...]:
    n, counts = len(found), [found.right_after(position) for position in range(-1, len(found.attacks))]
    names = ("none", *found.attacks)
    bands = np.asarray([wilson(right, n) for right in counts]).T
    series = Series("right", np.arange(len(counts), dtype=float), np.asarray(counts) / n, *bands)
    title, label = "Accuracy after each attack", "attacks so far (0: the clean images)"
    columns = ("after", "right", "low", "high", "broken by it", "n")
    lost = [0, *(before - after for before, after in pairwise(counts))]
    rows = tuple(
        (name, right / n, *wilson(right, n), float(less), n)
        for name, right, less in zip(names, counts, lost, strict=True)
    )
    return Curve(title, label, "share right", (series,), (0.0, 1.0)), Table("Attack by attack", columns, rows)
