"""The average-margin regularizer: the mean logit margin is pushed up, as far as a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.core.criterion import logit_margin
from robustlens.core.modes import still
from robustlens.core.passes import Passes
from robustlens.core.types import Crafted, Terms
from robustlens.linalg.layers import linear_head
from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AverageMargin:
    """−λ mean [α(x)]₀^τ with [t]₀^τ = min(max(t, 0), τ), or λ mean H_τ(α(x)) with H_τ(t) = max(0, τ − t).

    α(x) = z_y − max_{k≠y} z_k is the margin of the clean logits z (B, K), which share the objective's forward pass:
    no cost of its own. For binary logistic regression, logits (0, w·x), it is y w·x with y = ±1.

    The printed term (14) has normalised rows w_k and no bias; the authors' code and published networks have plain
    logits with bias, and so has this. With ``exact``, α is instead the distance in feature space to the nearest of the
    hyperplanes between y and k, min_k (z_y − z_k) / ‖w_y − w_k‖, whose divisor (14) leaves out.

    "paper" is eq. 15: an example that is misclassified, or has a margin beyond τ, has no gradient. "hinge" also pulls
    the misclassified ones; it is what the published MNIST-CNN was trained with (its stored loss allows nothing else
    that was ever in the code: today's code has clamp(−α, 0, τ), which is 0 wherever the prediction is right). Since
    −[t]₀^τ = H_τ(t) − H_0(t) − τ (the paper prints + τ), the two have the same slope on all right predictions.

    A margin counts only beside a bound on the Lipschitz constant of the features: without ``orthogonality`` the logits
    are merely inflated.

    Attributes:
        weight: λ; 0.1 for every network of the paper.
        tau: τ, in units of logits (of the distance with ``exact``), of the order of the network's Lipschitz constant.
            10 is the paper's for its two CNNs and CIFAR-MLP; 5 linear models and MNIST-MLP, 40 LeNets, 50 ConvNet.
            The published MNIST-CNN had 40.
        variant: "paper" or "hinge".
        exact: divide by ‖w_y − w_k‖.

    Raises:
        InputError: λ or τ below 0; with ``exact``, a network without ``features`` and a linear ``head``.
    """

    name: ClassVar[str] = "average-margin"
    reference: ClassVar[str] = "Wu & Yu 2019, arXiv 1907.11780, eq. 9, 14 and 15, second term (with orthogonality: AMR)"

    weight: float = 0.1
    tau: float = 10.0
    variant: Literal["paper", "hinge"] = "paper"
    exact: bool = False

    def __post_init__(self) -> None:
        for field in ("weight", "tau"):
            value = getattr(self, field)
            if not value >= 0:
                raise InputError(
                    f"average-margin {field}", expected="a number ≥ 0", got=str(value), fix="The paper has 0.1 and 10."
                )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(variant="hinge", tau=40.0)]

    @classmethod
    def neutral(cls) -> Self:
        """The setting that equals standard training bit for bit."""
        return cls(weight=0.0)

    @property
    def passes(self) -> Passes:
        return Passes()

    def check(self, model: nn.Module, x: Tensor) -> None:
        if self.exact and linear_head(model, x) is None:
            raise InputError(
                "average-margin exact",
                expected="a network whose logits are head(features(x)), with a linear head",
                got=type(model).__name__,
                fix="Set exact = false, or give the network both.",
            )

    def penalty(self, model: nn.Module, crafted: Crafted, terms: Terms, *, gen: Generator) -> Tensor:
        if self.weight == 0:
            return crafted.x_adv.new_zeros(())
        batch, logits = crafted.batch, terms.clean_logits
        if logits is None:
            with still(model):
                logits = model(batch.x)
        if self.exact:
            head = model.head
            assert isinstance(head, nn.Linear)
            margin = feature_distance(logits, batch.y, head)
        else:
            margin = logit_margin(logits, batch.y)
        return self.weight * self.psi(margin).mean()

    def psi(self, margin: Tensor) -> Tensor:
        """What one margin costs, before λ: −[t]₀^τ or H_τ(t), of the same shape."""
        if self.variant == "hinge":
            return (self.tau - margin).clamp_min(0)
        return -margin.clamp(0, self.tau)


def feature_distance(logits: Tensor, y: Tensor, head: nn.Linear) -> Tensor:
    """min_{k≠y} (z_y − z_k) / ‖w_y − w_k‖₂ (B,): signed distance of the features to the nearest hyperplane."""
    between = torch.cdist(head.weight, head.weight, compute_mode="donot_use_mm_for_euclid_dist")
    between = between + torch.eye(len(between), device=between.device, dtype=between.dtype)  # k = y: not 0/0
    gaps = (logits.gather(1, y[:, None]) - logits) / between[y]
    return gaps.scatter(1, y[:, None], torch.inf).amin(1)
