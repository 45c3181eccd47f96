"""Health checks on models that hide their weakness in a known way, and on honest ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.pgd import PGD
from robustlens.attacks.square import Square
from robustlens.attacks.verify import evaluate
from robustlens.core.types import Attack, Batch, Split, Splits, Subject
from robustlens.lenses.health import Health
from robustlens.lenses.health_attacks import FAMILY_LEVEL, TESTS, TOLERATED, Judged, more_starts, too_many
from robustlens.lenses.health_gradients import PIECES, Way
from robustlens.lenses.oracle import two_sided_subject
from robustlens.lenses.surrogate import KernelSurrogate
from robustlens.results.errors import InputError
from robustlens.results.panels import Curve, Table
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp

LINF = Lp("linf", 0.1)


class Changed(nn.Module):
    """The linear network z = ∓ ½ Σ_i w_i (x_i − ½), w_i = ±1 by quadrant, its input or output changed."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("w", torch.kron(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(4, 4)).flatten())
        self.scale = scale

    def seen(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        score = (self.seen(x).flatten(1) - 0.5) @ self.w
        return self.scale * torch.stack([-score, score], 1) / 2


class Quantised(Changed):
    def seen(self, x: Tensor) -> Tensor:
        return (x * 16).round() / 16


class Shaken(Changed):
    def seen(self, x: Tensor) -> Tensor:
        return x + 0.05 * torch.randn_like(x)


class Sociable(Changed):
    def seen(self, x: Tensor) -> Tensor:
        return x - 0.5 * (x.mean(0) - 0.5)


def subject(model: nn.Module, threat: Lp = LINF, *, n: int = 200, share: float = 0.5) -> Subject:
    """Images whose lead over the boundary is ``share`` of what a change of eps in ℓ∞ can take: none is robust."""
    y = torch.arange(n) % 2
    w = Changed().w
    lead = share * threat.eps * (2 * y - 1)[:, None]
    noise = 0.02 * torch.rand(n, 64, generator=gen(2)) - 0.01
    noise -= (noise @ w)[:, None] * w / 64
    split = Split((0.5 + lead * w + noise).view(n, 1, 8, 8), y)
    return Subject(model.eval(), Splits("even", split, split, split, ("no", "yes")), threat)


def look(model: nn.Module, attack: Attack | None = None, **settings: object) -> Reading:
    return Health(attack=attack, **settings).look(subject(model), gen=gen())  # type: ignore[arg-type]


def alarms(reading: Reading) -> set[str]:
    table = reading.panels[0]
    assert isinstance(table, Table) and table.title == "Health checks"
    said = {str(row[0]) for row in table.rows if row[-1] == "alarm"}
    assert bool(said) == (reading.outcome.status == "unreliable") == bool(reading.outcome.why)
    return said


CE = PGD(threat=LINF, steps=10)


def test_oracles_are_ok() -> None:
    for oracle in Health.oracles():
        assert oracle.lens.look(oracle.subject, gen=gen()).outcome.status == "ok"


@pytest.mark.parametrize("attack", [None, CE, FGSM(threat=LINF)], ids=["default", "ce", "fgsm"])
def test_a_linear_network_is_honest(attack: Attack | None) -> None:
    reading = look(Changed(), attack)
    assert not alarms(reading) and reading.outcome.status == "ok"
    assert (reading["clean accuracy"].value, reading["robust accuracy"].value) == (1.0, 0.0)


def test_a_network_that_has_collapsed_is_told_apart_from_one_that_hides() -> None:
    class Dead(Changed):
        def forward(self, x: Tensor) -> Tensor:
            return 0.01 * super().forward(x) + torch.tensor([1.0, 2.0])

    outcome = look(Dead()).outcome
    assert outcome.status == "failed" and "one answer to all images" in outcome.why


def test_robust_images_are_not_called_hidden() -> None:
    """With a lead of 1.5 eps nothing can be broken, by any check; without a limit everything is."""
    reading = Health().look(subject(Changed(), share=1.5), gen=gen())
    assert not alarms(reading)
    assert reading["robust accuracy"].value == reading["robust accuracy after all checks"].value == 1.0
    assert reading["left without a limit"].value == 0.0


def test_saturated_logits_are_found_by_another_loss() -> None:
    """Leads of 3.2 times 100: the cross-entropy is exactly 0 in float32, and so is its gradient."""
    reading = look(Changed(scale=100.0), CE)
    assert reading["robust accuracy"].value > 0.9
    assert alarms(reading) >= {"the margin loss", "gradients", "no limit", "random search", "transfer"}
    assert reading["robust accuracy after all checks"].value == 0.0
    assert reading["gradients of the cross-entropy that are zero or not finite"].value == 1.0
    assert "gradient masking" in reading.outcome.why
    assert look(Changed(scale=100.0)).outcome.status == "ok", "the margin is not saturated"


def test_a_floor_that_stalls_is_found_though_no_gradient_is_zero() -> None:
    """At a scale of 10 the gradient of the cross-entropy is ½ · 8 · 10 · e^−32: not zero, but below 1e-6."""
    threat = Lp("l2", 0.8)
    stalled = PGD(threat=threat, steps=10, grad_floor=1e-6)
    reading = Health(attack=stalled).look(subject(Changed(scale=10.0), threat, share=0.0625), gen=gen())
    entropy = reading["gradients of the cross-entropy below 1e-06"].value
    assert reading["gradients of the cross-entropy that are zero or not finite"].value == 0.0 and entropy == 1.0
    assert alarms(reading) >= {"the margin loss", "the ce loss without a floor"} and "gradients" not in alarms(reading)
    assert reading["stuck below the attack's floor"].value > 0.9 and reading["stuck without a gradient"].value == 0.0


def test_a_quantised_input_is_found_in_many_ways() -> None:
    reading = look(Quantised())
    assert reading["robust accuracy"].value > 0.9
    assert alarms(reading) >= {"random search", "transfer", "no limit", "gradients", "slopes"}
    assert reading["stuck without a gradient"].value > 0.9
    assert reading["unexplained change"].value == pytest.approx(1.0, abs=0.05), "the gradient predicts no change"


def test_a_random_network_is_found() -> None:
    reading = look(Shaken())
    assert alarms(reading) >= {"same answer", "in company"}
    assert "different answers to the same image" in reading.outcome.why


def test_a_network_that_looks_at_the_whole_batch_is_found() -> None:
    assert "in company" in alarms(look(Sociable())) and "same answer" not in alarms(look(Sociable()))


def test_too_few_steps_are_found() -> None:
    """Ten steps of 0.1 · eps / 10 go a tenth of a way of which a half is needed; 100 go all of it."""
    short = PGD(threat=LINF, steps=10, step_size=0.1 * LINF.eps / 10, random_start=False, loss="margin")
    reading = look(Changed(), short, times=10)
    assert reading["robust accuracy"].value == 1.0 and reading["lost to more steps"].value == 1.0
    assert "10 times as many steps" in reading.outcome.why and "more steps" in alarms(reading)
    assert "the ce loss" not in alarms(reading), "another loss with a path as short finds as little"


class Pixel(nn.Module):
    """The margin of class 0 is a piecewise linear function of the mean of an image, through ``knots``."""

    def __init__(self, *knots: tuple[float, float]) -> None:
        super().__init__()
        self.knots = knots

    def forward(self, x: Tensor) -> Tensor:
        at = x.flatten(1).mean(1)
        f = torch.zeros_like(at)
        for (a, fa), (b, fb) in zip(self.knots, self.knots[1:], strict=False):
            f = torch.where((at >= a) & (at <= b), fa + (fb - fa) * (at - a) / (b - a), f)
        return torch.stack([f, torch.zeros_like(f)], 1)


def grey(n: int) -> Splits:
    split = Split(torch.full((n, 1, 1, 1), 0.5), torch.zeros(n, dtype=torch.int64))
    return Splits("grey", split, split, split, ("in", "out"))


#: Falls to the right, through −0.5 at 0.55, and is high again at 0.6.
VALLEY = Pixel((0.0, 5.0), (0.5, 0.4), (0.55, -0.5), (0.6, 1.0), (1.0, 1.0))


def test_an_attack_that_steps_over_the_valley_is_found() -> None:
    """One step of eps = 0.1 from 0.5 lands at 0.6, where the margin is 1: it was −0.5 half-way."""
    reading = Health(attack=FGSM(threat=LINF)).look(Subject(VALLEY, grey(200), LINF), gen=gen())
    assert reading["robust accuracy"].value == 1.0 and reading["lost to points on the way"].value == 1.0
    assert alarms(reading) >= {"bumps", "more steps"} and "stepped over" in reading.outcome.why
    assert reading["wrong way"].value == pytest.approx(1.5 / 2.4, abs=1e-5)


def test_way_by_hand() -> None:
    """Five pieces fall by 0.18 and five rise by 0.3; at the kink the slope is that of one side."""
    splits = grey(3)
    judged = Judged.by(FGSM(threat=LINF), VALLEY, batch(splits), size=2, gen=gen())
    way = Way.of(judged)
    down, up = 0.4 - 0.18 * np.arange(6), -0.5 + 0.3 * np.arange(1, 6)
    assert way.f.shape == way.slope.shape == (3, PIECES + 1)
    assert way.f.numpy() == pytest.approx(np.tile([*down, *up], (3, 1)), abs=1e-5)
    inner = way.slope[:, [1, 2, 3, 4, 6, 7, 8, 9]].numpy() / PIECES
    assert inner == pytest.approx(np.tile([-0.18] * 4 + [0.3] * 4, (3, 1)), abs=1e-5)
    assert float(way.unexplained.max()) < 0.35
    assert way.wrong_way.numpy() == pytest.approx(1.5 / 2.4, abs=1e-5)


def batch(splits: Splits) -> Batch:
    return splits.test.batch(torch.arange(len(splits.test)))


def test_restarts_find_what_one_start_misses_by_half() -> None:
    """Downhill leads to 0 from every start right of ½ and to 0.1 from every start left of it: half fall each time.

    800 images: four standard errors are 0.071 at the first, and 0.018 … at the share of 1/16 after three more, 0.035.
    """
    ridge = Pixel((0.0, 0.1), (0.4, 0.1), (0.5, 1.0), (0.6, -1.0), (1.0, -1.0))
    attack = PGD(threat=LINF, steps=20, loss="margin")
    judged = Judged.by(attack, ridge, batch(grey(800)), size=300, gen=gen())
    finding, left = more_starts(judged, 3, gen(1))
    assert left[0] == pytest.approx(0.5, abs=0.071) and left[3] == pytest.approx(1 / 16, abs=0.035)
    assert left == sorted(left, reverse=True) and len(left) == 4
    assert finding.quantities[0].value == pytest.approx(left[0] - left[3]) and "3 more times" in finding.alarm


def test_the_count_that_alarms_is_the_exact_binomial_one() -> None:
    def naive(count: int, n: int) -> float:
        return math.fsum(math.comb(n, k) * TOLERATED**k * (1 - TOLERATED) ** (n - k) for k in range(count, n + 1))

    for n, least in ((200, 11), (1000, 33), (10, 3)):
        assert [too_many(least - 1, n), too_many(least, n)] == [False, True], n
        assert naive(least, n) <= FAMILY_LEVEL / TESTS < naive(least - 1, n)
    assert not too_many(0, 200)


def test_the_imitation_solves_its_equations() -> None:
    """(K + λI) a = Z in float64, so K a at the anchors; the scale and offset of the logits do not matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(30, 1, 4, 4, generator=gen(3))
    z = model(x).detach().double().numpy()
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    square = ((x.flatten(1)[:, None] - x.flatten(1)[None]).double() ** 2).sum(2).numpy()
    kernel = np.exp(-square / square.mean())
    expected = kernel @ np.linalg.solve(kernel + 0.01 * np.eye(30), z)
    fitted = KernelSurrogate.fitted(model, x, size=7)
    assert fitted(x).numpy() == pytest.approx(expected, abs=1e-3)
    scaled = KernelSurrogate.fitted(nn.Sequential(model, Scaled()), x)
    assert torch.allclose(fitted(x), scaled(x), atol=1e-4)


class Scaled(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 1e4 * z + 3


def test_the_union_is_that_of_the_attacks() -> None:
    """What random search alone breaks is lost to it, and the union has lost at least that."""
    reading = look(Quantised(), queries=200)
    lost = reading["lost to random search"].value
    assert lost > 0.5
    assert reading["robust accuracy after all checks"].value <= reading["robust accuracy"].value - lost + 1e-9


def test_an_attack_without_gradients_is_not_blamed_for_them() -> None:
    model, square = Quantised(), Square(threat=LINF, queries=300)
    seen = evaluate(square, model, batch(subject(model).splits), gen=gen())
    assert float(seen.robust.double().mean()) < 0.1
    reading = look(model, square, queries=300)
    assert "gradients" not in alarms(reading)


def test_charts() -> None:
    reading = look(Quantised(), restarts=2)
    table, restarts, way = reading.panels
    assert isinstance(table, Table) and len(table.rows) == 11
    assert isinstance(restarts, Curve) and restarts.series[0].x.tolist() == [1, 2, 3]
    assert isinstance(way, Curve) and len(way.series[0].x) == PIECES + 1


def test_a_model_without_a_training_split_is_imitated_on_the_judged_images() -> None:
    full = two_sided_subject(train_shifts=[0.3], test_shifts=[0.3, 0.1, 0.4, 0.2])
    none = Split(full.splits.train.images[:0], full.splits.train.labels[:0])
    splits = Splits("few", none, none, full.splits.test, full.splits.classes)
    assert Health().look(Subject(full.model, splits, full.threat), gen=gen()).outcome.status == "ok"


def test_settings() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Health(times=0)
    with pytest.raises(InputError, match="train, valid or test"):
        Health(split="all")  # type: ignore[arg-type]
