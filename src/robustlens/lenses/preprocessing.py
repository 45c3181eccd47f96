"""Signs that a network is given what it was not made for: pixels, labels, outputs or mode of another convention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.types import EITHER_SCALE, Invariance, Split, Subject
from robustlens.lenses.oracle import Oracle, linear_subject, two_sided_subject
from robustlens.lenses.passes import count, sample
from robustlens.results.errors import require_at_least
from robustlens.results.intervals import wilson
from robustlens.results.paired import Paired
from robustlens.results.panels import Table
from robustlens.results.reading import Outcome, Quantity, Reading

#: Means and deviations, one for each channel or one for all.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
#: Those that networks are usually trained with, for images of one channel and of three.
USUAL: dict[int, dict[str, Statistics]] = {
    1: {"MNIST": ((0.1307,), (0.3081,))},
    3: {
        "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    },
}
#: A sum of probabilities, or of exponentials of log-probabilities, may be that far from 1.
ROUNDING = 1e-3
#: Share of the largest logit by which an answer may change when it is given again, or in a smaller batch.
TOLERATED = 1e-2
#: Share of the images by which a finding may be worse than the best and still explain as much.
CLOSE = 0.05
#: Images that go together where the network is tried in another batch.
FEW = 16

LABELS = "other labels"
TRIED = ("with", "right as it is", "right so", "gain: low", "gain: high", "p", "n", "verdict")

WIDE = "It expects pixels from 0 to 255: multiply inside it, for example by --mean 0 --std 0.00392157."
MISSING = "It expects normalised images: put the normalisation inside, for example by --mean {} --std {}."
DOUBLE = "Its images are normalised twice: leave out --mean and --std, or the normalisation inside it."
BGR = "It expects blue, green, red: exchange the channels inside it by x.flip(1)."
ORDER = "It numbers the classes otherwise than the data: compare both lists of classes, and where they begin."
RANDOM = (
    "The same images get other answers when they are asked for again, by up to {:.0%} of the largest logit: something "
    "is random although the network was told to evaluate, such as F.dropout without training=self.training."
)
BATCH = (
    "The answer to an image depends on the other images in its batch, by up to {:.0%} of the largest logit: BatchNorm "
    "normalises by the batch although the network was told to evaluate. Save or export it in eval mode."
)
BUFFERS = (
    "A forward pass changes the network's buffers although it was told to evaluate: it is in training mode. Save or "
    "export it in eval mode."
)
SOFTMAX = (
    "All outputs are probabilities: remove the last softmax. Attacks need what comes before it, because behind it "
    "gradients vanish where the network is sure."
)


class Fact(NamedTuple):
    """How the network behaves: a number, what it may be at most, and what to say where it is more."""

    name: str
    value: float
    most: float
    trouble: str


class Try(NamedTuple):
    """A change of the images, and what to do where it helps."""

    kind: str
    what: str
    change: Callable[[Tensor], Tensor]
    cure: str


class Tried(NamedTuple):
    """What a try did to the images that are answered right."""

    kind: str
    what: str
    cure: str
    paired: Paired

    def says(self) -> str:
        before, after = self.paired.shares
        return (
            f"The network gets {before:.1%} of {self.paired.n} images right as it is used here, and {after:.1%} with "
            f"{self.what} (McNemar's exact test: p = {self.paired.p_second_is_better:.1g}). {self.cure}"
        )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Would the network be right much more often if its images or labels followed another convention?

    Tried on the same images: pixels from 0 to 255; normalising by usual statistics and by those of the images; undoing
    such a normalisation; channels in the order blue, green, red; labels one higher or lower; and a permutation of the
    classes, fitted to every second image (the assignment with most right answers) and judged on the others.

    A try is a *finding* when it is right on at least ``least`` more of the images, and McNemar's exact one-sided test
    of the images on which the two differ has p ≤ ``alpha`` / (number of tries). So on a network that no try improves,
    some try is called a finding with probability ``alpha`` at most (Bonferroni). Of several findings, which
    resemble or follow from one another, the first in this order is told that comes within ``CLOSE`` of the best.

    Further findings are facts without a test: an answer in eval mode that changes by more than 1 % of the largest
    logit when it is asked again (dropout is on) or in a batch of 16 (BatchNorm uses the batch), buffers that a forward
    pass changes, and rows of outputs that are all probabilities. Logarithms of probabilities are harmless and are only
    told: losses and margins do not change with a constant in every logit.

    The outcome is unreliable where there is a finding: other readings are then about a network that is used wrongly.

    Attributes:
        n_examples: a fixed random sample of the test images.
        alpha: probability of a false alarm, of all tries together.
        least: how much more must be right, as a share of the images. Honest networks gain too where they were trained
            briefly: up to 10 points were seen on digits from another contrast.
        batch_size: images of a forward pass.

    Raises:
        InputError: no images, or none in a batch.
    """

    name: ClassVar[str] = "preprocessing"
    invariances: ClassVar[frozenset[Invariance]] = EITHER_SCALE
    reference: ClassVar[str] = "McNemar 1947, Psychometrika 12, 153–157; Carlini et al. 2019, arXiv 1902.06705, §4"
    unsteady: ClassVar[bool] = True

    n_examples: int = 256
    alpha: float = 1e-3
    least: float = 0.15
    batch_size: int = 256

    def __post_init__(self) -> None:
        require_at_least(self, n_examples=1, batch_size=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(n_examples=20, alpha=0.01, least=0.2, batch_size=8)]

    def cost(self, subject: Subject) -> Passes:
        tries = len(_tries(subject.splits.test.batch(torch.arange(1)).x))
        return Passes(forward=(tries + 3) * count(subject.splits.test, self.n_examples))

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """Two classes at ½ ± ¼, one image of 64 wrong: a threshold at ½, one at 127.5, and labels exchanged."""
        test = two_sided_subject(train_shifts=[0.25], test_shifts=[0.25] * 63 + [-0.25]).splits.test
        other = Split(test.images, 1 - test.labels)
        weight = torch.tensor([[0.0] * 4, [4.0, 0.0, 0.0, 0.0]])

        def threshold(at: float, split: Split) -> Subject:
            return linear_subject(weight, torch.tensor([0.0, -4 * at]), train=split, test=split)

        right = {"signs of misuse": (0.0, 0.0), "clean accuracy": (63 / 64, 0.0), "gain from other labels": (0.0, 0.0)}
        wide = {
            "signs of misuse": (1.0, 0.0),
            "clean accuracy": (1 / 2, 0.0),
            "gain from pixels to 255": (31 / 64, 0.0),
        }
        exchanged = {
            "signs of misuse": (1.0, 0.0),
            "clean accuracy": (1 / 64, 0.0),
            "gain from other labels": (62 / 64, 0.0),
        }
        return [
            Oracle(threshold(0.5, test), cls(), right),
            Oracle(threshold(127.5, test), cls(), wide),
            Oracle(threshold(0.5, other), cls(), exchanged),
        ]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        split, model = subject.splits.test, subject.model
        batch = split.batch(sample(split, self.n_examples))
        x, y = batch.x.to(subject.device), batch.y.cpu()

        def answers(change: Callable[[Tensor], Tensor] = lambda part: part, size: int = self.batch_size) -> Tensor:
            return torch.cat([model(change(part)).cpu().double() for part in torch.split(x, size)])

        with untouched(model), torch.no_grad(), _buffers_kept(model) as moved:
            z = answers()
            if not bool(torch.isfinite(z).all()):
                why = "The network answers some of the images with NaN or infinity."
                return Reading(self.name, "Nothing was tried.", Outcome.failed(why), settings=describe(self))
            facts = _behaviour(z, answers(), answers(size=FEW), moved())
            clean = logit_margin(z, y) > 0
            tried = [
                Tried(each.kind, each.what, each.cure, _paired(clean, logit_margin(answers(each.change), y) > 0))
                for each in _tries(x)
            ]
        tried += _labels(z, y)
        return self._reading(clean, tried, facts, z)

    def _found(self, each: Tried, tries: int) -> bool:
        return each.paired.difference >= self.least and each.paired.p_second_is_better <= self.alpha / tries

    def _reading(self, clean: Tensor, tried: Sequence[Tried], facts: Sequence[Fact], z: Tensor) -> Reading:
        n, right = len(clean), int(clean.sum())
        helping = [each for each in tried if self._found(each, len(tried))]
        most = max((each.paired.shares[1] for each in helping), default=0.0)
        findings = [each.says() for each in helping if each.paired.shares[1] >= most - CLOSE][:1]
        findings += [fact.trouble for fact in facts if fact.value > fact.most]
        best = {e.kind: e for e in sorted(tried, key=lambda e: e.paired.difference)}
        quantities = [
            Quantity("signs of misuse", len(findings), n=n, nature="exact"),
            Quantity("clean accuracy", right / n, "fraction", *wilson(right, n), n),
            *(
                Quantity(f"gain from {kind}", e.paired.difference, "fraction", *e.paired.interval(), e.paired.n)
                for kind, e in sorted(best.items())
            ),
            *(Quantity(fact.name, fact.value, "fraction", n=n, nature="exact") for fact in facts),
        ]
        says = f"The network gets {right / n:.1%} of {n} images right, and of {len(tried)} other conventions for pixels"
        says += f" and labels {len(helping) or 'none'} {'makes' if len(helping) < 2 else 'make'} it much better."
        if _log_probabilities(z):
            says += " Its outputs are logarithms of probabilities, which is harmless."
        return Reading(
            lens=self.name,
            says=says,
            outcome=Outcome.unreliable(" ".join(findings)) if findings else Outcome(),
            quantities=tuple(quantities),
            headline=("signs of misuse",),
            panels=(self._table(tried), _facts(facts)),
            settings=describe(self),
        )

    def _table(self, tried: Sequence[Tried]) -> Table:
        rows = []
        for each in tried:
            paired = each.paired
            verdict = "finding" if self._found(each, len(tried)) else "no better"
            rows.append((each.what, *paired.shares, *paired.interval(), paired.p_second_is_better, paired.n, verdict))
        return Table("Other conventions on the same images", TRIED, tuple(rows))


def _paired(clean: Tensor, other: Tensor) -> Paired:
    return Paired.of(clean.numpy(), other.numpy())


def _tries(x: Tensor) -> list[Try]:
    """Every change of images like ``x`` (N, C, H, W)."""
    channels = x.shape[1]
    own = tuple(x.mean((0, 2, 3)).tolist()), tuple(x.std((0, 2, 3), correction=0).tolist())
    known: dict[str, Statistics] = {**USUAL.get(channels, {}), "½ and ½": ((0.5,), (0.5,)), "the images' own": own}
    found = [Try("pixels to 255", "pixels from 0 to 255", lambda part: 255 * part, WIDE)]
    for name, (mean, std) in known.items():
        m, s = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (mean, std))
        cure = MISSING.format(*(",".join(f"{value:.4g}" for value in values) for values in (mean, std)))
        normalise, undo = partial(_affine, scale=1 / s, shift=-m / s), partial(_affine, scale=s, shift=m)
        found.append(Try("normalising", f"mean and std of {name}", normalise, cure))
        found.append(Try("undoing", f"x·std + mean of {name}", undo, DOUBLE))
    if channels == 3:
        found.append(Try("other channels", "channels in the order blue, green, red", lambda part: part.flip(1), BGR))
    return found


def _affine(x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


def _labels(z: Tensor, y: Tensor) -> list[Tried]:
    """Labels one higher, one lower, and permuted as fits every second image of each class best."""
    answer, classes = z.argmax(1), z.shape[1]
    clean = logit_margin(z, y) > 0
    found = []
    for step in (1, -1)[: classes - 1]:
        right = answer == (y + step) % classes
        found.append(Tried(LABELS, f"labels {step:+d}", ORDER, _paired(clean, right)))
    fitted = torch.zeros(len(y), dtype=torch.bool)
    fitted[y.argsort(stable=True)[::2]] = True
    if bool(fitted.all()):
        return found
    counts = torch.zeros(classes, classes).index_put_((y[fitted], answer[fitted]), torch.ones(()), accumulate=True)
    meant = torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])
    right = answer == meant[y]
    found.append(Tried(LABELS, "classes in another order", ORDER, _paired(clean[~fitted], right[~fitted])))
    return found


def _behaviour(z: Tensor, again: Tensor, apart: Tensor, moved: bool) -> list[Fact]:
    """Facts about logits (N, K): as they are, asked for again, and asked for in small batches."""
    scale = z.abs().max().clamp(min=torch.finfo(z.dtype).tiny)
    repeated, alone = (float((other - z).abs().max() / scale) for other in (again, apart))
    rows = ((z >= 0).all(1) & ((z.sum(1) - 1).abs() < ROUNDING)).double().mean()
    random = repeated > TOLERATED
    return [
        Fact("change when asked again", repeated, TOLERATED, RANDOM.format(repeated)),
        # An answer that is random anyway says nothing about batches.
        Fact("change in another batch", 0.0 if random else alone, TOLERATED, BATCH.format(alone)),
        Fact("passes that change buffers", float(moved), 0.0, BUFFERS),
        Fact("answers that are probabilities", float(rows), 1 - 1 / (2 * len(z)), SOFTMAX),
    ]


def _log_probabilities(z: Tensor) -> bool:
    return bool((z.exp().sum(1) - 1).abs().max() < ROUNDING)


def _facts(facts: Sequence[Fact]) -> Table:
    rows = [(f.name, f.value, f.most, f.trouble if f.value > f.most else "as it should be") for f in facts]
    return Table("How it answers", ("what", "found", "allowed", "which means"), tuple(rows))


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a question: did a pass change a buffer? At the end all are what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield lambda: not all(torch.equal(buffer, was) for buffer, was in before)
    finally:
        for buffer, was in before:
            buffer.copy_(was)
