"""The exact worst case of a network that is affine in its input (logistic and softmax regression)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.types import Threat
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class LinearExact:
    """max_j max_z (w_j − w_y)ᵀ z + b_j − b_y over the threat, box included: the smallest logit margin there is.

    For each rival class j the maximiser is the support point of the threat in direction w_j − w_y; the rival with
    the smallest resulting margin wins. For two classes this is also the maximum of every loss of the margin, such
    as cross-entropy; without the box it is the closed form x − eps · y · w / ‖w‖₂ (ℓ2) or x − eps · y · sign(w) (ℓ∞).

    Raises:
        InputError: the model is not affine on the way to the point found.
    """

    name: ClassVar[str] = "linear-exact"
    reference: ClassVar[str] = "Yamada et al. 2021, arXiv 2102.02950, Lemma 1"

    threat: Threat

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(threat=Lp("linf", 0.1)), cls(threat=Lp("l2", 1.0)), cls(threat=Lp("l1", 5.0))]

    @property
    def passes(self) -> Passes:
        return Passes(inputs=1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(point)
        classes = logits.shape[1]
        rows = [torch.autograd.grad(logits[:, k].sum(), point, retain_graph=k + 1 < classes)[0] for k in range(classes)]
        jacobian, logits = torch.stack(rows, 1), logits.detach()
        each = torch.arange(len(x), device=x.device)
        true_row, true_logit = jacobian[each, y], logits[each, y]
        best, best_gain = x, torch.full_like(true_logit, -torch.inf)
        for k in range(classes):
            direction = jacobian[:, k] - true_row
            z = self.threat.support(direction, x)
            gain = logits[:, k] - true_logit + (direction * (z - x)).flatten(1).sum(1)
            gain = gain.masked_fill(y == k, -torch.inf)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better.view(-1, 1, 1, 1), z, best)
        self._require_affine(model, jacobian, logits, best, x)
        return best

    @staticmethod
    def _require_affine(model: nn.Module, jacobian: Tensor, logits: Tensor, z: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            predicted = logits + (jacobian * (z - x)[:, None]).flatten(2).sum(2)
            error = float((model(z) - predicted).abs().max())
        scale = float(predicted.abs().max()) + 1
        if error > 1e-4 * scale:
            raise InputError(
                "linear-exact",
                expected="a model that is affine in its input",
                got=f"logits that differ by {error:.2g} from the linear prediction",
                fix="Use pgd.",
            )
