"""The nearest wrong point of small networks, exactly: all of their linear regions, one convex problem each.

A network with one hidden layer of h ReLUs is affine in each of at most 2^h polyhedra. In each, and for each wrong
class, the nearest point at which that class is not below the right one solves a linear program (ℓ∞, ℓ1) or a least
distance problem (ℓ2: Lawson and Hanson 1974, chapter 23, by non-negative least squares). The box is part of the
polyhedron.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls
from torch import Tensor, nn

Floats = NDArray[np.float64]

#: A z ≤ b, and the logits W z + v that hold there.
Piece = tuple[Floats, Floats, Floats, Floats]


def nearest_wrong(model: nn.Sequential, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """The nearest wrong points (B, C, H, W) in the box [0, 1], and their distances (B,), in float64; ∞ without one.

    ``model`` is Flatten, Linear, or Flatten, Linear, ReLU, Linear. Images must be right.
    """
    pieces = list(_pieces(model))
    found = [_nearest(pieces, image, int(label), norm) for image, label in zip(_flat(x), y, strict=True)]
    points = torch.stack([torch.from_numpy(point) for point, _ in found]).view_as(x)
    return points, torch.tensor([distance for _, distance in found], dtype=torch.float64)


def _flat(x: Tensor) -> Floats:
    return x.detach().double().flatten(1).numpy()


def _pieces(model: nn.Sequential) -> Iterator[Piece]:
    parts = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in model[1::2]]
    w, v = parts[0]
    if len(parts) == 1:
        yield np.zeros((0, w.shape[1])), np.zeros(0), w, v
        return
    outer, outer_bias = parts[1]
    for on in itertools.product((0.0, 1.0), repeat=len(w)):
        sign = 1 - 2 * np.array(on)[:, None]
        yield sign * w, -sign[:, 0] * v, outer * on @ w, outer * on @ v + outer_bias


def _nearest(pieces: list[Piece], x: Floats, y: int, norm: str) -> tuple[Floats, float]:
    best, smallest = x, np.inf
    eye = np.eye(len(x))
    for region, most, w, v in pieces:
        for k in range(len(v)):
            if k == y:
                continue
            rows = np.vstack([region, eye, -eye, w[y] - w[k]])
            room = np.concatenate([most, np.ones(len(x)), np.zeros(len(x)), [v[k] - v[y]]]) - rows @ x
            step = _least_distance(rows, room) if norm == "l2" else _linear_program(rows, room, norm)
            if step is not None:
                size = np.linalg.norm(step, ord={"l2": 2, "linf": np.inf, "l1": 1}[norm])
                if size < smallest:
                    best, smallest = x + step, float(size)
    return best, smallest


def _least_distance(rows: Floats, room: Floats) -> Floats | None:
    """argmin ‖u‖₂ with rows · u ≤ room."""
    n = rows.shape[1]
    target = np.zeros(n + 1)
    target[n] = 1
    dual, distance = nnls(np.vstack([-rows.T, -room]), target)
    if distance < 1e-9:
        return None
    residual = np.vstack([-rows.T, -room]) @ dual - target
    return -residual[:n] / residual[n]


def _linear_program(rows: Floats, room: Floats, norm: str) -> Floats | None:
    """argmin ‖u‖ in ℓ∞ or ℓ1 with rows · u ≤ room; variables u and bounds t of |u|."""
    m, n = rows.shape
    bounds = np.ones((n, 1)) if norm == "linf" else np.eye(n)
    eye = np.eye(n)
    everything = np.block([[rows, np.zeros((m, bounds.shape[1]))], [eye, -bounds], [-eye, -bounds]])
    cost = np.concatenate([np.zeros(n), np.ones(bounds.shape[1])])
    solved = linprog(cost, everything, np.concatenate([room, np.zeros(2 * n)]), bounds=(None, None))
    assert solved.status in (0, 2), solved.message
    return solved.x[:n] if solved.status == 0 else None


def bent(classes: int = 3, hidden: int = 4, side: int = 3, seed: int = 6) -> nn.Sequential:
    """A random network of this kind in float64, whose logits tie at the grey image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(side**2, hidden), nn.ReLU(), nn.Linear(hidden, classes)).double()
        with torch.no_grad():
            for layer in model[1::2]:
                layer.weight.normal_()
                layer.bias.zero_()
            model[1].bias -= 0.5 * model[1].weight.sum(1)
            grey = torch.full((1, 1, side, side), 0.5, dtype=torch.float64)
            model[1].bias += 0.5 * torch.randn(hidden, dtype=torch.float64)
            model[3].bias -= model(grey)[0]
    return model


def straight(classes: int = 2, side: int = 3, seed: int = 7) -> nn.Sequential:
    """A random affine network in float64, whose logits tie at the grey image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(side**2, classes)).double()
        with torch.no_grad():
            model[1].weight.normal_()
            model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    return model
