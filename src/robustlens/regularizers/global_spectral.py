"""Global spectral norm regularization: the largest singular value of every layer, wherever the data lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.passes import Passes
from robustlens.core.types import Crafted, Terms
from robustlens.linalg.layers import ConvOperator, Skipped, operators
from robustlens.results.errors import require_at_least

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, kw_only=True)
class GlobalSpectralNorm:
    """λ/2 Σ_l σ(W_l)² over the linear layers and convolutions, with the gradient λσuvᵀ (u, v held fixed).

    σ = uᵀWv by the power method u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖. The v of every layer is kept from step to step (in
    ``moment.memory``), so that a single iteration follows weights that move slowly; it starts Gaussian.

    The iterations work on single matrices or images, not on the batch, and count as no pass; "true" also sends one
    image through the network in the first step, to learn on which sizes its convolutions work. A convolution followed
    by BatchNorm can be shrunk without any effect on the network.

    Attributes:
        weight: λ; the paper's ½ is beside it.
        iterations: of the power method in every step: 1, or 10 (the paper's appendix A.7).
        operator: what W is for a convolution: "reshaped", its kernel as a matrix (c_out, c_in·k_h·k_w), as in both
            papers, or "true", the map of images that it is, with its stride and padding; layers that do not run in a
            forward pass, or not on images, are then left out.

    Raises:
        InputError: a negative weight, or no iterations.
    """

    name: ClassVar[str] = "global-spectral-norm"
    reference: ClassVar[str] = (
        "Yoshida & Miyato 2017, arXiv 1705.10941; Roth, Kilcher & Hofmann 2020, arXiv 1906.01527, eq. 5 and 6"
    )

    weight: float = 3e-4
    iterations: int = 1
    operator: Literal["reshaped", "true"] = "reshaped"

    def __post_init__(self) -> None:
        require_at_least(self, weight=0, iterations=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(weight=0.01, iterations=10, operator="true")]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes()

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer → u, v after this step's iterations; every v is also kept in memory."""
        memory, layers = crafted.batch.moment.memory, _layers(model)
        if not any(f"{self.name}/{name}" in memory for name in layers):
            for name, shape in self._shapes(model, crafted.batch.x[:1].detach()).items():
                memory[f"{self.name}/{name}"] = layers[name].weight.new_empty(shape).normal_(generator=gen)
        found = {}
        for name, layer in layers.items():
            v = memory.get(f"{self.name}/{name}")
            if v is None:
                continue
            for _ in range(self.iterations):
                u, v = self._iterate(layer, v)
            memory[f"{self.name}/{name}"] = v
            found[name] = u, v
        return found

    def value(
        self, model: nn.Module, crafted: Crafted, terms: Terms, found: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The penalty with the directions ``found``, differentiable at the weights."""
        total, layers = crafted.x_adv.new_zeros(()), _layers(model)
        for name, (u, v) in found.items():
            total = total + self.weight / 2 * (u * self._apply(layers[name], v)).sum().square()
        return total

    def _iterate(self, layer: Layer, v: Tensor) -> tuple[Tensor, Tensor]:
        v = v.detach().requires_grad_()
        with torch.enable_grad():
            out = self._apply(layer, v)
        u = _unit(out.detach())
        pulled = torch.autograd.grad(out, v, u)[0]
        # A layer that starts at zero keeps its v for the day when it is not; one memory layout keeps resumes exact.
        return u, torch.where(pulled.norm() > 0, _unit(pulled), v.detach()).contiguous()

    def _apply(self, layer: Layer, v: Tensor) -> Tensor:
        """Wv, without the bias."""
        if isinstance(layer, nn.Conv2d) and self.operator == "true":
            out: Tensor = layer._conv_forward(v, layer.weight, None)  # with the layer's padding, of whatever mode
            return out
        return F.linear(v, layer.weight.flatten(1))

    def _shapes(self, model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Layer → shape of v."""
        if self.operator == "reshaped":
            return {name: (layer.weight[0].numel(),) for name, layer in _layers(model).items()}
        shapes: dict[str, tuple[int, ...]] = {}
        for found in operators(model, x):
            if isinstance(found, ConvOperator):
                shapes[found.name] = (1, found.weight.shape[1] * found.groups, *found.size)
            elif not isinstance(found, Skipped):
                shapes[found.name] = (found.weight.shape[1],)
        return shapes


def _layers(model: nn.Module) -> dict[str, Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def _unit(t: Tensor) -> Tensor:
    """t / ‖t‖₂ (0 for 0)."""
    size: Tensor = t.norm()
    return t / size.clamp_min(torch.finfo(t.dtype).tiny)
