"""Average-margin regularization and rows of unit norm, against the equations of Wu & Yu 2019 (arXiv 1907.11780)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.constraints.unit_rows import UnitRows
from robustlens.core.discovery import build, describe
from robustlens.core.types import Batch, Crafted, Terms
from robustlens.methods.preset import Preset
from robustlens.methods.wu_2019 import PRESETS
from robustlens.objectives.standard import Standard
from robustlens.regularizers.average_margin import AverageMargin
from robustlens.results.errors import InputError
from robustlens.train.config import TrainingConfig


def crafted_of(x: Tensor, y: Tensor) -> Crafted:
    return Crafted(Batch(x, y, torch.arange(len(y))), x)


def terms_of(model: nn.Module, crafted: Crafted) -> Terms:
    return Standard().loss(model, crafted)


@pytest.fixture
def mlp() -> nn.Module:
    """Features, a head with bias, and rows of very different norms; margins of both signs."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build("model", {"name": "mlp", "hidden": 9}).build((1, 8, 8), 4).double()
        nn.init.normal_(model.head.weight)
        nn.init.normal_(model.head.bias)
        with torch.no_grad():
            model.head.weight *= torch.tensor([[0.5], [0.7], [1.0], [1.4]])
    return model


def printed(reg: AverageMargin, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Equation 15's second term example by example, class by class, with the bias of the authors' code."""
    w, b, total = model.head.weight, model.head.bias, 0.0
    for phi, label in zip(model.features(x), y.tolist(), strict=True):
        margins = []
        for k in range(len(w)):
            if k != label:
                margin = (w[label] - w[k]) @ phi + b[label] - b[k]
                margins.append(margin / (w[label] - w[k]).norm() if reg.exact else margin)
        alpha = min(margins)
        if reg.variant == "paper":
            total = total - torch.clamp(alpha, min=0, max=reg.tau)
        else:
            total = total + torch.clamp(reg.tau - alpha, min=0)
    return reg.weight * total / len(y)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("variant", ["paper", "hinge"])
@pytest.mark.parametrize("tau", [1.5, 6.0])
def test_value_and_gradient_against_the_printed_equation(
    variant: str, exact: bool, tau: float, mlp: nn.Module, images: Tensor, labels: Tensor
) -> None:
    reg = AverageMargin(variant=variant, exact=exact, tau=tau, weight=0.3)
    crafted = crafted_of(images.double(), labels)
    ours = reg.penalty(mlp, crafted, terms_of(mlp, crafted), gen=gen())
    theirs = printed(reg, mlp, crafted.batch.x, labels)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    weights = list(mlp.parameters())
    a, b = torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(a, b, strict=True))
    assert any(bool(p.any()) for p in a)


def test_pieces_and_slopes() -> None:
    """H_τ − H_0 is τ, τ − t, 0 with slopes 0, −1, 0; −[t]₀^τ lies τ below it (the paper prints the other sign)."""
    tau = 2.5
    t = torch.tensor([-7.0, -0.1, 0.1, 1.0, 2.4, 2.6, 50.0], dtype=torch.float64, requires_grad=True)
    paper, hinge, zero = (
        AverageMargin(tau=s, variant=v).psi(t) for s, v in ((tau, "paper"), (tau, "hinge"), (0, "hinge"))
    )
    wanted = torch.tensor([tau, tau, tau - 0.1, tau - 1.0, tau - 2.4, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(hinge - zero, wanted, atol=1e-14)
    assert torch.allclose(paper, hinge - zero - tau, atol=1e-14)
    (slopes,) = torch.autograd.grad(paper.sum(), t, retain_graph=True)
    assert slopes.tolist() == [0, 0, -1, -1, -1, 0, 0]
    (slopes,) = torch.autograd.grad(hinge.sum(), t)
    assert slopes.tolist() == [-1, -1, -1, -1, -1, 0, 0], "the hinge pulls misclassified examples as well"


@pytest.mark.parametrize("tau", [0.5, 100.0])
def test_binary_logistic_regression_has_the_truncated_signed_margin(tau: float, images: Tensor) -> None:
    """Equation 9 with its sum over examples as a mean; under ‖w‖ = 1 the margin is a distance."""
    model = build("model", "logistic").build((1, 8, 8), 2).double()
    nn.init.normal_(model.fc.weight, generator=gen(4))
    UnitRows().apply(model, images[:1])
    x, y = images.double(), torch.arange(len(images)) % 2
    crafted = crafted_of(x, y)
    value = AverageMargin(tau=tau, weight=0.7).penalty(model, crafted, terms_of(model, crafted), gen=gen())
    distances = (x.flatten(1) @ model.fc.weight[0]).tolist()
    wanted = -0.7 * sum(
        min(max(s * d, 0.0), tau) for s, d in zip((2 * y - 1).tolist(), distances, strict=True)
    ) / len(y)  # fmt: skip
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12) and wanted < 0


def test_exact_margin_is_the_distance_at_which_a_linear_prediction_changes(images: Tensor) -> None:
    model = build("model", "softmax-regression").build((1, 8, 8), 4).double()
    nn.init.normal_(model.head.weight, generator=gen(2))
    nn.init.normal_(model.head.bias, generator=gen(3))
    reg = AverageMargin(exact=True, tau=1e9, weight=1.0)
    w = model.head.weight.detach()
    for x in images.double()[:, None]:
        y = model(x).argmax(1)
        crafted = crafted_of(x, y)
        distance = -float(reg.penalty(model, crafted, terms_of(model, crafted), gen=gen()).detach())
        assert distance > 0
        ways = [(w[k] - w[y[0]]) / (w[k] - w[y[0]]).norm() for k in range(4) if k != y[0]]
        at = {r: [int(model(x + r * distance * way.view_as(x)).argmax(1)) for way in ways] for r in (0.999, 1.001)}
        assert at[0.999] == [int(y)] * 3 and at[1.001] != [int(y)] * 3


def test_exact_margin_does_not_change_with_the_scale_of_the_head(
    mlp: nn.Module, images: Tensor, labels: Tensor
) -> None:
    crafted = crafted_of(images.double(), labels)
    scaled = copy.deepcopy(mlp)
    with torch.no_grad():
        scaled.head.weight *= 7
        scaled.head.bias *= 7
    for exact, same in ((True, True), (False, False)):
        reg = AverageMargin(exact=exact, tau=1e6)
        a, b = (float(reg.penalty(m, crafted, terms_of(m, crafted), gen=gen()).detach()) for m in (mlp, scaled))
        assert (a == pytest.approx(b, rel=1e-12)) is same


def test_clean_logits_are_shared_or_made_without_a_trace(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    net.train()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    crafted = crafted_of(images, labels)
    torch.manual_seed(0)
    terms = terms_of(net, crafted)
    AverageMargin().penalty(net, crafted, terms, gen=gen())
    assert len(calls) == 1
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    AverageMargin().penalty(net, crafted, Terms(terms.loss, terms.logits), gen=gen())
    assert len(calls) == 2
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_margins_are_those_of_the_clean_images(mlp: nn.Module, images: Tensor, labels: Tensor) -> None:
    x = images.double()
    plain, attacked = crafted_of(x, labels), Crafted(Batch(x, labels, torch.arange(12)), 1 - x)
    reg = AverageMargin()
    a = reg.penalty(mlp, plain, terms_of(mlp, plain), gen=gen())
    b = reg.penalty(mlp, attacked, Terms(torch.zeros(()), mlp(1 - x)), gen=gen())
    assert torch.allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize(
    ("variant", "weight", "tau"),
    [("paper", 0.1, 10.0), ("paper", 5.0, 1.0), ("paper", 0.5, 0.0), ("hinge", 0.1, 10.0), ("hinge", 5.0, 1.0)],
)
def test_fisher_consistency(variant: str, weight: float, tau: float) -> None:
    """Theorem 2: minimisers of C_η(α) = η ℓ(α) + (1 − η) ℓ(−α) have the sign of 2η − 1, strictly."""
    psi = AverageMargin(variant=variant, tau=tau).psi
    alpha = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    loss = lambda t: nn.functional.softplus(-t) + weight * psi(t)  # noqa: E731
    for eta in (0.1, 0.3, 0.45, 0.49, 0.51, 0.6, 0.9):
        risk = eta * loss(alpha) + (1 - eta) * loss(-alpha)
        wrong = alpha * (2 * eta - 1) <= 0
        assert float(risk[wrong].min()) > float(risk.min()) + 1e-9


def test_the_printed_definition_of_fisher_consistency_is_a_misprint() -> None:
    """With φ(1 − α) for φ(−α), the logistic loss itself would not be Fisher-consistent."""
    alpha = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    phi = lambda t: nn.functional.softplus(-t)  # noqa: E731
    assert float(alpha[(0.45 * phi(alpha) + 0.55 * phi(1 - alpha)).argmin()]) > 0.1


def test_errors() -> None:
    for field in ("weight", "tau"):
        with pytest.raises(InputError, match=f"average-margin {field}: expected a number ≥ 0, got -1"):
            AverageMargin(**{field: -1.0})
        with pytest.raises(InputError):
            AverageMargin(**{field: math.nan})
    headless = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(InputError, match=r"head\(features\(x\)\), with a linear head"):
        AverageMargin(exact=True).check(headless, torch.zeros(1, 1, 8, 8))
    AverageMargin().check(headless, torch.zeros(1, 1, 8, 8))
    reg = AverageMargin(exact=True, variant="hinge")
    assert build("regularizer", describe(reg)) == reg


# Unit rows


def test_unit_rows_are_the_nearest_weights_with_rows_of_norm_one(mlp: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(mlp.state_dict())
    facts = UnitRows().apply(mlp, images[:1])
    after = mlp.state_dict()
    old, new = before["fc2.weight"], after["fc2.weight"]
    assert facts == {"unit_rows_before": pytest.approx(float(old.norm(dim=1).max()))}
    assert torch.allclose(new.norm(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-15)
    for row, w in zip(old, new, strict=True):  # no other unit vector is nearer
        others = nn.functional.normalize(torch.randn(1000, 9, generator=gen(), dtype=torch.float64))
        assert float((others - row).norm(dim=1).min()) > float((w - row).norm())
    assert all(torch.equal(before[k], after[k]) for k in before if k != "fc2.weight")
    assert UnitRows().apply(mlp, images[:1])["unit_rows_before"] == pytest.approx(1, abs=1e-15)


def test_unit_rows_find_the_last_layer_and_leave_zeros(images: Tensor, net: nn.Module) -> None:
    with torch.no_grad():
        net.fc.weight[1] = 0
    assert UnitRows().every == "step"
    UnitRows().apply(net, images[:1])
    assert torch.allclose(net.fc.weight.norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="unit-rows: expected a linear layer"):
        UnitRows().apply(nn.Conv2d(1, 1, 3), images[:1])


def test_projected_descent_stops_where_the_gradient_is_radial(images: Tensor) -> None:
    """Equation 9 by its two parts: at a solution over the sphere no tangential slope is left."""
    model = build("model", "logistic").build((1, 8, 8), 2).double()
    nn.init.normal_(model.fc.weight, generator=gen(4))
    crafted = crafted_of(images.double(), torch.arange(len(images)) % 2)
    reg, w = AverageMargin(weight=0.5, tau=100.0), model.fc.weight
    for _ in range(3000):
        terms = terms_of(model, crafted)
        (grad,) = torch.autograd.grad(terms.loss + reg.penalty(model, crafted, terms, gen=gen()), w)
        with torch.no_grad():
            w -= 0.05 * grad
        UnitRows().apply(model, images[:1])
    w = w.detach()
    tangential = grad - (grad * w).sum() * w
    assert float(tangential.norm()) < 1e-8 < float(grad.norm())


# Presets


@pytest.mark.parametrize("preset", PRESETS, ids=lambda each: each.name)
@pytest.mark.parametrize("protocol", ["paper", "sound"])
def test_presets_can_be_built(preset: Preset, protocol: str) -> None:
    settings = preset.settings(protocol)
    TrainingConfig(**settings["training"])
    build("objective", settings["objective"])
    assert [build("regularizer", each).name for each in settings.get("regularizers", [])] in (
        [],
        ["orthogonality"],
        ["average-margin", "orthogonality"],
    )
    with torch.device("meta"):
        build("model", preset.model).build((1, 28, 28) if preset.data == "mnist" else (3, 32, 32), 10)
    assert bool(preset.sound) is bool(preset.differs)


def test_presets_say_what_ran_and_what_was_printed() -> None:
    known = {preset.name: preset for preset in PRESETS}
    assert len(known) == len(PRESETS) == 32
    amr = known["average-margin/mnist-cnn"]
    margin, orthogonality = amr.settings("paper")["regularizers"]
    assert (margin["tau"], margin["variant"], orthogonality["beta"]) == (40.0, "hinge", 2e-3)
    margin, orthogonality = amr.settings("sound")["regularizers"]
    assert (margin["tau"], margin["variant"], orthogonality["beta"]) == (10.0, "paper", 1e-3)
    assert amr.settings("sound")["training"]["optimizer"]["lr"] == 0.002
    lcr = known["orthogonality/mnist-softmax-regression"]
    assert [lcr.settings(p)["regularizers"][0]["beta"] for p in ("paper", "sound")] == [2.0, 1e-3]
    weak, strong = (known["adversarial/mnist-lenet"].settings(p)["objective"] for p in ("paper", "sound"))
    weak, strong = build("objective", weak).attack, build("objective", strong).attack
    assert weak.steps * weak.step_size == pytest.approx(0.4) and weak.threat.eps == 2.0
    assert strong.step_size is None and strong.steps == 40
