"""The cost of a method, counted in passes of a batch through the network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

#: How each field of Passes is written.
WRITTEN = {
    "forward": "forward",
    "inputs": "input",
    "weights": "weight",
    "double": "double",
    "tangent": "tangent",
}


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a batch goes through the network in a step, and for what.

    Attributes:
        forward: forward passes without any gradient.
        inputs: forward and backward passes to the images, with frozen weights (a step of PGD is one).
        weights: forward and backward passes to the weights (a plain training step is one).
        double: what it costs beyond a weight pass to keep the gradient with respect to the images in the graph, and
            to go backward through it to the weights.
        tangent: forward-mode derivatives along one direction an image, with frozen weights.
    """

    forward: float = 0
    inputs: float = 0
    weights: float = 0
    double: float = 0
    tangent: float = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def __mul__(self, times: float) -> Passes:
        return Passes(**{f.name: times * getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def learning(self) -> Passes:
        """The part that yields the gradient of the weights; the rest is crafting."""
        return Passes(weights=self.weights, double=self.double)

    def __str__(self) -> str:
        """For example "10 input + 1 weight"."""
        counts = {written: getattr(self, name) for name, written in WRITTEN.items()}
        return " + ".join(f"{count:g} {written}" for written, count in counts.items() if count) or "none"
