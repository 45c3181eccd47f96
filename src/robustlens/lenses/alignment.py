"""Whether adversarial perturbations point where the network stretches most."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, craft
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.rng import forked
from robustlens.core.types import WEIGHT_SCALE, Attack, Batch, Invariance, Split, Subject, Threat
from robustlens.lenses.accuracy import at_radius
from robustlens.lenses.bands import averaged, band
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.lenses.passes import batches, count, draw_seed, sample
from robustlens.linalg.jacobian import Decomposition, at_once, decompose, jacobian_rows, require_derivative
from robustlens.results.errors import InputError, require_at_least
from robustlens.results.intervals import wilson
from robustlens.results.panels import Curve, Floats, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

#: Where σ_2 is above this share of σ_1, the leading direction is not one direction.
TIED = 0.95
ADVERSARIAL, RANDOM, UNTRAINED = "adversarial", "random", "untrained, adversarial"


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """|cos(z, v_i)| of perturbations z with the right singular vectors v_i of J = ∂f(x)/∂x (K, n) at the clean image.

    v_1 is the direction in which the logits move most, v_2 the next, and so on; all changes of f to first order lie in
    their span, the row space. Adversarial z = x_adv − x comes from the attack, random z from a uniform draw in the
    threat, box included. A direction without any preference has E cos² = 1/n with each v_i, E|cos| =
    Γ(n/2) / (√π Γ((n+1)/2)), and a share ‖VVᵀz‖ / ‖z‖ of its length in a row space of dimension r with E share² = r/n.
    Random draws exceed that a little where pixels lie on the border of the box, which lets them move one way only.
    Multiplying the logits changes no v_i.

    For comparison stands the same network with weights drawn anew, attacked itself and measured with its own v_i.
    Where two singular values nearly agree, their vectors may turn into each other and only the plane of both has a
    meaning: the second chart adds up ranks, √(Σ_{j≤i} cos²), which is not affected, and the share of images whose σ_2
    is above 0.95 σ_1 is counted. Ranks whose σ_i is rounding (below max(K, n) · the model's precision · σ_1) have no
    direction; they and perturbations of length zero are left out of means, which say their n.

    Cost for each image: the attack at every radius and once on the untrained copy, and 2·K backward passes; with the
    defaults about 15 s of one core for mnist-cnn.

    Attributes:
        radii: ε of the alignment with v_1; None is ½, 1 and 2 times the radius of the attack, at most the whole box.
            The radius of the attack is always among them, and is the one of everything else.
        attack: None is PGD on the cross-entropy, 10 steps, in the subject's threat.
        n_examples: a fixed random sample of the test split; None takes all.
        untrained: compare with a copy whose weights are drawn anew by every layer's ``reset_parameters``. Left out
            where a parameter belongs to a layer without one; the table says so.
        batch_size: images at a time, fewer where their Jacobians would exceed ``linalg.jacobian.CHUNK``.

    Raises:
        InputError: a radius that is not positive, fewer than one example or image at a time, a network whose images
            see each other, or that cannot be differentiated.
    """

    name: ClassVar[str] = "alignment"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = "Roth, Kilcher and Hofmann 2020, arXiv 1906.01527, §5.2, figures 1 and 3 (right)"

    radii: tuple[float, ...] | None = None
    attack: Attack | None = None
    n_examples: int | None = 200
    untrained: bool = True
    batch_size: int = 200

    def __post_init__(self) -> None:
        if self.radii is not None and not all(radius > 0 for radius in self.radii):
            raise InputError(f"{self.name} radii", expected="numbers > 0", got=str(self.radii), fix="Leave them out.")
        require_at_least(self, batch_size=1)

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(n_examples=8, attack=quick),
            cls(n_examples=5, attack=quick, radii=(0.1,), untrained=False, batch_size=2),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=1000)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack, n = self.attack or PGD(threat=subject.threat), count(subject.splits.test, self.n_examples)
        times = (3 if self.radii is None else len(self.radii)) + self.untrained
        return attack.passes * (times * n) + Passes(inputs=(1 + self.untrained) * len(subject.splits.classes) * n / 2)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """W with rows 3e₁ and e₂: v_1 = e₁, v_2 = e₂, and the exact perturbation is ±ε (3e₁ − e₂)/√10."""
        split = Split(torch.full((6, 1, 2, 2), 0.5), torch.arange(6) % 2)
        weight = torch.zeros(2, 4)
        weight[0, 0], weight[1, 1] = 3.0, 1.0
        subject = linear_subject(weight, torch.zeros(2), train=split, test=split)
        expected = {
            "alignment with the leading direction, adversarial": (3 / math.sqrt(10), 1e-5),
            "alignment with the last direction, adversarial": (1 / math.sqrt(10), 1e-5),
            "share in the row space, adversarial": (1.0, 1e-5),
            "share in the row space, untrained, adversarial": (1.0, 1e-5),
            "expected squared cosine of any direction": (1 / 4, 1e-12),
            "images with two leading directions": (0.0, 0.0),
        }
        return [Oracle(subject, cls(attack=LinearExact(threat=subject.threat)), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat)
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}
        radii = self._radii(attack.threat, subject)
        split, model = subject.splits.test, subject.model
        order = sample(split, self.n_examples)
        pixels = math.prod(subject.splits.shape)
        size = min(self.batch_size, at_once(len(subject.splits.classes), pixels))
        require_derivative(model, split.batch(order[:8]).x.to(subject.device), self.name)
        fresh, why_not = untrained_copy(model, gen) if self.untrained else (None, "not asked for")
        seen: dict[str, list[_Seen]] = {ADVERSARIAL: [], RANDOM: [], UNTRAINED: []}
        leading: dict[str, list[Tensor]] = {ADVERSARIAL: [], RANDOM: []}
        ties: list[Tensor] = []
        try:
            for batch in batches(subject, split, order, size):
                found = _decomposed(model, batch.x)
                if found is None:
                    return self._failed("The derivative of some images is not a finite number.", settings)
                ties.append(_tied(found.s))
                for way, made in _perturbations(model, attack, radii, batch, gen).items():
                    measured = {radius: _measured(found, z) for radius, z in made.items()}
                    seen[way].append(measured[attack.threat.eps])
                    leading[way].append(torch.stack([m.cosines[:, 0] for m in measured.values()], 1))
                if fresh is not None and (its := _decomposed(fresh, batch.x)) is not None:
                    z = craft(attack, fresh, batch.x, batch.y, gen=gen) - batch.x
                    seen[UNTRAINED].append(_measured(its, z))
        except AttackBroken as error:
            return self._failed(str(error), settings)
        cosines = {way: torch.cat([s.cosines for s in parts]).cpu().numpy() for way, parts in seen.items() if parts}
        shares = {way: torch.cat([s.share for s in parts]).cpu().numpy() for way, parts in seen.items() if parts}
        by_radius = {way: torch.cat(parts).cpu().numpy() for way, parts in leading.items()}
        seed = draw_seed(gen)
        quantities = _quantities(cosines, shares, torch.cat(ties).cpu().numpy(), pixels, seed)
        first = next((q for q in quantities if q.name == f"alignment with the leading direction, {ADVERSARIAL}"), None)
        if first is None:
            return self._failed("No attack moved an image that has a direction in which the model moves.", settings)
        return Reading(
            lens=self.name,
            says=(
                f"Adversarial changes have cosine {first.value:.2f} on average with the direction in which the model "
                f"moves most at the image; for a change in any direction it would be {expected_cosine(pixels):.2g}."
            ),
            quantities=tuple(quantities),
            headline=(first.name, f"share in the row space, {ADVERSARIAL}"),
            panels=(
                *_by_rank(cosines, pixels, seed),
                _over_radius(by_radius, radii, attack.threat, pixels, seed),
                _table(quantities, why_not),
            ),
            settings=settings,
        )

    def _failed(self, why: str, settings: dict[str, object]) -> Reading:
        return Reading(self.name, "No alignment was measured.", Outcome.failed(why), settings=settings)

    def _radii(self, threat: Threat, subject: Subject) -> list[float]:
        if threat.eps == 0:
            raise InputError(f"{self.name} threat", expected="a radius > 0", got="0", fix="Give the adversary room.")
        corner = torch.ones(1, *subject.splits.shape)
        across = float(threat.distance(corner, torch.zeros_like(corner))[0])
        chosen = [min(k * threat.eps, across) for k in (0.5, 1.0, 2.0)] if self.radii is None else self.radii
        return sorted({threat.eps, *map(float, chosen)})


class _Seen(NamedTuple):
    """|cos| (B, r) with every right singular vector, NaN where there is none, and ‖VVᵀz‖ / ‖z‖ (B,)."""

    cosines: Tensor
    share: Tensor


def untrained_copy(model: nn.Module, gen: Generator) -> tuple[nn.Module | None, str]:
    """``model`` with fresh weights drawn by every module's ``reset_parameters``, or None and why there is none.

    The draws follow from ``gen``; the global random state is afterwards what it was.
    """
    fresh = copy.deepcopy(model)
    stuck = [
        type(m).__name__
        for m in fresh.modules()
        if any(True for _ in m.parameters(recurse=False)) and not hasattr(m, "reset_parameters")
    ]
    if stuck:
        return None, f"not measured: {stuck[0]} has weights and no reset_parameters"
    with forked():
        torch.manual_seed(draw_seed(gen))
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return fresh, ""


def expected_cosine(n: int) -> float:
    """E|cos| = Γ(n/2) / (√π Γ((n+1)/2)) of a uniform direction in n dimensions with any fixed one."""
    return math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)


def _decomposed(model: nn.Module, x: Tensor) -> Decomposition | None:
    """U, σ, V of the Jacobians; σ that are rounding are set to 0. None where a derivative is not finite."""
    with untouched(model):
        jacobian = jacobian_rows(model, x)
    if not bool(torch.isfinite(jacobian).all()):
        return None
    u, s, v = decompose(jacobian)
    noise = max(jacobian.shape[1:]) * torch.finfo(jacobian.dtype).eps * s[:, :1]
    return Decomposition(u, torch.where(s > noise, s, 0.0), v)


def _tied(s: Tensor) -> Tensor:
    """Whether σ_2 is nearly σ_1 (B,), which is above 0."""
    return (s[:, 1] > TIED * s[:, 0]) if s.shape[1] > 1 else torch.zeros_like(s[:, 0], dtype=torch.bool)


def _perturbations(
    model: nn.Module, attack: Attack, radii: list[float], batch: Batch, gen: Generator
) -> dict[str, dict[float, Tensor]]:
    """The changes z (B, C, H, W) at every radius, of the attack and at random."""
    x, y = batch.x, batch.y
    made: dict[str, dict[float, Tensor]] = {ADVERSARIAL: {}, RANDOM: {}}
    for radius in radii:
        here = at_radius(attack, radius)
        made[ADVERSARIAL][radius] = craft(here, model, x, y, gen=gen) - x
        made[RANDOM][radius] = here.threat.start(x, gen) - x
    return made


def _measured(found: Decomposition, z: Tensor) -> _Seen:
    flat = z.flatten(1).double()
    size = flat.norm(dim=1, keepdim=True)
    cosines = (found.v @ (flat / size)[:, :, None])[:, :, 0].abs()  # NaN where z is zero
    real = found.s > 0
    share = torch.where(real, cosines, 0.0).norm(dim=1)
    return _Seen(torch.where(real, cosines, torch.nan), torch.where(real[:, 0], share, torch.nan))


def _quantities(
    cosines: dict[str, Floats], shares: dict[str, Floats], ties: Floats, pixels: int, seed: int
) -> list[Quantity]:
    found: list[Quantity] = []
    for way, values in cosines.items():
        found += averaged(f"alignment with the leading direction, {way}", values[:, 0], seed=seed)
    for way, values in cosines.items():
        found += averaged(f"alignment with the last direction, {way}", _last(values), seed=seed)
    for way, share in shares.items():
        found += averaged(f"share in the row space, {way}", share, seed=seed)
    found += averaged("squared cosine with the leading direction, random", cosines[RANDOM][:, 0] ** 2, seed=seed)
    found.append(Quantity("expected squared cosine of any direction", 1 / pixels, nature="exact"))
    tied, n = int(ties.sum()), len(ties)
    found.append(Quantity("images with two leading directions", tied / n, "fraction", *wilson(tied, n), n))
    return found


def _last(cosines: Floats) -> Floats:
    """The cosine (n,) with the last singular vector that has a direction, NaN where none has."""
    there = ~np.isnan(cosines)
    at = np.where(there, np.arange(cosines.shape[1]), 0).max(1)
    values: Floats = cosines[np.arange(len(cosines)), at]
    return values


def _by_rank(cosines: dict[str, Floats], pixels: int, seed: int) -> tuple[Curve, Curve]:
    rank = np.arange(1.0, 1 + cosines[ADVERSARIAL].shape[1])
    single = [band(way, rank, values, seed=seed) for way, values in cosines.items()]
    single.append(Series("any direction, expected", rank, np.full_like(rank, expected_cosine(pixels))))
    summed = []
    for way, values in cosines.items():
        length = np.sqrt(np.nancumsum(values**2, axis=1))
        summed.append(band(way, rank, np.where(np.isnan(values[:, :1]), np.nan, length), seed=seed))
    summed.append(Series("any direction, expected", rank, np.sqrt(np.minimum(rank / pixels, 1))))
    label = "rank of the singular vector"
    return (
        Curve("Alignment with the singular vectors", label, "|cosine|", tuple(single), (0.0, 1.0)),
        Curve("Share of the change in the leading directions", label, "‖V_r V_rᵀ z‖ / ‖z‖", tuple(summed), (0.0, 1.0)),
    )


def _over_radius(by_radius: dict[str, Floats], radii: list[float], threat: Threat, pixels: int, seed: int) -> Curve:
    x = np.asarray(radii)
    series = [band(way, x, values, seed=seed) for way, values in by_radius.items()]
    series.append(Series("any direction, expected", x, np.full_like(x, expected_cosine(pixels))))
    label = f"radius ε ({str(threat).partition(':')[0]}, pixels in [0, 1])"
    return Curve("Alignment with the leading direction", label, "|cosine|", tuple(series), (0.0, 1.0))


def _table(quantities: list[Quantity], why_not: str) -> Table:
    rows: list[tuple[str | float | None, ...]] = [(q.name, q.value, q.low, q.high, q.n) for q in quantities]
    if why_not:
        rows.append((f"untrained copy: {why_not}", None, None, None, None))
    return Table("Alignment in numbers", ("measure", "mean", "low", "high", "images"), tuple(rows))
