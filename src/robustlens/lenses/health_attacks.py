"""Other attacks on the images that an attack left standing: whatever they break, the attack missed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from scipy.special import bdtrc
from torch import Generator, Tensor, nn

from robustlens.attacks.losses import LossName
from robustlens.attacks.pgd import PGD
from robustlens.attacks.square import Square
from robustlens.attacks.transfer import transferred
from robustlens.attacks.verify import craft, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.modes import untouched
from robustlens.core.types import Attack, Batch
from robustlens.lenses.accuracy import at_radius
from robustlens.lenses.surrogate import KernelSurrogate
from robustlens.results.intervals import wilson
from robustlens.results.reading import Quantity

#: Floors under ‖∇‖₂ below which PGD slows down: the one that it has by default, and one that is never met.
USUAL_FLOOR, NO_FLOOR = 1e-12, 1e-38
#: A share of all images that an attack may miss, and that any other check may find, without an alarm.
TOLERATED = 0.02
#: The chance that any of the tests raises an alarm although no share in the population exceeds ``TOLERATED``.
FAMILY_LEVEL = 0.05
#: Tests that a look makes at most; each is made at ``FAMILY_LEVEL / TESTS`` (Bonferroni).
TESTS = 11


@dataclass(frozen=True, eq=False)
class Judged:
    """What an attack did to ``images``, as measured by ``attacks.verify``: the number under judgement.

    ``right`` (n,) are the images that are right before, ``standing`` (n,) those that are right after too, ``x_adv``
    (n, C, H, W) what the attack returned. ``size`` is how many images go through the network together.
    """

    model: nn.Module
    attack: Attack
    images: Batch
    right: Tensor
    standing: Tensor
    x_adv: Tensor
    size: int

    @classmethod
    def by(cls, attack: Attack, model: nn.Module, images: Batch, *, size: int, gen: Generator) -> Judged:
        seen = [evaluate(attack, model, part, gen=gen) for part in parts(images, size)]
        right, standing = (torch.cat([getattr(s, name) for s in seen]) for name in ("clean_correct", "robust"))
        return cls(model, attack, images, right, standing, torch.cat([s.x_adv for s in seen]), size)

    def __len__(self) -> int:
        return len(self.images)

    def fallen_to(self, rival: Attack, gen: Generator, *, among: Tensor | None = None) -> Tensor:
        """Which images (n,) that were left standing, or of those ``among`` (n,), ``rival`` breaks."""
        fallen = torch.zeros_like(self.standing)
        for part in parts(self.images, self.size, self.standing if among is None else among):
            x_adv = craft(rival, self.model, part.x, part.y, gen=gen)
            with untouched(self.model), torch.no_grad():
                fallen[part.index] = ~(logit_margin(self.model(x_adv), part.y) > 0)
        return fallen


@dataclass(frozen=True, eq=False)
class Finding:
    """What a check found: its numbers (the first is the one that was tested), and a sentence where it is alarmed.

    ``fallen`` (n,) are the images that the attack left standing and that this check broke.
    """

    check: str
    quantities: tuple[Quantity, ...]
    alarm: str = ""
    fallen: Tensor | None = None


def parts(images: Batch, size: int, chosen: Tensor | None = None) -> list[Batch]:
    """The ``chosen`` (n,) images in batches of at most ``size``; ``index`` counts in ``images``."""
    order = torch.arange(len(images), device=images.y.device) if chosen is None else chosen.nonzero()[:, 0]
    return [Batch(images.x[i], images.y[i], i) for i in torch.split(order, size) if len(i)]


def too_many(count: int, n: int) -> bool:
    """Whether ``count`` of ``n`` shows a share above ``TOLERATED``, by the exact binomial test.

    The rival adds to the attack, so it can only take images away and every image it breaks is a discordant pair:
    the paired exact test of "misses at most a share p₀" is P(Binomial(n, p₀) ≥ count) ≤ level.
    """
    return count > 0 and float(bdtrc(count - 1, n, TOLERATED)) <= FAMILY_LEVEL / TESTS


def share(name: str, count: int, n: int, nature: Literal["estimate", "upper bound"] = "estimate") -> Quantity:
    return Quantity(name, count / n, "fraction", *wilson(count, n), n, nature=nature)


def _missed(check: str, fallen: Tensor, sentence: str) -> Finding:
    """``sentence`` has {} where the share of images stands that the attack missed."""
    count, n = int(fallen.sum()), len(fallen)
    alarm = sentence.format(f"{count / n:.1%}") if too_many(count, n) else ""
    return Finding(check, (share(f"lost to {check}", count, n),), alarm, fallen)


def more_steps(judged: Judged, times: int, gen: Generator) -> Finding:
    """The attack with ``times`` its steps; where it has none, PGD on the margin with 50 · ``times``."""
    attack = judged.attack
    if hasattr(attack, "steps"):
        longer = cast(Attack, dataclasses.replace(cast(Any, attack), steps=times * attack.steps))
        sentence = f"With {times} times as many steps the attack breaks another {{}} of the images: "
    else:
        longer = _plain(attack, "margin", 50 * times)
        sentence = f"An attack that takes {longer.steps} small steps breaks another {{}} of the images: "
    sentence += "the one that was used ends before it has found what there is."
    return _missed("more steps", judged.fallen_to(longer, gen), sentence)


def more_starts(judged: Judged, restarts: int, gen: Generator) -> tuple[Finding, list[float]]:
    """The attack again, ``restarts`` times from other random points; and the accuracy that each one left."""
    attack = judged.attack
    if hasattr(attack, "random_start"):
        attack = cast(Attack, dataclasses.replace(cast(Any, attack), random_start=True))
    fallen, left = torch.zeros_like(judged.standing), [float(judged.standing.double().mean())]
    for _ in range(restarts):
        fallen = fallen | judged.fallen_to(attack, gen, among=judged.standing & ~fallen)
        left.append(float((judged.standing & ~fallen).double().mean()))
    sentence = (
        f"Started {restarts} more times from other random points, the attack breaks another {{}} of the images: one "
        "run depends too much on luck."
    )
    return _missed("more restarts", fallen, sentence), left


def other_losses(judged: Judged, gen: Generator) -> list[Finding]:
    """The attack on the other losses, all else equal but without a floor under gradients; else PGD on each of them."""
    attack = judged.attack
    with untouched(judged.model), torch.no_grad():
        classes = judged.model(judged.images.x[:1]).shape[1]
    names: dict[LossName, str] = {
        "ce": "the cross-entropy",
        "margin": "the lead of the right class over the next one",
        "dlr": "the lead of the right class, free of scale",
    }
    if classes < 3:
        del names["dlr"]
    found = []
    for name, words in names.items():
        label = f"the {name} loss"
        if not isinstance(attack, PGD):
            rival = _plain(attack, name, getattr(attack, "steps", 50))
        elif attack.loss != name:
            rival = dataclasses.replace(attack, loss=name, inverse_temperature=1.0, grad_floor=NO_FLOOR)
        elif attack.grad_floor > USUAL_FLOOR:
            rival = dataclasses.replace(attack, grad_floor=NO_FLOOR)
            label, words = f"{label} without a floor", f"{words}, however small its gradients are,"
        else:
            continue
        sentence = (
            f"With as many steps, an attack that works on {words} breaks another {{}} of the images: what the attack "
            "that was used looks at leads it nowhere there, as where a model is so sure of itself that its gradients "
            "vanish; this is called gradient masking."
        )
        found.append(_missed(label, judged.fallen_to(rival, gen), sentence))
    return found


def blind_search(judged: Judged, queries: int, gen: Generator) -> Finding:
    """Random search, which sees answers and no gradient."""
    fallen = judged.fallen_to(Square(threat=judged.attack.threat, queries=queries), gen)
    sentence = (
        f"A random search with {queries} questions, which cannot look inside the model, breaks another {{}} of the "
        "images: an attack that can should never do worse, so the model hides its weakness from it."
    )
    return _missed("random search", fallen, sentence)


def transfer(judged: Judged, known: Tensor, gen: Generator) -> Finding:
    """Images crafted on a surrogate that was fitted to the answers to ``known`` (N, C, H, W) alone."""
    surrogate = KernelSurrogate.fitted(judged.model, known, size=judged.size)
    rival = _plain(judged.attack, "margin", 40, early_stop=False)
    fallen = judged.fallen_to(transferred(rival, surrogate), gen)
    sentence = (
        "Images that were made to fool a simple imitation of the model break another {} of the images: an attack on "
        "the model itself should never do worse, so the model hides its weakness from it."
    )
    return _missed("transfer", fallen, sentence)


def no_limit(judged: Judged, gen: Generator) -> Finding:
    """The attack where it may change the whole image."""
    attack, x = judged.attack, judged.images.x
    across = float(attack.threat.distance(torch.ones_like(x[:1]), torch.zeros_like(x[:1]))[0])
    left = judged.standing & ~judged.fallen_to(at_radius(attack, across), gen)
    count, n = int(left.sum()), len(judged)
    alarm = (
        f"{count / n:.1%} of the images keep their answer even when the attack may change every pixel freely; a "
        "working attack should then always win, so it probably misses attacks at small radii too."
    )
    found = share("left without a limit", count, n)
    return Finding("no limit", (found,), alarm if too_many(count, n) else "")


def _plain(attack: Attack, loss: LossName, steps: int, *, early_stop: bool = True) -> PGD:
    return PGD(threat=attack.threat, steps=steps, loss=loss, early_stop=early_stop)
