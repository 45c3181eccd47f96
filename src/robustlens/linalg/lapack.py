"""Eigenvalues of the Gram matrices of many small matrices, by BLAS and LAPACK without their wrappers.

SciPy publishes where their routines are (``scipy.linalg.cython_blas`` and ``cython_lapack``). ``ctypes`` calls them
without Python's lock, so that workers run side by side. NumPy's and SciPy's wrappers copy and scale every matrix, and
SciPy's hold the lock.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import byref, c_char, c_double, c_int
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack

#: Columns that are brought to tridiagonal form at a time. LAPACK's own 32 take up to a tenth longer below 512 rows.
COLUMNS = 8


def gram_eigenvalues(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """Eigenvalues of A·A* or A*·A, whichever is smaller, for each A of ``matrices``.

    Args:
        matrices: (F, r, c), float64 or complex128, contiguous, r and c at least 1.

    Returns:
        (F, min(r, c)), ascending. Rounding may make the smallest negative.

    Raises:
        numpy.linalg.LinAlgError: a matrix holds NaN or infinity.
    """
    number, rows, columns = matrices.shape
    n = min(rows, columns)
    herk, hetrd, sterf = _routines("d" if matrices.dtype == np.float64 else "z")
    values, beside = np.empty((number, n)), np.empty(n)
    gram, scales, work = (np.empty(size, matrices.dtype) for size in (n * n, n, COLUMNS * n))
    # LAPACK counts along columns, so it sees each matrix's transpose; its Gram matrix is the conjugate of ours.
    lower, turned = byref(c_char(b"L")), byref(c_char(b"N" if columns <= rows else b"C"))
    order, inner, step = byref(c_int(n)), byref(c_int(max(rows, columns))), byref(c_int(columns))
    one, zero, length, told = byref(c_double(1)), byref(c_double(0)), byref(c_int(len(work))), c_int()
    here, e, tau, space = (array.ctypes.data for array in (gram, beside, scales, work))
    first, found = matrices.ctypes.data, values.ctypes.data
    for at in range(number):
        a, d = first + at * matrices.strides[0], found + at * values.strides[0]
        herk(lower, turned, order, inner, one, a, step, zero, here, order)
        hetrd(lower, order, here, order, d, e, tau, space, length, byref(told))
        sterf(order, d, e, byref(told))
        if told.value or not math.isfinite(values[at, -1]):
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return values


@cache
def _routines(kind: str) -> tuple[Callable[..., None], ...]:
    """C = A·A* or A*·A; C = Q·T·Q* with T tridiagonal; the eigenvalues of T: of real ("d") or complex ("z") numbers."""
    product, reduction = ("syrk", "sytrd") if kind == "d" else ("herk", "hetrd")
    return (
        _routine(cython_blas, kind + product, 10),
        _routine(cython_lapack, kind + reduction, 10),
        _routine(cython_lapack, "dsterf", 4),
    )


def _routine(module: ModuleType, name: str, arguments: int) -> Callable[..., None]:
    """The routine whose address ``module`` publishes, with ``arguments`` pointers as its arguments."""
    called = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    capsule = module.__pyx_capi__[name]
    address = pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, called(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)
