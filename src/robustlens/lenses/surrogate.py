"""A stand-in for a network, fitted in closed form to nothing but its answers."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from robustlens.core.modes import untouched


class KernelSurrogate(nn.Module):
    """Kernel ridge regression of a network's answers: g(x) = Σ_i a_i exp(−γ ‖x − x_i‖²), a = (K + λI)⁻¹ Z.

    Z (N, K) are the network's logits at the images x_i, each row shifted and scaled to mean 0 and deviation 1: the
    ranking of the classes without the scale of the logits, which saturated networks inflate. γ is one
    over the mean squared distance of two images. No gradient of the network is used, and g is smooth: adversarial
    images of g show what a network hides that has no useful gradients of its own (Papernot et al. 2017,
    arXiv 1602.02697, with a kernel machine in place of the substitute network, so that nothing is trained).

    Shapes: images (B, C, H, W) to scores (B, K). Fitting N images takes N³/3 multiplications in float64; an answer
    to one image takes N · C · H · W.
    """

    RIDGE = 1e-2

    anchors: Tensor
    weights: Tensor

    def __init__(self, anchors: Tensor, weights: Tensor, gamma: float) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.register_buffer("weights", weights)
        self.gamma = gamma

    @classmethod
    def fitted(cls, model: nn.Module, x: Tensor, *, size: int = 250) -> Self:
        """Ask ``model`` about the images ``x`` (N, C, H, W), ``size`` at a time, and fit its answers."""
        with untouched(model), torch.no_grad():
            z = torch.cat([model(part) for part in torch.split(x, size)]).double()
            z = z - z.mean(1, keepdim=True)
            z = z / z.std(1, unbiased=False, keepdim=True).clamp_min(1e-12)
            flat = x.flatten(1)
            square = torch.cdist(flat, flat).double().square()
            gamma = 1 / max(float(square.mean()), 1e-12)
            kernel = torch.exp(-gamma * square)
            kernel.diagonal().add_(cls.RIDGE)
            weights = torch.linalg.solve(kernel, z)
        return cls(x.flatten(1), weights.to(x.dtype), gamma)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        inner = flat @ self.anchors.T
        square = flat.square().sum(1, keepdim=True) - 2 * inner + self.anchors.square().sum(1)
        scores: Tensor = torch.exp(-self.gamma * square.clamp_min(0)) @ self.weights
        return scores
