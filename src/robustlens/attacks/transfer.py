"""Transfer: images crafted on one network, tried on another."""

from __future__ import annotations

from typing import ClassVar

from torch import Generator, Tensor, nn

from robustlens.attacks.verify import craft
from robustlens.core.passes import Passes
from robustlens.core.types import Attack, Threat


def transferred(attack: Attack, source: nn.Module) -> Attack:
    """``attack`` on ``source``, whatever network it is called with: argmax_z loss(source(z), y) over the threat.

    The result is an attack for ``attacks.verify.evaluate(…, model, …)``, which checks and scores it on ``model``; the
    model itself is asked nothing before that. Where it breaks more images than the same attack on the model does, the
    model's gradients mislead (Athalye et al. 2018, arXiv 1802.00420, §3.1: black-box attacks are better than white-box
    attacks), and the direct number is no measure of robustness.

    ``source`` maps the same images (B, C, H, W) to logits of the same classes; it runs in eval mode and is left as it
    was. An attack that stops as soon as ``source`` is wrong goes no farther than that, and transfers badly: leave
    ``early_stop`` off. Costs the passes of ``attack``, through ``source``.

    It has a network among its parts and so no plain settings to be described and rebuilt from: it is no plug-in, and
    is found under no name.
    """
    return _Transferred(attack, source)


class _Transferred:
    name: ClassVar[str] = "transfer"
    reference: ClassVar[str] = "Papernot et al. 2016, arXiv 1605.07277"

    def __init__(self, attack: Attack, source: nn.Module) -> None:
        self.attack, self.source = attack, source

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    @property
    def passes(self) -> Passes:
        return self.attack.passes

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return craft(self.attack, self.source, x, y, gen=gen)
