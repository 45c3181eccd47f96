"""The largest singular value of a linear map that is known by its products alone: Golub and Kahan's bidiagonalisation.

    A V_k = U_k B_k,    Aᵀ U_k = V_k B_kᵀ + β_k v_{k+1} e_kᵀ,        B_k upper bidiagonal (α on, β above the diagonal),

with a product by A and one by Aᵀ a step (Golub and Kahan 1965; Lanczos' method on AᵀA). The right vectors are
reorthogonalised, which keeps the left ones orthogonal as well (Simon and Zha 2000), so no value appears twice. With
(p, σ, q) the first singular triplet of B_k, u = U_k p and v = V_k q, the norm is at least σ and
‖Aᵀu − σv‖ = β_k |p_k|. Where values crowd at the top, as a large image's do, σ settles long before v: a residual of
1e-3 went with errors of σ near 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Products between two looks at the bidiagonal matrix.
EVERY = 5

#: Units of rounding, relative to the largest α, below which an α or β counts as zero.
NOTHING = 100


class Top(NamedTuple):
    """``value`` σ = ‖Av‖ with ‖v‖ = 1, a lower bound of the norm, and ``residual`` = ‖Aᵀu − σv‖ / σ with u = Av / σ.

    Some singular value lies within residual·σ of σ, and the largest is far closer than that unless ``v`` missed it.
    ``steps`` counts products with A.
    """

    value: float
    residual: float
    steps: int


def top_singular_value(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    tolerance: float = 1e-3,
) -> Top:
    """The largest singular value of A, from a random ``start`` of any shape that ``apply`` takes.

    Iterates in the precision of ``start`` until the residual is below ``tolerance`` or ``steps`` are spent; value and
    residual are then computed anew in float64, so they hold whatever rounding did. Keeps ``steps`` vectors.

    Args:
        apply: x ↦ Ax, in the dtype of its argument.
        adjoint: y ↦ Aᵀy.
    """
    limit, tiny = min(steps, start.numel()), torch.finfo(start.dtype).tiny
    basis = start.new_empty(limit + 1, start.numel())
    basis[0] = start.flatten() / start.norm()
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    left = torch.zeros(())
    for k in range(limit):
        image = apply(basis[k].view_as(start))
        if betas:
            image = image - betas[-1] * left
        alphas.append(image.norm())
        left = image / alphas[-1].clamp_min(tiny)
        pulled = adjoint(left).flatten() - alphas[-1] * basis[k]
        pulled = pulled - (basis[: k + 1] @ pulled) @ basis[: k + 1]
        betas.append(pulled.norm())
        basis[k + 1] = pulled / betas[-1].clamp_min(tiny)
        if (k + 1) % EVERY == 0 or k + 1 == limit:
            diagonal, above = torch.stack([torch.stack(alphas), torch.stack(betas)]).cpu().double()
            # From the first α or β that is zero on, products are those of rounding errors.
            floor = NOTHING * torch.finfo(start.dtype).eps * diagonal.max()
            ended = (torch.minimum(diagonal, above) <= floor).nonzero()
            used = int(ended[0]) + 1 if len(ended) else k + 1
            p, values, q = torch.linalg.svd(torch.diag(diagonal[:used]) + torch.diag(above[: used - 1], 1))
            if len(ended) or above[-1] * p[-1, 0].abs() <= tolerance * values[0]:
                break
    v = (q[0].to(basis) @ basis[:used]).double().view_as(start)
    v = v / v.norm()
    image = apply(v)
    value = image.norm()
    if value == 0:
        return Top(0.0, 0.0, k + 1)
    residual = (adjoint(image / value) - value * v).norm() / value
    return Top(float(value), float(residual), k + 1)
