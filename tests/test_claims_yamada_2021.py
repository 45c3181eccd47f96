"""Claims about the weight-loss landscape, on runs made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from small_evidence import reading, run

from robustlens.claims.ledger import Claim
from robustlens.claims.yamada_2021 import CLAIMS
from robustlens.results.reading import Outcome
from robustlens.results.runs import Run

NAMED: Mapping[str, Claim] = {claim.name.removeprefix("004-"): claim for claim in CLAIMS}
TOP = "leading eigenvalue, adversarial, frozen"


def trained(
    eps: float, lens: str, values: Mapping[str, float | tuple[float, float]], seed: int = 0, **more: object
) -> Run:
    objective = "standard" if eps == 0 else f"pgd l2:{eps}"
    found = reading(lens, values, settings={"threat": f"l2:{eps}"})
    return run(f"ε {eps}", [found], seed=seed, objective=objective, model={"name": "logistic"})


def eigenvalues(top: Callable[[float], float], radii: tuple[float, ...] = (0, 0.2, 0.5, 1.0)) -> list[Run]:
    return [trained(eps, "hessian", {TOP: top(eps) + 0.001 * seed}, seed) for eps in radii for seed in range(3)]


@pytest.mark.parametrize(
    ("top", "linear"),
    [
        (lambda eps: 1 + eps, "supported"),
        (lambda eps: 1 + 0.9 * eps + 0.1 * eps**2, "supported"),
        (lambda eps: 1 + eps**2, "contradicted"),
    ],
)
def test_lines_and_parabolas(top: Callable[[float], float], linear: str) -> None:
    (verdict,) = NAMED["eigenvalues-linear"].judge(eigenvalues(top))
    assert verdict.judgement == linear and verdict.statistic is not None and verdict.statistic.seeds == 3
    share = {"supported": top(2) - 2 * top(1) + top(0), "contradicted": 2.0}[linear] / 2 / (top(1) - top(0))
    assert verdict.statistic.value == pytest.approx(share, abs=1e-9)
    (grows,) = NAMED["eigenvalues-grow"].judge(eigenvalues(top))
    assert grows.judgement == "supported"


def test_a_reading_that_is_not_reliable_decides_nothing() -> None:
    runs = eigenvalues(lambda eps: 1 + eps)
    runs[0] = replace(runs[0], readings=[replace(runs[0].readings[0], outcome=Outcome.unreliable("Why."))])
    for name in ("eigenvalues-linear", "eigenvalues-grow"):
        (verdict,) = NAMED[name].judge(runs)
        assert verdict.judgement == "undecided" and "Why." in verdict.says


def test_what_lies_beyond_the_figure_does_not_count_and_three_radii_are_too_few() -> None:
    far = eigenvalues(lambda eps: 1 + eps if eps <= 1 else 100.0, (0, 0.2, 0.5, 1.0, 4.0))
    (verdict,) = NAMED["eigenvalues-linear"].judge(far)
    assert verdict.judgement == "supported"
    assert NAMED["eigenvalues-linear"].judge(eigenvalues(lambda eps: eps, (0, 0.5, 1.0))) == []


@pytest.mark.parametrize(("after", "wanted"), [(1.05, "supported"), (2.0, "contradicted"), (1.3, "undecided")])
def test_noise_is_compared_under_noise_at_its_largest_radius(after: float, wanted: str) -> None:
    noise = {"attack used": {"name": "uniform-noise", "threat": "l2:1.0"}, "threat": "l2:1.0"}

    def look(objective: str, rise: float, settings: Mapping[str, object]) -> Run:
        found = reading("weight-landscape", {"rise at ±0.5": (rise, 0.05)}, settings=settings)
        return run(objective, [found], objective=objective, model={"name": "logistic"})

    attacked = {"attack used": {"name": "pgd", "threat": "l2:1.0"}, "threat": "l2:1.0"}
    runs = [look("standard", 1.0, noise), look("noise l2:1.0", after, noise), look("noise l2:0.5", 9.0, noise)]
    (verdict,) = NAMED["noise-does-not-sharpen"].judge(runs)
    assert verdict.judgement == wanted
    assert NAMED["noise-does-not-sharpen"].judge([look("standard", 1.0, attacked), runs[1]]) == []
    both = [replace(one, readings=[*look("x", 1.0, attacked).readings, *one.readings]) for one in runs]
    (verdict,) = NAMED["noise-does-not-sharpen"].judge(both)
    assert verdict.judgement == wanted, "readings under PGD that stand beside them do not count"


def test_formula_9_is_held_against_the_exact_hessian() -> None:
    names = (
        "leading eigenvalue, closed form without the box",
        "ε / (2‖w‖), equation 9",
        "mean s, adversary without the box",
    )

    def judged(top: float, s: float) -> list[str]:
        values = dict(zip(names, ((top, 0.001), (0.1, 0.001), (s, 0.001)), strict=True))
        runs = [trained(0.5, "hessian", values)]
        return [NAMED[name].judge(runs)[0].judgement for name in ("formula-9", "formula-9-premise")]

    assert judged(0.1, 0.5) == ["supported", "supported"]
    assert judged(0.2, 0.01) == ["contradicted", "contradicted"]
