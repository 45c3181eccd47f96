"""The attacks that look for the smallest change, on models whose nearest boundary is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import forked, gen
from torch import Tensor, nn

from robustlens.attacks.carlini_wagner import CarliniWagner
from robustlens.attacks.ddn import DDN
from robustlens.attacks.deepfool import DeepFool
from robustlens.attacks.fab import FAB
from robustlens.attacks.fmn import FMN
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.smallest import nearest_on_segment
from robustlens.attacks.superdeepfool import SuperDeepFool
from robustlens.attacks.verify import evaluate
from robustlens.core.types import Attack, Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

WHOLE = {"l2": Lp("l2", 8.0), "linf": Lp("linf", 1.0)}
both_norms = pytest.mark.parametrize("norm", WHOLE)


@pytest.fixture
def five() -> nn.Module:
    """Five classes, linear, boundaries all around the grey image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    with torch.no_grad():
        model[1].weight.normal_(generator=gen(2))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    return model


def grey(n: int = 200) -> Tensor:
    return 0.5 + 0.05 * torch.randn(n, 1, 8, 8, generator=gen(3), dtype=torch.float64)


def predicted(model: nn.Module, x: Tensor) -> Batch:
    with torch.no_grad():
        return Batch(x, model(x).argmax(1), torch.arange(len(x)))


def closed_form(model: nn.Module, batch: Batch, norm: str) -> Tensor:
    """min_k (f_y − f_k) / ‖w_y − w_k‖_q."""
    weight = model[1].weight.detach()
    leads = model(batch.x).detach()
    leads = leads.gather(1, batch.y[:, None]) - leads
    sizes = (weight[batch.y][:, None] - weight).norm(p=1 if norm == "linf" else 2, dim=2)
    return (leads / sizes).nan_to_num(nan=torch.inf).amin(1)


def found(attack: Attack, model: nn.Module, batch: Batch) -> Tensor:
    seen = evaluate(attack, model, batch, gen=gen())
    assert not seen.robust.any()
    return seen.distance


@both_norms
def test_superdeepfool_is_exact_on_a_linear_model(five: nn.Module, norm: str) -> None:
    batch = predicted(five, grey())
    ratio = found(SuperDeepFool(threat=WHOLE[norm], bisections=16), five, batch) / closed_form(five, batch, norm)
    assert ratio.min() > 1 - 1e-9 and ratio.median() < 1.0001 and ratio.max() < 1.001


@both_norms
def test_deepfool_overshoots_the_nearest_boundary_of_a_linear_model(five: nn.Module, norm: str) -> None:
    batch = predicted(five, grey())
    ratio = found(DeepFool(threat=WHOLE[norm], overshoot=0.03), five, batch) / closed_form(five, batch, norm)
    assert torch.allclose(ratio, torch.full_like(ratio, 1.03), rtol=1e-9)


@pytest.mark.parametrize(
    ("attack", "median", "most"),
    [
        (FMN(threat=WHOLE["linf"], steps=200), 1.01, 1.2),
        (FMN(threat=WHOLE["l2"], steps=200), 1.01, 1.2),
        (DDN(threat=WHOLE["l2"], steps=200), 1.01, 1.2),
        (CarliniWagner(threat=WHOLE["l2"], step_size=0.01), 1.02, 1.3),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_descents_are_near_on_a_linear_model(attack: Attack, median: float, most: float, five: nn.Module) -> None:
    """With confident logits, as cross-entropy mixes the rivals; a fixed step size cannot see what is nearest of all."""
    exact = closed_form(five, predicted(five, grey()), attack.threat.norm)
    model, far = nn.Sequential(*five, Times(1000.0)), exact > exact.quantile(0.3)
    ratio = found(attack, model, predicted(model, grey()[far])) / exact[far]
    assert ratio.min() > 1 - 1e-9 and ratio.median() < median and ratio.max() < most


@pytest.mark.parametrize(
    ("attack", "within", "short"),
    [
        (SuperDeepFool(threat=WHOLE["l2"]), 1.01, 0.0),
        (SuperDeepFool(threat=WHOLE["linf"]), 1.01, 0.0),
        (FMN(threat=WHOLE["l2"]), 1.01, 0.0),
        (FMN(threat=WHOLE["linf"]), 1.01, 0.0),
        (DeepFool(threat=WHOLE["l2"]), 1.03, 0.0),
        (DeepFool(threat=WHOLE["linf"]), 1.2, 0.0),
        (DDN(threat=WHOLE["l2"], steps=300), 1.05, 0.0),
        (CarliniWagner(threat=WHOLE["l2"], steps=300, step_size=0.01), 1.05, 0.05),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_in_the_box_they_are_near_the_exact_distance(
    attack: Attack, within: float, short: float, linear: nn.Module, images: Tensor
) -> None:
    """The exact worst case of a linear model says whether anything wrong lies nearer than what was found."""
    linear, threat = linear.double(), attack.threat
    batch = predicted(linear, images.double())
    distance = found(attack, linear, batch)
    assert (distance > 1.1 * closed_form(linear, batch, threat.norm)).any(), "the box is in the way of some"
    for i, radius in enumerate((distance / within - short).clamp_min(0).tolist()):
        one = Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.index[i : i + 1])
        assert evaluate(LinearExact(threat=threat.with_eps(radius)), linear, one, gen=gen()).robust.all()


#: Attacks of the margin, which goes up and down with the logits.
OF_THE_MARGIN = [
    SuperDeepFool(threat=WHOLE["l2"], steps=12),
    FMN(threat=WHOLE["linf"], steps=12),
    DeepFool(threat=WHOLE["linf"], steps=12),
    CarliniWagner(threat=WHOLE["l2"], steps=20, searches=3, step_size=0.05),
]
ATTACKS = [*OF_THE_MARGIN, DDN(threat=WHOLE["l2"], steps=30)]
all_attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)


@pytest.mark.parametrize("attack", OF_THE_MARGIN, ids=lambda a: a.name)
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_the_scale_of_the_logits_changes_nothing(attack: Attack, scale: float, network: nn.Module) -> None:
    x = torch.rand(12, 1, 8, 8, generator=gen(1), dtype=torch.float64)
    before = evaluate(attack, network, predicted(network, x), gen=gen())
    with torch.no_grad():
        for p in network[-1].parameters():
            p *= scale
    after = evaluate(attack, network, predicted(network, x), gen=gen())
    assert torch.equal(before.x_adv, after.x_adv) and not before.robust.any()


@all_attacks
def test_wrong_images_stay_and_each_image_is_on_its_own(attack: Attack, five: nn.Module) -> None:
    batch = predicted(five, grey(12))
    mixed = Batch(batch.x, torch.where(batch.index % 3 == 0, (batch.y + 1) % 5, batch.y), batch.index)
    seen = evaluate(attack, five, mixed, gen=gen())
    assert (seen.distance[::3] == 0).all()
    alone = evaluate(attack, five, Batch(batch.x[1:2], batch.y[1:2], batch.index[1:2]), gen=gen())
    assert torch.allclose(alone.x_adv[0], seen.x_adv[1], atol=1e-12)


class Flat(nn.Module):
    """Always class 0, with slope 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).to(x) + 0 * x.flatten(1)[:, :2]


@all_attacks
def test_failure_is_a_right_answer_and_no_nan(attack: Attack) -> None:
    seen = evaluate(attack, Flat(), predicted(Flat(), torch.rand(4, 1, 8, 8)), gen=gen())
    assert seen.robust.all() and torch.isfinite(seen.x_adv).all()


def test_saturated_logits_do_not_stop_them(five: nn.Module) -> None:
    """In float32 the gradient of cross-entropy would be 0 at these margins, and squares of these slopes underflow."""
    model = five.float()
    for scale in (1e6, 1e-25):
        scaled = nn.Sequential(*model, Times(scale))
        batch = predicted(scaled, grey(20).float())
        for attack in ATTACKS:
            found(dataclasses.replace(attack, steps=40), scaled, batch)


class Times(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * z


def test_bisection_finds_the_crossing_and_keeps_its_wrong_side(five: nn.Module) -> None:
    batch = predicted(five, grey(20))
    far = batch.x.flip(0)
    wrong = predicted(five, far).y != batch.y
    x, y, far = batch.x[wrong], batch.y[wrong], far[wrong]
    assert len(x) > 3
    near = nearest_on_segment(five, x, far, y, steps=20)
    t = ((near - x) / (far - x)).flatten(1).median(1).values[:, None, None, None]
    assert (predicted(five, near).y != y).all()
    assert (predicted(five, torch.lerp(x, far, t - 2e-6)).y == y).all()


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SuperDeepFool, {"threat": Lp("l1", 5.0)}),
        (FMN, {"threat": Lp("l1", 5.0)}),
        (SuperDeepFool, {"steps": 0}),
        (SuperDeepFool, {"rivals": 0}),
        (SuperDeepFool, {"overshoot": -0.1}),
        (SuperDeepFool, {"bisections": -1}),
        (FMN, {"steps": 0}),
        (FMN, {"step_size": 0.0}),
        (FMN, {"gamma": 1.0}),
    ],
)
def test_settings_that_cannot_work_are_refused(cls: type, settings: dict) -> None:
    with pytest.raises(InputError):
        cls(**{"threat": Lp("l2", 1.0), **settings})


@pytest.mark.parametrize(
    "attack",
    [
        FMN(threat=WHOLE["linf"]),
        FMN(threat=WHOLE["l2"]),
        DDN(threat=WHOLE["l2"]),
        SuperDeepFool(threat=WHOLE["l2"]),
        SuperDeepFool(threat=WHOLE["linf"]),
        DeepFool(threat=WHOLE["linf"]),
        CarliniWagner(threat=WHOLE["l2"], steps=100, step_size=0.05),
        FAB(threat=WHOLE["linf"], steps=20, minimal=True),
        FAB(threat=WHOLE["l2"], steps=20, minimal=True, targets=3),
    ],
    ids=str,
)
def test_what_single_precision_finds_is_wrong_in_double(attack: Attack) -> None:
    """On the boundary rounding decides, and it differs from one pass to the next; the exact answer must be wrong."""
    with forked():
        torch.manual_seed(7)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 4))
    with torch.no_grad():
        model[3].weight *= 30.0
    x = torch.rand(300, 1, 8, 8, generator=gen(4))
    seen = evaluate(attack, model, predicted(model, x), gen=gen())
    exact = model.double()(seen.x_adv.double()).argmax(1)
    still_right = int((exact == seen.clean_logits.argmax(1)).sum())
    assert not seen.robust.any() and still_right == 0
