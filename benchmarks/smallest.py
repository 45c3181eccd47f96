"""The smallest adversarial change by FMN and DDN, beside adversarial-library and foolbox where they are installed.

Equal numbers of gradient steps, each library's own defaults otherwise. A row divides our seconds by theirs; its note
tells how far the median image had to move in both, failures counted as ∞, and how many images each broke. Foolbox's
Brendel-Bethge attack, which walks along the boundary, takes part where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.methods import learnt
from benchmarks.peers import installed
from benchmarks.workload import Bench, Plan
from robustlens.attacks.ddn import DDN
from robustlens.attacks.fmn import FMN
from robustlens.attacks.verify import evaluate
from robustlens.core.rng import generator
from robustlens.core.types import Attack
from robustlens.threats.lp import Lp

STEPS = 100
#: Radii that limit nothing.
WHOLE = {"l2": Lp("l2", 28.0), "linf": Lp("linf", 1.0)}
Peer = Callable[[Bench], Tensor]


def run(plan: Plan) -> list[Row]:
    """A row per attack, norm and peer."""
    bench = learnt("lenet-small", plan)
    steps = 5 if plan.tiny else STEPS
    return [row for peer in ("adv_lib.attacks", "foolbox") for row in beside(bench, peer, steps)]


def beside(bench: Bench, peer: str, steps: int) -> Iterator[Row]:
    name = peer.partition(".")[0]
    if not installed(peer):
        note = "not installed: pip install adv-lib torchvision visdom" if name == "adv_lib" else "pip install foolbox"
        yield Row(benchmark="smallest", model=bench.work.model, case=f"beside {name}", note=note)
        return
    for case, attack, theirs in contests(peer, steps):

        def ours(attack: Attack = attack) -> Tensor:
            return evaluate(attack, bench.model, bench.batch, gen=generator("cpu", 0, "smallest")).x_adv

        def other(theirs: Peer = theirs) -> Tensor:
            return theirs(bench)

        seconds = interleave(
            [
                Case("ours", ours, before=bench.thaw),
                Case("peer", other, before=lambda: (bench.thaw(), bench.model.eval())),
            ],
            rounds=bench.plan.rounds,
            device=bench.plan.device,
        )
        facts = [result(bench, attack.threat, found) for found in (ours(), other())]
        (mine, my_share), (yours, your_share) = facts
        note = f"median {mine:.4f} against {yours:.4f}; broken {my_share:.1%} against {your_share:.1%}"
        found = compare(seconds["ours"], seconds["peer"])
        found["measured"] |= {"median": mine, "peer_median": yours, "broken": my_share, "peer_broken": your_share}
        yield Row(benchmark="smallest", model=bench.work.model, case=f"{case}, to {name}", bar=1.0, note=note, **found)


def result(bench: Bench, threat: object, found: Tensor) -> tuple[float, float]:
    """Median distance and share of the images that the model answers wrongly, of those it answered rightly."""
    assert isinstance(threat, Lp)
    x, y = bench.batch.x, bench.batch.y
    with torch.no_grad():
        right = bench.model.eval()(x).argmax(1) == y
        wrong = bench.model(found).argmax(1) != y
    distance = torch.where(wrong, threat.distance(found, x), torch.inf)[right]
    return float(distance.median()), float(wrong[right].double().mean())


def contests(peer: str, steps: int) -> Iterator[tuple[str, Attack, Peer]]:
    l2, linf = (WHOLE[norm] for norm in ("l2", "linf"))
    fmn2, fmn_inf, ddn = FMN(threat=l2, steps=steps), FMN(threat=linf, steps=steps), DDN(threat=l2, steps=steps)
    if peer == "foolbox":
        import foolbox

        def foolish(kind: type, bench: Bench) -> Tensor:
            model = foolbox.PyTorchModel(bench.model, bounds=(0, 1), device=bench.device)
            goal = foolbox.criteria.Misclassification(bench.batch.y)
            found: Tensor = kind(steps=steps).run(model, bench.batch.x, goal)
            return found

        kinds = foolbox.attacks
        yield f"FMN-{steps} ℓ2", fmn2, lambda bench: foolish(kinds.L2FMNAttack, bench)
        yield f"FMN-{steps} ℓ∞", fmn_inf, lambda bench: foolish(kinds.LInfFMNAttack, bench)
        yield f"DDN-{steps} ℓ2", ddn, lambda bench: foolish(kinds.DDNAttack, bench)
        if installed("numba"):
            walk = kinds.L2BrendelBethgeAttack
            yield f"DDN-{steps} ℓ2 beside Brendel-Bethge", ddn, lambda bench: foolish(walk, bench)
    else:
        from adv_lib import attacks

        def called(attack: Callable[..., Tensor], bench: Bench, **settings: object) -> Tensor:
            return attack(bench.model, bench.batch.x, bench.batch.y, steps=steps, **settings)

        yield f"FMN-{steps} ℓ2", fmn2, lambda bench: called(attacks.fmn, bench, norm=2)
        yield f"FMN-{steps} ℓ∞", fmn_inf, lambda bench: called(attacks.fmn, bench, norm=float("inf"))
        yield f"DDN-{steps} ℓ2", ddn, lambda bench: called(attacks.ddn, bench)
