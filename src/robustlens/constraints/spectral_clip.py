"""Spectral control: no layer stretches its input by more than a given factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from robustlens.linalg.layers import ConvOperator, LinearOperator, Operator, Skipped, operators
from robustlens.linalg.projection import How, Projected, project_conv, project_linear
from robustlens.linalg.spectra import padded_circle
from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SpectralClip:
    """‖W_l‖₂ ≤ c for every Conv2d and Linear layer l, c = ``norm``; W_l is the layer as an operator on images.

    Bounds the spectral complexity Π_l ‖W_l‖₂. Layers within the bound keep their weights to the bit; momentum
    buffers, biases and BatchNorm are left alone. In a network with BatchNorm the scale of a convolution is divided
    out again, so there the constraint mostly changes the effective learning rate; the paper's networks have none.

    The paper says both "renormalize" and "clip"; it is read as a projection, which leaves small singular values alone.
    A strided layer is measured with its stride, not by the larger norm of the same layer without. "alternating" is the
    default because one clip leaves a He-initialised 3×3 layer at σ_max ≈ 1.3–1.4 for c = 1; the paper clipped once.
    One ``apply`` to ResNet-56 on 32×32 images takes 0.7 s on one CPU core where every layer is within the bound, and
    15 s where all 55 convolutions are He-initialised and c = 1 ("clip": 5 s).

    Attributes:
        norm: c > 0.
        how: "alternating" reaches the bound near the old weights; "clip" clips and crops once; "rescale" multiplies
            W_l by min(1, c / ‖W_l‖₂). The first two are one exact projection for Linear layers.
        operator: "circular" bounds the convolution on a circle as large as the layer's input, as the paper does;
            for a zero-padded layer this is close to its norm but no upper bound of it. "padded" bounds it on the
            smallest circle that certifies the layer as it is used.
        every: "epoch" or "step".

    Raises:
        InputError: ``norm`` ≤ 0, or (on checking) "padded" with layers that mirror the image at its border.
    """

    name: ClassVar[str] = "spectral-clip"
    reference: ClassVar[str] = (
        "Wen, Li and Jia 2020, arXiv 2011.07478, appendix B.4 and D.3; Sedghi, Gupta and Long 2019, arXiv 1805.10408"
    )

    norm: float = 1.0
    how: How = "alternating"
    operator: Literal["circular", "padded"] = "circular"
    every: Literal["step", "epoch"] = "epoch"

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise InputError(
                "spectral-clip norm", expected="a number > 0", got=str(self.norm), fix="The paper: 1 to 5."
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(norm=0.5, how="clip", every="step"),
            cls(norm=0.5, how="rescale", operator="padded"),
        ]

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Raise InputError where "padded" cannot certify a layer."""
        if self.operator == "padded":
            for layer in operators(model, x[:1]):
                if not isinstance(layer, Skipped) and layer.norm_bound() is None:
                    raise InputError(
                        f"spectral-clip of layer {layer.name}",
                        expected="zero or full circular padding",
                        got="another padding",
                        fix='Set operator = "circular".',
                    )

    @torch.no_grad()
    def apply(self, model: nn.Module, x: Tensor) -> Mapping[str, float]:
        """Project every layer; the largest norm over the layers before and after, of the operator that is bounded."""
        before = after = 0.0
        for layer in operators(model, x):
            if isinstance(layer, Skipped):
                continue
            found = self._project(layer)
            layer.weight.copy_(found.weight)
            before, after = max(before, found.before), max(after, found.after)
        return {"spectral_norm_before": before, "spectral_norm_after": after}

    def _project(self, layer: Operator) -> Projected:
        if isinstance(layer, LinearOperator):
            return project_linear(layer.weight, self.norm, how=self.how)
        return project_conv(
            layer.weight,
            self._circle(layer),
            self.norm,
            how=self.how,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    def _circle(self, layer: ConvOperator) -> tuple[int, int]:
        if self.operator == "circular" or layer.exact:
            return layer.circle
        return padded_circle(layer.weight, layer.size, stride=layer.stride, dilation=layer.dilation)
