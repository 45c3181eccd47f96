"""Directions in the weights of a network that do not see its scale, and the network at other weights.

The weights that move are the parameters of two or more dimensions (kernels and matrices); biases, BatchNorm's own
weights and every other vector stay, so that their directions are zero. One filter is one index of the first dimension:
a row of a matrix, the kernel of an output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from robustlens.core.modes import untouched

#: Name of a parameter → weights, or a direction, of its shape.
Weights = Mapping[str, Tensor]


def moving_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that directions are drawn for, detached; they share the model's memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim >= 2 and p.is_floating_point()}


def gaussian(weights: Weights, gen: Generator) -> dict[str, Tensor]:
    """Independent standard normal entries, shaped like ``weights``.

    They are drawn on the device of ``gen`` in float64: with one on the CPU, every device and precision gets the same.
    """
    return {
        name: torch.randn(w.shape, generator=gen, dtype=torch.float64, device=gen.device).to(w)
        for name, w in weights.items()
    }


def filter_normalised(direction: Weights, weights: Weights) -> dict[str, Tensor]:
    """h_m · ‖w_m‖ / ‖h_m‖ for every filter m (Li et al. 2018, arXiv 1712.09913, §4); zero where the filter is.

    Multiplying a filter by c > 0 multiplies its direction by c, so a ReLU network in which (W₁, b₁, W₂) became
    (c W₁, c b₁, W₂ / c) computes the same function at every step along it.
    """
    found = {}
    for name, h in direction.items():
        flat, rows = h.flatten(1), weights[name].flatten(1)
        length = flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
        found[name] = (flat * (rows.norm(dim=1, keepdim=True) / length)).view_as(h)
    return found


def in_relative_ball(direction: Weights, weights: Weights, xi: float, gen: Generator) -> dict[str, Tensor]:
    """A uniform draw ν from the ball ‖ν_l‖ ≤ ξ ‖w_l‖ of every layer l, when ``direction`` is Gaussian."""
    found = {}
    for name, h in direction.items():
        radius = float(torch.rand((), generator=gen, dtype=torch.float64, device=gen.device)) ** (1 / h.numel())
        found[name] = h * (xi * radius * weights[name].norm() / h.norm())
    return found


def into_relative_ball(step: Weights, weights: Weights, xi: float) -> dict[str, Tensor]:
    """The nearest ν with ‖ν_l‖ ≤ ξ ‖w_l‖ for every layer l."""
    found = {}
    for name, v in step.items():
        size = v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        found[name] = v * (xi * weights[name].norm() / size).clamp_max(1)
    return found


def inner(a: Weights, b: Weights) -> float:
    """⟨a, b⟩ over all weights, in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def orthogonal_to(a: Weights, b: Weights) -> dict[str, Tensor]:
    """b minus its component along a."""
    share = inner(a, b) / inner(a, a)
    return {name: b[name] - share * a[name] for name in b}


def cosine(a: Weights, b: Weights) -> float:
    """The cosine of the angle between two directions; 0 where one of them is zero."""
    size = (inner(a, a) * inner(b, b)) ** 0.5
    return inner(a, b) / size if size > 0 else 0.0


def moved(weights: Weights, *steps: tuple[float, Weights]) -> dict[str, Tensor]:
    """w + Σ α h for the given (α, h)."""
    found = dict(weights)
    for alpha, direction in steps:
        found = {name: torch.add(w, direction[name], alpha=alpha) for name, w in found.items()}
    return found


class Moved(nn.Module):
    """``model`` at other weights (and buffers), which takes and gives what ``model`` does.

    Nothing of the model is written to: a forward pass looks the tensors of ``state`` up in place of its own. Attacks
    and guards take this as any other network.
    """

    def __init__(self, model: nn.Module, state: Weights) -> None:
        super().__init__()
        self.model = model
        self._state = dict(state)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, self._state, (x,))
        return logits


def batch_statistics(model: nn.Module, weights: Weights, images: Iterator[Tensor]) -> dict[str, Tensor]:
    """The running means and variances that BatchNorm finds on batches of ``images`` (B, C, H, W) at ``weights``.

    Each is the average over the batches, which should be of one size. Only BatchNorm runs in train mode, so dropout
    stays off. Buffer names → tensors; empty for a network without BatchNorm. The model's own buffers stay.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    own = {f"{name}.{key}": b for name, m in norms.items() for key, b in m.named_buffers(recurse=False)}
    fresh = {name: torch.zeros_like(b) for name, b in own.items()}
    if fresh:
        with untouched(model), torch.no_grad(), _averaging(list(norms.values())):
            for x in images:
                functional_call(model, {**weights, **fresh}, (x,))
    return fresh


@contextmanager
def _averaging(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Train mode, and plain averages over the batches seen (momentum None), for these modules alone."""
    kept = [m.momentum for m in norms]
    try:
        for m in norms:
            m.train()
            m.momentum = None
        yield
    finally:
        for m, momentum in zip(norms, kept, strict=True):
            m.momentum = momentum
