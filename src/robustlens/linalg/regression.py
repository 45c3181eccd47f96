"""The Jacobian without derivatives: linear regression on the answers to perturbed images, activations held.

With every activation function fixed to what it does at x, a network is affine. Random perturbations of x are sent
through it, and the least-squares fit of its logits to them is J ("Extracting Jacobian as a Matrix", Roth, Kilcher and
Hofmann, arXiv 1906.01527, A.5). Nothing is differentiated, so it tells whether the backward pass is right.

ReLUs and max-pooling are held: they treat every perturbed image as they treat x, which a perturbation of any size
would otherwise change, because an even background has ties in every window of a pooling layer. Other layers are run as
they are; they bend over the radius of the perturbations, so that is small, and everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from robustlens.results.errors import InputError

#: Pixels that an image may have: the regression solves a system of that many unknowns.
MOST = 4096

_OPS = torch.ops.aten
_RELUS = (_OPS.relu.default, _OPS.relu_.default)
_LEAKY = (_OPS.leaky_relu.default, _OPS.leaky_relu_.default)


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """ReLU and max-pooling do to each of ``size`` images what they do to the first."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS and len(args[0]) == self.size:
            return self._scaled(func is _RELUS[1], args[0], 0.0)
        if func in _LEAKY and len(args[0]) == self.size:
            return self._scaled(func is _LEAKY[1], args[0], args[1] if len(args) > 1 else 0.01)
        if func is _OPS.max_pool2d_with_indices.default and len(args[0]) == self.size:
            _, at = func(args[0][:1], *args[1:], **kwargs)
            at = at.expand(self.size, *at.shape[1:])
            return args[0].flatten(2).gather(2, at.flatten(2)).view(at.shape), at
        return func(*args, **kwargs)

    @staticmethod
    def _scaled(in_place: bool, h: Tensor, slope: float) -> Tensor:
        factor = torch.where(h[:1] > 0, 1.0, slope).to(h.dtype)
        return h.mul_(factor) if in_place else h * factor


@torch.no_grad()
def regressed_jacobian(
    model: nn.Module, x: Tensor, *, gen: Generator, radius: float = 1e-4, batch_size: int = 256
) -> Tensor:
    """J (B, K, n) of the logits at images ``x`` (B, C, H, W), in float64, from 1.5 (n + 1) forward passes an image.

    Args:
        model: in eval mode; it is run with float64 copies of its weights.
        radius: standard deviation of a pixel's perturbation.
        batch_size: perturbed images of a forward pass.

    Raises:
        InputError: an image of more than MOST pixels.
    """
    n = x[0].numel()
    if n > MOST:
        raise InputError(
            "a regression of logits on pixels",
            expected=f"at most {MOST} pixels",
            got=str(n),
            fix="Leave it out; the derivative is computed without it.",
        )
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in weights.items()}
    steps = torch.empty((3 * (n + 1) // 2, n), dtype=torch.float64, device=x.device).normal_(0, radius, generator=gen)
    steps -= steps.mean(0)  # now the intercept drops out
    factor = torch.linalg.cholesky(steps.T @ steps)
    found = []
    for image in x.double():
        answers = []
        for part in torch.split(steps, batch_size):
            images = torch.cat([image[None], image + part.view(-1, *image.shape)])
            with _Held(len(images)):
                answers.append(functional_call(model, wide, (images,))[1:])
        found.append(torch.cholesky_solve(steps.T @ torch.cat(answers).double(), factor).T)
    return torch.stack(found)
