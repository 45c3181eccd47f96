"""Losses of a network at other weights, clean and under attack, on the same examples with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from robustlens.attacks.verify import craft
from robustlens.core.modes import untouched
from robustlens.core.rng import generator
from robustlens.core.types import Attack, Batch, Split, Subject
from robustlens.lenses.passes import batches, useless_gradients
from robustlens.linalg.directions import Moved, Weights, batch_statistics, into_relative_ball, moved, moving_weights
from robustlens.results.panels import Floats

Statistics = Literal["frozen", "re-estimated"]

#: Gradients no longer than this in ℓ2 hardly move an attack (``Lp.ascend``) and were rounded on their way.
FAINT = 1e-12


class Losses(NamedTuple):
    """Cross-entropy of every example (n,), in nats: clean, under attack, and on given images.

    ``robust`` is max(ℓ(x), ℓ(x_adv)), a lower bound of the maximum over the threat. ``x_adv`` are the images found.
    """

    clean: Floats
    robust: Floats
    given: Floats
    x_adv: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Displaced:
    """The examples at ``order`` of ``split`` and the attack that is run on them anew at all weights asked for.

    The generator of a batch's attack depends on ``seed`` and the batch's number alone, so that random starts are the
    same at all weights and differences between weights are not drowned in their noise.
    """

    subject: Subject
    split: Split
    order: Tensor
    attack: Attack
    batch_size: int
    seed: int
    statistics: Statistics

    def at(self, weights: Weights, given: tuple[Tensor, ...] = ()) -> Losses:
        """The losses at ``weights``; ``given`` are images, batch by batch, to score beside (default: what is found).

        Raises:
            AttackBroken: the attack returned NaN.
        """
        model = self._model(weights)
        clean, robust, other, found = [], [], [], []
        for number, batch in enumerate(self._batches()):
            gen = generator(self.subject.device, self.seed, "attack", number)
            x_adv = craft(self.attack, model, batch.x, batch.y, gen=gen)
            with untouched(model), torch.no_grad():
                before, after = _losses(model, batch.x, batch.y), _losses(model, x_adv, batch.y)
                other.append((_losses(model, given[number], batch.y) if given else after).cpu())
            clean.append(before.cpu())
            robust.append(torch.maximum(before, after).cpu())
            found.append(x_adv)
        return Losses(torch.cat(clean).numpy(), torch.cat(robust).numpy(), torch.cat(other).numpy(), tuple(found))

    def blind(self) -> float:
        """Share of the examples whose cross-entropy at w has an input gradient that nearly vanishes (or none)."""
        model = self.subject.model
        return sum(useless_gradients(model, batch, floor=FAINT) for batch in self._batches()) / len(self.order)

    def climb(self, base: Losses, xi: float, steps: int) -> Floats:
        """Robust losses (n,) where their mean was largest on an ascent in ν, ‖ν_l‖ ≤ ξ ‖w_l‖, jointly with the attack.

        From ν = 0, where the losses are ``base``, each step attacks anew and moves ν_l by 2 ξ ‖w_l‖ / steps along its
        gradient, then back into the ball. The start is a candidate too.
        """
        weights = moving_weights(self.subject.model)
        nu: dict[str, Tensor] = {name: torch.zeros_like(w) for name, w in weights.items()}
        here, best = base, base.robust
        for _ in range(steps):
            slope = self._gradient(moved(weights, (1.0, nu)), here)
            for name, g in slope.items():
                length = 2 * xi / steps * weights[name].norm()
                nu[name] = nu[name] + length * g / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
            nu = into_relative_ball(nu, weights, xi)
            here = self.at(moved(weights, (1.0, nu)))
            best = max(best, here.robust, key=lambda losses: float(losses.mean()))
        return best

    def _gradient(self, weights: Weights, here: Losses) -> dict[str, Tensor]:
        """The gradient of the mean robust loss at ``weights``, with the images held that were found there."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        model, total = self._model(leaves), {name: torch.zeros_like(w) for name, w in weights.items()}
        for batch, x_adv in zip(self._batches(), here.x_adv, strict=True):
            with untouched(model), torch.enable_grad():
                loss = torch.maximum(_losses(model, batch.x, batch.y), _losses(model, x_adv, batch.y)).sum()
            grads = torch.autograd.grad(loss / len(self.order), list(leaves.values()), materialize_grads=True)
            for name, grad in zip(leaves, grads, strict=True):
                total[name] += grad
        return total

    def _batches(self) -> Iterator[Batch]:
        return batches(self.subject, self.split, self.order, self.batch_size)

    def _model(self, weights: Weights) -> Moved:
        model = self.subject.model
        state: Mapping[str, Tensor] = weights
        if self.statistics == "re-estimated":
            fixed = {name: w.detach() for name, w in weights.items()}
            state = {**weights, **batch_statistics(model, fixed, (batch.x for batch in self._batches()))}
        return Moved(model, state)


def _losses(model: Moved, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (B,), in float64."""
    return F.cross_entropy(model(x).double(), y, reduction="none")
