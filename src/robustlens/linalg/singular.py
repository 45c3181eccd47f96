"""Singular values of many matrices at once, on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from robustlens.linalg.lapack import gram_eigenvalues

Result = TypeVar("Result")

#: Where λ_min < STEEP·λ_max for the Gram matrix of A, singular values come from A itself.
STEEP = 1e-8
#: Matrices of fewer rows or columns take longer to call than to decompose.
SMALL = 24


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values (…, min(r, c)) of ``matrices`` (…, r, c), float64 or complex128, ascending.

    Eigenvalues λ of the smaller Gram side give √λ with a relative error of 1e-16·λ_max/λ, in less than half the time of
    a singular value decomposition of A, which takes over where that would exceed 1e-8.
    """
    together = matrices.is_cuda or min(matrices.shape[-2:]) < SMALL
    squares: Tensor = torch.linalg.eigvalsh(smaller_gram(matrices)) if together else _squares(matrices)
    values = squares.clamp(min=0).sqrt()
    steep = squares[..., 0] < STEEP * squares[..., -1]
    if bool(steep.any()):
        values[steep] = _directly(matrices[steep]).flip(-1)
    return values


def _directly(matrices: Tensor) -> Tensor:
    """Descending; NumPy's LAPACK takes half to two thirds of the time of torch's on some processors."""
    if matrices.is_cuda:
        found: Tensor = torch.linalg.svdvals(matrices, driver="gesvd")
        return found
    return torch.from_numpy(np.linalg.svd(matrices.numpy(), compute_uv=False))


def _squares(matrices: Tensor) -> Tensor:
    found = gram_eigenvalues(matrices.reshape(-1, *matrices.shape[-2:]).contiguous().numpy())
    return torch.from_numpy(found).reshape(*matrices.shape[:-2], -1)


def smaller_gram(matrices: Tensor) -> Tensor:
    """A·A* or A*·A, whichever is smaller, for matrices A (…, r, c)."""
    return matrices @ matrices.mH if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH @ matrices


def by_workers(work: Callable[[Tensor], Result], *groups: Tensor, size: int | None = None) -> list[list[Result]]:
    """``work`` on every group of matrices (F, …), ``size`` of them at a time (None: one share for each worker).

    On the CPU there is one single-threaded worker for every thread of torch: LAPACK gains little from threads inside
    matrices of this size.
    """
    workers = 1 if groups[0].is_cuda else torch.get_num_threads()
    shares = [torch.split(group, size or -(-len(group) // workers)) if len(group) else () for group in groups]
    with _blas().limit(limits=1, user_api="blas"):
        if workers == 1:
            return [[work(share) for share in each] for each in shares]
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                tasks = [[pool.submit(work, share) for share in each] for each in shares]
                return [[task.result() for task in each] for each in tasks]
        finally:
            torch.set_num_threads(workers)  # what workers set also holds for threads that start later


@cache
def _blas() -> ThreadpoolController:
    """NumPy's and SciPy's BLAS, whose threads are their own."""
    return ThreadpoolController()
