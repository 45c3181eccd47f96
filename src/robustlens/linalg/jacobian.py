"""Products with the Jacobian of the logits, one matrix J = ∂f(x)/∂x (K, n) an image, and its operator norms.

All are exact derivatives. Sending v itself through the network with its ReLUs held fixed is not Jv: that adds the
biases and the shifts of BatchNorm. u ↦ Jᵀu is linear, so its own derivative along v is Jv, and reverse mode applied
twice gives both products from one graph, whatever layers it goes through.

Images must not see each other: take the model in eval mode (``core.modes.untouched``). Under BatchNorm in train mode
these are products with the Jacobian of the whole batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched
from robustlens.linalg.frozen_convolutions import FrozenConvolutions
from robustlens.results.errors import InputError

#: Numbers that the Jacobians of one chunk of images may hold (64 MiB in float64; their factors take as much again).
CHUNK = 8 * 2**20
#: What is left of a vector beside the others, relative to it, below which it counts as one of their sums.
NOTHING = 1e-12


class Decomposition(NamedTuple):
    """J = U diag(σ) Vᵀ of every image: ``u`` (B, K, r), ``s`` (B, r) descending and ``v`` (B, r, n), r = min(K, n).

    Row i of ``v`` is the i-th right singular vector.
    """

    u: Tensor
    s: Tensor
    v: Tensor


class Linearization:
    """The Jacobians J of ``model`` at images ``x`` (B, C, H, W), for many products at one point.

    Making it costs a forward and a backward pass; then Jᵀu costs a backward pass and Jv a forward one: with frozen
    weights, convolutions are those of ``FrozenConvolutions``.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        with torch.enable_grad(), FrozenConvolutions():
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
    with torch.enable_grad(), FrozenConvolutions():
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


def krylov_method(model: nn.Module, x: Tensor, v0: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of J, for every image at once, from the space of u, JJᵀu, … (JJᵀ)^{m−1} u, u = Jv0.

    m = min(``steps``, K). On an orthonormal basis U of that space, which holds every vector that the power method would
    have met, u = Us with s the leading eigenvector of UᵀJJᵀU (Rayleigh and Ritz; U is built as in Lanczos' method, in
    float64 and orthogonalised twice). For K ≤ ``steps`` the space is all of ℝᴷ, and σ exact to rounding. Costs a
    product with Jᵀ and one with J a step, and one of each besides.

    Args:
        v0: (B, C, H, W), random.

    Returns:
        u (B, K) and v (B, C, H, W) of unit size, and σ = ‖Jᵀu‖₂ (B,), which is never above the norm; Jᵀu = σv.
        Where J is zero, so are they.
    """
    linear = Linearization(model, x)
    fresh = linear.jvp(v0).double()
    basis, images = fresh[:, None][:, :0], []
    for _ in range(min(steps, fresh.shape[1])):
        whole = fresh.norm(dim=1, keepdim=True)
        for _ in range(2):
            fresh = fresh - ((basis @ fresh[:, :, None]).mT @ basis)[:, 0]
        left = fresh.norm(dim=1, keepdim=True)
        fresh = torch.where(left > NOTHING * whole, fresh / left, 0.0)  # the space ends where only rounding is left
        basis = torch.cat([basis, fresh[:, None]], 1)
        fresh = linear.jvp(linear.vjp(basis[:, -1].to(v0.dtype))).double()
        images.append(fresh)
    gram = basis @ torch.stack(images, 2)
    s = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors[:, :, -1:]
    u = (s.mT @ basis)[:, 0].to(v0.dtype)
    pulled = linear.vjp(u)
    return u, dual(pulled, 2), pulled.flatten(1).norm(dim=1)


def dual(t: Tensor, s: float) -> Tensor:
    """The maximiser of ⟨w, t⟩ over ‖w‖_{s*} = 1, for every example of ``t`` (B, …); its value is ‖t‖_s, s in [1, ∞)."""
    flat, tiny = t.flatten(1), torch.finfo(t.dtype).tiny
    size = flat.abs()
    size = size / size.amax(1, keepdim=True).clamp_min(tiny)  # powers of small gradients would underflow
    norm = torch.linalg.vector_norm(size, ord=s, dim=1, keepdim=True).clamp_min(tiny)
    power: Tensor = (size / norm) ** (s - 1)
    return (flat.sign() * power).view_as(t)


def jacobian_rows(model: nn.Module, x: Tensor) -> Tensor:
    """J (B, K, n) of every image ``x`` (B, C, H, W), one backward pass a class over one forward pass.

    Why a loop: batching the same backward passes (``is_grads_batched``), copying the images K times, and
    ``vmap(jacrev)`` give the same rows to rounding. The loop is the fastest of them as long as a pass has enough to do
    (``python -m benchmarks lenses``; with 25 images of a network as small as lenet-small it takes a quarter longer than
    the batched passes). It also holds K times less, and needs no batching rule of any layer.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad(), FrozenConvolutions():
        logits = model(point)
    classes = logits.shape[1]
    axes = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    rows = torch.empty((len(x), classes, x[0].numel()), dtype=x.dtype, device=x.device)
    for k in range(classes):
        (row,) = torch.autograd.grad(logits, point, axes[k].expand_as(logits), retain_graph=k + 1 < classes)
        rows[:, k] = row.flatten(1)
    return rows


def decompose(jacobian: Tensor) -> Decomposition:
    """The singular value decomposition of matrices (B, K, n), in float64.

    The long side is first taken off by QR, so that the decomposition proper is of r × r matrices: no squares are
    formed, and small singular values are as accurate as those of the whole matrix.
    """
    wide = jacobian.double()
    lying = wide.shape[1] <= wide.shape[2]
    q, small = torch.linalg.qr(wide.mT if lying else wide)  # tall = q @ small
    left, s, right = torch.linalg.svd(small, full_matrices=False)
    long = q @ left
    return Decomposition(right.mT, s, long.mT) if lying else Decomposition(long, s, right)


def at_once(classes: int, pixels: int) -> int:
    """Images whose Jacobians are held together: as many as CHUNK allows, and at least one."""
    return max(1, CHUNK // (classes * pixels))


def residual(model: nn.Module, x: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """max(‖Jv − σu‖₂, ‖Jᵀu − σv‖₂) / σ (B,) for unit u (B, K) and v (B, C, H, W); 0 where σ is.

    Some singular value of J lies within this times σ of σ. ``power_method`` ends with σv = Jᵀu, so that its error
    is all in the first of the two.
    """
    linear = Linearization(model, x)
    forth = linear.jvp(v) - sigma[:, None] * u
    back = (linear.vjp(u) - sigma.view(-1, *[1] * (x.ndim - 1)) * v).flatten(1)
    worst = torch.maximum(forth.norm(dim=1), back.norm(dim=1))
    return torch.where(sigma > 0, worst / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)


def require_derivative(model: nn.Module, x: Tensor, who: str) -> None:
    """Refuse a ``model`` whose answer does not depend on the images ``x``; ``who`` is the name of what asks.

    Raises:
        InputError: the logits have no derivative.
    """
    with untouched(model), torch.enable_grad():
        logits = model(x.detach().requires_grad_())
    if not logits.requires_grad:
        raise InputError(
            f"a network under {who}",
            expected="logits that can be differentiated by the image",
            got="logits without a derivative",
            fix="Leave the lens out, or take no_grad, detach and argmax out of the forward pass.",
        )
