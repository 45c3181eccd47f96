"""Spectral clipping and the Parseval retraction against transcriptions and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.constraints.parseval import Parseval
from robustlens.constraints.spectral_clip import SpectralClip
from robustlens.core.discovery import build
from robustlens.linalg.layers import ConvOperator, Skipped, operators
from robustlens.linalg.spectra import circular_conv_norm
from robustlens.methods import cisse_2017, wen_2020
from robustlens.methods.preset import Preset
from robustlens.objectives.adversarial import Adversarial
from robustlens.results.errors import InputError
from robustlens.studies.config import MethodConfig
from robustlens.studies.plan import make_recipe
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig


class Layers(nn.Module):
    """Strided, grouped and dilated convolutions, BatchNorm and a linear layer, on 1×8×8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.strided = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.grouped(self.strided(self.norm(self.stem(x)).relu()).relu()).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = Layers()
        for module in found.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight)
        return found


X = torch.rand(1, 1, 8, 8, generator=gen(0))


def norms(model: nn.Module) -> dict[str, float]:
    return {layer.name: layer.norm() for layer in operators(model, X) if not isinstance(layer, Skipped)}


@pytest.mark.parametrize("how", ["alternating", "rescale"])
def test_every_layer_is_brought_within_the_bound(model: nn.Module, how: str) -> None:
    before, biases = norms(model), [model.strided.bias.clone(), model.norm.weight.clone()]
    bound = sorted(before.values())[1]  # one layer lies within it, one exactly on it
    within = [name for name, value in before.items() if value <= bound]
    old = {name: model.get_submodule(name).weight.clone() for name in before}
    facts = SpectralClip(norm=bound, how=how).apply(model, X)
    after = norms(model)
    assert len(within) == 2 and len(before) == 4
    for name in before:
        assert torch.equal(model.get_submodule(name).weight, old[name]) == (name in within)
        assert after[name] <= bound and after[name] >= min(before[name], bound * (1 - 1e-6))
    assert facts == {"spectral_norm_before": max(before.values()), "spectral_norm_after": max(after.values())}
    assert torch.equal(model.strided.bias, biases[0]) and torch.equal(model.norm.weight, biases[1])


def test_one_clip_reports_the_norm_that_it_reached(model: nn.Module) -> None:
    facts = SpectralClip(norm=1.0, how="clip").apply(model, X)
    assert facts["spectral_norm_after"] == max(norms(model).values())
    assert 1.0 < facts["spectral_norm_after"] < facts["spectral_norm_before"]
    assert norms(model)["fc"] <= 1  # nothing is cropped from a matrix


def test_padded_certifies_the_layers_as_they_are_used(model: nn.Module) -> None:
    constraint = SpectralClip(norm=1.0, operator="padded")
    constraint.check(model, X)
    facts = constraint.apply(model, X)
    bounds = [layer.norm_bound() for layer in operators(model, X) if not isinstance(layer, Skipped)]
    assert facts["spectral_norm_after"] == max(bounds) <= 1
    circular = copy.deepcopy(model)
    circular.stem.weight.data.mul_(10)
    SpectralClip(norm=1.0).apply(circular, X)
    stem = operators(circular, X)[0]
    assert isinstance(stem, ConvOperator) and stem.norm() <= 1


def test_mirrored_layers_have_no_certificate() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"))
    SpectralClip().check(model, X)
    with pytest.raises(InputError, match='Set operator = "circular"'):
        SpectralClip(operator="padded").check(model, X)
    with pytest.raises(InputError, match="a number > 0"):
        SpectralClip(norm=0.0)


def test_momentum_is_left_alone(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().sum().backward()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    SpectralClip().apply(model, X)
    for number, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], kept["state"][number]["momentum_buffer"])


def test_batchnorm_divides_the_scale_out_again(model: nn.Module) -> None:
    """Why the constraint does not bound a network with BatchNorm: the function is the same after rescaling."""
    model.norm.eps = 1e-12
    images = torch.rand(16, 1, 8, 8, generator=gen(1))
    before = model.norm(model.stem(images))
    facts = SpectralClip(norm=0.1, how="rescale").apply(model, X)
    assert facts["spectral_norm_before"] > 1
    assert torch.allclose(model.norm(model.stem(images)), before, atol=1e-4)


def retracted(w: Tensor, beta: float) -> Tensor:
    """(1 + β) W − β W Wᵀ W, one element at a time."""
    new = torch.empty_like(w)
    rows, cols = w.shape
    for i in range(rows):
        for j in range(cols):
            cubed = sum(w[i, a] * w[b, a] * w[b, j] for a in range(cols) for b in range(rows))
            new[i, j] = (1 + beta) * w[i, j] - beta * cubed
    return new


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_retraction_is_the_equation(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0]).double()
    w, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    facts = Parseval(beta=0.1).apply(layer, X)
    assert torch.allclose(layer.weight, retracted(w, 0.1), rtol=0, atol=1e-14) and torch.equal(layer.bias, bias)
    gram = w @ w.T if shape[0] <= shape[1] else w.T @ w
    assert facts["parseval_gap"] == pytest.approx(float((gram - torch.eye(3)).norm()), rel=1e-12)


@pytest.mark.parametrize("overlap", [False, True])
def test_retraction_of_a_grouped_convolution(overlap: bool) -> None:
    conv = nn.Conv2d(4, 6, (1, 3), groups=2).double()
    scale = math.sqrt(3) if overlap else 1.0
    w = scale * conv.weight.detach().clone()
    truth = torch.cat([retracted(part.flatten(1), 0.05) for part in w.chunk(2)]).view(w.shape) / scale
    Parseval(beta=0.05, overlap=overlap).apply(conv, X)
    assert torch.allclose(conv.weight, truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_every_singular_value_moves_by_itself_towards_one(shape: tuple[int, int]) -> None:
    beta, layer = 0.05, nn.Linear(shape[1], shape[0]).double()
    start = torch.tensor([3.0, 1.0, 0.2, 0.01], dtype=torch.float64)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 4, dtype=torch.float64, generator=gen(6)))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 4, dtype=torch.float64, generator=gen(7)))
    layer.weight.data = u @ torch.diag(start) @ v.T
    Parseval(beta=beta).apply(layer, X)
    truth = u @ torch.diag((1 + beta) * start - beta * start**3) @ v.T
    assert torch.allclose(layer.weight, truth, rtol=0, atol=1e-13)
    for _ in range(600):
        facts = Parseval(beta=beta).apply(layer, X)
    assert torch.allclose(layer.weight, u @ v.T, rtol=0, atol=1e-10) and facts["parseval_gap"] < 1e-9
    fixed = layer.weight.detach().clone()  # orthonormal rows, or columns, stay
    Parseval(beta=0.5).apply(layer, X)
    assert torch.allclose(layer.weight, fixed, rtol=0, atol=1e-10)


def test_overlap_makes_a_convolution_a_contraction() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 8, 3, padding=1).double() for _ in range(2)]
    for conv, overlap in zip(convs, (True, False), strict=True):
        for _ in range(800):
            Parseval(beta=0.05, overlap=overlap).apply(conv, X)
    assert circular_conv_norm(convs[0].weight, (8, 8)) <= 1 + 1e-9
    assert 1.2 < circular_conv_norm(convs[1].weight, (8, 8)) <= 3


def test_parseval_settings() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    Parseval(beta=0.0).apply(layer, X)
    assert torch.equal(layer.weight, before)
    assert Parseval().apply(nn.Flatten(), X) == {"parseval_gap": 0.0}
    with pytest.raises(InputError, match=r"a number in \[0, 1\)"):
        Parseval(beta=1.0)


@pytest.mark.parametrize("protocol", ["paper", "sound"])
@pytest.mark.parametrize("preset", [*wen_2020.PRESETS, *cisse_2017.PRESETS], ids=lambda p: p.name)
def test_presets_can_be_built(preset: Preset, protocol: str) -> None:
    method = MethodConfig.model_validate({"label": preset.name, **preset.settings(protocol)})
    recipe, training = make_recipe(method), TrainingConfig.model_validate(method.training)
    assert build("model", preset.model) and str(Lp.parse(preset.threat)) and training.epochs in (90, 200)
    assert bool(preset.sound) == bool(preset.differs)
    if preset.sound:
        assert [c.how for c in recipe.constraints] == ["clip" if protocol == "paper" else "alternating"]
    if isinstance(recipe.objective, Adversarial) and isinstance(recipe.objective.attack, PGD):
        attack = recipe.objective.attack
        assert attack.steps * attack.step_size > attack.threat.eps  # the steps can cross the ball's radius
