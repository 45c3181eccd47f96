"""The largest minimum margin that a hyperplane can have, solved to the end in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from robustlens.core.types import Split
from robustlens.results.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HardMargin:
    """The hyperplane direction · x + bias = 0, ``direction`` (d,) of unit norm in float64.

    ``margin`` is the smallest signed distance y (direction · x + bias) over the data: it is attained, so the largest
    possible one is at least this. ``bound`` is what no hyperplane can exceed: ‖Σ α_i y_i x_i‖ for the weights α that
    were found (half the distance of two points of the classes' convex hulls, where there is a bias). ``support``
    (S,) are the positions of the examples with α > 0.
    """

    direction: Tensor
    bias: float
    margin: float
    bound: float
    support: Tensor

    @property
    def gap(self) -> float:
        """How much of the bound may be missing, relative."""
        return (self.bound - self.margin) / self.bound


def hard_margin_svm(split: Split, *, bias: bool = False) -> HardMargin:
    """max min_i y_i (w·x_i + b) over ‖w‖₂ = 1, with b = 0 or free.

    Its dual is a nearest point: min ‖Σ α_i y_i x_i‖₂ over α ≥ 0, Σ α = 1 (with a bias also Σ α_i y_i = 0), and any such
    α bounds all margins from above, since min_i y_i w·x_i ≤ Σ α_i y_i w·x_i ≤ ‖Σ α_i y_i x_i‖. It is solved as
    non-negative least squares, min ‖Σ α_i y_i x_i‖² + (Σ α − 1)², by active sets, which end at the solution instead of
    approaching it like the coordinate descent of LinearSVC. A free bias is a feature of a constant 1,000 times the
    largest image, so that its own weight costs next to nothing; the bound accounts for the rest.

    Raises:
        InputError: labels other than 0 and 1, or data that no such hyperplane separates.

    Reference: Wu & Yu 2019, arXiv 1907.11780, §3; Lawson & Hanson 1974, ch. 23.
    """
    x, y = pixels_and_signs(split)
    far = 1e3 * np.linalg.norm(x, axis=1).max()
    points = np.column_stack([x, np.full(len(x), far)]) if bias else x
    system = np.vstack([(y[:, None] * points).T, np.ones(len(y))])
    alpha, _ = nnls(system, np.append(np.zeros(len(system) - 1), 1.0))
    if bias:
        sides = [alpha[y == side] @ x[y == side] / alpha[y == side].sum() for side in (1, -1)]
        normal = (sides[0] - sides[1]) / 2
        scores = x @ normal
        low, high = scores[y == 1].min(), scores[y == -1].max()
        worst, offset = (low - high) / 2, -(low + high) / 2
    else:
        normal = (alpha * y) @ x / alpha.sum()
        worst, offset = (y * (x @ normal)).min(), 0.0
    bound = float(np.linalg.norm(normal))
    if worst <= 0:
        raise InputError(
            "hard-margin SVM",
            expected="data that a hyperplane separates" + ("" if bias else " through the origin"),
            got=f"no margin above {bound:.2g}",
            fix="Take other classes." if bias else "Allow a bias, or take other classes.",
        )
    return HardMargin(
        direction=torch.from_numpy(normal / bound),
        bias=float(offset / bound),
        margin=float(worst / bound),
        bound=bound,
        support=torch.from_numpy(alpha.nonzero()[0]),
    )


def pixels_and_signs(split: Split) -> tuple[Array, Array]:
    """Pixels (N, d) as training sees them, and y = ±1 (N,)."""
    present = sorted(set(split.labels.tolist()))
    if present != [0, 1]:
        raise InputError("linear limits", expected="the labels 0 and 1", got=str(present), fix="Keep two classes.")
    batch = split.batch(torch.arange(len(split)))
    return batch.x.flatten(1).double().cpu().numpy(), (2.0 * batch.y - 1).double().cpu().numpy()
