"""What every attack must hold, whichever file it is in."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import gen
from torch import Generator, Tensor, nn

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.verify import AttackBroken, craft, evaluate
from robustlens.core.discovery import build, describe, discover
from robustlens.core.rng import SharedGenerator, drawn
from robustlens.core.types import Attack, Batch
from robustlens.results.errors import InputError, RobustlensError
from robustlens.threats.lp import Lp

ATTACKS = [attack for cls in discover("attack").values() for attack in cls.examples()]


def each(attack: Attack) -> str:
    return f"{attack.name}-{attack.threat}-{getattr(attack, 'loss', '')}"


every = pytest.mark.parametrize("attack", ATTACKS, ids=each)


def subject(attack: Attack, net: nn.Module, linear: nn.Module) -> nn.Module:
    return linear if isinstance(attack, LinearExact) else net


def everything(model: nn.Module) -> dict[str, object]:
    """All that an attack might disturb."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@every
def test_stays_in_ball_and_box(
    attack: Attack, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    found = evaluate(attack, subject(attack, net, linear), Batch(images, labels, torch.arange(12)), gen=gen())
    assert (found.distance <= attack.threat.eps * (1 + 1e-5)).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert torch.isfinite(found.x_adv).all()
    assert not found.x_adv.requires_grad
    assert torch.equal(found.distance, attack.threat.distance(found.x_adv, images))


@every
def test_radius_zero_is_the_identity(
    attack: Attack, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    harmless = build("attack", {**describe(attack), "threat": str(attack.threat.with_eps(0.0))})
    assert torch.equal(craft(harmless, subject(attack, net, linear), images, labels, gen=gen()), images)


@every
@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(
    attack: Attack, training: bool, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    model = subject(attack, net, linear).train(training)
    first = next(model.parameters())
    first.requires_grad_(False)
    for p in list(model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    before = everything(model)
    for mode in ("eval", "train"):
        craft(attack, model, images, labels, gen=gen(), mode=mode)
        evaluate(attack, model, Batch(images, labels, torch.arange(12)), gen=gen())
        assert same(before, everything(model)), mode


class Fuse(nn.Module):
    """A model that fails at the n-th forward pass."""

    def __init__(self, model: nn.Module, burns_at: int) -> None:
        super().__init__()
        self.model, self.left = model, burns_at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the fuse has burnt")
        return self.model(x)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.name != "uniform-noise"], ids=each)  # it runs no forward
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_leaves_the_model_as_it_was_after_an_exception(
    attack: Attack, mode: str, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    model = Fuse(subject(attack, net, linear).train(), burns_at=1 if attack.name != "fgsm" else 0)
    before = everything(model)
    with pytest.raises(RuntimeError, match="fuse"):
        craft(attack, model, images, labels, gen=gen(), mode=mode)
    assert same(before, everything(model))


@every
def test_is_replayable_and_never_reads_the_global_random_state(
    attack: Attack, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    model = subject(attack, net, linear)
    torch.manual_seed(1)
    once = craft(attack, model, images, labels, gen=gen(5))
    torch.manual_seed(2)
    assert torch.equal(once, craft(attack, model, images, labels, gen=gen(5)))


@every
def test_what_an_image_gets_does_not_depend_on_the_processes_that_share_its_batch(
    attack: Attack, network: nn.Module, linear: nn.Module, images: Tensor
) -> None:
    """Shares differ in how many of their images are wrong from the start, and leave."""
    model, x = subject(attack, network, linear).double(), images.double()
    with torch.no_grad():
        y = (model(x).argmax(1) + torch.tensor([0, 0, 1] * 2 + [0] * 6)) % 4
    alone = gen(5)
    whole = craft(attack, model, x, y, gen=alone)
    for rank in range(3):
        shared = SharedGenerator.of(gen(5), rows=torch.arange(rank, 12, 3), examples=12)
        own = craft(attack, model, x[rank::3], y[rank::3], gen=shared)
        assert torch.allclose(own, whole[rank::3], rtol=0, atol=1e-10)
        assert torch.equal(shared.get_state(), alone.get_state())


def test_a_draw_for_others_than_the_generator_is_for_is_refused() -> None:
    shared = SharedGenerator.of(gen(), rows=torch.arange(0, 12, 3), examples=12)
    with pytest.raises(InputError, match=r"4 examples.*got 3.*for_part"):
        drawn(torch.empty(3, 2), lambda t: t.normal_(generator=shared), shared)


@every
def test_takes_an_empty_batch(
    attack: Attack, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    assert craft(attack, subject(attack, net, linear), images[:0], labels[:0], gen=gen()).shape == (0, 1, 8, 8)


@every
def test_does_not_write_into_the_images(
    attack: Attack, net: nn.Module, linear: nn.Module, images: Tensor, labels: Tensor
) -> None:
    before = images.clone()
    craft(attack, subject(attack, net, linear), images, labels, gen=gen())
    assert torch.equal(images, before)


@every
def test_settings_round_trip(attack: Attack) -> None:
    assert build("attack", describe(attack)) == attack


class Liar:
    """An attack that breaks its word."""

    name = "liar"

    def __init__(self, threat: Lp, answer: Tensor) -> None:
        self.threat, self.answer = threat, answer

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
        return self.answer


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_choke_point_believes_nothing(norm: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
    threat = Lp(norm, 0.5)
    batch = Batch(images, labels, torch.arange(12))
    far = evaluate(Liar(threat, images + 7), net, batch, gen=gen())
    assert (far.distance <= 0.5 * (1 + 1e-5)).all() and far.x_adv.max() <= 1
    for answer in (images * torch.nan, images[:3], images.double().to(torch.complex64)[..., :4]):
        with pytest.raises((AttackBroken, RobustlensError)):
            evaluate(Liar(threat, answer), net, batch, gen=gen())


def test_the_choke_point_scores_in_eval_mode_by_itself(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.train()
    attack = Liar(Lp("l2", 1.0), images.flip(0))
    found = evaluate(attack, net, Batch(images, labels, torch.arange(12)), gen=gen())
    judge = copy.deepcopy(net).eval()
    with torch.no_grad():
        assert torch.equal(found.clean_logits, judge(images))
        assert torch.equal(found.logits, judge(found.x_adv))
        right = judge(images).argmax(1) == labels
        assert torch.equal(found.clean_correct, right)
        assert torch.equal(found.robust, right & (judge(found.x_adv).argmax(1) == labels))
