"""Receptive fields: which pixels a unit sees, and which columns of its Jacobian can be taken at once.

Where no unit sees two of some pixels, the derivative along all of them together holds, for every unit, the derivative
along the one that it sees: as many passes as colours are enough, where two pixels that a unit sees differ in colour
(Curtis, Powell and Reid 1974, J. Inst. Maths Applics 13, 117–119).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: From images (B, C, H, W) to tensors (B, units), one a layer.
Layers = Callable[[Tensor], list[Tensor]]

#: Entries of a layer's field that are looked at; larger ones are taken to be whole.
LARGEST = 2**28


class Sweep(NamedTuple):
    """How all rows of the Jacobian are found: the first ``layers`` by columns, a colour at a time, the others by rows.

    ``colour`` (pixels,) counts from 0.
    """

    colour: Tensor
    layers: int

    @property
    def colours(self) -> int:
        return int(self.colour.max()) + 1


def receptive_fields(layers: Layers, x: Tensor, *, chunk: int) -> list[Tensor]:
    """Which pixels can change which units, (pixels, units) a layer, for a network that takes images like ``x``.

    A pixel that is not a number makes every unit that it reaches not a number, whatever the weights are and whatever
    is switched off. Convolutions that are computed in tiles may spread it farther, never less far. ``layers`` is called
    with at most ``chunk`` images, copies of ``x`` (B, C, H, W) one after the other.
    """
    pixels = x[0].numel()
    copies = max(1, min(chunk, pixels + len(x) - 1) // len(x))
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for first in range(0, pixels, copies * len(x)):
            many = x.detach().repeat(copies, 1, 1, 1).flatten(1)
            here = torch.arange(min(len(many), pixels - first), device=x.device)
            many[here, first + here] = torch.nan
            parts.append([torch.isnan(layer[: len(here)]) for layer in layers(many.view(-1, *x.shape[1:]))])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def cheapest_sweep(fields: Sequence[Tensor]) -> Sweep:
    """The sweep with the fewest passes: one a colour, and one a unit of the layers that are found by rows."""
    pixels, units = fields[0].shape[0], [field.shape[1] for field in fields]
    best, fewest = Sweep(torch.zeros(pixels, dtype=torch.int64), 0), sum(units)
    for layers in range(1, len(fields) + 1):
        colour = colours(fields[:layers])
        sweep = Sweep(colour, layers)
        cost = sweep.colours + sum(units[layers:])
        if cost <= fewest:
            best, fewest = sweep, cost
    return best


def colours(fields: Sequence[Tensor]) -> Tensor:
    """Colours (pixels,) from 0 on; no unit of the layers with these ``fields`` sees two pixels of one colour."""
    pixels = len(fields[0])
    if any(field.numel() > LARGEST or bool(field.all()) for field in fields):
        return torch.arange(pixels)
    which, places = _alike(torch.cat(list(fields), 1))  # the channels of a place are seen by the same units
    together = torch.zeros(len(places), len(places), dtype=torch.bool)
    for field in fields:
        _, one_of_each = _alike(field.T)  # the channels of a unit see the same pixels
        seen = field[places][:, one_of_each].cpu().float()
        together |= seen @ seen.T > 0
    colour = torch.full((len(places),), -1)
    for place, others in enumerate(together):
        taken = torch.zeros(place + 1, dtype=torch.bool)
        taken[colour[:place][others[:place]]] = True
        colour[place] = int((~taken).to(torch.int8).argmax())  # the smallest that is free
    rank = (which[:, None] == which).tril(-1).sum(1).cpu()  # among the pixels that are alike, which differ in colour
    compact: Tensor = torch.unique(colour[which.cpu()] * int(rank.max() + 1) + rank, return_inverse=True)[1]
    return compact


def _alike(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the ``rows`` (n, m) of bits the number of its kind (n,), and the first row of each kind (kinds,)."""
    weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, which = torch.unique(rows.double() @ weights.to(rows.device), return_inverse=True)
    place = torch.arange(len(rows), device=rows.device)
    first = torch.full((int(which.max()) + 1,), len(rows), device=rows.device).scatter_reduce(0, which, place, "amin")
    first, order = first.sort()
    return order.argsort()[which], first
