"""Whether a model's answers and gradients are ones that an attack can work with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.losses import LossName, attack_loss
from robustlens.core.modes import untouched
from robustlens.lenses.health_attacks import Finding, Judged, parts, share, too_many
from robustlens.results.reading import Quantity

#: ‖∇‖₂ at which common implementations of ℓ2 attacks stop to normalise, so that they hardly move below it.
FLOOR = 1e-6
#: Pieces into which the way from an image to its adversarial image is cut.
PIECES = 10
#: Images that are asked about alone and in company.
ALONE = 32
#: Relative difference of two answers, and of two gradients, to the same image that rounding does not explain.
ROUNDING = {"answers": 1e-3, "gradients": 0.1}


def gradients(judged: Judged) -> Finding:
    """The gradient of the attack's own loss where its search ended, and of the cross-entropy at the images.

    Tested is the share of images that were left standing at a point without a direction: the gradient there is exactly
    zero or not finite, as it is at x. Below the attack's own floor (ℓ2 and ℓ1) it is slowed down, which does no harm
    where the image is robust anyway: that share is told, and the attack without its floor is one of ``other_losses``.
    """
    attack, n, x = judged.attack, len(judged), judged.images.x
    loss: LossName = getattr(attack, "loss", "ce" if isinstance(attack, FGSM) else "margin")
    if getattr(attack, "targeted", False):
        loss = "margin"
    beta = getattr(attack, "inverse_temperature", 1.0)
    floor = 0.0 if str(attack.threat).startswith("linf") else float(getattr(attack, "grad_floor", 0.0))
    ended, began = sizes(judged, judged.x_adv, loss, beta), sizes(judged, x, loss, beta)
    stuck = (judged.standing & ~((ended > 0) & ended.isfinite())) | ~began.isfinite()
    count = int(stuck.sum())
    entropy = sizes(judged, x, "ce")
    useless = int((~entropy.isfinite() | (entropy == 0)).sum())
    alarm = ""
    if attack.passes.inputs and too_many(count, n):
        alarm = (
            f"For {count / n:.1%} of the images the attack ended without success where the model gives it no usable "
            "direction (the gradient of what it looks at is zero or not a number), so it failed "
            "although harmful changes may exist; this is called gradient masking."
        )
    return Finding(
        "gradients",
        (
            share("stuck without a gradient", count, n),
            share("stuck below the attack's floor", int((judged.standing & (ended < floor)).sum()), n),
            share("gradients of the cross-entropy that are zero or not finite", useless, n),
            share(f"gradients of the cross-entropy below {FLOOR:g}", int((~(entropy >= FLOOR)).sum()), n),
        ),
        alarm,
    )


def sizes(judged: Judged, x: Tensor, loss: LossName, beta: float = 1.0) -> Tensor:
    """‖∇_x loss‖₂ (n,) in float64 at ``x`` (n, C, H, W), which belongs to the judged images."""
    found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for part in parts(judged.images, judged.size):
        with untouched(judged.model), torch.no_grad():
            clean = judged.model(part.x)
        grad = _slope(judged.model, x[part.index], part.y, loss, clean, beta)[1]
        found[part.index] = grad.flatten(1).double().norm(dim=1)
    return found


def _slope(
    model: nn.Module, x: Tensor, y: Tensor, loss: LossName, clean: Tensor | None = None, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss (B,) and its gradient (B, C, H, W) at ``x``."""
    point = x.detach().clone().requires_grad_()
    with untouched(model), torch.enable_grad():
        values = attack_loss(loss, model(point), y, clean, inverse_temperature=beta)
        (grad,) = torch.autograd.grad(values.sum(), point)
    return values.detach(), grad


@dataclass(frozen=True, eq=False)
class Way:
    """The logit margin f (n', PIECES + 1) at equal steps from the right images x to what the attack made of them.

    ``slope`` (n', PIECES + 1) is its derivative along the way, by the model's gradient.
    """

    f: Tensor
    slope: Tensor

    @classmethod
    def of(cls, judged: Judged) -> Way:
        f, slope = [], []
        for part in parts(judged.images, judged.size, judged.right):
            along = judged.x_adv[part.index] - part.x
            points = [_slope(judged.model, part.x + k / PIECES * along, part.y, "margin") for k in range(PIECES + 1)]
            f.append(-torch.stack([value for value, _ in points], 1).double())
            slope.append(-torch.stack([(grad * along).flatten(1).sum(1) for _, grad in points], 1).double())
        empty = torch.zeros(0, PIECES + 1, dtype=torch.float64)
        return cls(torch.cat(f or [empty]).cpu(), torch.cat(slope or [empty]).cpu())

    @property
    def unexplained(self) -> Tensor:
        """Σ|real − predicted| / Σ|real| (n',) over the pieces; predicted is the mean slope of a piece's two ends."""
        real = self.f.diff(dim=1)
        predicted = (self.slope[:, 1:] + self.slope[:, :-1]) / 2 / PIECES
        return _ratio((real - predicted).abs().sum(1), real.abs().sum(1))

    @property
    def wrong_way(self) -> Tensor:
        """The part (n',) of the way's ups and downs on which the right class gains."""
        real = self.f.diff(dim=1)
        return _ratio(real.clamp_min(0).sum(1), real.abs().sum(1))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where there is no change at all."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), torch.zeros_like(whole))


def surface(judged: Judged, way: Way) -> list[Finding]:
    """What the straight way from each image to its adversarial image looks like.

    Every point of it is an allowed change, so an image that was left standing and is wrong on the way was missed. And
    a gradient that an attack can trust predicts how the margin changes along it.
    """
    n = len(judged)
    fallen = torch.zeros_like(judged.standing)
    fallen[judged.right.nonzero()[:, 0]] = ~(way.f > 0).all(1).to(fallen.device)
    fallen &= judged.standing
    missed, misled = int(fallen.sum()), int((~(way.unexplained <= 0.5)).sum())
    first = second = ""
    if too_many(missed, n):
        first = (
            f"For {missed / n:.1%} of the images the attack stepped over wrong answers that lie half-way on its own "
            "path, and ended at a right one: the model is bumpy along the attack's direction, as after training on "
            "single steps."
        )
    if too_many(misled, n):
        second = (
            f"For {misled / n:.1%} of the images the model's gradients do not tell how its answer changes along the "
            "attack's path, so an attack that follows them is misled."
        )
    return [
        Finding(
            "bumps", (share("lost to points on the way", missed, n), _mean("wrong way", way.wrong_way)), first, fallen
        ),
        Finding(
            "slopes", (share("misled by gradients", misled, n), _mean("unexplained change", way.unexplained)), second
        ),
    ]


def _mean(name: str, values: Tensor) -> Quantity:
    return Quantity(name, float(values.mean()) if len(values) else 0.0, "fraction", n=len(values))


def same_answer(judged: Judged) -> Finding:
    """The same images twice: the largest relative difference of the logits."""
    worst, n = 0.0, len(judged)
    for part in parts(judged.images, judged.size):
        with untouched(judged.model), torch.no_grad():
            worst = max(worst, _difference(judged.model(part.x), judged.model(part.x)))
    alarm = (
        "The model gives different answers to the same image, so an attack that failed once may succeed next time; "
        "average over many answers before you attack it."
    )
    found = Quantity("difference of two answers", worst, "relative", n=n)
    return Finding("same answer", (found,), alarm if worst > ROUNDING["answers"] else "")


def in_company(judged: Judged) -> Finding:
    """Answers and gradients of images alone and among others."""
    model, images = judged.model, judged.images
    n = min(ALONE, len(judged))
    many = [_asked(model, part.x, part.y) for part in parts(images, judged.size, torch.arange(len(judged)) < n)]
    z, grad = (torch.cat(each)[:n] for each in zip(*many, strict=True))
    alone = [_asked(model, images.x[i : i + 1], images.y[i : i + 1]) for i in range(n)]
    z_alone, grad_alone = (torch.cat(each) for each in zip(*alone, strict=True))
    answers = _difference(z, z_alone)
    change = (grad - grad_alone).flatten(1).norm(dim=1) / grad.flatten(1).norm(dim=1).clamp_min(1e-30)
    moved = int((change > ROUNDING["gradients"]).sum())
    alarm = (
        "What the model answers to an image, or its gradient, depends on which other images are asked about with it, "
        "so what an attack sees is not what counts in the end; is a layer in training mode?"
    )
    found = (
        Quantity("difference of answers alone and in company", answers, "relative", n=n),
        share("gradients that depend on the company", moved, n),
    )
    return Finding("in company", found, alarm if answers > ROUNDING["answers"] or moved > 1 else "")


def _asked(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with untouched(model), torch.no_grad():
        z = model(x)
    return z, _slope(model, x, y, "margin")[1]


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two answers to the same images (B, K), relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
