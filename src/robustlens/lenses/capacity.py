"""The terms of generalisation bounds, in log10: products over the layers overflow otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustlens.linalg.layers import ConvOperator, Operator

#: Singular values below this share of the largest are rounding and count as 0.
ROUNDING = 1e-14


class Layer(NamedTuple):
    """Operator norm and smallest singular value of a layer, ‖Wᵀ‖_{2,1} (the sum of its rows' norms), and its width."""

    name: str
    largest: float
    smallest: float
    rows: float
    width: int


class Cover(NamedTuple):
    """Dimension k, C_X in the threat's norm and in ℓ2, log10 (C_X/ε)^k, the images more than 2ε apart, and ε."""

    k: float
    constant: float
    constant_l2: float
    balls: float
    apart: int
    eps: float


def layer_facts(operator: Operator) -> Layer:
    """The numbers of one layer; a convolution's singular values are those of its circular operator."""
    values, rows = operator.spectrum(), operator.row_norms()
    largest, smallest = float(values.max()), float(values.min())
    smallest = smallest if smallest > ROUNDING * largest else 0.0
    inputs = operator.weight.shape[1]
    if isinstance(operator, ConvOperator):
        inputs *= operator.groups * math.prod(operator.size)
    return Layer(operator.name, largest, smallest, float(rows.sum()), max(len(rows), inputs))


def smallest_row_distance(head: Tensor) -> float:
    """min ‖w_y − w_y'‖₂ over pairs of rows of ``head`` (K, F); one row stands for the pair 0 and w."""
    rows = head.detach().double()
    if len(rows) == 1:
        return float(rows.norm())
    return float(torch.pdist(rows).min())


def second_term(log_balls: float, m: int, eta: float) -> float:
    """log10 √(2 log 2 · N / m + 2 log(1/η) / m) for log10 N."""
    return log_sum([log10(2 * math.log(2) / m) + log_balls, log10(-2 * math.log(eta) / m)]) / 2


def bartlett(layers: Sequence[Layer], size: float, gamma: float, m: int, eta: float) -> float:
    """log10 of ‖X‖_F R ln(W) / (γ m) + √(ln(1/η) / m) with ``size`` = ‖X‖_F."""
    logs = [log10(layer.largest) for layer in layers]
    parts = [2 / 3 * (log10(layer.rows) - log) for layer, log in zip(layers, logs, strict=True) if log > -math.inf]
    width = max(layer.width for layer in layers)
    complexity = sum(logs) + 1.5 * log_sum(parts) + log10(size) + log10(math.log(width)) - log10(gamma * m)
    return log_sum([complexity, log10(-math.log(eta) / m) / 2])


def sokolic(layers: Sequence[Layer], margin: float, cover: Cover, classes: int, m: int, eta: float) -> float:
    """log10 of √(2 log 2 · classes · (2 C_M / v)^k / m) + √(2 log(1/η) / m), v = ``margin`` / (√2 ∏ ‖W_i‖)."""
    reach = log10(margin) - log10(2) / 2 - sum(log10(layer.largest) for layer in layers)
    balls = log10(classes) + cover.k * max(0.0, log10(2 * cover.constant_l2) - reach)
    return log_sum([(log10(2 * math.log(2) / m) + balls) / 2, log10(-2 * math.log(eta) / m) / 2])


def intrinsic_dimension(distances: Tensor, *, neighbours: int = 10) -> float:
    """1 / mean log(T_K / T_j) over j < K and all points, T_j the distance to the j-th neighbour.

    The estimate of Levina and Bickel (2004), averaged over points as MacKay and Ghahramani (2005) propose, from
    ``distances`` (n, n). Points with an equal are left out; 1 where fewer than 3 points remain.
    """
    neighbours = min(neighbours, len(distances) - 1)
    if neighbours < 2:
        return 1.0
    nearest = distances.sort(dim=1).values[:, 1 : neighbours + 1]
    nearest = nearest[nearest[:, 0] > 0]
    mean = float((nearest[:, -1:] / nearest[:, :-1]).log().mean()) if len(nearest) else 0.0
    return 1 / mean if mean > 0 else 1.0


def log10(value: float) -> float:
    """log10, −∞ at 0."""
    return math.log10(value) if value > 0 else -math.inf


def log_sum(logs: Sequence[float]) -> float:
    """log10 of a sum, from the log10 of its terms."""
    top = max(logs, default=-math.inf)
    return top if math.isinf(top) else top + math.log10(sum(10 ** (log - top) for log in logs))
