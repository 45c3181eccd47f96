"""What a penalty on a gradient, and a product with a Hessian, ask of a network: two derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustlens.core.modes import still
from robustlens.results.errors import InputError


@contextmanager
def differentiating_twice(
    what: str, fix: str = "Write the layer's backward pass with differentiable operations, or leave this out."
) -> Iterator[None]:
    """Say what to do where a layer has no second derivative; raises InputError about ``what``."""
    try:
        yield
    except RuntimeError as error:
        got = str(error).partition("\n")[0]
        raise InputError(what, expected="layers that can be differentiated twice", got=got, fix=fix) from error


def require_second_derivative(model: nn.Module, x: Tensor, who: str) -> None:
    """Refuse a ``model`` for which ∇_θ ‖∇_x log softmax(f_θ(x))_0‖² cannot be computed.

    A layer without a second derivative need not stop the training: a gradient that is asked for at the weights alone
    goes around it and is wrong. ``who`` is the name of the method; ``x`` (B, C, H, W) are a few images. Costs one
    forward and two backward passes. The model is left as it was.

    Raises:
        InputError: a layer has no second derivative, such as an autograd function marked ``once_differentiable``.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), still(model):
        copies = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        first_class = functional_call(model, copies, (x,)).log_softmax(1)[:, 0].sum()
        with differentiating_twice(f"a network under {who}"):
            (slope,) = torch.autograd.grad(first_class, x, create_graph=True)
            torch.autograd.backward(slope.square().sum())  # every branch of the graph, so that none is gone around
