"""How far around an image the network is what its derivative says."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, craft
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.types import WEIGHT_SCALE, Attack, Invariance, Split, Subject, Threat
from robustlens.lenses.linearity_figures import Measured, reading_of
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.lenses.passes import batches, count, draw_seed, sample
from robustlens.linalg.jacobian import Linearization, jvp, krylov_method, residual
from robustlens.linalg.layers import linear_head
from robustlens.linalg.receptive import Sweep, cheapest_sweep, receptive_fields
from robustlens.linalg.regions import DUAL, bends, gradient_norms, other_pools, require_relu_regions, slopes_along
from robustlens.results.errors import InputError
from robustlens.results.reading import Outcome, Reading

#: Distances of the default, in radii of the threat.
MULTIPLES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
#: Where the Jacobian's norm is measured along the way, in radii of the threat.
NORM_AT = (0.0, 0.5, 1.0, 2.0, 4.0)
#: Values of an image up to which facet radii are measured without being asked for: they cost a pass a value.
AFFORDABLE = 1024
FACETS = 3


@dataclass(frozen=True, kw_only=True)
class LocalLinearity:
    """‖φ(x + t v) − (φ(x) + t J v)‖₂ over the distance t, J = ∂φ/∂x at x, for random and for adversarial directions v.

    φ is the logits, and the features where the model has ``features(x)`` and a linear ``head``. A random v is
    Gaussian (ℓ2, ℓ1) or a random sign per pixel (ℓ∞); an adversarial v is x_adv − x of ``attack``. Both are
    scaled to size 1 in the threat's norm, in which t is measured, and are followed past the radius and out of the box.

    Deviations are computed in a float64 copy of the model. What is below its rounding (8 · 2⁻²⁹ of what float32 does
    to φ(x), plus four units in the last place of the terms) counts as exactly linear. "float32 rounding" is where
    the same measurement in float32 would stall.

    Scaling φ by c scales deviations by |c|; the relative deviation Σ ‖deviation‖ / Σ t ‖J v‖, sums over images, stays.
    The order is the slope of log(mean deviation) in log t up to a tenth of the radius, over the distances where every
    image deviates by ten times its rounding (left out below three of them): 2 for a smooth φ. Within the facets of
    a ReLU network there is no deviation and so no order; where max-pooling windows tie, as on a black background,
    φ has no derivative and the order is 1.

    First kink: along v, the smallest −h_j / (∇h_j·v) ≥ 0 over the hidden units h_j and the differences h_j of each
    max-pooling window's entries from its largest. Facet radius: in any direction, min_j |h_j| / ‖∇h_j‖_q, q dual to the
    threat's norm; with pooling also over the ReLUs alone, as windows that tie make it 0. Both are exact for networks
    that bend in nn.ReLU, nn.LeakyReLU and max-pooling alone (upper bounds with adaptive pooling or ``ceil_mode``), and
    left out for other networks.

    Singular values come from a Krylov space of the logits' Jacobian, in the model's own precision: lower bounds, exact
    to rounding for up to ``iterations`` classes (for 100, 30 brought residuals below 1e-5), with the relative residual.

    Cost an image: 24 forward passes in float64 with the default distances, 20 passes of the attack, 15 for derivatives;
    an image of the norms 10 · (3 · min(iterations, classes) + 10); one of the facets 3 · C·H·W. mnist-cnn on one core:
    about 15 s.

    Attributes:
        n_examples: test images, a fixed random sample.
        distances: t > 0; None is twelve from 1e-5 to 4 radii of the threat. The radius is always among them.
        attack: None is PGD on the cross-entropy, 10 steps, in the subject's threat.
        n_norms: images of which singular values are computed along the way.
        iterations: products with J and with Jᵀ for each of them; no more are made than there are classes.
        n_facets: images of which the facet radius is computed; None is 3 for images of up to 1,024 values, else none.
        batch_size: images processed together.

    Raises:
        InputError: a distance ≤ 0, a number below 1 (``n_facets``: 0), a threat of radius 0.
    """

    name: ClassVar[str] = "local-linearity"
    invariances: ClassVar[frozenset[Invariance]] = WEIGHT_SCALE
    reference: ClassVar[str] = "Roth, Kilcher and Hofmann 2020, arXiv 1906.01527, §5.3, figures 2 and 4"

    n_examples: int = 80
    distances: tuple[float, ...] | None = None
    attack: Attack | None = None
    n_norms: int = 16
    iterations: int = 20
    n_facets: int | None = None
    batch_size: int = 50

    def __post_init__(self) -> None:
        for field, right, expected in (
            ("distances", self.distances is None or (self.distances and min(self.distances) > 0), "numbers > 0"),
            ("n_examples", self.n_examples >= 1, "1 or more"),
            ("n_norms", self.n_norms >= 1, "1 or more"),
            ("iterations", self.iterations >= 1, "1 or more"),
            ("n_facets", self.n_facets is None or self.n_facets >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        ):
            if not right:
                what, got = f"local-linearity {field}", str(getattr(self, field))
                raise InputError(what, expected=expected, got=got, fix="Leave it out for the default.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(n_examples=12, n_norms=4, iterations=4, n_facets=2, batch_size=5),
            cls(n_examples=6, distances=(0.01, 0.1, 1.0), n_norms=2, n_facets=0),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(n_examples=500, n_norms=100, iterations=30)

    def cost(self, subject: Subject) -> Passes:
        """At most, for one example each."""
        attack, n = self.attack or PGD(threat=subject.threat), count(subject.splits.test, self.n_examples)
        facets = 3 if self.n_facets is None else self.n_facets
        along = 10 * (3 * min(self.iterations, len(subject.splits.classes)) + 10) * self.n_norms
        columns = 3 * math.prod(subject.splits.shape) * facets
        return attack.passes * n + Passes(forward=48 * n, inputs=(30 * n + along + columns) / 2)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A linear model never deviates; ½ a ‖x‖² deviates by ½ a t² whatever the direction; a layer of ReLUs."""
        split = Split(torch.full((6, 1, 2, 2), 0.5), torch.arange(6) % 2)
        weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]])
        flat = linear_subject(weight, torch.tensor([0.0, -1.0]), train=split, test=split)
        ways = ("random", "adversarial")
        linear = {f"deviation, logits, {way}": (0.0, 1e-13) for way in ways}
        linear |= {f"share exactly linear, logits, {way}": (1.0, 0.0) for way in ways}
        linear |= {"largest singular value at the image": (5.0, 1e-5), "largest singular value, random": (5.0, 1e-5)}
        a, eps = 3.0, flat.threat.eps
        curved = Subject(_Bowl(a), flat.splits, flat.threat)
        quadratic = {f"deviation, logits, {way}": (a * eps**2 / 2, 1e-13) for way in ways}
        quadratic |= {f"order, logits, {way}": (2.0, 1e-5) for way in ways}
        quadratic |= {f"share exactly linear, logits, {way}": (0.0, 0.0) for way in ways}
        quadratic |= {"largest singular value at the image": (a, 1e-5)}  # a ‖x‖, and ‖x‖ = 1
        hidden, last = nn.Linear(4, 2), nn.Linear(2, 2)
        with torch.no_grad():
            hidden.weight.copy_(torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
            hidden.bias.copy_(torch.tensor([-3.0, 1.0]))  # units ½ and 3/2 at distances 1/10 and 3/2
            last.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        net = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last).eval()
        bent = Subject(net, flat.splits, flat.threat)
        facet = {"facet radius": (0.1, 1e-6), "largest singular value at the image": (math.sqrt(26), 1e-5)}
        quick = cls(n_examples=6)
        return [Oracle(flat, quick, linear), Oracle(curved, quick, quadratic), Oracle(bent, quick, facet)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        attack = self.attack or PGD(threat=subject.threat, steps=10, loss="ce")
        settings = describe(self) | {"threat": str(attack.threat), "attack used": describe(attack)}
        eps = attack.threat.eps
        if eps == 0:
            fix = "Give a radius; it sets the unit of the distances."
            raise InputError("local-linearity threat", expected="a radius > 0", got=str(attack.threat), fix=fix)
        distances = np.array(sorted({eps, *(self.distances or (eps * m for m in MULTIPLES))}))
        double = _copy_in(subject.model, torch.float64)
        order = sample(subject.splits.test, self.n_examples)
        problem = _problem(subject, double, order)
        if problem:
            return Reading(self.name, "No linearity was measured.", Outcome.failed(problem), settings=settings)
        try:
            measured = self._deviations(subject, attack, double, order, torch.from_numpy(distances), gen)
        except AttackBroken as error:
            return Reading(self.name, "No linearity was measured.", Outcome.failed(str(error)), settings=settings)
        if not measured.finite():
            why = "The model answers some images with numbers that are not finite."
            return Reading(self.name, "No linearity was measured.", Outcome.failed(why), settings=settings)
        self._norms(subject, attack, measured, order, gen)
        self._facets(subject, double, attack.threat, measured, order)
        return reading_of(self.name, measured, seed=draw_seed(gen), settings=settings)

    def _deviations(
        self, subject: Subject, attack: Attack, double: nn.Module, order: Tensor, distances: Tensor, gen: Generator
    ) -> Measured:
        """Deviations, linear changes and roundings of all images, and the first kink along each direction."""
        few = next(batches(subject, subject.splits.test, order, 2)).x.double()
        wide = _width(double, few)
        phi, single = _Outputs(double, wide), _Outputs(_copy_in(subject.model, torch.float32), wide)
        measured = Measured(attack.threat, distances.numpy(), phi.parts)
        measured.no_regions, measured.pools = _no_regions(double, few), other_pools(double, few)
        for batch in batches(subject, subject.splits.test, order, self.batch_size):
            x = batch.x.double()
            linear = Linearization(phi, x)
            with torch.no_grad():
                here = phi(x)
                lost = phi.split(single(batch.x.float()).double() - here)
            for part, rounding in lost.items():
                measured.rounding[part].append(rounding.norm(dim=1).cpu().numpy())
            for way, v in self._directions(subject, attack, batch.x, batch.y, gen):
                some = (v != 0).flatten(1).any(1)
                if not bool(some.any()):
                    continue
                slope = linear.jvp(v)
                found = _along(phi, x, v, here, slope, lost, distances)
                for part, arrays in found.items():
                    measured.add(way, part, [a[some].cpu().numpy() for a in arrays])
                if measured.no_regions is None:
                    measured.kinks[way].append(_first_kink(double, x[some], v[some]).cpu().numpy())
        return measured

    def _directions(
        self, subject: Subject, attack: Attack, x: Tensor, y: Tensor, gen: Generator
    ) -> Iterator[tuple[str, Tensor]]:
        """The name and the directions v (B, C, H, W) float64 of size 1 in the threat's norm, or zero."""
        threat = attack.threat
        yield "random", _unit(threat, threat.ascend(torch.empty_like(x).normal_(generator=gen)).double())
        found = craft(attack, subject.model, x, y, gen=gen)
        yield "adversarial", _unit(threat, found.double() - x.double())

    def _norms(self, subject: Subject, attack: Attack, measured: Measured, order: Tensor, gen: Generator) -> None:
        """σ_max of the logits' Jacobian (n, points) along both ways, and its residual."""
        threat, model = attack.threat, subject.model
        measured.norm_at = np.array(NORM_AT) * threat.eps
        for batch in batches(subject, subject.splits.test, order[: self.n_norms], self.batch_size):
            for way, v in self._directions(subject, attack, batch.x, batch.y, gen):
                v0 = torch.empty_like(batch.x).normal_(generator=gen)
                sigmas, residuals = [], []
                with untouched(model):
                    for t in measured.norm_at.tolist():
                        point = (batch.x.double() + t * v).to(batch.x.dtype)
                        u, w, sigma = krylov_method(model, point, v0, self.iterations)
                        sigmas.append(sigma)
                        residuals.append(residual(model, point, u, w, sigma))
                measured.sigmas[way].append(torch.stack(sigmas, 1).double().cpu().numpy())
                measured.residuals[way].append(torch.stack(residuals, 1).double().cpu().numpy())

    def _facets(self, subject: Subject, double: nn.Module, threat: Threat, measured: Measured, order: Tensor) -> None:
        """Facet radii of some images; heights in float64, gradients in the model's own precision."""
        q = DUAL[str(threat).partition(":")[0]]
        test = subject.splits.test
        wanted = (FACETS if test.images[0].numel() <= AFFORDABLE else 0) if self.n_facets is None else self.n_facets
        if measured.no_regions is not None or wanted == 0:
            return
        sweep: Sweep | None = None
        for batch in batches(subject, test, order[:wanted], 1):
            with untouched(subject.model), torch.no_grad():
                heights = _heights(double, batch.x.double())
                single = partial(_heights, subject.model)
                sweep = sweep or cheapest_sweep(receptive_fields(single, batch.x, chunk=self.batch_size))
                norms = gradient_norms(single, batch.x, q, chunk=self.batch_size, sweep=sweep)
                relus = len(bends(double, batch.x.double()).relus)
            away = [
                torch.where(size > 0, height.abs() / size.double(), torch.inf).amin(1)
                for height, size in zip(heights, norms, strict=True)
            ]
            measured.radii["facet radius"].append(torch.stack(away).amin(0).cpu().numpy())
            if len(away) > relus:
                measured.radii["facet radius, ReLUs alone"].append(torch.stack(away[:relus]).amin(0).cpu().numpy())


class _Outputs(nn.Module):
    """φ: the ``wide`` features of ``model``, if any, then the logits, in one row (B, F + K); ``parts`` says where."""

    def __init__(self, model: nn.Module, wide: int) -> None:
        super().__init__()
        self.model = model
        self.parts = {"logits": slice(wide, None)} | ({"features": slice(0, wide)} if wide else {})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor
        if "features" not in self.parts:
            logits = self.model(x)
            return logits
        model: Any = self.model
        features = model.features(x)
        return torch.cat([features, model.head(features)], 1)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        return {part: rows[:, where] for part, where in self.parts.items()}


def _width(model: nn.Module, x: Tensor) -> int:
    """How many features the logits are linear in; 0 where the model does not show them."""
    head = linear_head(model, x)
    return 0 if head is None else head.in_features


class _Bowl(nn.Module):
    """z = (½ a ‖x‖², 0)."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        height = self.a / 2 * x.flatten(1).square().sum(1)
        return torch.stack([height, torch.zeros_like(height)], 1)


def _copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode, with frozen weights of ``dtype``."""
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


def _problem(subject: Subject, double: nn.Module, order: Tensor) -> str | None:
    """Why the network cannot be measured, found out on one image."""
    (batch,) = batches(subject, subject.splits.test, order[:1], 1)
    x = batch.x.double()
    try:
        moved = jvp(_Outputs(double, _width(double, x)), x, x)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        return f"The network must run in float64 and be differentiable twice; it answers: {said}"
    return None if moved.dtype == torch.float64 else "The network turns float64 images into numbers of less precision."


def _no_regions(double: nn.Module, x: Tensor) -> str | None:
    """Why the linear regions of the network are not those of its ReLU modules."""
    try:
        require_relu_regions(double, x, "local-linearity")
    except InputError as error:
        return f"not measured: expected {error.expected}, got {error.got}"
    return None


def _unit(threat: Threat, v: Tensor) -> Tensor:
    """``v`` (B, C, H, W) scaled to size 1 in the threat's norm; zero stays zero."""
    size = threat.distance(v, torch.zeros_like(v))
    return v / torch.where(size > 0, size, 1)[:, None, None, None]


def _along(
    phi: _Outputs,
    x: Tensor,
    v: Tensor,
    here: Tensor,
    slope: Tensor,
    lost: Mapping[str, Tensor],
    distances: Tensor,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For every part of φ: deviations (B, D), ‖Jv‖ (B,) and float64's rounding (B, D) at x + t v for all t (D,).

    ``here`` is φ(x), ``slope`` J v, ``lost`` what float32 does to φ(x).
    """
    starts, slopes = phi.split(here), phi.split(slope)
    deviations: dict[str, list[Tensor]] = {part: [] for part in phi.parts}
    roundings: dict[str, list[Tensor]] = {part: [] for part in phi.parts}
    last = torch.finfo(here.dtype).eps
    for t in distances.tolist():
        with torch.no_grad():
            there = phi.split(phi(x + t * v))
        for part, value in there.items():
            start, straight = starts[part], t * slopes[part]
            deviations[part].append((value - (start + straight)).norm(dim=1))
            terms = value.norm(dim=1) + start.norm(dim=1) + straight.norm(dim=1)
            roundings[part].append(8 * 2.0**-29 * lost[part].norm(dim=1) + 4 * last * terms)
    return {
        part: (torch.stack(deviations[part], 1), slopes[part].norm(dim=1), torch.stack(roundings[part], 1))
        for part in phi.parts
    }


def _heights(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What is 0 where ``model`` bends, those of its ReLUs first."""
    found = bends(model, x)
    return [*found.relus, *found.windows]


def _first_kink(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """The smallest t ≥ 0 (B,) at which a height's linear continuation along ``v`` is 0; ∞ where there is none."""
    layers, changes = slopes_along(lambda z: _heights(model, z), x, v)
    height, change = torch.cat(layers, 1), torch.cat(changes, 1)
    t = torch.where(change != 0, -height / change, torch.inf)
    return torch.where(t >= 0, t, torch.inf).amin(1)
