"""Products with the Hessian of a loss in the weights of a network, L(w) = (1/N) Σ_i ℓ(f_w(x_i), y_i).

H v = ∇_w ⟨∇_w L(w), v⟩ by differentiating twice (Pearlmutter 1994), exact to rounding, at about the cost of two
gradients more. Losses are *summed* over a chunk and divided once by N: the mean over batches of batch means is another
number when the last batch is smaller. Weights are a dict of detached copies, so the model is never written to; take it
in eval mode, or BatchNorm ties the examples of a chunk together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from robustlens.core.second_derivative import differentiating_twice
from robustlens.results.errors import InputError

Weights = Mapping[str, Tensor]

#: Logits (B, K) and targets (B, …) ↦ the sum of the losses of the B examples.
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Σ_i −log softmax(z_i)_{y_i}."""
    return F.cross_entropy(logits, y, reduction="sum")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters that require a gradient, by name.

    Raises:
        InputError: there are none.
    """
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InputError(
            "a Hessian in the weights",
            expected="parameters that require a gradient",
            got="none",
            fix="Call model.requires_grad_(True) first.",
        )
    return found


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All of them in one vector (d,)."""
    return torch.cat([t.flatten() for t in tensors])


def shaped(vector: Tensor, at: Weights) -> dict[str, Tensor]:
    """The inverse of ``flat(at.values())``."""
    parts = torch.split(vector, [w.numel() for w in at.values()])
    return {name: part.view_as(w) for (name, w), part in zip(at.items(), parts, strict=True)}


def dot(grads: Iterable[Tensor], along: Weights) -> Tensor:
    """⟨grads, along⟩ (scalar)."""
    return torch.stack([(g * v).sum() for g, v in zip(grads, along.values(), strict=True)]).sum()


def filter_norms(at: Weights) -> Tensor:
    """For every weight the Frobenius norm of its filter, (d,): a row of a matrix, an output channel of a kernel.

    Biases and BatchNorm's own weights, of one dimension, get 0. With D = diag of it, D H D is the Hessian in
    filter-normalised coordinates (Li et al. 2018, arXiv 1712.09913, §4): it does not change when one layer is
    multiplied by c and the next divided by c behind a ReLU, while H does.
    """
    return flat(
        w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1)).expand_as(w) if w.ndim > 1 else torch.zeros_like(w)
        for w in at.values()
    )


class LossHessian:
    """v (d,) ↦ Hv (d,) at the weights ``at``, on inputs ``x`` (N, …) and targets ``y`` (N, …) in chunks.

    Where all fit into one chunk, its graph is kept between products, which saves more than a third of their time.
    """

    def __init__(
        self, model: nn.Module, at: Weights, x: Tensor, y: Tensor, *, chunk: int, loss: Loss = cross_entropy_sum
    ) -> None:
        self._model, self._at, self._loss = model, at, loss
        self._x, self._y, self._chunk = x, y, chunk
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None

    def value(self) -> float:
        """L."""
        with torch.no_grad():
            sums = [
                self._loss(functional_call(self._model, dict(self._at), (x,)), y).double() for x, y in self._chunks()
            ]
        return float(torch.stack(sums).sum()) / len(self._y)

    def gradient(self) -> Tensor:
        """∇L (d,)."""
        total = torch.zeros_like(flat(self._at.values()))
        for x, y in self._chunks():
            _, grads = slopes(self._model, self._at, x, y, self._loss, twice=False)
            total += flat(grads)
        return total / len(self._y)

    def __call__(self, v: Tensor) -> Tensor:
        """Hv (d,)."""
        along, total = shaped(v, self._at), torch.zeros_like(v)
        for x, y in self._chunks():
            leaves, grads = self._kept or slopes(self._model, self._at, x, y, self._loss)
            keep = len(y) == len(self._y)
            self._kept = (leaves, grads) if keep else None
            rise = dot(grads, along)
            total += flat(torch.autograd.grad(rise, leaves, retain_graph=keep, materialize_grads=True))
        return total / len(self._y)

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(torch.split(self._x, self._chunk), torch.split(self._y, self._chunk), strict=True)


def slopes(
    model: nn.Module, at: Weights, x: Tensor, y: Tensor, loss: Loss, *, twice: bool = True, image: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves [w₁, …], with ``image`` x last, and the summed loss's gradients by them, in a graph if ``twice``."""
    with torch.enable_grad():
        copies = {name: w.detach().requires_grad_() for name, w in at.items()}
        leaves = list(copies.values())
        if image:
            x = x.detach().requires_grad_()
            leaves.append(x)
        total = loss(functional_call(model, copies, (x,)), y)
        grads = torch.autograd.grad(total, leaves, create_graph=twice, materialize_grads=True)
    return leaves, list(grads)


def require_curvature(model: nn.Module, at: Weights, x: Tensor, y: Tensor, who: str, *, image: bool = False) -> None:
    """Refuse a ``model`` whose loss cannot be differentiated twice in its weights (with ``image``, also in ``x``).

    A layer without a second derivative is otherwise gone around in silence, and the products are wrong.

    Raises:
        InputError: a layer has no second derivative, such as an autograd function marked ``once_differentiable``.
    """
    with differentiating_twice(f"a network under {who}"):
        _, grads = slopes(model, at, x, y, cross_entropy_sum, image=image)
        total = torch.stack([g.square().sum() for g in grads]).sum()
        torch.autograd.backward(total)  # every branch, so that none is gone around
