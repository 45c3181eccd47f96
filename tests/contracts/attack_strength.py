"""What an attack that claims to be strong must reach: contracts as functions, for sound attacks and for mutants.

A contract takes the class of an attack and a norm, makes the attack at its default settings (a few with fewer steps,
and each with every switch flipped that should not make it weaker), and raises AssertionError where it falls short of
what is known: exact distances of small networks in the box, the exact worst case of affine ones, or its own answer with
less effort.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import torch
from conftest import gen
from exact_distances import bent, nearest_wrong, straight
from torch import Tensor, nn

from robustlens.attacks.verify import Attacked, evaluate
from robustlens.core.criterion import logit_margin
from robustlens.core.types import Attack, Batch
from robustlens.threats.lp import Lp

Contract = Callable[[type, str], None]

#: Images nearer to a boundary than the radius divided by this must fall.
SLACK = 1.2

#: The diameter of the box [0, 1]⁹.
DIAMETER = {"linf": 1.0, "l2": 3.0, "l1": 9.0}

#: Switches that may be flipped without an excuse: the attack must stay as strong.
SWITCHES = ("early_stop", "random_start")

#: Budgets that nine pixels do not need, cut to what keeps the tests quick. Everything else is at its default.
SMALL_BUDGET = {
    "square": {"queries": 1000},
    "autoattack-standard": {"effort": 0.2},
}


@dataclasses.dataclass(frozen=True)
class Known:
    """Images (16, 1, 3, 3) that a network has right, and their exact distances (16,) to the nearest wrong point."""

    model: nn.Sequential
    batch: Batch
    distance: Tensor


@cache
def known(network: Callable[[], nn.Sequential], norm: str) -> Known:
    model = network()
    x = torch.rand(16, 1, 3, 3, generator=gen(1), dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    batch = _predicted(model, x)
    return Known(model, batch, nearest_wrong(model, x, batch.y, norm)[1])


def breaks_what_is_near_on_an_affine_network(cls: type, norm: str) -> None:
    """Every image falls whose exact distance is less than the radius by a sixth, and none that is farther."""
    for attack in _variants(cls, norm):
        _breaks_what_is_near(attack, known(straight, norm), share=1.0)


def breaks_what_is_near_on_a_bent_network(cls: type, norm: str) -> None:
    """The same with three classes and sixteen linear regions, where one image in ten may be missed."""
    for attack in _variants(cls, norm):
        _breaks_what_is_near(attack, known(bent, norm), share=0.9)


def _breaks_what_is_near(attack: Attack, case: Known, *, share: float) -> None:
    radius = float(case.distance.quantile(0.7))
    seen = _seen(_at(attack, radius), case.model, case.batch)
    near = case.distance < radius / SLACK
    assert 5 <= int(near.sum()) <= 11, "the radius says nothing"
    assert float((~seen.robust[near]).double().mean()) >= share, f"{attack.name} misses what is near"
    assert seen.robust[case.distance > radius * (1 + 1e-6)].all(), f"{attack.name} breaks what cannot be broken"


def reaches_the_worst_case_of_an_affine_network(cls: type, norm: str) -> None:
    """What still stands has the lowest margin of the ℓ∞ ball and the box: the whole radius is used."""
    case = known(straight, norm)
    x, y = case.batch.x, case.batch.y
    w = case.model[1].weight.detach()
    for attack in _variants(cls, norm):
        radius = float(case.distance.quantile(0.3))
        seen = _seen(_at(attack, radius), case.model, case.batch)
        toward = (w[1 - y] - w[y]).sign().view_as(x)
        worst = _margin(case.model, (x + radius * toward).clamp(0, 1), y)
        fall = _margin(case.model, x, y) - worst
        short = (logit_margin(seen.logits, y) - worst) / fall
        assert int(seen.robust.sum()) > 8
        assert (short[seen.robust] < 0.05).all(), f"{attack.name} leaves {float(short[seen.robust].max()):.0%} unused"


def leaves_wrong_images_wrong(cls: type, norm: str) -> None:
    """An image that is wrong before is wrong after."""
    for attack in _variants(cls, norm):
        seen, _ = _on_wrong_labels(attack, norm)
        wrong = logit_margin(seen.logits, _wrong_batch(norm).y) <= 0
        assert wrong.all(), f"{attack.name} makes wrong images right"


def leaves_wrong_images_where_they_are(cls: type, norm: str) -> None:
    """An image that is wrong already is the nearest one."""
    for attack in _smallest(cls, norm):
        seen, x = _on_wrong_labels(attack, norm)
        assert torch.equal(seen.x_adv, x), f"{attack.name} moves what is wrong already"


def _wrong_batch(norm: str) -> Batch:
    batch = known(bent, norm).batch
    return Batch(batch.x, (batch.y + 1) % 3, batch.index)


def _on_wrong_labels(attack: Attack, norm: str) -> tuple[Attacked, Tensor]:
    case, batch = known(bent, norm), _wrong_batch(norm)
    return evaluate(_at(attack, float(case.distance.median())), case.model, batch, gen=gen()), batch.x


def finds_the_nearest(cls: type, norm: str) -> None:
    """Without a limit to the radius: exact up to a tenth for three quarters of the images, for half where it bends."""
    for attack in _smallest(cls, norm):
        for network, worst in ((straight, 0.75), (bent, 0.5)):
            case = known(network, norm)
            seen = _seen(_at(attack, DIAMETER[norm]), case.model, case.batch)
            assert not seen.robust.any(), f"{attack.name} finds nothing wrong in the whole box"
            ratio = seen.distance / case.distance
            assert float(ratio.min()) > 1 - 1e-6, "nothing is nearer than the nearest"
            assert float(ratio.quantile(worst)) < 1.1, (
                f"{attack.name} ends {float(ratio.quantile(worst)):.2f} times too far"
            )


def more_restarts_are_never_worse(cls: type, norm: str) -> None:
    """What one short run breaks, four runs break too; the first of the four draws what the one drew."""
    model, batch = _rugged()
    fields = _fields(cls)
    short = {name: few for name, few in (("steps", 2), ("queries", 20)) if name in fields}
    for attack in _variants(cls, norm):
        if not getattr(attack, "random_start", True):
            continue  # every run would be the same, and is refused
        for share in (0.02, 0.05, 0.1):
            once = _at(attack, share * DIAMETER[norm], **short)
            one = _seen(once, model, batch).robust
            four = _seen(_at(once, once.threat.eps, restarts=4), model, batch).robust
            assert not (four & ~one).any(), f"{attack.name} forgets what an earlier restart broke"


@cache
def _rugged() -> tuple[nn.Module, Batch]:
    model = bent(hidden=40, seed=8)
    return model, _predicted(model, torch.rand(150, 1, 3, 3, generator=gen(2), dtype=torch.float64))


def a_flat_spot_does_not_hold_it(cls: type, norm: str) -> None:
    """Where the network is constant around the image, a search that begins elsewhere sees its slope."""
    for attack in _variants(cls, norm):
        if not getattr(attack, "random_start", True):
            continue  # asked to begin at the image
        spot = FlatSpot(norm)
        x = torch.full((20, 1, 3, 3), 0.5, dtype=torch.float64)
        seen = _seen(_at(attack, spot.eps), spot, Batch(x, torch.zeros(20, dtype=torch.int64), torch.arange(20)))
        assert int((~seen.robust).sum()) >= 13, f"{attack.name} stays on the flat spot"


class FlatSpot(nn.Module):
    """Two logits: a lead that is constant for |⟨a, z − grey⟩| ≤ t, and falls along ± a beyond, to zero half-way."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.eps = 0.1 * DIAMETER[norm]
        a = torch.randn(9, 1, generator=gen(3), dtype=torch.float64)
        self.reach = self.eps * float(a.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm]))
        self.a = nn.Parameter(a)

    def forward(self, z: Tensor) -> Tensor:
        aside = ((z.flatten(1) - 0.5) @ self.a).abs()
        lead = 0.5 * self.reach - (aside - 0.02 * self.reach).relu()
        return torch.cat([lead, torch.zeros_like(lead)], 1)


CONTRACTS: tuple[Contract, ...] = (
    breaks_what_is_near_on_an_affine_network,
    breaks_what_is_near_on_a_bent_network,
    reaches_the_worst_case_of_an_affine_network,
    leaves_wrong_images_wrong,
    leaves_wrong_images_where_they_are,
    finds_the_nearest,
    more_restarts_are_never_worse,
    a_flat_spot_does_not_hold_it,
)

#: Weak by nature, and held to no contract; each is seen to fail one.
WEAK = {
    "uniform-noise": "one random point of the ball",
    "random-search": "a hundred random points of the ball",
    "fgsm": "one step, which the box and a bend cut short",
}

#: Searches for the smallest change. All begin at the image.
SMALLEST = {"superdeepfool", "fmn", "deepfool", "ddn", "carlini-wagner"}

SPARSE = "changes a fifth of the pixels at once, which is one of nine, in steps of a tenth of the radius at least"

#: Contract → attack, or attack and norm → why it does not apply.
EXEMPT: dict[Contract, dict[str, str]] = {
    breaks_what_is_near_on_an_affine_network: {"apgd l1": SPARSE, "apgd-targeted l1": SPARSE},
    breaks_what_is_near_on_a_bent_network: {"apgd l1": SPARSE, "linear-exact": "takes affine networks alone"},
    leaves_wrong_images_wrong: {"linear-exact": "takes affine networks alone"},
    reaches_the_worst_case_of_an_affine_network: {
        **dict.fromkeys(SMALLEST, "where nothing wrong lies within the radius there is nothing it looks for"),
        "fab": "a search for the smallest change, cut off at the radius",
    },
    a_flat_spot_does_not_hold_it: {
        **dict.fromkeys(SMALLEST, "begins at the image, where a flat network has no slope"),
        "fab": "the first run begins at the image",
        "linear-exact": "takes affine networks alone",
    },
}


def applies(contract: Contract, cls: type, norm: str) -> bool:
    """Whether ``contract`` is about attacks like ``cls``: all but the exempt, restarts where there are any."""
    exempt = EXEMPT.get(contract, {})
    if cls.name in WEAK or cls.name in exempt or f"{cls.name} {norm}" in exempt:
        return False
    if contract is reaches_the_worst_case_of_an_affine_network:
        return norm == "linf"  # of which the closed form is; distances in the other norms have their own contract
    if contract is more_restarts_are_never_worse:
        return "restarts" in _fields(cls)
    if contract in (finds_the_nearest, leaves_wrong_images_where_they_are):
        return cls.name in SMALLEST or "minimal" in _fields(cls)
    return True


def norms(cls: type) -> list[str]:
    """The norms that an attack claims: those of its examples."""
    return sorted({example.threat.norm for example in cls.examples()})


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _variants(cls: type, norm: str) -> list[Attack]:
    """The attack as it comes, and with each of its switches flipped."""
    threat = Lp(norm, 0.1)
    plain = cls(threat=threat, **SMALL_BUDGET.get(cls.name, {}))
    flips = [name for name in SWITCHES if name in _fields(cls)]
    return [plain, *(dataclasses.replace(plain, **{name: not getattr(plain, name)}) for name in flips)]


def _smallest(cls: type, norm: str) -> list[Attack]:
    """The variants, told to go on to the smallest change where they have to be told."""
    told = {"minimal": True} if "minimal" in _fields(cls) else {}
    return [dataclasses.replace(attack, **told) for attack in _variants(cls, norm)]


def _at(attack: Attack, radius: float, **settings: object) -> Attack:
    return dataclasses.replace(attack, threat=attack.threat.with_eps(radius), **settings)


def _predicted(model: nn.Module, x: Tensor) -> Batch:
    with torch.no_grad():
        return Batch(x, model(x).argmax(1), torch.arange(len(x)))


def _margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return logit_margin(model(x), y)


def _seen(attack: Attack, model: nn.Module, batch: Batch) -> Attacked:
    seen = evaluate(attack, model, batch, gen=gen())
    assert seen.clean_correct.all()
    return seen
