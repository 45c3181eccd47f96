"""How sharply the loss bends in the weights: leading eigenvalues, trace and density of its Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Generator, Tensor

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import AttackBroken, craft
from robustlens.core.discovery import describe
from robustlens.core.modes import untouched
from robustlens.core.passes import Passes
from robustlens.core.types import Attack, Split, Splits, Subject
from robustlens.lenses.inner_maximum import FollowingHessian, reattacked_product
from robustlens.lenses.oracle import Oracle
from robustlens.lenses.passes import batches, count, draw_seed, sample
from robustlens.lenses.robust_logistic import OneRow, logistic_row, robust_logistic_hessian
from robustlens.linalg.hessian import LossHessian, Weights, filter_norms, flat, require_curvature, weights
from robustlens.linalg.lanczos import Eigenpairs, Operator, Trace, Which, eigenpairs, trace
from robustlens.results.errors import InputError, require_at_least
from robustlens.results.panels import Curve, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

Full = Literal["auto", "implicit", "difference", "off"]
CLEAN, FROZEN, FULL = "clean", "adversarial, frozen", "adversarial, full"

#: "auto" solves for the adversary's answer up to this many weights.
SMALL = 20_000

#: The density's Gaussians, relative to the range of the eigenvalues.
BANDWIDTH = 0.01


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """The k largest eigenvalues of ∇²_w L at the trained weights, for L the mean cross-entropy over n examples:

        clean                 L = (1/N) Σ ℓ(w, x_i)
        adversarial, frozen   L = (1/N) Σ ℓ(w, x_i + δ_i) with the attack's δ_i held fixed
        adversarial, full     L = (1/N) Σ max_δ ℓ(w, x_i + δ), with δ following the weights

    Frozen has the right gradient (Danskin) but not the whole Hessian: the full one adds −ℓ_wδ ℓ_δδ⁻¹ ℓ_δw on what the
    threat leaves δ free to do. They agree for an ℓ∞ adversary in the corners of its ball and differ for ℓ2. Table and
    names say which is which. Where the full one is not solved for, its curvature along the sharpest frozen direction is
    measured by running the attack again at weights moved both ways: a finite difference, and with an exact attack a
    lower bound of the largest full eigenvalue.

    Every eigenvalue has its recomputed residual ‖Hv − λv‖ / |λ|; a second random start looks for what the first missed.
    The trace (Hutch++) has a standard error, from which its interval comes (Student's t), and the density (stochastic
    Lanczos quadrature) is smoothed by Gaussians of 1 % of its range. Eigenvalues are those of these n examples.

    Eigenvalues change when one layer is multiplied by c and the next divided by c, which changes no answer. So each is
    also given in filter-normalised coordinates, where that drops out; biases stay fixed there.

    For one row of weights without bias (``logistic``) the exact matrix without the pixel box stands beside them, with
    the prediction ε / (2‖w‖₂) of Yamada et al., equation 9. That assumes every example at its own optimum (s = ½,
    s the adversarial probability of the wrong class); mean s says how far that is from true.

    Costs about 170 Hessian-vector products of n examples, each about two forward and backward passes: 10 seconds for
    ``lenet-small``, about eight times as much for ``mnist-cnn``. In memory about 2 · (2k + 21) vectors of weights, and
    the graphs of two batches. ``full = "implicit"`` costs about ten times as much.

    Attributes:
        k: number of eigenvalues.
        n_examples: examples of the training split (of the test split where there is none); None takes all.
        attack: None is PGD on the cross-entropy with 20 steps in the subject's threat, for one row of weights the
            exact adversary.
        full: "implicit" solves for the adversary's answer (ℓ2 and ℓ∞), "difference" measures one direction by
            attacking again, "off" leaves it out; "auto" is implicit up to 20,000 weights.
        which: "algebraic" or "magnitude", which also sees sharp directions of descent.
        tolerance: of the residuals.
        restarts: of Lanczos, at most.
        probes: random vectors of the trace.
        batch_size: examples of a pass. While they all fit into one, its graph is kept.

    Raises:
        InputError: a network without second derivatives, or fields that make no sense.
    """

    name: ClassVar[str] = "hessian"
    reference: ClassVar[str] = "Yamada et al. 2021, arXiv 2102.02950, §3 and eq. 9"

    k: int = 3
    n_examples: int | None = 128
    attack: Attack | None = None
    full: Full = "auto"
    which: Which = "algebraic"
    tolerance: float = 1e-3
    restarts: int = 4
    probes: int = 8
    batch_size: int = 128

    def __post_init__(self) -> None:
        require_at_least(self, k=1, restarts=0, probes=2, batch_size=1)
        if not 0 < self.tolerance < 1:
            raise InputError(
                "hessian tolerance", expected="between 0 and 1", got=str(self.tolerance), fix="Leave it out for 1e-3."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        quick = PGD(threat=Lp("l2", 0.5), steps=3)
        return [
            cls(k=1, n_examples=8, attack=quick, full="difference", restarts=1),
            cls(k=2, n_examples=6, attack=quick, full="off", which="magnitude", restarts=0),
        ]

    @classmethod
    def thorough(cls) -> Self:
        """What a thorough look takes."""
        return cls(k=5, n_examples=1000, probes=20)

    def cost(self, subject: Subject) -> Passes:
        """About, for one example each; without ``full = "implicit"``, which has as much again ten times."""
        split = subject.splits.train if len(subject.splits.train) else subject.splits.test
        attack, n = self.attack or PGD(threat=subject.threat, steps=20), count(split, self.n_examples)
        products = 170 * n
        return attack.passes * (3 * n) + Passes(weights=products, double=products)

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """One row of weights and the exact ℓ2 adversary, on images that no eps takes out of the box."""
        draw = Generator().manual_seed(1)
        x, y = 0.3 + 0.4 * torch.rand(6, 1, 2, 2, generator=draw), torch.arange(6) % 2
        w, threat = torch.tensor([1.5, -2.0, 0.5, 1.0]), Lp("l2", 0.2)
        split = Split(x, y)
        subject = Subject(OneRow(w), Splits("oracle", split, split, split, ("0", "1")), threat)
        full, s = robust_logistic_hessian(w, x, y, threat)
        clean, _ = robust_logistic_hessian(w, x, y, Lp("l2", 0.0))
        unit = w.double() / w.double().norm()
        bend = s.mean() * threat.eps / w.double().norm() * (torch.eye(4, dtype=torch.float64) - torch.outer(unit, unit))
        expected: dict[str, tuple[float, float]] = {}
        for label, matrix in ((CLEAN, clean), (FROZEN, full - bend), (FULL, full)):
            values = torch.linalg.eigvalsh(matrix)
            expected[f"leading eigenvalue, {label}"] = (float(values[-1]), 1e-5)
            expected[f"eigenvalue 3, {label}"] = (float(values[-3]), 1e-5)
            expected[f"trace, {label}"] = (float(values.sum()), 1e-5)
        expected["ε / (2‖w‖), equation 9"] = (0.2 / (2 * math.sqrt(7.5)), 1e-7)
        return [Oracle(subject, cls(batch_size=4), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        model, at, threat = subject.model, weights(subject.model), subject.threat
        split = subject.splits.train if len(subject.splits.train) else subject.splits.test
        x, y = _examples(subject, split, self.n_examples, self.batch_size, flat(at.values()).dtype)
        with untouched(model):
            clean = LossHessian(model, at, x, y, chunk=self.batch_size)
            if not math.isfinite(clean.value()):
                return self._failed("The loss of some images is not a finite number.")
            row = logistic_row(model, at, x)
            default = PGD(threat=threat, steps=20) if row is None else LinearExact(threat=threat)
            attack = self.attack or default
            full = self._chosen(attack, at)
            require_curvature(model, at, x[:4], y[:4], self.name, image=full == "implicit")
            try:
                parts = zip(torch.split(x, self.batch_size), torch.split(y, self.batch_size), strict=True)
                x_adv = torch.cat([craft(attack, model, a, b, gen=gen) for a, b in parts])
            except AttackBroken as error:
                return self._failed(str(error))
            frozen = LossHessian(model, at, x_adv, y, chunk=self.batch_size)
            views = [self._view(CLEAN, clean, at, gen), self._view(FROZEN, frozen, at, gen)]
            extra: list[Quantity] = []
            if full == "implicit" and isinstance(attack.threat, Lp):
                following = FollowingHessian(model, at, x, x_adv, y, attack.threat, chunk=self.batch_size)
                views.append(self._view(FULL, following, at, gen))
                share = Quantity("share without a strict inner maximum", following.loose, "fraction", n=len(y))
                extra.append(share)
            if full != "off":
                v = views[-1].pairs.vectors[0]
                seed, chunk = draw_seed(gen), self.batch_size
                bent = reattacked_product(model, at, x, y, attack, v, chunk=chunk, seed=seed)
                name = f"curvature along the leading direction ({views[-1].label}), attacking again"
                extra.append(Quantity(name, float(v @ bent), n=len(y)))
        if row is not None and isinstance(attack.threat, Lp) and attack.threat.norm != "l1":
            extra += _logistic(row, x, y, attack.threat)
        return Reading(
            lens=self.name,
            says=_sentence(views, len(y)),
            outcome=self._outcome(views),
            quantities=(*(q for view in views for q in view.quantities(len(y))), *extra),
            headline=tuple(f"leading eigenvalue, {view.label}" for view in views),
            panels=(_density(views), _table(views), _evidence(views, extra)),
            settings=describe(self) | {"attack used": describe(attack), "full used": full},
        )

    def _chosen(self, attack: Attack, at: Weights) -> Full:
        """How the full Hessian is seen for this attack and these weights."""
        threat = attack.threat
        solvable = isinstance(threat, Lp) and threat.norm != "l1"
        if self.full == "implicit" and not solvable:
            got = str(threat)
            raise InputError("hessian full", expected="an l2 or linf threat", got=got, fix='Set full = "difference".')
        if self.full == "auto":
            return "implicit" if solvable and len(flat(at.values())) <= SMALL else "difference"
        return self.full

    def _view(self, label: str, apply: Operator, at: Weights, gen: Generator) -> View:
        like, norms = torch.zeros_like(flat(at.values())), filter_norms(at)

        def found(operator: Operator) -> Eigenpairs:
            return eigenpairs(
                operator, like, self.k, gen=gen, which=self.which, tolerance=self.tolerance, restarts=self.restarts
            )

        pairs, scaled = found(apply), found(lambda v: norms * apply(norms * v))
        tr = trace(apply, like, probes=self.probes, gen=gen, known=pairs)
        return View(label, pairs, scaled, tr)

    def _outcome(self, views: list[View]) -> Outcome:
        open_ends = [
            f"{view.label}{suffix}"
            for view in views
            for pairs, suffix in ((view.pairs, ""), (view.scaled, " (filter-normalised)"))
            if not pairs.converged
        ]
        if not open_ends:
            return Outcome()
        return Outcome.unreliable(
            f"Some eigenvalues have not settled to {self.tolerance:g} ({'; '.join(open_ends)}); their residuals say "
            "how far they may be off. Raise restarts."
        )

    def _failed(self, why: str) -> Reading:
        return Reading(self.name, "No eigenvalue was measured.", Outcome.failed(why), settings=describe(self))


class View(NamedTuple):
    """What was found about one Hessian; ``scaled`` in filter-normalised coordinates."""

    label: str
    pairs: Eigenpairs
    scaled: Eigenpairs
    trace: Trace

    def quantities(self, n: int) -> list[Quantity]:
        found = []
        for pairs, suffix in ((self.pairs, ""), (self.scaled, ", filter-normalised")):
            for i, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)):
                name = f"{f'eigenvalue {i + 1}' if i else 'leading eigenvalue'}, {self.label}{suffix}"
                found.append(Quantity(name, value, n=n, residual=residual))
        reach = float(stdtrit(self.trace.probes - 1, 0.975)) * self.trace.error
        tr = self.trace.value
        found.append(Quantity(f"trace, {self.label}", tr, low=tr - reach, high=tr + reach, n=self.trace.probes))
        return found


def _examples(
    subject: Subject, split: Split, n: int | None, size: int, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = list(batches(subject, split, sample(split, n), size))
    return torch.cat([b.x for b in found]).to(precision), torch.cat([b.y for b in found])


def _logistic(w: Tensor, x: Tensor, y: Tensor, threat: Lp) -> list[Quantity]:
    n, found = len(y), []
    if len(w) <= 4096:
        matrix, s = robust_logistic_hessian(w, x, y, threat)
        values = torch.linalg.eigvalsh(matrix)
        found += [
            Quantity("leading eigenvalue, closed form without the box", float(values[-1]), n=n, nature="exact"),
            Quantity("trace, closed form without the box", float(values.sum()), n=n, nature="exact"),
            Quantity("mean s, adversary without the box", float(s.mean()), n=n, nature="exact"),
        ]
    if threat.norm == "l2":
        found.append(Quantity("ε / (2‖w‖), equation 9", threat.eps / (2 * float(w.double().norm())), n=n))
    return found


def _sentence(views: list[View], n: int) -> str:
    first = {view.label: float(view.pairs.values[0]) for view in views}
    said = (
        f"Along its sharpest direction the loss of {n} images bends by {first[CLEAN]:.3g}, and that of the attacked "
        f"images by {first[FROZEN]:.3g} with the adversary frozen"
    )
    return f"{said}, by {first[FULL]:.3g} with an adversary that follows the weights." if FULL in first else f"{said}."


def _density(views: list[View], points: int = 400) -> Curve:
    nodes = torch.cat([view.pairs.density.nodes for view in views])
    low, high = float(nodes.min()), float(nodes.max())
    span = high - low or abs(high) or 1.0
    grid = torch.linspace(low - 0.05 * span, high + 0.05 * span, points, dtype=torch.float64, device=nodes.device)
    curves = []
    for view in views:
        y = view.pairs.density.smooth(grid, BANDWIDTH * span).cpu().numpy()
        curves.append(Series(view.label, grid.cpu().numpy(), np.maximum(y, 1e-8 * y.max())))
    label = f"density (bandwidth {BANDWIDTH:.0%} of the range)"
    return Curve("Density of the Hessian's eigenvalues", "eigenvalue", label, tuple(curves), log_y=True)


def _table(views: list[View]) -> Table:
    header = ("loss", "rank", "eigenvalue", "residual", "filter-normalised", "residual, filter-normalised")
    rows: list[tuple[str | float | None, ...]] = []
    for view in views:
        columns = (view.pairs.values, view.pairs.residuals, view.scaled.values, view.scaled.residuals)
        ranked = zip(*(column.tolist() for column in columns), strict=True)
        rows += [(view.label, i, *numbers) for i, numbers in enumerate(ranked, 1)]
    return Table("Leading eigenvalues of the Hessian", header, tuple(rows))


def _evidence(views: list[View], extra: list[Quantity]) -> Table:
    """What backs the eigenvalues: one column a loss, and what else was measured in the last rows."""

    def line(name: str, values: Mapping[str, float | None]) -> tuple[str | float | None, ...]:
        return (name, *(values.get(view.label) for view in views))

    rows = [
        line("basis: ‖VᵀV − I‖", {v.label: v.pairs.orthogonality for v in views}),
        line("leading value of a second start beside them", {v.label: v.pairs.second for v in views}),
        line("eigenvalues that the first start missed", {v.label: v.pairs.missed for v in views}),
        line("Hessian-vector products", {v.label: v.pairs.products + v.scaled.products for v in views}),
        line("standard error of the trace", {v.label: v.trace.error for v in views}),
    ]
    rows += [(q.name, *[None] * (len(views) - 1), q.value) for q in extra]
    return Table("How the eigenvalues were found", ("evidence", *(view.label for view in views)), tuple(rows))
