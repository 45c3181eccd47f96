"""Singular values of every weight layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Generator

from robustlens.core.discovery import describe
from robustlens.core.types import Split, Subject
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.linalg.layers import ConvOperator, Operator, Skipped, operators
from robustlens.linalg.spectra import linear_spectrum
from robustlens.results.panels import Curve, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading

HEADER = (
    "layer",
    "kernel",
    "operator",
    "values",
    "largest",
    "upper bound",
    "smallest",
    "mean",
    "standard deviation",
    "condition",
    "reshaped: largest",
    "reshaped: standard deviation",
)


@dataclass(frozen=True, kw_only=True)
class LayerSpectra:
    """All singular values σ of every Linear and Conv2d layer W_i, and the spectral complexity ∏ᵢ σ_max(W_i).

    A convolution is measured as the operator on images that it is, with circular padding (for strides by
    splitting the image into its phases), as the papers do. The table says for each layer whether that *is* the
    layer ("exact") or stands for it, and gives a certified upper bound of the norm of the zero-padded layer.
    "Reshaped" is the matrix c_out × c_in·k², another matrix with other values, which some papers mean.
    The condition is σ_max / σ_min; blank where σ_min is below rounding (1e-14 σ_max).

    What the numbers are not: batch normalisation after a layer rescales it, so a spectrum alone says nothing about
    sensitivity there (BatchNorm is not folded in), and the spectral complexity bounds the network's Lipschitz
    constant only for a plain chain of these layers, not across residual branches or pooling.

    Layers with weights that are neither Linear nor Conv2d are listed in the table and left out of the products.

    Attributes:
        bound: also compute the upper bounds (about as much work again).
        points: points of a layer's curve.
    """

    name: ClassVar[str] = "layer-spectra"
    reference: ClassVar[str] = "Sedghi, Gupta and Long 2019, arXiv 1805.10408, Theorem 6"

    bound: bool = True
    points: int = 200

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(bound=False, points=20)]

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A single layer diag(3, 1, …): the largest is 3, and the spread that of its two values."""
        split = Split(torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 2)
        weight = torch.zeros(2, 4)
        weight[0, 0], weight[1, 1] = 3.0, 1.0
        subject = linear_subject(weight, torch.zeros(2), train=split, test=split)
        expected = {
            "log10 spectral complexity": (math.log10(3.0), 1e-12),
            "largest layer norm": (3.0, 1e-12),
            "mean spread of singular values": (1.0, 1e-12),
        }
        return [Oracle(subject, cls(), expected)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        image = subject.splits.test.batch(torch.tensor([0])).x.to(subject.device)
        rows: list[tuple[str | float | None, ...]] = []
        curves: list[Series] = []
        norms: dict[str, float] = {}
        bounds: list[float | None] = []
        spreads: dict[str, float] = {}
        convolutions: list[float] = []
        exact = True
        for layer in operators(subject.model, image):
            if isinstance(layer, Skipped):
                rows.append((layer.name, None, f"not measured: {layer.why}", *[None] * (len(HEADER) - 3)))
                continue
            if not bool(torch.isfinite(layer.weight).all()):
                return self._failed(f"Layer {layer.name} holds weights that are not finite numbers.")
            values = layer.spectrum().numpy()
            exact = exact and layer.label == "exact"
            norms[layer.name], spreads[layer.name] = float(values[0]), float(values.std())
            if isinstance(layer, ConvOperator):
                convolutions.append(float(values.std()))
            bounds.append(layer.norm_bound() if self.bound else None)
            rows.append(_row(layer, values, bounds[-1]))
            curves.append(_curve(layer.name, values, self.points))
        if not norms:
            return self._failed("The model has no linear or convolutional layer that its forward pass uses.")
        return Reading(
            lens=self.name,
            says=_sentence(norms),
            quantities=tuple(_quantities(norms, bounds, spreads, convolutions, "exact" if exact else "estimate")),
            headline=(
                *(("log10 spectral complexity",) if min(norms.values()) > 0 else ()),
                "mean spread of singular values",
            ),
            panels=(
                Curve("Singular values of the layers", "rank / number of values", "singular value", tuple(curves)),
                Table("Layers and their spectra", HEADER, tuple(rows)),
            ),
            settings=describe(self),
        )

    def _failed(self, why: str) -> Reading:
        return Reading(
            lens=self.name, says="No spectrum was measured.", outcome=Outcome.failed(why), settings=describe(self)
        )


def _row(layer: Operator, values: np.ndarray, bound: float | None) -> tuple[str | float | None, ...]:
    largest, smallest = float(values[0]), float(values[-1])
    reshaped = linear_spectrum(layer.weight.flatten(1)).numpy()
    return (
        layer.name,
        "×".join(map(str, layer.weight.shape)),
        layer.label,
        len(values),
        largest,
        bound,
        smallest,
        float(values.mean()),
        float(values.std()),
        largest / smallest if smallest > 1e-14 * largest else None,
        float(reshaped[0]),
        float(reshaped.std()),
    )


def _curve(name: str, values: np.ndarray, points: int) -> Series:
    """At most ``points`` of the values, the largest and the smallest among them, by rank from 0 to 1."""
    last = len(values) - 1
    keep = np.unique(np.linspace(0, last, min(points, len(values))).round().astype(int))
    return Series(name, keep / max(last, 1), values[keep])


def _quantities(
    norms: dict[str, float],
    bounds: list[float | None],
    spreads: dict[str, float],
    convolutions: list[float],
    nature: Literal["exact", "estimate"],
) -> list[Quantity]:
    """The summary; ``nature`` is "exact" where every measured operator is the layer itself."""
    n = len(norms)
    found = []
    if min(norms.values()) > 0:
        complexity = sum(math.log10(v) for v in norms.values())
        found.append(Quantity("log10 spectral complexity", complexity, n=n, nature=nature))
    certified = [b for b in bounds if b is not None]
    if len(certified) == n and min(certified) > 0:
        value = sum(math.log10(b) for b in certified)
        found.append(Quantity("log10 product of norm bounds", value, n=n, nature="upper bound"))
    found.append(Quantity("largest layer norm", max(norms.values()), n=n, nature=nature))
    spread = sum(spreads.values()) / n
    found.append(Quantity("mean spread of singular values", spread, n=n, nature=nature))
    if convolutions:
        mean = sum(convolutions) / len(convolutions)
        found.append(Quantity("mean spread, convolutions", mean, n=len(convolutions), nature=nature))
    return found


def _sentence(norms: dict[str, float]) -> str:
    strongest = max(norms, key=lambda name: norms[name])
    said = f"The layer that stretches most is {strongest}: it can lengthen its input about {norms[strongest]:.3g} times"
    zero = [name for name, norm in norms.items() if norm == 0]
    if zero:
        return f"{said}; layer {zero[0]} is all zeros and passes nothing on."
    product = sum(math.log10(v) for v in norms.values())
    factor = f"{10**product:.3g}" if abs(product) < 5 else f"10^{product:.1f}"
    return f"{said}, and the product over all {len(norms)} layers is {factor}."
