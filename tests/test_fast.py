"""FGSM from a random start, the adversary of fast adversarial training."""

from __future__ import annotations

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import craft
from robustlens.core.discovery import build
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_one_step_of_pgd_bit_for_bit(
    norm: str, random_start: bool, alpha: float | None, net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    threat = Lp(norm, 0.2)
    one = PGD(threat=threat, steps=1, step_size=alpha or 0.2, random_start=random_start)
    ours = FGSM(threat=threat, random_start=random_start, step_size=alpha)
    assert torch.equal(craft(ours, net, images, labels, gen=gen(6)), craft(one, net, images, labels, gen=gen(6)))


def test_by_default_the_step_of_goodfellow_bit_for_bit(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """And the generator is not touched."""
    net.eval()
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
    used = gen(6)
    found = FGSM(threat=Lp("linf", 0.1)).perturb(net, images, labels, gen=used)
    expected = (images + 0.1 * g.sign()).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.equal(found, FGSM(threat=Lp("linf", 0.1), step_size=0.1).perturb(net, images, labels, gen=gen()))
    assert torch.equal(used.get_state(), gen(6).get_state())


def test_naive_transcription_of_fgsm_rs(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """δ ~ U(±ε) cut to the box, δ + α sign(∇) cut to the ball, then to the box; one example at a time."""
    net, x, eps, alpha = net.double().eval(), images.double(), 0.1, 0.125
    threat = Lp("linf", eps)
    noise, expected = threat.noise(x, gen(2)), []
    for i in range(len(x)):
        delta = ((x[i : i + 1] + noise[i : i + 1]).clamp(0, 1) - x[i : i + 1]).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1] + delta), labels[i : i + 1]), delta)
        moved = (delta.detach() + alpha * g.sign()).clamp(-eps, eps)
        expected.append((x[i : i + 1] + moved).clamp(0, 1))
    found = FGSM(threat=threat, random_start=True, step_size=alpha).perturb(net, x, labels, gen=gen(2))
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)


def test_on_a_linear_model_a_random_start_gives_up_a_known_share_of_the_radius() -> None:
    """The sign s is the same everywhere, so δ s = min(u + 1.25 ε, ε) with u ~ U(±ε), of mean 0.859375 ε.

    Its deviation is 0.20 ε; over 64,000 pixels the mean is within 0.004 ε up to 5 standard errors.
    """
    eps = 0.1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    x, y = torch.full((1000, 1, 8, 8), 0.5, dtype=torch.float64), torch.zeros(1000, dtype=torch.int64)
    sign = (model[1].weight[1] - model[1].weight[0]).detach().sign().view(1, 1, 8, 8)
    rs = FGSM(threat=Lp("linf", eps), random_start=True, step_size=1.25 * eps)
    share = (craft(rs, model, x, y, gen=gen()) - x) * sign / eps
    assert float(share.min()) >= 0.25 - 1e-9 and float(share.max()) <= 1 + 1e-9
    assert float((share > 1 - 1e-9).double().mean()) == pytest.approx(0.625, abs=0.01)
    assert float(share.mean()) == pytest.approx(0.625 + 0.375 * 0.625, abs=0.004)
    plain = (craft(FGSM(threat=Lp("linf", eps)), model, x, y, gen=gen()) - x) * sign / eps
    assert torch.allclose(plain, torch.ones_like(plain))


def test_settings() -> None:
    settings = {"name": "fgsm", "threat": "linf:8/255", "random_start": True, "step_size": 10 / 255}
    assert build("attack", settings) == FGSM(threat=Lp("linf", 8 / 255), random_start=True, step_size=10 / 255)
    with pytest.raises(InputError, match="a number > 0"):
        FGSM(threat=Lp("linf", 0.1), step_size=0.0)
