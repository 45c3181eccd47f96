"""Singular values of every weight layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Generator, nn

from robustlens.core.discovery import describe
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.oracle import Oracle, linear_subject
from robustlens.linalg.layers import ConvOperator, Operator, Skipped, operators
from robustlens.linalg.spectra import linear_spectrum
from robustlens.results.errors import require_at_least
from robustlens.results.panels import Curve, Floats, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.threats.lp import Lp

HEADER = (
    "layer",
    "kernel",
    "operator",
    "values",
    "largest",
    "smallest",
    "mean",
    "standard deviation",
    "condition",
    "norm as padded",
    "residual",
    "upper bound",
    "reshaped: largest",
    "reshaped: standard deviation",
)

PLAIN = "Layers and their spectra"
FOLDED = "Layers and their spectra, BatchNorm folded in"


@dataclass(frozen=True, kw_only=True)
class LayerSpectra:
    """All singular values σ of every Linear and Conv2d layer W_i, and how much the layers together can stretch.

    A convolution's values are those of the operator on images that it is, with circular padding (for strides by
    splitting the image into its phases), as the papers do. The table says for each layer whether that *is* the
    layer ("exact") or stands for it. A layer that pads otherwise has in addition its own norm, by Golub and Kahan's
    method with a residual (a lower bound: σ = ‖Wv‖ for a unit v), and a certified upper bound of it (zero
    padding: the circular operator on n + k − 1 pixels). "Reshaped" is the matrix c_out × c_in·k², another matrix with
    other values, which some papers mean. The condition is σ_max / σ_min; blank where σ_min < 1e-14 σ_max.

    With σ_i the layers' own norms and rows a of their matrices A_i,

        spectral complexity = ∏ᵢ σ_i,        Bartlett complexity = ∏ᵢ σ_i · (Σᵢ (Σ_{a ∈ A_i} ‖a‖₂ / σ_i)^{2/3})^{3/2}

    (Wen, Li and Jia, definition 7; Bartlett, Foster and Telgarsky 2017, arXiv 1706.08498, eq. 1.2 with reference
    matrices 0), in log10. A BatchNorm that takes a layer's output multiplies its rows by γ / √(v + ε) in eval mode; if
    there is one, everything is given twice, for the layers alone and with BatchNorm folded in.

    The products bound the network's Lipschitz constant only for a plain chain of these layers, not across residual
    branches. The table lists what is left out: other layers with weights, and BatchNorm that no layer comes
    right before. On one CPU core the 28×28 networks take a second; ResNet-18 on 3×32×32 takes 20 to 30 s for the layers
    alone, in about equal parts for the spectra, the norms and the bounds, and as much again with BatchNorm.

    Attributes:
        bound: also compute the upper bounds.
        points: points of a layer's curve.
        steps: most products with a layer and its transpose in Golub and Kahan's method.

    Raises:
        InputError: no points, or no steps.
    """

    name: ClassVar[str] = "layer-spectra"
    reference: ClassVar[str] = "Sedghi, Gupta and Long 2019, arXiv 1805.10408, Theorem 6; Golub and Kahan 1965"
    unsteady: ClassVar[bool] = True

    bound: bool = True
    points: int = 200
    steps: int = 60

    def __post_init__(self) -> None:
        require_at_least(self, points=1, steps=1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(bound=False, points=20, steps=5)]

    @classmethod
    def oracles(cls) -> list[Oracle]:
        """A layer diag(3, 1, …), and the zero-padded kernel kkᵀ, k = [1, 2, 1], with a BatchNorm that doubles.

        The norm of the latter on n × n images is (2 + 2 cos(π / (n + 1)))²; around the circle it is 16.
        """
        split = Split(torch.full((4, 1, 2, 2), 0.5), torch.arange(4) % 2)
        weight = torch.zeros(2, 4)
        weight[0, 0], weight[1, 1] = 3.0, 1.0
        line = linear_subject(weight, torch.zeros(2), train=split, test=split)
        chain = {
            "log10 spectral complexity": (math.log10(3.0), 1e-12),
            "log10 Bartlett complexity": (math.log10(4.0), 1e-12),
            "largest layer norm": (3.0, 1e-12),
            "mean spread of singular values": (1.0, 1e-12),
        }
        norm = (2 + 2 * math.cos(math.pi / 6)) ** 2
        padded = {
            "log10 spectral complexity": (math.log10(norm), 1e-6),
            "largest layer norm": (norm, 1e-4),
            "largest layer norm, BatchNorm folded in": (2 * norm, 2e-4),
        }
        return [Oracle(line, cls(), chain), Oracle(_triangle(), cls(), padded)]

    def look(self, subject: Subject, *, gen: Generator) -> Reading:
        image = subject.splits.test.batch(torch.tensor([0])).x.to(subject.device)
        layers = operators(subject.model, image)
        skipped = [layer for layer in layers if isinstance(layer, Skipped)]
        measured = [layer for layer in layers if not isinstance(layer, Skipped)]
        if not measured:
            return self._failed("Its forward pass shows no linear or convolutional layer, as that of a frozen program.")
        for layer in measured:
            if not bool(torch.isfinite(layer.folded().weight).all()):
                return self._failed(f"Layer {layer.name} or its BatchNorm holds numbers that are not finite.")
        plain = [self._measure(layer, gen) for layer in measured]
        quantities = _quantities(plain, "")
        panels: list[Curve | Table] = [
            _curves("Singular values of the layers", plain, self.points),
            _table(PLAIN, plain, skipped),
        ]
        if any(layer.scale is not None for layer in measured):
            folded = [
                found if found.layer.scale is None else self._measure(found.layer.folded(), gen) for found in plain
            ]
            quantities += _quantities(folded, ", BatchNorm folded in")
            panels += [
                _curves("Singular values of the layers, BatchNorm folded in", folded, self.points),
                _table(FOLDED, folded, skipped),
            ]
        return Reading(
            lens=self.name,
            says=_sentence(plain),
            quantities=tuple(quantities),
            headline=(
                *(("log10 spectral complexity",) if all(found.norm > 0 for found in plain) else ()),
                "mean spread of singular values",
            ),
            panels=tuple(panels),
            settings=describe(self),
        )

    def _measure(self, layer: Operator, gen: Generator) -> _Measured:
        values = layer.spectrum().numpy()
        if isinstance(layer, ConvOperator) and not layer.exact:
            top = layer.top(gen=gen, steps=self.steps)
            return _Measured(layer, values, top.value, top.residual, layer.norm_bound() if self.bound else None)
        norm = float(values[0])
        return _Measured(layer, values, norm, None, norm if self.bound else None)

    def _failed(self, why: str) -> Reading:
        return Reading(
            lens=self.name, says="No spectrum was measured.", outcome=Outcome.failed(why), settings=describe(self)
        )


@dataclass(frozen=True, eq=False)
class _Measured:
    """A layer with the singular ``values`` of its (circular) operator, descending, and its own ``norm``.

    ``residual`` is that of the norm, None where it is exact; ``bound`` is an upper bound of it, None where unknown.
    """

    layer: Operator
    values: Floats
    norm: float
    residual: float | None
    bound: float | None


def _table(title: str, found: Sequence[_Measured], skipped: Sequence[Skipped]) -> Table:
    rows = [_row(one) for one in found]
    rows += [(layer.name, None, f"not measured: {layer.why}", *[None] * (len(HEADER) - 3)) for layer in skipped]
    return Table(title, HEADER, tuple(rows))


def _row(found: _Measured) -> tuple[str | float | None, ...]:
    layer, values = found.layer, found.values
    largest, smallest = float(values[0]), float(values[-1])
    reshaped = values if layer.weight.ndim == 2 else linear_spectrum(layer.weight.flatten(1)).numpy()
    return (
        layer.name,
        "×".join(map(str, layer.weight.shape)),
        layer.label,
        len(values),
        largest,
        smallest,
        float(values.mean()),
        float(values.std()),
        largest / smallest if smallest > 1e-14 * largest else None,
        found.norm,
        found.residual,
        found.bound,
        float(reshaped[0]),
        float(reshaped.std()),
    )


def _curves(title: str, found: Sequence[_Measured], points: int) -> Curve:
    series = tuple(_curve(one.layer.name, one.values, points) for one in found)
    return Curve(title, "rank / number of values", "singular value", series)


def _curve(name: str, values: Floats, points: int) -> Series:
    """At most ``points`` of the values, the largest and the smallest among them, by rank from 0 to 1."""
    last = len(values) - 1
    keep = np.unique(np.linspace(0, last, min(points, len(values))).round().astype(int))
    return Series(name, keep / max(last, 1), values[keep])


def _quantities(found: Sequence[_Measured], suffix: str) -> list[Quantity]:
    """The summary over layers. Norms by Golub and Kahan are lower bounds, so what grows with them is one as well."""
    n = len(found)
    exact = all(one.layer.exact for one in found)
    residual = max((one.residual for one in found if one.residual is not None), default=None)
    below: Literal["exact", "lower bound"] = "exact" if exact else "lower bound"
    nature: Literal["exact", "estimate"] = "exact" if exact else "estimate"
    summary = []
    if all(one.norm > 0 for one in found):
        product = sum(math.log10(one.norm) for one in found)
        ratios = [float(one.layer.row_norms().sum()) / one.norm for one in found]
        bartlett = product + 1.5 * math.log10(sum(ratio ** (2 / 3) for ratio in ratios))
        summary += [
            Quantity("log10 spectral complexity", product, n=n, residual=residual, nature=below),
            Quantity("log10 Bartlett complexity", bartlett, n=n, residual=residual, nature=nature),
        ]
    certified = [one.bound for one in found if one.bound is not None]
    if len(certified) == n and min(certified) > 0:
        value = sum(math.log10(bound) for bound in certified)
        summary.append(Quantity("log10 product of norm bounds", value, n=n, nature="upper bound"))
    top = max(found, key=lambda one: one.norm)
    summary.append(Quantity("largest layer norm", top.norm, n=n, residual=top.residual, nature=below))
    spreads = [float(one.values.std()) for one in found]
    summary.append(Quantity("mean spread of singular values", sum(spreads) / n, n=n, nature=nature))
    convolutions = [spread for one, spread in zip(found, spreads, strict=True) if isinstance(one.layer, ConvOperator)]
    if convolutions:
        mean = sum(convolutions) / len(convolutions)
        summary.append(Quantity("mean spread, convolutions", mean, n=len(convolutions), nature=nature))
    summary += [
        Quantity(
            f"spread of singular values, {one.layer.name}", spread, nature="exact" if one.layer.exact else "estimate"
        )
        for one, spread in zip(found, spreads, strict=True)
    ]
    return [replace(quantity, name=quantity.name + suffix) for quantity in summary]


def _sentence(found: Sequence[_Measured]) -> str:
    top = max(found, key=lambda one: one.norm)
    said = f"The layer that stretches most is {top.layer.name}: it can lengthen its input about {top.norm:.3g} times"
    zero = [one.layer.name for one in found if one.norm == 0]
    if zero:
        return f"{said}; layer {zero[0]} is all zeros and passes nothing on."
    product = sum(math.log10(one.norm) for one in found)
    factor = f"{10**product:.3g}" if abs(product) < 5 else f"10^{product:.1f}"
    return f"{said}, and the product over all {len(found)} layers is {factor}."


def _triangle() -> Subject:
    """A 3 × 3 convolution with kernel kkᵀ, k = [1, 2, 1], and zeros around 5 × 5 images; its BatchNorm doubles."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Flatten()).eval()
    line = torch.tensor([1.0, 2.0, 1.0])
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(line[:, None] * line)
        model.get_parameter("1.weight").fill_(2 * math.sqrt(1 + 1e-5))
    split = Split(torch.full((4, 1, 5, 5), 0.5), torch.arange(4))
    return Subject(model, Splits("oracle", split, split, split, tuple(map(str, range(25)))), Lp("l2", 0.2))
