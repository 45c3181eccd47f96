"""Adversarial logistic regression with one row of weights: its Hessian in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlens.linalg.hessian import Weights
from robustlens.threats.lp import Lp


class OneRow(nn.Module):
    """The logits (0, w·x) of images x, for a row w (d,)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(w.clone()[None])

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.row.T
        return torch.cat([torch.zeros_like(z), z], 1)


def logistic_row(model: nn.Module, at: Weights, x: Tensor) -> Tensor | None:
    """w (d,) if ``at`` is one row of weights and the logits at images ``x`` are (0, w·x); None for other networks."""
    if len(at) != 1:
        return None
    (w,) = at.values()
    with torch.no_grad():
        z = model(x)
    if w.shape != (1, x[0].numel()) or z.shape[1] != 2:
        return None
    expected = torch.stack([torch.zeros_like(z[:, 0]), x.flatten(1) @ w[0]], 1)
    return w[0] if torch.allclose(z, expected, rtol=1e-4, atol=1e-4) else None


def robust_logistic_hessian(w: Tensor, x: Tensor, y: Tensor, threat: Lp) -> tuple[Tensor, Tensor]:
    """The Hessian (d, d) of (1/N) Σ log(1 + exp(−y_i w·x_i + ε‖w‖_*)), and s_i (N,), both float64.

        ℓ2:  s(1 − s) x̃x̃ᵀ + s ε (I − ŵŵᵀ) / ‖w‖,   x̃ = x − ε y ŵ,        ŵ = w / ‖w‖₂
        ℓ∞:  s(1 − s) x̃x̃ᵀ,                         x̃ = x − ε y sign(w)

    averaged over the examples, s = σ(−y w·x + ε‖w‖_*) the probability of the wrong class under attack; this adversary
    ignores the pixel box. For ℓ2, Yamada et al. 2021 (arXiv 2102.02950), appendix B.

    Args:
        w: (d,). x: (N, …) with d values each. y: (N,) labels 0 and 1.
    """
    w, x = w.double(), x.flatten(1).double()
    sign, size = (2.0 * y.double() - 1)[:, None], w.norm()
    step = w / size if threat.norm == "l2" else w.sign()
    moved = x - threat.eps * sign * step
    s = torch.sigmoid(-sign[:, 0] * (moved @ w))
    matrix = moved.T @ ((s * (1 - s))[:, None] * moved) / len(y)
    if threat.norm == "l2":
        unit = w / size
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        matrix = matrix + s.mean() * threat.eps / size * (eye - torch.outer(unit, unit))
    return matrix, s
