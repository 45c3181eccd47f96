"""The lenses of the Jacobian's spectrum and of alignment, against matrices that are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import double_net, gen
from torch import Generator, Tensor, nn

from robustlens.attacks.linear import LinearExact
from robustlens.attacks.pgd import PGD
from robustlens.core.types import Split, Splits, Subject
from robustlens.lenses.alignment import Alignment, expected_cosine, untrained_copy
from robustlens.lenses.jacobian_spectrum import JacobianSpectrum
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

QUICK = PGD(threat=Lp("l2", 0.3), steps=4)
LEADING = "alignment with the leading direction"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def affine(weight: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    with torch.no_grad():
        net[1].weight.copy_(weight)
    return net


def subject_of(model: nn.Module, n: int = 12, side: int = 8, low: float = 0.3, high: float = 0.7) -> Subject:
    """Images away from the border of the box, in float64."""
    x = torch.rand(n, 1, side, side, generator=gen(1), dtype=torch.float64) * (high - low) + low
    classes = model(x[:2]).shape[1]
    split = Split(x, torch.arange(n) % classes)
    return Subject(model.eval(), Splits("noise", split, split, split, tuple(map(str, range(classes)))), Lp("l2", 0.3))


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x) * self.factor
        return logits


def test_spectrum_of_an_affine_model_is_that_of_its_matrix() -> None:
    weight = draw(5, 64)
    reading = JacobianSpectrum(attack=QUICK, regressed=2).look(subject_of(affine(weight)), gen=gen())
    values = torch.linalg.svdvals(weight).numpy()
    clean, attacked = reading.panels[0].series
    for series in (clean, attacked):
        assert np.allclose(series.y, values, rtol=1e-10) and series.x.tolist() == [1, 2, 3, 4, 5]
        assert (series.low <= series.y).all() and (series.y <= series.high).all()
    assert reading["stable rank, clean"].value == pytest.approx((values**2).sum() / values[0] ** 2)
    assert reading["largest singular value, clean"].n == 12
    assert reading["growth under attack"].value == pytest.approx(1, abs=1e-10)
    assert reading["regression: distance from the derivative"].value < 1e-9
    power = reading["power method: distance from the decomposition"]
    assert power.value <= power.residual + 1e-12 and power.value < 0.05
    assert reading.outcome.status == "ok"


def test_spectrum_of_every_image_against_a_dense_relu_network(network: nn.Module) -> None:
    """J = W₂ D(x) W₁ at the image and at the attacked one."""
    found: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watched:
        name = "watched"
        threat: Lp = QUICK.threat

        def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, gen: Generator) -> Tensor:
            found.append(QUICK.perturb(model, x, y, gen=gen))
            return found[-1]

    subject = subject_of(network)
    reading = JacobianSpectrum(attack=Watched(), n_examples=None, batch_size=5).look(subject, gen=gen())
    first, second = network[1], network[3]
    clean, attacked = reading.panels[0].series
    for series, x in ((clean, subject.splits.test.images), (attacked, torch.cat(found))):
        mask = (first(x.flatten(1)) > 0).double()
        dense = torch.einsum("kh,bh,hn->bkn", second.weight, mask, first.weight)
        assert np.allclose(series.y, torch.linalg.svdvals(dense).mean(0).detach().numpy(), rtol=1e-10)
    assert not np.allclose(clean.y, attacked.y), "the attack crosses no kink, so this shows nothing"
    assert reading["regression: distance from the derivative"].value < 1e-8


def test_scale_of_the_logits_scales_the_spectrum_and_leaves_alignment_alone() -> None:
    net = double_net().eval()
    straight = PGD(threat=Lp("l2", 0.3), steps=3, loss="margin", random_start=False)
    readings = {}
    for factor in (1.0, 7.0):
        subject = subject_of(Scaled(net, factor))
        readings[factor] = [
            JacobianSpectrum(attack=straight, regressed=0).look(subject, gen=gen()),
            Alignment(attack=straight, untrained=False).look(subject, gen=gen()),
        ]
    (small, before), (large, after) = readings[1.0], readings[7.0]
    for a, b in zip(small.panels[0].series, large.panels[0].series, strict=True):
        assert np.allclose(7 * a.y, b.y, rtol=1e-9) and a.y.min() > 0.01
    assert large["stable rank, clean"].value == pytest.approx(small["stable rank, clean"].value, rel=1e-9)
    assert len(before.quantities) == len(after.quantities) > 5
    for p, q in zip(before.quantities, after.quantities, strict=True):
        assert q.value == pytest.approx(p.value, rel=1e-7), q.name


def test_alignment_of_the_exact_perturbation_of_a_linear_model() -> None:
    """Two classes: z ∝ w₁ − w₀, so |cos(z, v_i)| = σ_i |u_i · (1, −1)| / ‖w₁ − w₀‖, at every radius."""
    weight = draw(2, 64, seed=4)
    subject = subject_of(affine(weight), n=30)
    attack = LinearExact(threat=Lp("l2", 0.3))
    reading = Alignment(attack=attack, radii=(0.1, 0.2)).look(subject, gen=gen())
    u, s, _ = torch.linalg.svd(weight, full_matrices=False)
    gap = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    truth = (s * (u.T @ gap).abs() / (weight.T @ gap).norm()).numpy()
    ranks, shares, radius, _ = reading.panels
    assert np.allclose(ranks.series[0].y, truth, atol=1e-6)
    assert np.allclose(shares.series[0].y, [truth[0], 1], atol=1e-6)
    assert radius.series[0].x.tolist() == [0.1, 0.2, 0.3]
    assert np.allclose(radius.series[0].y, truth[0], atol=1e-6)
    assert [s.name for s in ranks.series][2] == "untrained, adversarial"
    assert reading["share in the row space, untrained, adversarial"].value == pytest.approx(1, abs=1e-6)
    assert abs(reading[f"{LEADING}, untrained, adversarial"].value - truth[0]) > 1e-3


def test_random_directions_have_the_expected_cosine() -> None:
    """1000 draws: the mean of cos² is within 5 standard errors, √(2/1000)/64, of 1/64, and so for |cos|."""
    subject = subject_of(affine(draw(3, 64)), n=1000, low=0.5, high=0.5)
    attack = LinearExact(threat=Lp("l2", 0.3))
    reading = Alignment(attack=attack, n_examples=None, untrained=False, batch_size=300).look(subject, gen=gen())
    square = reading["squared cosine with the leading direction, random"]
    assert abs(square.value - 1 / 64) < 5 * math.sqrt(2 / 1000) / 64 and square.n == 1000
    assert reading["expected squared cosine of any direction"].value == 1 / 64
    assert abs(reading[f"{LEADING}, random"].value - expected_cosine(64)) < 5 * math.sqrt(1 / 64 / 1000)
    assert expected_cosine(3) == pytest.approx(0.5)  # Archimedes: the height on a sphere is uniform
    shares = reading.panels[1].series
    assert shares[1].y[-1] == pytest.approx(math.sqrt(3 / 64), rel=0.1)
    assert shares[2].y[-1] == pytest.approx(math.sqrt(3 / 64))


def test_ranks_without_a_direction_are_left_out() -> None:
    """Rank one: the second singular vector of the decomposition is arbitrary, and its cosine is not reported."""
    weight = torch.outer(torch.tensor([-1.0, 1.0]), draw(64)[:, None].float()[:, 0]).double()
    subject = subject_of(affine(weight))
    reading = Alignment(attack=LinearExact(threat=Lp("l2", 0.3)), untrained=False).look(subject, gen=gen())
    assert reading.panels[0].series[0].x.tolist() == [1.0]
    assert reading[f"{LEADING}, adversarial"].value == pytest.approx(1, abs=1e-9)
    assert reading["alignment with the last direction, adversarial"].value == pytest.approx(1, abs=1e-9)


def test_untrained_copy_is_drawn_from_gen_and_leaves_everything_alone() -> None:
    net = double_net().eval()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    copies = [untrained_copy(net, gen(seed))[0] for seed in (1, 1, 2)]
    weights = [c.fc.weight for c in copies]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], net.fc.weight) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m.training for m in copies[0].modules())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = net, nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.shift

    assert untrained_copy(Own(), gen())[0] is None
    reading = Alignment(attack=QUICK, n_examples=4).look(subject_of(Own()), gen=gen())
    assert "Own has weights and no reset_parameters" in str(reading.panels[-1].rows[-1][0])
    assert [s.name for s in reading.panels[0].series] == ["adversarial", "random", "any direction, expected"]


def constant() -> nn.Module:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :3] > 0.5).double()

    return Sign()


@pytest.mark.parametrize("lens", [JacobianSpectrum(attack=QUICK), Alignment(attack=QUICK)], ids=lambda v: v.name)
def test_networks_without_a_derivative_are_refused(lens: Alignment) -> None:
    with pytest.raises(InputError, match="can be differentiated"):
        lens.look(subject_of(constant()), gen=gen())


class Once(torch.autograd.Function):
    """x², without a second derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Straight(torch.autograd.Function):
    """Rounds to tenths, and pretends to be the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (10 * x).round() / 10

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class Through(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], model: nn.Module) -> None:
        super().__init__()
        self.function, self.model = function, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.function.apply(x))


def test_the_power_method_says_that_it_needs_a_second_derivative() -> None:
    subject = subject_of(Through(Once, affine(draw(3, 64))))
    with pytest.raises(InputError, match=r"differentiated twice.*Set powered = 0"):
        JacobianSpectrum(attack=QUICK).look(subject, gen=gen())
    reading = JacobianSpectrum(attack=QUICK, powered=0).look(subject, gen=gen())
    assert reading.outcome.status == "ok" and reading["regression: distance from the derivative"].value < 1e-3


def test_a_backward_pass_that_is_not_the_derivative_is_found_out() -> None:
    reading = JacobianSpectrum(attack=QUICK).look(subject_of(Through(Straight, affine(draw(3, 64)))), gen=gen())
    assert reading.outcome.status == "unreliable" and "derivative predicts" in reading.outcome.why


def test_wrong_fields_are_refused() -> None:
    for wrong in ({"powered": -1}, {"regressed": -1}, {"iterations": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            JacobianSpectrum(**wrong)
    with pytest.raises(InputError, match="radii"):
        Alignment(radii=(0.0, 0.1))
    with pytest.raises(InputError, match="batch_size"):
        Alignment(batch_size=0)
    still = dataclasses.replace(subject_of(affine(draw(2, 64))), threat=Lp("l2", 0.0))
    with pytest.raises(InputError, match="radius > 0"):
        Alignment().look(still, gen=gen())
