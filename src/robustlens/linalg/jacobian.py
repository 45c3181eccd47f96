"""Products with the Jacobian of the logits, one matrix J = ∂f(x)/∂x (K, n) an image, and its operator norms.

All are exact derivatives. Sending v itself through the network with its ReLUs held fixed is not Jv: that adds the
biases and the shifts of BatchNorm. u ↦ Jᵀu is linear, so its own derivative along v is Jv, and reverse mode applied
twice gives both products from one graph, whatever layers it goes through.

Images must not see each other: take the model in eval mode (``core.modes.untouched``). Under BatchNorm in train mode
these are products with the Jacobian of the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Linearization:
    """The Jacobians J of ``model`` at images ``x`` (B, C, H, W), for many products at one point.

    Making it costs a forward and a backward pass; then Jᵀu costs a backward pass, and Jv about two.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        with torch.enable_grad():
            self._logits = model(self._x)
            self._u = torch.zeros_like(self._logits, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._logits, self._x, self._u, create_graph=True)

    def jvp(self, v: Tensor) -> Tensor:
        """Jv (B, K) for directions ``v`` (B, C, H, W)."""
        return torch.autograd.grad(self._pulled, self._u, v, retain_graph=True)[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu (B, C, H, W) for directions ``u`` (B, K)."""
        return torch.autograd.grad(self._logits, self._x, u, retain_graph=True)[0]


def jvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Jv (B, K) at images ``x`` for directions ``v``, both (B, C, H, W)."""
    return Linearization(model, x).jvp(v)


def vjp(model: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    """Jᵀu (B, C, H, W) at images ``x`` for directions ``u`` (B, K)."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
    return torch.autograd.grad(logits, point, u)[0]


def power_method(
    model: nn.Module, x: Tensor, v0: Tensor, iterations: int, p: float = 2, q: float = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """‖J‖_{p→q} = max ‖Jv‖_q over ‖v‖_p = 1, for every image at once, by ``iterations`` steps from ``v0``:

        u ← dual_q(Jv),   v ← dual_{p*}(Jᵀu),   dual_s(t) = sign(t) |t|^{s−1} / ‖t‖_s^{s−1},   1/p + 1/p* = 1

    (Boyd 1974; p = q = 2 is the power method of Roth et al. 2020, arXiv 1906.01527, eq. 7). The value never falls.
    For p = q = 2 it reaches the largest singular value; otherwise it may stop at a smaller local maximum.

    Args:
        v0: (B, C, H, W), of any size but zero.
        p: in (1, ∞].
        q: in [1, ∞).

    Returns:
        u (B, K) with ‖u‖_{q*} = 1, v (B, C, H, W) with ‖v‖_p = 1, and σ = uᵀJv (B,), which is never above the norm.
        Where J is zero, so are they.
    """
    linear, conjugate = Linearization(model, x), 1 if math.isinf(p) else p / (p - 1)
    v = v0
    for _ in range(iterations):
        u = dual(linear.jvp(v), q)
        pulled = linear.vjp(u)
        v = dual(pulled, conjugate)
    return u, v, (pulled * v).flatten(1).sum(1)


def dual(t: Tensor, s: float) -> Tensor:
    """The maximiser of ⟨w, t⟩ over ‖w‖_{s*} = 1, for every example of ``t`` (B, …); its value is ‖t‖_s, s in [1, ∞)."""
    flat, tiny = t.flatten(1), torch.finfo(t.dtype).tiny
    size = flat.abs()
    size = size / size.amax(1, keepdim=True).clamp_min(tiny)  # powers of small gradients would underflow
    norm = torch.linalg.vector_norm(size, ord=s, dim=1, keepdim=True).clamp_min(tiny)
    power: Tensor = (size / norm) ** (s - 1)
    return (flat.sign() * power).view_as(t)
