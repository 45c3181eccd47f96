"""What a penalty on the gradient with respect to the images asks of a network: two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustlens.core.modes import still
from robustlens.results.errors import InputError


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
        try:
            (slope,) = torch.autograd.grad(first_class, x, create_graph=True)
            torch.autograd.backward(slope.square().sum())  # every branch of the graph, so that none is gone around
        except RuntimeError as error:
            raise InputError(
                f"a network under {who}",
                expected="layers that can be differentiated twice",
                got=str(error).partition("\n")[0],
                fix="Write the layer's backward pass with differentiable operations, or leave the method out.",
            ) from error
