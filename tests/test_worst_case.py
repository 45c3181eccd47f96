"""Several attacks over streams of data: the worst case per example, resumable to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import gen
from safetensors.torch import load_file
from torch import Tensor, nn

from robustlens.attacks.apgd_targeted import APGDTargeted
from robustlens.attacks.ensemble import AutoAttackStandard
from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.linear import LinearExact
from robustlens.attacks.noise import UniformNoise
from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.attacks.worst_case import STANDS, WRONG_BEFORE, WorstCase, worst_case
from robustlens.core.types import Attack, Batch
from robustlens.results.errors import InputError
from robustlens.threats.lp import Lp

THREAT = Lp("linf", 0.03)
LINE_UP: tuple[Attack, ...] = (
    UniformNoise(threat=THREAT),
    FGSM(threat=THREAT),
    PGD(threat=THREAT, steps=5, loss="margin", early_stop=True),
)


@pytest.fixture
def stream(net: nn.Module) -> list[Batch]:
    """Three chunks of 10, 10 and 3 images, most of which the network gets right."""
    x = torch.rand(23, 1, 8, 8, generator=gen(1)).mul(1.6).sub(0.3).clamp(0, 1)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return [Batch(x[i : i + 10], y[i : i + 10], torch.arange(i, min(i + 10, 23))) for i in (0, 10, 20)]


def run(net: nn.Module, stream: list[Batch], state: Path | None = None, **more: object) -> WorstCase:
    return worst_case(LINE_UP, net, iter(stream), seed=3, batch_size=4, state=state, **more)  # type: ignore[arg-type]


def same(a: WorstCase, b: WorstCase) -> bool:
    return torch.equal(a.broken_by, b.broken_by) and torch.equal(a.distance.nan_to_num(-1), b.distance.nan_to_num(-1))


def test_each_example_falls_to_the_first_attack_that_breaks_it(net: nn.Module, stream: list[Batch]) -> None:
    found = run(net, stream)
    assert found.attacks[0] == "uniform-noise" and found.attacks[2] == "pgd-margin"
    assert len(found) == 23 and found.index.tolist() == list(range(23))
    assert (found.broken_by == WRONG_BEFORE).nonzero()[:, 0].tolist() == [0, 7, 14, 21]
    assert set(found.broken_by.tolist()) >= {WRONG_BEFORE, STANDS, 1}, "something falls to FGSM, something stands"
    counts = [found.right_after(k) for k in range(-1, 3)]
    assert counts[0] == 19 and counts == sorted(counts, reverse=True)
    assert counts[-1] == int((found.broken_by == STANDS).sum())
    assert torch.equal(found.distance.isnan(), found.broken_by < 0)
    assert (found.distance[~found.distance.isnan()] <= 0.03 * (1 + 1e-5)).all()
    alone = [evaluate(LINE_UP[1], net, batch, gen=gen()) for batch in stream]
    fgsm = torch.cat([(~seen.robust) & seen.clean_correct for seen in alone])
    assert torch.equal(fgsm & (found.broken_by != 0), found.broken_by == 1)


def test_targets_fill_a_batch_where_few_images_are_left(net: nn.Module, stream: list[Batch]) -> None:
    counts: list[int] = []
    net.eval().register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    attack = APGDTargeted(threat=Lp("linf", 1e-6), targets=3, steps=10)
    found = worst_case([attack], net, stream[:1], seed=3, batch_size=16)
    assert int((found.broken_by == STANDS).sum()) == 8 and max(counts) == 16
    assert sum(counts) == 10 + 8 * (attack.passes.inputs + attack.passes.forward) + 2 * 8


class Killed(Exception):
    pass


@pytest.mark.parametrize("batches", [1, 3, 5, 8])
def test_a_killed_evaluation_ends_where_the_uninterrupted_one_ends(
    batches: int, net: nn.Module, stream: list[Batch], tmp_path: Path
) -> None:
    whole, left = run(net, stream), batches

    def kill(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        run(net, stream, tmp_path, told=kill)
    seen: list[tuple[object, ...]] = []
    again = run(net, stream, tmp_path, told=lambda *what: seen.append(what))
    assert same(again, whole)
    total: list[tuple[object, ...]] = []
    run(net, stream, told=lambda *what: total.append(what))
    assert len(seen) == len(total) - batches, "what was finished is not computed again"
    seen.clear()
    assert same(run(net, stream, tmp_path, told=lambda *what: seen.append(what)), whole) and seen == []


def test_the_state_holds_the_adversarial_images(net: nn.Module, stream: list[Batch], tmp_path: Path) -> None:
    found = run(net, stream, tmp_path)
    for number, batch in enumerate(stream):
        kept = load_file(tmp_path / f"chunk-{number:06}.safetensors")
        rows = kept["broken"]
        assert rows.tolist() == (kept["broken_by"] >= 0).nonzero()[:, 0].tolist()
        assert not (net(kept["x_adv"]).argmax(1) == batch.y[rows]).any()
        assert torch.equal(THREAT.distance(kept["x_adv"], batch.x[rows]), kept["distance"][rows])
        assert torch.equal(kept["label"], batch.y) and torch.equal(kept["index"], batch.index)
    assert int((found.broken_by >= 0).sum()) > 0


@pytest.mark.parametrize("what", ["network", "images", "labels", "attacks", "seed"])
def test_a_state_of_something_else_is_refused(what: str, net: nn.Module, stream: list[Batch], tmp_path: Path) -> None:
    run(net, stream, tmp_path)
    attacks, seed = LINE_UP, 3
    if what == "network":
        with torch.no_grad():
            next(net.parameters()).mul_(1.1)
    elif what == "images":
        stream[0] = Batch(stream[0].x.flip(0), stream[0].y, stream[0].index)
    elif what == "labels":
        stream[0] = Batch(stream[0].x, stream[0].y.flip(0), stream[0].index)
    elif what == "attacks":
        attacks = LINE_UP[:2]
    else:
        seed = 4
    with pytest.raises(InputError, match="state file"):
        worst_case(attacks, net, iter(stream), seed=seed, batch_size=4, state=tmp_path)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_standard_is_exact_on_linear_models(classes: int, norm: str) -> None:
    """Whatever the number of classes; a fifth of the effort does."""
    with torch.random.fork_rng():
        torch.manual_seed(classes)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    threat = Lp(norm, {"linf": 0.04, "l2": 0.3}[norm])
    x = torch.rand(30, 1, 8, 8, generator=gen())
    batch = Batch(x, model(x).argmax(1), torch.arange(30))
    exact = evaluate(LinearExact(threat=threat), model, batch, gen=gen())
    line_up = AutoAttackStandard(threat=threat, effort=0.2).line_up
    found = worst_case(line_up, model, [batch], seed=0)
    assert 2 <= int(exact.robust.sum()) <= 28
    assert torch.equal(found.broken_by == STANDS, exact.robust)
    whole = evaluate(AutoAttackStandard(threat=threat, effort=0.2), model, batch, gen=gen())
    assert torch.equal(whole.robust, exact.robust)


def test_the_line_up_is_the_references() -> None:
    told = [(a.name, a.passes) for a in AutoAttackStandard(threat=Lp("l2", 1.0)).line_up]
    assert [name for name, _ in told] == ["apgd", "apgd-targeted", "fab", "square"]
    apgd, targeted, fab, square = AutoAttackStandard(threat=Lp("l1", 1.0)).line_up
    assert (apgd.restarts, targeted.targets, fab.targets, square.queries) == (5, 5, 9, 5000)
    apgd, targeted, fab, square = AutoAttackStandard(threat=Lp("linf", 0.1)).line_up
    assert (apgd.restarts, apgd.steps, targeted.targets, fab.steps) == (1, 100, 9, 100)
    with pytest.raises(InputError, match="share in"):
        AutoAttackStandard(threat=Lp("l2", 1.0), effort=1.5)


def test_tensors_of_a_chunk_are_not_held(net: nn.Module, stream: list[Batch]) -> None:
    """One chunk at a time: the stream's next is asked for when the last is done."""
    order: list[str] = []

    def chunks() -> object:
        for number, batch in enumerate(stream):
            order.append(f"asked {number}")
            yield batch

    def told(chunk: int, *_: object) -> None:
        order.append(f"worked {chunk}")

    worst_case(LINE_UP[:1], net, chunks(), seed=0, told=told)  # type: ignore[arg-type]
    assert order == ["asked 0", "worked 0", "asked 1", "worked 1", "asked 2", "worked 2"]


class Viewing(nn.Module):
    """A linear network that views images flat, which torch refuses for a batch of none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(x.shape[0], -1))


def test_nothing_is_asked_once_nothing_stands(stream: list[Batch], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Viewing()
    with torch.no_grad():
        stream = [Batch(batch.x, net(batch.x).argmax(1), batch.index) for batch in stream]
    whole = Lp("linf", 1.0)
    attacks = (LinearExact(threat=whole), PGD(threat=whole, steps=2), FGSM(threat=whole))
    heard: list[object] = []
    for _ in range(2):
        found = worst_case(attacks, net, stream, seed=0, state=tmp_path, told=lambda *what: heard.append(what[1]))
        assert (found.broken_by == 0).all() and heard == ["linear-exact"] * 3
