"""Random search and transfer: the attacks that learn nothing from the network they are tried on."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from test_square import BALLS, Witness, every_norm, labels_of, linear_pair, pictures
from torch import Tensor, nn

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.attacks.random_search import RandomSearch
from robustlens.attacks.transfer import transferred
from robustlens.attacks.verify import craft, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.discovery import discover
from robustlens.core.types import Attack, Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@every_norm
def test_random_search_is_the_best_of_its_draws(norm: str) -> None:
    model, x, threat = Witness(linear_pair(30.0)), pictures(6), Lp(norm, BALLS[norm])
    y = torch.zeros(6, dtype=torch.int64)
    attack = RandomSearch(threat=threat, points=25)
    found = attack.perturb(model, x, y, gen=gen(2))
    assert len(model.asked) == attack.passes.forward == 26
    draws = gen(2)
    points = torch.stack([x, *(threat.start(x, draws) for _ in range(25))])
    margins = torch.stack([logit_margin(model.model(z), y) for z in points])
    assert torch.equal(found, points[margins.argmin(0), torch.arange(6)])


def test_random_search_asks_no_more_where_an_image_fell() -> None:
    model, x = Witness(linear_pair(0.0)), pictures(30)
    y = labels_of(model.model, x)
    y[::3] = 1 - y[::3]
    model.asked.clear()
    found = RandomSearch(threat=Lp("linf", 0.2), points=40).perturb(model, x, y, gen=gen())
    sizes = [len(z) for z in model.asked]
    standing = int((logit_margin(model.model(found), y) > 0).sum())
    assert sizes[:2] == [30, 20] and 0 < standing <= sizes[-1] < 20 and torch.equal(found[::3], x[::3])


def test_random_search_wants_a_point() -> None:
    with pytest.raises(InputError):
        RandomSearch(threat=Lp("l2", 1.0), points=0)


class Quantised(nn.Module):
    """A model behind a step function: the same answers nearly, and no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((255 * x).round() / 255)


def test_transfer_breaks_what_a_direct_attack_cannot_see(linear: nn.Module, images: Tensor) -> None:
    """From the network inside, what transfers is its exact worst case; on the step function itself PGD stands still."""
    batch = Batch(images, labels_of(linear, images), torch.arange(12))
    threat = Lp("linf", 0.2)
    direct: Attack = PGD(threat=threat, random_start=False, loss="margin")
    masked = Quantised(linear)
    assert evaluate(direct, masked, batch, gen=gen()).robust.all()
    carried = evaluate(transferred(direct, linear), masked, batch, gen=gen())
    exact = evaluate(LinearExact(threat=threat), linear, batch, gen=gen())
    assert not carried.robust.any() and not exact.robust.any()
    assert (carried.distance <= 0.2 + 1e-6).all()


def test_transfer_asks_the_source_alone_and_leaves_it_as_it_was(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    target, attack = Witness(net), PGD(threat=Lp("l2", 1.0), steps=3)
    source = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)).train()
    source[2].weight.grad = torch.ones_like(source[2].weight)
    carried = transferred(attack, source)
    random = torch.get_rng_state()
    found = craft(carried, target, images, labels, gen=gen(3))
    assert not target.asked
    assert torch.equal(found, craft(attack, source, images, labels, gen=gen(3)))
    assert source.training and source[0].training and all(p.requires_grad for p in source.parameters())
    assert (source[2].weight.grad == 1).all() and torch.equal(random, torch.get_rng_state())
    assert isinstance(carried, Attack) and carried.threat == attack.threat and carried.passes == attack.passes
    assert "transfer" not in discover("attack")
