"""Seeded bugs: each must break at least one contract that the sound attacks keep.

A mutant is a subclass, so the contracts see it exactly as they see an attack that discovery found.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contracts.attack_strength import CONTRACTS, applies
from torch import Generator, Tensor, nn

from robustlens.attacks.apgd import APGD
from robustlens.attacks.apgd_targeted import APGDTargeted
from robustlens.attacks.carlini_wagner import CarliniWagner
from robustlens.attacks.ddn import DDN
from robustlens.attacks.deepfool import DeepFool
from robustlens.attacks.fab import FAB
from robustlens.attacks.fmn import FMN
from robustlens.attacks.losses import attack_loss
from robustlens.attacks.pgd import PGD
from robustlens.attacks.square import Square
from robustlens.attacks.superdeepfool import SuperDeepFool
from robustlens.core.criterion import logit_margin
from robustlens.core.types import Attack
from robustlens.threats.lp import Lp


class QuarterBall:
    """Projects on a quarter of the ball."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        found = super().perturb(model, x, y, gen=gen)
        return self.threat.with_eps(self.threat.eps / 4).project(found, x)


class HalfFrozen:
    """Half of the pixels never move."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        found = super().perturb(model, x, y, gen=gen)
        moves = torch.arange(x[0].numel()).view_as(x[0]) % 2 == 0
        return torch.where(moves, found, x)


class LabelsShifted:
    """Takes the labels of the next class."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        classes = model(x[:1]).shape[1]
        return super().perturb(model, x, (y + 1) % classes, gen=gen)


class Backward(nn.Module):
    """The model with another gradient with respect to its input."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        z = x.clone()
        if z.requires_grad:
            z.register_hook({"unsigned": torch.abs, "none": torch.zeros_like}[self.kind])
        return self.model(z)


class SignLost:
    """Steps along |∇|."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return super().perturb(Backward(model, "unsigned"), x, y, gen=gen)


class NoStep:
    """Steps of size zero."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return super().perturb(Backward(model, "none"), x, y, gen=gen)


class TooFar:
    """Returns a change half as large again as the one that was found."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        found = super().perturb(model, x, y, gen=gen)
        return (x + 1.5 * (found - x)).clamp(0, 1)


class TooShort:
    """Returns a point just before the boundary."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return x + 0.95 * (super().perturb(model, x, y, gen=gen) - x)


class WrongOnesMove:
    """Does not see that an image is wrong already."""

    def perturb(self: Any, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        with torch.no_grad():
            return super().perturb(model, x, model(x).argmax(1), gen=gen)


class LastRestart(PGD):
    """Keeps the last restart, not the worst."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        for _ in range(self.restarts):
            found = self._climb(model, x, y, None, gen)
        return found


class StartAtImage(Lp):
    def start(self, x: Tensor, gen: Generator) -> Tensor:
        return x


class NoRandomStart(PGD):
    """Begins at the image, whatever it was asked."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        still = dataclasses.replace(self, threat=StartAtImage(self.threat.norm, self.threat.eps))
        return super(NoRandomStart, still).perturb(model, x, y, gen=gen)


class WrongTarget(PGD):
    """Climbs the loss of the class that is predicted now: what has fallen is sent back."""

    def _loss(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return attack_loss(self.loss, logits, logits.detach().argmax(1), clean)


class RandomTarget(PGD):
    """Climbs the loss of class 0, whatever the label."""

    def _loss(self, logits: Tensor, y: Tensor, clean: Tensor | None) -> Tensor:
        return attack_loss(self.loss, logits, torch.zeros_like(y), clean)


class ForgetsFallen(PGD):
    """Early stopping that takes fallen images out of the batch and never writes them down."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        found = super().perturb(model, x, y, gen=gen)
        with torch.no_grad():
            fell = (logit_margin(model(found), y) <= 0)[:, None, None, None]
        return torch.where(fell, x, found) if self.early_stop else found


GENERAL = (QuarterBall, HalfFrozen, LabelsShifted, SignLost, NoStep)
OF_PGD = (LastRestart, NoRandomStart, WrongTarget, RandomTarget, ForgetsFallen)
SMALLEST = (SuperDeepFool, FMN, DeepFool, DDN)
LINE_UP = (APGD, APGDTargeted, FAB, CarliniWagner)
#: What a search without gradients can have wrong too.
WITHOUT_GRADIENTS = (QuarterBall, HalfFrozen, LabelsShifted)


def mutant(bug: type, cls: type[Attack]) -> type[Attack]:
    return type(f"{bug.__name__} in {cls.__name__}", (bug, cls), {})


MUTANTS = [
    *((mutant(bug, PGD), norm) for bug in GENERAL for norm in ("linf", "l2")),
    *((bug, norm) for bug in OF_PGD for norm in ("linf", "l2")),
    *((mutant(bug, cls), "l2") for bug in (*GENERAL, TooFar, TooShort, WrongOnesMove) for cls in SMALLEST),
    *((mutant(bug, cls), "l2") for bug in GENERAL for cls in LINE_UP),
    *((mutant(bug, cls), "linf") for bug in GENERAL for cls in LINE_UP[:3]),
    *((mutant(bug, Square), norm) for bug in WITHOUT_GRADIENTS for norm in ("linf", "l2")),
]


def broken(cls: type[Attack], norm: str) -> list[str]:
    """The contracts that an attack breaks."""
    names = []
    for contract in CONTRACTS:
        if applies(contract, cls, norm):
            try:
                contract(cls, norm)
            except AssertionError:
                names.append(contract.__name__)
    return names


@pytest.mark.parametrize(("mutant", "norm"), MUTANTS, ids=lambda v: getattr(v, "__name__", v))
def test_every_bug_is_caught(mutant: type[Attack], norm: str) -> None:
    assert broken(mutant, norm)


@pytest.mark.parametrize("cls", [PGD, *SMALLEST, *LINE_UP, Square])
def test_sound_attacks_break_nothing(cls: type[Attack]) -> None:
    assert not broken(cls, "l2")
