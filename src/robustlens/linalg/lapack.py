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
    n, kind = min(rows, columns), "d" if matrices.dtype == np.float64 else "z"
    herk, hetrd, sterf = _routines(kind)
    compiled = _tridiagonal() if kind == "z" else None
    before = -n % 4  # of the rows and columns that ``compiled`` takes
    order = before + n
    values, d, e = np.empty((number, n)), np.empty(order), np.empty(order)
    gram = np.zeros((order, order), matrices.dtype)
    scales, work = np.empty(n, matrices.dtype), np.empty(COLUMNS * n, matrices.dtype)
    # LAPACK counts along columns, so it sees each matrix's transpose; its Gram matrix is the conjugate of ours.
    lower, turned = byref(c_char(b"L")), byref(c_char(b"N" if columns <= rows else b"C"))
    size, apart, inner, step = (byref(c_int(k)) for k in (n, order, max(rows, columns), columns))
    one, zero, length, told = byref(c_double(1)), byref(c_double(0)), byref(c_int(len(work))), c_int()
    tau, space = scales.ctypes.data, work.ctypes.data
    here, along, beside = (array.ctypes.data for array in (gram[before:, before:], d[before:], e[before:]))
    for at in range(number):
        herk(lower, turned, size, inner, one, matrices[at].ctypes.data, step, zero, here, apart)
        if compiled is not None:
            compiled(gram.view(np.float64), before, d, e)
        else:
            hetrd(lower, size, here, apart, along, beside, tau, space, length, byref(told))
        sterf(size, along, beside, byref(told))
        values[at] = d[before:]
        if told.value or not math.isfinite(values[at, -1]):
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return values


@cache
def _tridiagonal() -> Callable[..., None] | None:
    """What takes the place of ``zhetrd``, if numba goes with the NumPy that is installed."""
    try:
        from robustlens.linalg.tridiagonal import tridiagonal
    except ImportError:
        return None
    return tridiagonal


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
