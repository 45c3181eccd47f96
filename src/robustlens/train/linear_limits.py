"""Where training of a binary linear classifier ends: the minimiser of its loss.

It is solved to the end in float64, with a number that says how near the end is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from robustlens.core.types import Split
from robustlens.linalg.hard_margin import pixels_and_signs
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LogisticOptimum:
    """Weights ``w`` (d,) float64 with their ``loss``, and the ℓ2 norm ``residual`` of its smallest subgradient there.

    With an ℓ2 term the loss is at most residual² / (2 · l2) above its minimum.
    """

    w: Tensor
    loss: float
    residual: float
    iterations: int


def logistic_optimum(
    split: Split, threat: Lp | None = None, *, l2: float = 0.0, iterations: int = 20_000
) -> LogisticOptimum:
    """argmin_w mean log(1 + exp(−y w·x + ε ‖w‖_*)) + (l2 / 2) ‖w‖₂², the adversary without the pixel box.

    Convex, and minimised by L-BFGS-B: over w for ℓ2 (‖w‖_* = ‖w‖₂, smooth but for the origin, which is tried first),
    over w = u − v with u, v ≥ 0 for ℓ∞ (‖w‖_* = ‖w‖₁ = Σ u + v, smooth). ``l2`` is what an optimizer calls weight
    decay. No bias.

    Where the data are separable by a margin beyond ε and ``l2`` is 0, the loss only tends to 0 as w grows and nothing
    is its minimiser; the direction that w then takes is that of ``linalg.hard_margin`` (for ε = 0, Soudry et al. 2018).

    Args:
        split: images with the labels 0 (y = −1) and 1 (y = 1).
        threat: "l2" or "linf"; None is ε = 0.

    Raises:
        InputError: other labels, the threat "l1", or no minimiser.

    Reference: Yamada et al. 2021, arXiv 2102.02950, eq. 4 and 7.
    """
    x, y = pixels_and_signs(split)
    norm, eps = ("l2", 0.0) if threat is None else (threat.norm, threat.eps)
    if norm == "l1":
        raise InputError("logistic optimum", expected="l2 or linf", got=norm, fix="Use one of the two.")
    signed = y[:, None] * x

    def parts(w: Array, size: float) -> tuple[float, Array, float]:
        """Loss for ‖w‖_* = size, its gradient at constant size, and its derivative by the size."""
        margins = signed @ w - eps * size
        s = expit(-margins)
        loss = np.logaddexp(0, -margins).mean() + 0.5 * l2 * (w @ w)
        return float(loss), l2 * w - s @ signed / len(s), float(eps * s.mean())

    def of_w(w: Array) -> tuple[float, Array]:
        size = float(np.linalg.norm(w))
        loss, grad, slope = parts(w, size)
        return loss, grad + slope * w / (size or 1.0)

    def of_halves(halves: Array) -> tuple[float, Array]:
        u, v = np.split(halves, 2)
        loss, grad, slope = parts(u - v, float(halves.sum()))
        return loss, np.concatenate([slope + grad, slope - grad])

    def residual(w: Array) -> float:
        _, grad, slope = parts(w, float(np.linalg.norm(w, 2 if norm == "l2" else 1)))
        if norm == "linf":
            smallest = np.where(w == 0, np.maximum(abs(grad) - slope, 0), grad + slope * np.sign(w))
            return float(np.linalg.norm(smallest))
        if not w.any():
            return max(float(np.linalg.norm(grad)) - slope, 0.0)
        return float(np.linalg.norm(grad + slope * w / np.linalg.norm(w)))

    origin = np.zeros(x.shape[1])
    if residual(origin) == 0:
        return LogisticOptimum(torch.from_numpy(origin), float(np.log(2)), 0.0, 0)
    start = signed.mean(0)
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 0.0, "gtol": 1e-12, "maxcor": 30}
    if norm == "l2":
        found = minimize(of_w, start, jac=True, method="L-BFGS-B", options=options)
        w = found.x
    else:
        halves = np.concatenate([start.clip(0), (-start).clip(0)])
        positive = [(0.0, None)] * len(halves)
        found = minimize(of_halves, halves, jac=True, method="L-BFGS-B", bounds=positive, options=options)
        u, v = np.split(found.x, 2)
        w = u - v
    size = float(np.linalg.norm(w, 2 if norm == "l2" else 1))
    least = float((signed @ w - eps * size).min())
    if l2 == 0 and least > 0:
        raise InputError(
            "logistic optimum",
            expected="data that no w separates with room for the adversary, or l2 > 0",
            got=f"a w whose worst margin under the adversary is {least / size:.3g} in the threat's norm",
            fix="Set l2, raise eps, or take hard_margin_svm.",
        )
    return LogisticOptimum(torch.from_numpy(w), parts(w, size)[0], residual(w), int(found.nit))
