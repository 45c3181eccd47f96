"""Global spectral norm regularization against equations 5 and 6, dense matrices, and a killed run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import SmallNet, gen
from torch import Tensor, nn

from robustlens.core.passes import Passes
from robustlens.core.types import Batch, Crafted, Moment, Terms
from robustlens.objectives.standard import Standard
from robustlens.regularizers.global_spectral import GlobalSpectralNorm
from robustlens.results.errors import InputError
from robustlens.updates.descend import Descend

NO_TERMS = Terms(torch.zeros(()), torch.zeros(1, 2))


def crafted_at(x: Tensor, memory: dict[str, Tensor]) -> Crafted:
    moment = Moment(memory=memory)
    return Crafted(Batch(x, torch.zeros(len(x)).long(), torch.arange(len(x)), moment), x)


def penalty(reg: GlobalSpectralNorm, net: nn.Module, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
    return reg.penalty(net, crafted_at(x, memory), NO_TERMS, gen=gen(2))


@pytest.fixture
def double_net(net: nn.Module) -> nn.Module:
    return net.double()


def test_each_step_continues_the_printed_iteration(double_net: nn.Module, images: Tensor) -> None:
    """Equation 5 on the stored v, value λ/2 Σσ², gradient λσuvᵀ; the next step goes on from where this one stopped."""
    net, x, memory = double_net, images.double(), {}
    weights = {"conv": net.conv.weight, "fc": net.fc.weight}
    reg = GlobalSpectralNorm(weight=0.3, iterations=2)
    draws = gen(2)
    vs = {k: torch.empty(w[0].numel(), dtype=w.dtype).normal_(generator=draws) for k, w in weights.items()}
    for _ in range(3):
        before = {k: v.clone() for k, v in memory.items()}
        held = dict(memory)
        ours = penalty(reg, net, x, memory)
        assert all(torch.equal(held[k], before[k]) for k in held), "memory is replaced, not written into"
        value, slopes = 0.0, {}
        for k, w in weights.items():
            matrix = w.detach().flatten(1)
            for _ in range(2):
                u = matrix @ vs[k] / (matrix @ vs[k]).norm()
                vs[k] = matrix.T @ u / (matrix.T @ u).norm()
            sigma = u @ matrix @ vs[k]
            value += 0.3 / 2 * float(sigma) ** 2
            slopes[k] = (0.3 * sigma * torch.outer(u, vs[k])).view_as(w)
        assert float(ours.detach()) == pytest.approx(value, rel=1e-12)
        found = torch.autograd.grad(ours, list(weights.values()))
        assert all(torch.allclose(g, slopes[k], atol=1e-12) for g, k in zip(found, weights, strict=True))
        assert {k: tuple(v.shape) for k, v in memory.items()} == {
            "global-spectral-norm/conv": (9,),
            "global-spectral-norm/fc": (384,),
        }


def test_converges_to_the_singular_values_of_the_reshaped_kernels(double_net: nn.Module, images: Tensor) -> None:
    memory: dict[str, Tensor] = {}
    for _ in range(300):
        found = float(penalty(GlobalSpectralNorm(weight=2.0), double_net, images.double(), memory).detach())
    weights = double_net.conv.weight, double_net.fc.weight
    exact = sum(float(torch.linalg.svdvals(w.detach().flatten(1))[0]) ** 2 for w in weights)
    assert found == pytest.approx(exact, rel=1e-8)


def dense(conv: nn.Conv2d, shape: tuple[int, int, int]) -> Tensor:
    """The matrix of a convolution on images of ``shape``, a column for every pixel."""
    n = torch.Size(shape).numel()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    return (conv(torch.eye(n, dtype=torch.float64).view(n, *shape)) - conv(zero)).flatten(1).T.detach()


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"stride": 3},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_true_operator_is_the_convolution_as_it_acts(settings: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 4, 3, **settings).double()
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))
    x = torch.rand(4, 2, 7, 6, generator=gen(), dtype=torch.float64)
    net(x)
    matrix, weight = dense(conv, (2, 7, 6)), net[3].weight.detach()
    reg, memory = GlobalSpectralNorm(weight=1.0, iterations=2, operator="true"), {}
    penalty(reg, net, x, memory)
    v, w = memory["global-spectral-norm/0"], memory["global-spectral-norm/3"]
    assert v.shape == (1, 2, 7, 6)
    found = penalty(reg, net, x, memory)
    sigmas = []
    for m, t in ((matrix, v.flatten()), (weight, w)):
        for _ in range(2):
            u = m @ t / (m @ t).norm()
            t = m.T @ u / (m.T @ u).norm()
        sigmas.append(float(u @ m @ t))
    assert float(found.detach()) == pytest.approx((sigmas[0] ** 2 + sigmas[1] ** 2) / 2, rel=1e-12)

    # The dominant singular vectors are where the iteration stays, with the value ½σ₁² and the gradient σ₁uvᵀ.
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    memory = {"global-spectral-norm/0": right[0].view(1, 2, 7, 6)}
    found = penalty(reg, net, x, memory)
    assert float(found.detach()) == pytest.approx(float(values[0]) ** 2 / 2, rel=1e-10)
    (slope,) = torch.autograd.grad(found, conv.weight)
    v = right[0].view(1, 2, 7, 6)
    top = (left[:, 0] * (conv(v) - conv(0 * v)).flatten()).sum()
    assert torch.allclose(slope, values[0] * torch.autograd.grad(top, conv.weight)[0], atol=1e-8)
    kernel = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
    tiles = settings == {"stride": 3}  # windows that do not overlap: many copies of the kernel, side by side
    assert (abs(float(values[0] - kernel)) < 1e-9) == tiles, "in general another operator"


def test_true_operator_leaves_out_what_does_not_run(double_net: nn.Module, images: Tensor) -> None:
    double_net.spare = nn.Conv2d(3, 3, 3).double()
    memory: dict[str, Tensor] = {}
    penalty(GlobalSpectralNorm(operator="true"), double_net, images.double(), memory)
    assert set(memory) == {"global-spectral-norm/conv", "global-spectral-norm/fc"}
    assert double_net.training


def test_a_layer_that_starts_at_zero_is_found_when_it_wakes(double_net: nn.Module, images: Tensor) -> None:
    """As the second convolutions of a Fixup network do."""
    awake = double_net.fc.weight.detach().clone()
    nn.init.zeros_(double_net.fc.weight)
    reg, memory, x = GlobalSpectralNorm(weight=2.0, iterations=50), {}, images.double()
    conv = float(torch.linalg.svdvals(double_net.conv.weight.detach().flatten(1))[0]) ** 2
    asleep = penalty(reg, double_net, x, memory)
    assert float(asleep.detach()) == pytest.approx(conv, rel=1e-3)
    assert torch.isfinite(torch.autograd.grad(asleep, double_net.fc.weight)[0]).all()
    with torch.no_grad():
        double_net.fc.weight.copy_(awake)
    for _ in range(20):
        found = penalty(reg, double_net, x, memory)
    exact = conv + float(torch.linalg.svdvals(awake)[0]) ** 2
    assert float(found.detach()) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("operator", ["reshaped", "true"])
def test_a_resumed_run_goes_on_to_the_bit(operator: str, images: Tensor, labels: Tensor) -> None:
    """All state is in the moment's memory, through a file, in a network of either memory format."""

    def steps(model: nn.Module, first: int, last: int, memory: dict[str, Tensor]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reg = GlobalSpectralNorm(weight=0.1, operator=operator)
        for step in range(first, last):
            optimizer.zero_grad()
            torch.manual_seed(step)
            batch = Batch(images, labels, torch.arange(12), Moment(memory=memory))
            Descend().backward(model, Standard(), (reg,), batch, gen=gen(step))
            optimizer.step()

    whole = SmallNet().to(memory_format=torch.channels_last)
    part, lost = copy.deepcopy(whole), copy.deepcopy(whole)
    kept: dict[str, Tensor] = {}
    steps(whole, 0, 6, {})
    steps(part, 0, 3, kept)
    steps(part, 3, 6, safetensors.torch.load(safetensors.torch.save(kept)))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), part.state_dict().values(), strict=True))
    steps(lost, 0, 3, {})
    steps(lost, 3, 6, {})
    assert not torch.equal(whole.fc.weight, lost.fc.weight), "the test would see a memory that is lost"


def test_settings() -> None:
    assert GlobalSpectralNorm(iterations=10, operator="true").passes == Passes()
    memory: dict[str, Tensor] = {}
    nothing = penalty(GlobalSpectralNorm(weight=0.0), nn.Linear(2, 2), torch.ones(1, 2), memory)
    assert nothing == 0 and not nothing.requires_grad and not memory
    for bad in ({"weight": -1.0}, {"iterations": 0}):
        with pytest.raises(InputError, match=f"global-spectral-norm {next(iter(bad))}"):
            GlobalSpectralNorm(**bad)
