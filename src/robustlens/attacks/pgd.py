"""Projected gradient descent on an image, in any ℓp ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from robustlens.attacks.losses import RELATIVE, LossName, attack_loss
from robustlens.core.criterion import logit_margin
from robustlens.core.denormals import drop_denormals
from robustlens.core.passes import Passes
from robustlens.core.rng import drawn, for_part
from robustlens.core.types import Threat
from robustlens.results.errors import InputError, require_at_least
from robustlens.threats.lp import Lp


@dataclass(frozen=True, kw_only=True)
class PGD:
    """max_z loss(f(z), y) over the threat by x_{k+1} = Π(x_k + α d_k), d_k the threat's direction of steepest ascent.

    A k-step attack costs k forward passes and k backward passes to the input; a restart or ``early_stop`` adds
    one forward pass each time the outcome is scored.

    Attributes:
        threat: norm, radius and box.
        steps: number of gradient steps k.
        step_size: α in pixel units; None is 2.5 · eps / steps, enough to cross the ball and settle.
        random_start: begin at a uniform point of the ball instead of at x.
        restarts: independent runs, of which the worst for the model is kept *per example*.
        loss: "ce", "margin", "dlr", "kl" (to the clean prediction), "squared" (½ ‖f(z) − f(x)‖²) or "label-flip"
            (``attacks.losses`` has the equations).
        targeted: climb −loss(f(z), t) instead, t a wrong class that is drawn uniformly, anew in every restart. What
            counts as broken, and the worst restart, are still judged by y.
        inverse_temperature: β of the softmax in "ce". A large one picks out the class on top, and saturates at once;
            its limits are "margin", and "label-flip" for a targeted attack.
        early_stop: leave an example alone once it is misclassified, and drop it from the batch. For evaluation;
            the last iterate is then not the one of highest loss.
        grad_floor: a gradient of ℓ2 size below it makes a shorter step (ℓ2, ℓ1). 1e-6 reproduces attacks that stall
            on saturated networks; leave it at 1e-12 to measure robustness.

    Raises:
        InputError: no steps, no restarts, a step size or inverse temperature ≤ 0, a relative loss started at x, where
            its gradient is 0, or a loss that does not go with ``targeted`` or an inverse temperature.
    """

    name: ClassVar[str] = "pgd"
    reference: ClassVar[str] = "Madry et al. 2018, arXiv 1706.06083, §2.1"

    threat: Threat
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: LossName = "ce"
    early_stop: bool = False
    grad_floor: float = 1e-12
    targeted: bool = False
    inverse_temperature: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, restarts=1)
        if self.step_size is not None and self.step_size <= 0:
            raise InputError(
                "pgd step_size",
                expected="a number > 0",
                got=str(self.step_size),
                fix="Leave it out for 2.5 · eps / steps.",
            )
        if self.loss in RELATIVE and not self.random_start:
            raise InputError(
                f"pgd with loss {self.loss!r}",
                expected="a random start",
                got="random_start = false",
                fix="At the clean image the gradient of this loss is exactly zero; set random_start = true.",
            )
        if self.restarts > 1 and not self.random_start:
            raise InputError(
                "pgd restarts",
                expected="random starts, without which every restart is the same",
                got="random_start = false",
                fix="Set random_start = true, or restarts = 1.",
            )
        if self.targeted and self.loss in RELATIVE:
            raise InputError(
                f"pgd with loss {self.loss!r}",
                expected="targeted = false",
                got="targeted = true",
                fix="This loss compares with the clean prediction and knows no target; take ce, margin or label-flip.",
            )
        if self.loss == "label-flip" and not self.targeted:
            raise InputError(
                "pgd with loss 'label-flip'",
                expected="targeted = true",
                got="targeted = false",
                fix='Its gradient is zero while the prediction is right; loss = "margin" is the limit that moves.',
            )
        if not 0 < self.inverse_temperature < float("inf"):
            raise InputError(
                "pgd inverse_temperature",
                expected="a finite number > 0",
                got=str(self.inverse_temperature),
                fix='For the limit take loss = "margin", or "label-flip" with targeted = true.',
            )
        if self.inverse_temperature != 1 and self.loss != "ce":
            raise InputError(
                "pgd inverse_temperature",
                expected='1 for every loss but "ce"',
                got=f"{self.inverse_temperature:g} with loss {self.loss!r}",
                fix='Set loss = "ce", or leave it out.',
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(threat=Lp("linf", 8 / 255)),
            cls(threat=Lp("l2", 1.0), steps=20, loss="margin", restarts=2),
            cls(threat=Lp("l2", 1.0), loss="dlr", early_stop=True, restarts=2),
            cls(threat=Lp("linf", 0.1), loss="kl"),
            cls(threat=Lp("l1", 5.0), steps=20, loss="squared"),
            cls(threat=Lp("linf", 0.1), steps=5, random_start=False),
            cls(threat=Lp("l2", 1.0), inverse_temperature=5.0),
            cls(threat=Lp("l2", 1.0), loss="label-flip", targeted=True, restarts=2, early_stop=True),
        ]

    @property
    def passes(self) -> Passes:
        scored = self.restarts if self.restarts > 1 else 0
        return Passes(inputs=self.steps * self.restarts, forward=scored + (self.loss in RELATIVE))

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        clean = None
        if self.loss in RELATIVE:
            with torch.no_grad():
                clean = model(x)
        if self.restarts == 1:
            return self._climb(model, x, y, clean, gen)
        everyone = torch.arange(len(x), device=x.device)
        worst = self._climb(model, x, y, clean, for_part(gen, everyone, len(x)))
        broken, height = self._score(model, worst, y, clean)
        for _ in range(self.restarts - 1):
            todo = (~broken).nonzero()[:, 0] if self.early_stop else everyone
            if len(todo) == 0:
                break
            some_clean = None if clean is None else clean[todo]
            found = self._climb(model, x[todo], y[todo], some_clean, for_part(gen, todo, len(x)))
            new_broken, new_height = self._score(model, found, y[todo], some_clean)
            worse = (new_broken & ~broken[todo]) | ((new_broken == broken[todo]) & (new_height > height[todo]))
            won = todo[worse]
            worst[won], broken[won], height[won] = found[worse], new_broken[worse], new_height[worse]
        return worst

    def _climb(self, model: nn.Module, x: Tensor, y: Tensor, clean: Tensor | None, gen: Generator) -> Tensor:
        threat = self.threat
        alpha = 2.5 * threat.eps / self.steps if self.step_size is None else self.step_size
        point = threat.start(x, gen) if self.random_start else x
        result, alive = point.clone() if self.early_stop else point, torch.arange(len(x), device=x.device)
        target: Tensor | None = None
        for _ in range(self.steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                logits = model(point)
                if isinstance(threat, Lp) and threat.norm != "linf" and self.grad_floor >= 1e-20:  # moves nothing
                    drop_denormals(logits)
                if self.targeted:
                    target = _wrong_class(logits, y, gen) if target is None else target
                    loss = -self._loss(logits, target, clean).sum()
                else:
                    loss = self._loss(logits, y, clean).sum()
            (grad,) = torch.autograd.grad(loss, point)
            if self.early_stop:
                standing = logit_margin(logits.detach(), y) > 0
                if not bool(standing.all()):
                    result[alive[~standing]] = point.detach()[~standing]
                    alive, point, grad, x, y = (
                        alive[standing],
                        point[standing],
                        grad[standing],
                        x[standing],
                        y[standing],
                    )
                    clean = None if clean is None else clean[standing]
                    target = None if target is None else target[standing]
                    if len(alive) == 0:
                        return result
            with torch.no_grad():
                direction = threat.ascend(grad, floor=self.grad_floor)
                point = threat.project(torch.add(point, direction, alpha=alpha), x)
        if self.early_stop:
            result[alive] = point
            return result
        return point

    def _score(self, model: nn.Module, point: Tensor, y: Tensor, clean: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(point)
            return logit_margin(logits, y) <= 0, self._loss(logits, y, clean)

    def _loss(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return attack_loss(self.loss, logits, y, clean, inverse_temperature=self.inverse_temperature)


def _wrong_class(logits: Tensor, y: Tensor, gen: Generator) -> Tensor:
    """One of the other classes for each label (B,), uniformly."""
    classes = logits.shape[1]
    return (y + drawn(y, lambda t: t.random_(1, classes, generator=gen), gen)) % classes
