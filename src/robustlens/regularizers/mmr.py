"""The maximum margin regularizer: wide linear regions around the images, and decision boundaries far from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from robustlens.core.modes import evaluating, untouched
from robustlens.core.passes import Passes
from robustlens.core.second_derivative import require_second_derivative
from robustlens.core.types import Crafted, Moment, Terms
from robustlens.linalg.frozen_convolutions import FrozenConvolutions
from robustlens.linalg.receptive import Sweep, cheapest_sweep, colours, receptive_fields
from robustlens.linalg.regions import (
    DUAL,
    Heights,
    gradient_norms,
    heights_along,
    norms_by_column,
    observed,
    observed_until,
    require_relu_regions,
)
from robustlens.results.errors import InputError
from robustlens.threats.lp import NORMS, Norm

#: What is remembered of the network from step to step.
COLOURS = "mmr/colours"

#: How many rows of the Jacobian cost as much as a colour with all that is pulled along it.
COLUMN = 0.45


#: A part of the penalty's value, and tensors with the slopes (None for 1) that the penalty has by them.
Part = tuple[Tensor | float, Iterable[tuple[Tensor, Tensor | None]]]


class Near(NamedTuple):
    """The boundaries of one layer that a hinge reaches, by ``example`` (P,) and ``unit`` (P,); ``size`` is ‖v_j‖ (P,).

    ``share`` is what a whole hinge adds to the penalty.
    """

    example: Tensor
    unit: Tensor
    size: Tensor
    gamma: float
    share: float


@dataclass(frozen=True, kw_only=True)
class MMR:
    """λ s · mean [ 1/k_B Σ_{k_B nearest units} [1 − d_B/γ_B]₊ + 1/K Σ_{k≠y} [1 − d_D/γ_D]₊ ].

    In the linear region of the clean image x, unit j is v_j·x + a_j before its ReLU, and class k has the logit
    V_k·x + a_k. The region ends at d_B = |v_j·x + a_j| / ‖v_j‖_q, the decision at the signed
    d_D = (f_y − f_k) / ‖V_y − V_k‖_q, with q the dual of ``norm``. Within the region both are exact distances.

    As in the authors' code: all classes count (k_D = K), and the divisor stays K although y itself adds nothing; with
    e = 1, 2, … the epoch, s = min(e / ``warmup``, 1), and k_B moves from ``first`` to ``last`` of all units as
    int(first + (last − first) · e / epochs). Unlike there, rows at the border of a padded first layer are exact,
    nothing is added to small entries of v_j, a unit that is constant on the region (v_j = 0) has no boundary, and
    beside adversarial training the penalty stays with the clean images.

    The network runs in eval mode: no dropout, BatchNorm an affine map. Where max-pooling switches is not counted.

    Which boundaries are near is searched without gradient, as ``linalg.regions.gradient_norms`` finds ‖v_j‖ of all
    units. Only the hinges that are not zero are then differentiated, in forward mode, one row each, as deep as their
    layer lies; where that takes more passes, those of the layers with small receptive fields a colour at a time
    instead, however many they are (not for "l1", whose ‖v_j‖_∞ hangs on one column). The result is exact either way.
    Gradients are summed ``chunk`` images at a time, so that memory does not grow with k_B; the penalty can be
    differentiated once, and with respect to the weights alone.

    Cost a step: 3 forward passes, tangent and input passes by the receptive fields (at most C·H·W tangent ones), and
    for each of at most k_B + K − 1 rows, or for each colour, a tangent pass that is differentiated by the weights.
    ``passes`` counts these for lenet-small on MNIST: twice 100 colours of pixels, 110 units and classes that see every
    pixel, and 9 classes.

    Attributes:
        weight: λ.
        gamma_b, gamma_d: distances, in pixels of [0, 1], from which on a boundary is far enough.
        norm: of the threat: "linf", "l2" or "l1".
        warmup: epochs over which s grows to 1.
        first, last: share of the hidden units that count, in the first and in the last epoch.
        chunk: images that are processed at a time; so few stay in a processor's caches.

    Raises:
        InputError: a negative weight or warmup, a distance ≤ 0, shares outside [0, 1], a chunk below 1; a network
            that is not piecewise linear, that bends elsewhere than in nn.ReLU and nn.LeakyReLU modules, or that has no
            derivatives in forward mode.
    """

    name: ClassVar[str] = "mmr"
    reference: ClassVar[str] = "Croce, Andriushchenko & Hein 2019, arXiv 1810.07481, §4 (MMR), and the authors' code"

    weight: float = 1.0
    gamma_b: float = 1.0
    gamma_d: float = 1.0
    norm: Norm = "l2"
    warmup: float = 10.0
    first: float = 0.1
    last: float = 0.02
    chunk: int = 256

    def __post_init__(self) -> None:
        for field, right, expected in (
            ("weight", self.weight >= 0, "a number ≥ 0"),
            ("gamma_b", self.gamma_b > 0, "a distance > 0"),
            ("gamma_d", self.gamma_d > 0, "a distance > 0"),
            ("norm", self.norm in NORMS, "linf, l2 or l1"),
            ("warmup", self.warmup >= 0, "epochs ≥ 0"),
            ("first", 0 <= self.first <= 1, "a share in [0, 1]"),
            ("last", 0 <= self.last <= 1, "a share in [0, 1]"),
            ("chunk", self.chunk >= 1, "1 or more"),
        ):
            if not right:
                raise InputError(
                    f"mmr {field}", expected=expected, got=str(getattr(self, field)), fix="Correct the value."
                )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(weight=0.5, gamma_b=0.2, gamma_d=0.3, norm="linf", warmup=0, first=1.0, last=0.5, chunk=5)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes(forward=3, inputs=119, tangent=209, weights=109)

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Refuse a network whose linear regions are not those of its ReLU modules."""
        require_second_derivative(model, x, self.name)
        require_relu_regions(model, x, self.name)
        try:
            with evaluating(model):
                torch.func.vmap(lambda v: heights_along(lambda z: [model(z)], x, v)[1])(torch.ones_like(x)[None])
        except RuntimeError as error:
            raise InputError(
                f"a network under {self.name}",
                expected="layers that can be differentiated in forward mode, under torch.func.vmap",
                got=str(error).partition("\n")[0],
                fix="Write the layer with torch's operations, or give its autograd function a jvp.",
            ) from error

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        return self.value(model, crafted, terms, self.search(model, crafted, gen=gen))

    def search(self, model: nn.Module, crafted: Crafted, *, gen: Generator) -> list[Near]:
        """The boundaries within γ among the nearest of each image: of each ReLU call, and at last of the classes."""
        batch = crafted.batch
        x, y = batch.x.detach(), batch.y
        with untouched(model), torch.enable_grad():
            layers = crossings(model, x, y)

            def heights(many: Tensor) -> list[Tensor]:
                return crossings(model, many, y.repeat(len(many) // len(x)))

            sweep = self._sweep(heights, x, batch.moment)
            sizes = gradient_norms(heights, x, DUAL[self.norm], chunk=self.chunk, sweep=sweep)
        units, classes = sum(layer.shape[1] for layer in layers[:-1]), layers[-1].shape[1]
        ramp, count = self.schedule(batch.moment, units)
        distances = [
            torch.where(size > 0, height / size, torch.inf)
            for height, size in zip([*(layer.abs() for layer in layers[:-1]), layers[-1]], sizes, strict=True)
        ]
        hidden = torch.cat(distances[:-1], 1)
        nearest = torch.zeros_like(hidden, dtype=torch.bool)
        nearest.scatter_(1, hidden.topk(count, largest=False).indices, True)
        share = self.weight * ramp / len(x)
        parts = torch.split(nearest & (hidden < self.gamma_b), [layer.shape[1] for layer in layers[:-1]], dim=1)
        return [
            *(_near(part, size, self.gamma_b, share / count) for part, size in zip(parts, sizes, strict=False)),
            _near(distances[-1] < self.gamma_d, sizes[-1], self.gamma_d, share / classes),
        ]

    def value(self, model: nn.Module, crafted: Crafted, terms: Terms, found: list[Near]) -> Tensor:
        """The penalty (scalar) over the boundaries in ``found``."""
        total = crafted.batch.x.new_zeros(())
        weights = [p for p in model.parameters() if p.requires_grad]
        slopes = [torch.zeros_like(p) for p in weights]
        with evaluating(model):
            for part, behind in self._parts(model, crafted, found):
                learning = [(tensor, by) for tensor, by in behind if tensor.requires_grad]
                tensors, bys = [tensor for tensor, _ in learning], [by for _, by in learning]
                news = torch.autograd.grad(tensors, weights, bys, allow_unused=True) if learning else []
                for slope, new in zip(slopes, news, strict=False):
                    if new is not None:
                        slope += new
                total = total + part
        # Adds 0, and has the gradient that was summed: no graph outlives its chunk.
        for p, slope in zip(weights, slopes, strict=True):
            total = total + ((p - p.detach()) * slope).sum()
        return total

    def schedule(self, moment: Moment, units: int) -> tuple[float, int]:
        """s and k_B in the epoch of ``moment``, for a network with so many hidden units."""
        epoch = int(moment.epoch) + 1
        first, last = int(self.first * units), int(self.last * units)
        count = int(first + (last - first) * epoch / moment.epochs)
        return min(epoch / self.warmup, 1.0) if self.warmup else 1.0, max(count, 1)

    def _sweep(self, heights: Heights, x: Tensor, moment: Moment) -> Sweep:
        """How the network's norms are found, which stays the same from step to step."""
        if COLOURS not in moment.memory:
            fields = receptive_fields(heights, x, chunk=self.chunk)
            each = [colours(fields[: k + 1]) for k in range(cheapest_sweep(fields).layers)]
            moment.memory[COLOURS] = torch.stack(each) if each else torch.zeros(0, x[0].numel(), dtype=torch.int64)
        return _sweeps(moment)[-1]

    def _parts(self, model: nn.Module, crafted: Crafted, found: list[Near]) -> Iterator[Part]:
        """What sums to the penalty, and to its gradient."""
        sweeps = _sweeps(crafted.batch.moment)[: len(found) if self.norm != "l1" else 1]  # not the classes
        rows = [len(near.unit) for near in found]

        def passes(sweep: Sweep) -> float:
            columns = COLUMN * sweep.colours * len(crafted.batch) if sweep.layers else 0
            return columns + sum(rows[sweep.layers : len(sweeps) - 1])

        sweep = min(sweeps, key=passes)
        if sweep.layers:
            yield from self._by_column(model, crafted, found[: sweep.layers], sweep)
        for layer in range(sweep.layers, len(found)):
            for first in range(0, len(found[layer].unit), self.chunk):
                part = slice(first, first + self.chunk)
                example, unit, size = (entry[part] for entry in found[layer][:3])
                near = Near(example, unit, size, *found[layer][3:])
                yield self._by_row(model, crafted, layer, near, last=layer == len(found) - 1)

    def _by_row(self, model: nn.Module, crafted: Crafted, layer: int, near: Near, *, last: bool) -> Part:
        """The hinges of ``near``, as deep as their ``layer`` lies: ‖v_j‖_q = ⟨n, v_j⟩ is the slope of h_j along n.

        n is the direction of steepest ascent of h_j within the unit ball of the norm, and is held fixed.
        """
        x, y = crafted.batch.x.detach()[near.example], crafted.batch.y[near.example]

        def height(x: Tensor) -> list[Tensor]:
            heights = crossings(model, x, y)[-1] if last else observed_until(model, x, layer)[-1]
            return [heights.gather(1, near.unit[:, None])[:, 0]]

        with untouched(model), torch.enable_grad(), FrozenConvolutions():
            point = x.clone().requires_grad_()
            (row,) = torch.autograd.grad(height(point)[0].sum(), point)
        row.requires_grad_()
        (steepest,) = torch.autograd.grad(row.flatten(1).norm(DUAL[self.norm], dim=1).sum(), row)
        (value,), (size,) = heights_along(height, x, steepest)
        distance = (value if last else value.abs()) / size
        return _scalar((near.share * F.relu(1 - distance / near.gamma)).sum())

    def _by_column(self, model: nn.Module, crafted: Crafted, found: list[Near], sweep: Sweep) -> Iterator[Part]:
        """The hinges of the first layers, ``found``: those of all units at once, by columns of the Jacobian."""
        x, q, shares = crafted.batch.x.detach(), DUAL[self.norm], []
        total = x.new_zeros(())
        for near, layer in zip(found, observed_until(model, x, len(found) - 1), strict=True):
            distance = layer[near.example, near.unit].abs() / near.size
            hinge = near.share * F.relu(1 - distance / near.gamma)
            total = total + hinge.sum()
            # The slope of the hinge by ‖v_j‖, over that of ‖v_j‖_q^q / q.
            slope = near.share / near.gamma * distance.detach() / near.size**q * (hinge.detach() > 0)
            shares.append(torch.zeros_like(layer).index_put((near.example, near.unit), slope))
        yield _scalar(total)
        for behind in norms_by_column(model, len(found) - 1, x, q, shares, sweep=sweep, chunk=self.chunk):
            yield 0.0, behind


def _sweeps(moment: Moment) -> list[Sweep]:
    """Those of no layer, of the first one, of the first two, …, as far as columns are cheaper than rows."""
    each = moment.memory[COLOURS]
    return [Sweep(each.new_zeros(each.shape[1]), 0), *(Sweep(colour, k + 1) for k, colour in enumerate(each))]


def _scalar(part: Tensor) -> Part:
    return part.detach(), [(part, None)]


def _near(within: Tensor, size: Tensor, gamma: float, share: float) -> Near:
    example, unit = within.nonzero(as_tuple=True)
    return Near(example, unit, size[within], gamma, share)


def crossings(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """What is 0 on the boundaries: the inputs of every call of a ReLU (B, U), and f_y − f_k of all classes (B, K)."""
    seen, logits = observed(model, x)
    return [*seen, logits.gather(1, y[:, None]) - logits]
