"""Eigenvalues, trace and density of a symmetric matrix H (d, d) that is known by its products v ↦ Hv alone.

Lanczos' method keeps an orthonormal basis V of span(v, Hv, H²v, …) and reads eigenvalues off the small matrix VᵀHV.
In floating point V loses its orthogonality once an eigenvalue has converged, and copies of it ("ghosts") appear that
H does not have. Here every new vector is made orthogonal to the whole basis, twice (Parlett, The Symmetric Eigenvalue
Problem, §6.9: twice is enough), and ‖VᵀV − I‖ is reported.

Vectors are flat, on the device and in the precision of ``like``; small matrices are float64 on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from robustlens.results.errors import InputError

#: v (d,) ↦ Hv (d,), linear and symmetric.
Operator = Callable[[Tensor], Tensor]

#: "algebraic" asks for the largest eigenvalues, "magnitude" for those of largest |λ|.
Which = Literal["algebraic", "magnitude"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """The leading eigenvalues, and what shows that they are the leading ones.

    Attributes:
        values: (k,) float64, leading one first.
        vectors: (k, d), orthonormal rows.
        residuals: (k,) ‖Hv − λv‖ / |λ| from a fresh product: an eigenvalue of H lies within this relative distance of
            λ. For a λ that is within rounding of 0, relative to the largest |λ|.
        converged: every residual is within the tolerance and the second start found nothing more.
        second: the leading value that a second random start sees orthogonal to ``vectors``; None where k = d.
        missed: eigenvalues that the first start had missed and the second one found.
        density: the distribution of all d eigenvalues: these k as they are, and the rest as the second start saw it.
        basis: (m, d), orthonormal rows, of the first start.
        inside: the trace of H within the span of ``basis``.
        orthogonality: ‖VᵀV − I‖₂ of that basis.
        products: how often H was applied.
        verifying: how many of these went into second starts.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    second: float | None
    missed: int
    density: Density
    basis: Tensor
    inside: float
    orthogonality: float
    products: int
    verifying: int


def eigenpairs(
    apply: Operator,
    like: Tensor,
    k: int,
    *,
    gen: Generator,
    which: Which = "algebraic",
    tolerance: float = 1e-3,
    steps: int | None = None,
    restarts: int = 10,
) -> Eigenpairs:
    """The k leading eigenpairs of H by Lanczos with two-pass full reorthogonalisation and thick restarts.

    The basis stops growing once the k best Ritz pairs are within the tolerance, by the norm that is left over in every
    step. A restart keeps the best Ritz vectors and goes on from the direction in which all of them err (Wu & Simon
    2000, SIAM J. Matrix Anal. Appl. 22, 602–616), until ‖Hv − λv‖ ≤ tolerance · |λ| for the k best. Then a second
    random start, orthogonal to what was found, takes 22 steps: an eigenvalue that comes before the k-th one was missed,
    and takes its place. This is also how copies of a multiple eigenvalue are found, of which one start sees one.

    Costs at most ``steps`` products, about ⅔ · ``steps`` for each restart, k for the residuals and 22 for the second
    start; memory for (steps + 1) · d numbers.

    Args:
        like: (d,), tells size, precision and device.
        k: at most d are returned.
        steps: size m of the basis, at least 2k + 20, which None takes.

    Raises:
        InputError: k < 1, or too few steps.
    """
    if k < 1:
        raise InputError("eigenvalues", expected="at least 1", got=str(k), fix="Raise the number.")
    k = min(k, len(like))
    if steps is not None and steps < 2 * k + 20:
        raise InputError("Lanczos steps", expected=f"at least {2 * k + 20}", got=str(steps), fix="Raise them.")
    first = _Krylov(apply, like, steps or 2 * k + 20, gen)
    first.climb(k, which, tolerance / 2, restarts)
    vectors = first.ritz_vectors(k, which)
    values, residuals = _checked(apply, vectors)
    products, missed, second, complete = first.products + k, 0, None, True
    rest = []
    for _ in range(k if k < len(like) else 0):
        other = _Krylov(apply, like, 22, gen, locked=vectors)
        other.grow(0)
        second = float(other.ritz(which)[0][0])
        rest = [other.quadrature()]
        complete = not _precedes(second, values, which, tolerance)
        if not complete:
            other.climb(1, which, tolerance / 2, restarts)
            more = torch.cat([vectors, other.ritz_vectors(1, which)])
            values, residuals = _checked(apply, more)
            best = _order(values, which)[:k]
            vectors, values, residuals, missed = more[best], values[best], residuals[best], missed + 1
            products += k + 1
        products += other.products
        if complete:
            break
    converged = complete and bool((residuals <= tolerance).all())
    basis, inside = first.basis[: first.size], float(first.small.trace())
    return Eigenpairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        converged=converged,
        second=second,
        missed=missed,
        density=_mixed(values, rest, len(like)),
        basis=basis,
        inside=inside,
        orthogonality=orthogonality(basis),
        products=products,
        verifying=products - first.products - k,
    )


def orthogonality(rows: Tensor) -> float:
    """‖VᵀV − I‖₂ for the rows V (m, d), in float64."""
    gram = rows.double() @ rows.double().T
    return float(torch.linalg.matrix_norm(gram - torch.eye(len(rows), dtype=gram.dtype, device=gram.device), ord=2))


@dataclass(frozen=True, eq=False)
class Density:
    """Point masses that stand for the d eigenvalues: ``nodes`` (N,) float64 and ``masses`` (N,), which add up to 1."""

    nodes: Tensor
    masses: Tensor

    def smooth(self, grid: Tensor, bandwidth: float) -> Tensor:
        """The density (G,) at ``grid`` (G,): each mass spread as a Gaussian of standard deviation ``bandwidth``."""
        scaled = (grid[:, None] - self.nodes) / bandwidth
        return (-0.5 * scaled.square()).exp() @ self.masses / (bandwidth * math.sqrt(2 * math.pi))


def density(apply: Operator, like: Tensor, *, probes: int, steps: int, gen: Generator) -> Density:
    """The distribution of H's eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    The Ritz values θ_j of ``steps`` Lanczos steps from a random unit vector, with the squares of the first components
    of their small eigenvectors as masses, are a Gauss quadrature of that vector's spectral measure: moments up to
    2 · steps − 1 are exact, and their mean over the starts is d⁻¹ tr(Hⁿ). Costs probes · steps products. The variance
    between starts falls as 1/d; ``eigenpairs`` gives one start's for nothing.
    """
    runs = [_Krylov(apply, like, steps, gen) for _ in range(probes)]
    for run in runs:
        run.grow(0)
    return _mixed(like.new_zeros(0, dtype=torch.float64), [run.quadrature() for run in runs], len(like))


def _mixed(values: Tensor, rest: list[tuple[Tensor, Tensor]], d: int) -> Density:
    """Mass 1/d on each of ``values``, and what is left in equal shares on the quadratures of ``rest``."""
    left = (1 - len(values) / d) / max(len(rest), 1)
    nodes = torch.cat([values, *(n for n, _ in rest)])
    return Density(nodes, torch.cat([torch.full_like(values, 1 / d), *(left * m for _, m in rest)]))


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace, its standard error, and the number of random vectors behind that."""

    value: float
    error: float
    probes: int


def trace(apply: Operator, like: Tensor, *, probes: int, gen: Generator, known: Eigenpairs | None = None) -> Trace:
    """tr H = tr(QᵀHQ) + tr((I − QQᵀ) H (I − QQᵀ)) by Hutch++ (Meyer, Musco, Musco & Woodruff 2021, Algorithm 1).

    The first part is exact, the second the mean of zᵀHz over random signs z outside Q, whose standard error is given
    (0 where Q is everything). Q spans HS for ``probes`` random signs S, or is the Lanczos basis of ``known``, which
    saves 2 · probes of the 3 · probes products.

    Raises:
        InputError: fewer than 2 probes, which leave the error unknown.
    """
    if probes < 2:
        raise InputError("trace probes", expected="at least 2", got=str(probes), fix="Raise them.")
    if known is None:
        signs = [_signs(like, gen) for _ in range(min(probes, len(like)))]
        q = torch.linalg.qr(torch.stack([apply(s) for s in signs], 1)).Q.T.contiguous()
        inside = sum(float((row @ apply(row)).double()) for row in q)
    else:
        q, inside = known.basis, known.inside
    if len(q) == len(like):
        return Trace(inside, 0.0, probes)
    found = []
    for _ in range(probes):
        z = _signs(like, gen)
        for _ in range(2):
            z = z - q.T @ (q @ z)
        found.append((z @ apply(z)).double())
    outside = torch.stack(found)
    return Trace(inside + float(outside.mean()), float(outside.std()) / math.sqrt(probes), probes)


class _Krylov:
    """``size`` rows V of ``basis`` with small = V H Vᵀ and HVᵀ = Vᵀ small + edge · next eᵀ; the row after is ``next``.

    With ``locked`` (l, d), orthonormal, everything happens in its orthogonal complement.
    """

    def __init__(self, apply: Operator, like: Tensor, size: int, gen: Generator, *, locked: Tensor | None = None):
        self.room = len(like) - (0 if locked is None else len(locked))
        self.most, self.size = min(size, self.room), 0
        self.basis = like.new_zeros(self.most + 1, len(like))
        self._small = torch.zeros(self.most, self.most, dtype=torch.float64, device=like.device)
        self.edge, self.reach, self.products = 0.0, 0.0, 0
        self._apply, self._gen, self._locked = apply, gen, locked
        self._restart(0)

    def grow(self, start: int, enough: Callable[[], bool] = lambda: False) -> None:
        """Fill the basis from row ``start`` on, which holds its vector already, or until ``enough``."""
        for j in range(start, self.most):
            image = self._apply(self.basis[j])
            self.products += 1
            self.reach = max(self.reach, float(image.norm()))
            image, along = self._orthogonal(image, j + 1)
            self._small[: j + 1, j] = along
            self._small[j, : j + 1] = along
            self.edge = float(image.norm())
            if j + 1 == self.room:
                self.edge = 0.0
            elif self.edge <= 10 * torch.finfo(image.dtype).eps * self.reach:
                self.edge = 0.0  # the space is invariant: go on in another direction
                self._restart(j + 1)
            else:
                self.basis[j + 1] = image / self.edge
            self.size = j + 1
            if enough():
                return

    def climb(self, k: int, which: Which, tolerance: float, restarts: int) -> None:
        """Grow, and restart until the k leading Ritz pairs are within ``tolerance``; k < most."""

        def enough() -> bool:
            return self.size >= 2 * k + 6 and self.edge > 0 and self._within(k, which, tolerance)

        if self.products == 0:
            self.grow(0, enough)
        for _ in range(restarts):
            if self.size == self.room or self._within(k, which, tolerance):
                return
            values, small = self.ritz(which)
            keep = k + (self.size - k) // 3
            self.basis[:keep] = small[:, :keep].T.to(self.basis.dtype) @ self.basis[: self.size]
            self.basis[keep] = self.basis[self.size]
            self._small.zero_()
            self._small.diagonal()[:keep] = values[:keep]
            self.grow(keep, enough)

    def _within(self, k: int, which: Which, tolerance: float) -> bool:
        """Whether the k leading Ritz pairs have that relative residual, by what the last step left over."""
        values, small = self.ritz(which)
        error = self.edge * small[-1, :k].abs()
        rounding = 10 * torch.finfo(self.basis.dtype).eps * self.reach
        return bool((error <= tolerance * values[:k].abs() + rounding).all())

    @property
    def small(self) -> Tensor:
        """V H Vᵀ (size, size)."""
        return self._small[: self.size, : self.size]

    def ritz(self, which: Which) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) of the small matrix, leading one first, and its eigenvectors (m, m) as columns."""
        values, small = torch.linalg.eigh(self.small)
        order = _order(values, which)
        return values[order], small[:, order]

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and masses (m,) of the spectral measure of the start, as long as there was no restart."""
        values, small = torch.linalg.eigh(self.small)
        return values, small[0].square()

    def ritz_vectors(self, k: int, which: Which) -> Tensor:
        found = self.ritz(which)[1][:, :k].T.to(self.basis.dtype) @ self.basis[: self.size]
        unit: Tensor = found / found.norm(dim=1, keepdim=True)
        return unit

    def _orthogonal(self, vector: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """What is left of ``vector`` outside the first ``rows`` (and ``locked``), and its components along them."""
        along = torch.zeros(rows, dtype=torch.float64, device=vector.device)
        for _ in range(2):
            if self._locked is not None:
                vector = vector - self._locked.T @ (self._locked @ vector)
            part = self.basis[:rows] @ vector
            vector = vector - self.basis[:rows].T @ part
            along += part.double()
        return vector, along

    def _restart(self, row: int) -> None:
        vector = torch.randn(self.basis.shape[1], generator=self._gen, device=self._gen.device).to(self.basis)
        vector, _ = self._orthogonal(vector, row)
        self.basis[row] = vector / vector.norm()


def _order(values: Tensor, which: Which) -> Tensor:
    return (values if which == "algebraic" else values.abs()).argsort(descending=True, stable=True)


def _precedes(value: float, values: Tensor, which: Which, tolerance: float) -> bool:
    """Whether ``value`` clearly belongs before the last of ``values``."""
    last = float(values[-1])
    gain = value - last if which == "algebraic" else abs(value) - abs(last)
    return gain > tolerance * abs(last) + 1e-5 * float(values.abs().max())


def _checked(apply: Operator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients (k,) of unit vectors (k, d) and their relative residuals (k,), from fresh products."""
    values, errors = [], []
    for v in vectors:
        image = apply(v)
        value = (v.double() @ image.double()) / v.double().square().sum()
        values.append(value)
        errors.append((image.double() - value * v.double()).norm())
    found, error = torch.stack(values), torch.stack(errors)
    largest = found.abs().max()
    zero = found.abs() <= 1e3 * torch.finfo(vectors.dtype).eps * largest
    scale = torch.where(zero, largest, found.abs())
    return found, torch.where(error == 0, error, error / scale.clamp_min(torch.finfo(torch.float64).tiny))


def _signs(like: Tensor, gen: Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=gen, device=gen.device).to(like).mul_(2).sub_(1)
