"""Hermitian matrices to tridiagonal form, compiled when first used.

LAPACK's ``zhetrd`` reads the matrix from memory for every column, and again for every few columns to change it. Here
both are one pass (as for bidiagonal form in Howell, Demmel, Fulton, Hammarling and Marmol, "Cache efficient
bidiagonalization using BLAS 2.5 operators", ACM Transactions on Mathematical Software 34, 2008).

Complex numbers are pairs of real ones. With q = (Im x, −Re x) and iv = (−Im v, Re v), pair by pair, all products are
those of real vectors, which processors multiply 4 or 8 at a time. The compiler finds that out where loops start at 0
and numbers, not rows, are assigned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

#: Columns that are read together. ``_four_columns`` names each of them.
BLOCK = 4


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for this processor, without Python's lock, and kept on disk where there is a place for it."""
    ways = {
        "nogil": True,
        "fastmath": {"reassoc", "contract", "nsz", "arcp"},
        "error_model": "numpy",
        "forceinline": True,
    }
    try:
        found: Callable[..., Any] = numba.njit(cache=True, **ways)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        found = numba.njit(**ways)(function)
    return found


@_compiled
def tridiagonal(matrix: Vector, first: int, d: Vector, e: Vector) -> None:
    """T = Q*HQ with diagonal ``d`` and ``e`` beside it, by Householder's reflections I − τxx*.

    With x = c/‖c‖ + e₁c₁/|c₁| they turn c, what column j has below the diagonal, into ‖c‖e₁, and H into H − vw* − wv*
    with v = x, y = Hx and w = τy − ½τ²(x*y)x. This is done when column j + 1 needs it, in the pass that computes its
    own y.

    Args:
        matrix: (n, 2n), n a multiple of 4. Row j holds column j of H from the diagonal on, its numbers as pairs;
            overwritten. H starts at row and column ``first``, before are zeros. Its numbers are 0, or between 1e-150
            and 1e150.
        d, e: (n,), written from ``first`` on.
    """
    n = len(matrix)
    vectors = np.zeros((10, 2 * n))
    for block in range(0, n, BLOCK):
        for j in range(block, block + BLOCK):
            for i in range(j + 1, block + BLOCK):
                matrix[i, 2 * j], matrix[i, 2 * j + 1] = matrix[j, 2 * i], -matrix[j, 2 * i + 1]
    for j in range(first, n):
        s = 2 * j
        c, x, y = matrix[j, s:], vectors[4, s:], vectors[5, s:]
        v, iv, w, iw = vectors[0, s:], vectors[1, s:], vectors[2, s:], vectors[3, s:]
        vr, vi, wr, wi = v[0], v[1], w[0], w[1]
        for i in range(len(c)):
            c[i] -= v[i] * wr - iv[i] * wi + w[i] * vr - iw[i] * vi
        d[j] = c[0]
        if j == n - 1:
            break
        c[0] = c[1] = square = 0.0
        for i in range(len(c)):
            square += c[i] * c[i]
        e[j] = norm = np.sqrt(square)
        scale = 1 / norm if norm > 0 else 0.0
        for i in range(len(c)):
            x[i] = scale * c[i]
        head = np.sqrt(x[2] * x[2] + x[3] * x[3])
        tau = 1 / (1 + head) if norm > 0 else 0.0
        x[2] += x[2] / head if head > 0 else 1.0
        x[3] += x[3] / head if head > 0 else 0.0
        _pass(matrix, (j + 1) // BLOCK * BLOCK, vectors)
        half = 0.0
        for i in range(len(x)):
            half += x[i] * y[i]
        half *= tau * tau / 2
        for i in range(len(x) // 2):
            re, im = x[2 * i], x[2 * i + 1]
            v[2 * i], v[2 * i + 1], iv[2 * i], iv[2 * i + 1] = re, im, -im, re
            re, im = tau * y[2 * i] - half * re, tau * y[2 * i + 1] - half * im
            w[2 * i], w[2 * i + 1], iw[2 * i], iw[2 * i + 1] = re, im, -im, re


@_compiled
def _pass(matrix: Vector, start: int, vectors: Vector) -> None:
    """H ← H − vw* − wv* and y = Hx from row ``start`` on, both from the columns below the diagonal alone.

    A block of columns gives its share of y's later rows by t, its product with Re x, and u, that with Im x: t + iu.
    Its own rows get the product of its conjugate with x, where ``p`` and ``q`` no longer hold the rows of the block.
    """
    s = 2 * start
    x, y, p, q, t, u = vectors[4, s:], vectors[5, s:], vectors[6, s:], vectors[7, s:], vectors[8, s:], vectors[9, s:]
    p[:] = x
    for i in range(len(q) // 2):
        q[2 * i], q[2 * i + 1] = x[2 * i + 1], -x[2 * i]
    t[:] = 0
    u[:] = 0
    factors = np.empty((BLOCK, 6))
    for j in range(start, len(matrix), BLOCK):
        s = 2 * j
        v, iv, w, iw, x, y = (
            vectors[0, s:],
            vectors[1, s:],
            vectors[2, s:],
            vectors[3, s:],
            vectors[4, s:],
            vectors[5, s:],
        )
        p, q, t, u = vectors[6, s:], vectors[7, s:], vectors[8, s:], vectors[9, s:]
        for k in range(BLOCK):
            factors[k, 0], factors[k, 1], factors[k, 2] = w[2 * k], w[2 * k + 1], v[2 * k]
            factors[k, 3], factors[k, 4], factors[k, 5] = v[2 * k + 1], x[2 * k], x[2 * k + 1]
        p[: 2 * BLOCK] = 0
        q[: 2 * BLOCK] = 0
        c0, c1, c2, c3 = matrix[j, s:], matrix[j + 1, s:], matrix[j + 2, s:], matrix[j + 3, s:]
        products = _four_columns(c0, c1, c2, c3, v, iv, w, iw, p, q, t, u, factors)
        y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7] = products
    s = 2 * start
    y, t, u = vectors[5, s:], vectors[8, s:], vectors[9, s:]
    for i in range(len(y) // 2):
        y[2 * i] += t[2 * i] - u[2 * i + 1]
        y[2 * i + 1] += t[2 * i + 1] + u[2 * i]


@_compiled
def _four_columns(
    c0: Vector,
    c1: Vector,
    c2: Vector,
    c3: Vector,
    v: Vector,
    iv: Vector,
    w: Vector,
    iw: Vector,
    p: Vector,
    q: Vector,
    t: Vector,
    u: Vector,
    factors: Vector,
) -> tuple[float, ...]:
    """Updates ``c0`` to ``c3``, t and u; c*x of each, its real and its imaginary part."""
    f0, g0, h0, l0, a0, b0 = factors[0, 0], factors[0, 1], factors[0, 2], factors[0, 3], factors[0, 4], factors[0, 5]
    f1, g1, h1, l1, a1, b1 = factors[1, 0], factors[1, 1], factors[1, 2], factors[1, 3], factors[1, 4], factors[1, 5]
    f2, g2, h2, l2, a2, b2 = factors[2, 0], factors[2, 1], factors[2, 2], factors[2, 3], factors[2, 4], factors[2, 5]
    f3, g3, h3, l3, a3, b3 = factors[3, 0], factors[3, 1], factors[3, 2], factors[3, 3], factors[3, 4], factors[3, 5]
    p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = 0.0
    for i in range(len(c0)):
        e0 = c0[i] - (v[i] * f0 - iv[i] * g0 + w[i] * h0 - iw[i] * l0)
        e1 = c1[i] - (v[i] * f1 - iv[i] * g1 + w[i] * h1 - iw[i] * l1)
        e2 = c2[i] - (v[i] * f2 - iv[i] * g2 + w[i] * h2 - iw[i] * l2)
        e3 = c3[i] - (v[i] * f3 - iv[i] * g3 + w[i] * h3 - iw[i] * l3)
        c0[i], c1[i], c2[i], c3[i] = e0, e1, e2, e3
        t[i] += e0 * a0 + e1 * a1 + e2 * a2 + e3 * a3
        u[i] += e0 * b0 + e1 * b1 + e2 * b2 + e3 * b3
        p0, p1, p2, p3 = p0 + e0 * p[i], p1 + e1 * p[i], p2 + e2 * p[i], p3 + e3 * p[i]
        q0, q1, q2, q3 = q0 + e0 * q[i], q1 + e1 * q[i], q2 + e2 * q[i], q3 + e3 * q[i]
    return p0, q0, p1, q1, p2, q2, p3, q3
