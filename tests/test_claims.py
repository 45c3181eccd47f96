"""Statistics of claims against formulas written out by hand, verdicts, and the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import exp, log, sqrt
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from small_evidence import reading, run

from robustlens.claims.evidence import (
    Ask,
    AtEpoch,
    families,
    is_regularized,
    is_standard,
    is_trained_against,
    strength,
)
from robustlens.claims.ledger import Claim, claims, find_claim, ledger
from robustlens.claims.statistics import Judge, compare, error_of, trend, value, within
from robustlens.results.errors import InputError
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import Run
from robustlens.results.verdict import FALLS, RISES, Entry, Statistic, Verdict, decide

PGD = is_trained_against("pgd")
LOSS = Ask("gap", "loss")
Z = 1.959964


def gap(loss: float | tuple[float, float], *, n: int = 100, outcome: Outcome | None = None) -> list[object]:
    return [reading("gap", {"loss": loss}, n=n, outcome=outcome)]


def trained(eps: float, loss: float | tuple[float, float], seed: int = 0, **parts: object) -> Run:
    objective = "standard" if eps == 0 else f"pgd l2:{eps}"
    return run(f"ε {eps}", gap(loss), seed=seed, objective=objective, **parts)  # type: ignore[arg-type]


def test_a_trend_is_the_least_squares_line_with_both_errors() -> None:
    eps = np.array([0.0, 0.5, 2.0])
    losses = np.array([[1.0, 1.4, 2.0], [1.2, 1.3, 2.6], [0.9, 1.6, 2.2]])
    half = 0.1
    runs = [trained(e, (losses[s, k], half), s) for s in range(3) for k, e in enumerate(eps)]
    (verdict,) = trend(LOSS, RISES, member=PGD)(runs)
    slopes = [np.polyfit(eps, row, 1)[0] * 2.0 for row in losses]
    centred = eps - eps.mean()
    by_examples = Z * sqrt(sum((w * 2.0 / (centred @ centred) * half / Z) ** 2 for w in centred))
    by_seeds = student.ppf(0.975, 2) * np.std(slopes, ddof=1) / sqrt(3)
    found = verdict.statistic
    assert found is not None and found.seeds == 3 and found.n == 100
    assert found.value == pytest.approx(np.mean(slopes))
    assert found.high is not None and found.high - found.value == pytest.approx(np.hypot(by_examples, by_seeds))
    assert verdict.judgement == "supported" and "1.033 → 1.433 → 2.267 at ε = 0, 0.5, 2" in verdict.says


def test_a_trend_can_leave_out_weak_training_and_needs_two_radii() -> None:
    runs = [trained(0, (9.0, 0.1)), trained(0.5, (1.0, 0.1)), trained(1.0, (2.0, 0.1))]
    (all_of_them,) = trend(LOSS, RISES, member=PGD)(runs)
    (stronger,) = trend(LOSS, RISES, member=PGD, least=0.4)(runs)
    assert (all_of_them.judgement, stronger.judgement) == ("contradicted", "supported")
    assert stronger.statistic is not None and stronger.statistic.value == pytest.approx(1.0)
    assert trend(LOSS, RISES, member=PGD, least=0.9)(runs) == []


def test_a_change_that_cancels_is_written_as_none() -> None:
    runs = [trained(eps / 255, (loss, 0.01)) for eps, loss in ((1, 0.0005), (2, -0.0095), (4, -0.0015))]
    (verdict,) = trend(LOSS, RISES, member=PGD)(runs)
    assert verdict.statistic is not None and 0 < abs(verdict.statistic.value) < 1e-12
    assert "change over that range 0 [" in verdict.says


def test_families_differ_in_radius_and_seed_alone() -> None:
    runs = [trained(eps, 1.0, seed) for eps in (0, 1.0, 0.5) for seed in (0, 1)]
    other = {"data": {"source": "other", "classes": [0, 1], "train": 50}}
    runs += [trained(eps, 1.0, **other) for eps in (0.5, 1.0)]
    runs += [run("∞", gap(1.0), objective="pgd linf:0.1"), run("clip", gap(1.0), constraints=["spectral-clip"])]
    mnist, small, ell_inf = families(runs, PGD)
    assert list(mnist.by_strength) == [0.0, 0.5, 1.0] and set(mnist.by_strength[0.5]) == {0, 1}
    assert list(small.by_strength) == [0.5, 1.0] and "other 0/1 (50 images), mlp" in small.where
    assert list(ell_inf.by_strength) == [0.0, 0.1]


def test_step_sizes_at_one_radius_are_families_of_their_own() -> None:
    def stepped(eps: float, step: float) -> Run:
        attack = {"name": "pgd", "threat": f"l2:{eps}", "steps": 7, "step_size": step}
        return run(f"ε {eps}", gap(1.0), objective={"name": "adversarial", "attack": attack})

    radii = (0.4, 0.8, 1.2)
    growing = [stepped(eps, eps / 4) for eps in radii]
    fixed = [stepped(eps, 0.05) for eps in radii]
    (alone,) = families(growing, PGD)
    assert list(alone.by_strength) == list(radii)
    standard = trained(0, 1.0)
    both = {family.where.rpartition("steps of ")[2]: family for family in families([standard, *growing, *fixed], PGD)}
    assert set(both) == {"0.25 ε", "0.05"}
    for name, members in (("0.25 ε", growing), ("0.05", fixed)):
        assert [both[name].by_strength[eps][0] for eps in radii] == members
        assert list(both[name].by_strength) == [0.0, *radii]


def test_one_training_looked_at_in_two_studies_has_all_its_readings() -> None:
    bare = run("standard", [], threat="ignored")
    (family,) = families([trained(0, 2.0), bare, trained(1.0, 1.0)], PGD)
    assert LOSS.of(family.by_strength[0.0][0]) is not None


def test_a_difference_is_paired_by_seed() -> None:
    a = [run("AMR", gap((x, 0.2)), seed=s, regularizers=["average-margin"]) for s, x in enumerate([2.0, 3.0, 4.0])]
    b = [run("standard", gap((x, 0.1)), seed=s) for s, x in enumerate([1.0, 1.5, 3.5])]
    (verdict,) = compare(LOSS, RISES, first=is_regularized("average-margin"), second=is_standard)([*a, *b[::-1]])
    differences = [1.0, 1.5, 0.5]
    half = np.hypot(np.hypot(0.2, 0.1), student.ppf(0.975, 2) * np.std(differences, ddof=1) / sqrt(3))
    assert verdict.statistic is not None and verdict.statistic.value == pytest.approx(1.0)
    assert verdict.statistic.low == pytest.approx(1.0 - half)
    assert compare(LOSS, RISES, first=PGD, second=is_standard)([*a, *b]) == []


def test_with_the_same_draws_only_seeds_make_the_interval() -> None:
    first = is_regularized("average-margin")
    a = [run("AMR", gap((x, 1.0)), seed=s, regularizers=["average-margin"]) for s, x in enumerate([2.0, 3.0, 4.0])]
    b = [run("standard", gap((x, 1.0)), seed=s) for s, x in enumerate([1.0, 1.5, 1.9])]
    judge = compare(LOSS, (1.8, 2.3), first=first, second=is_standard, ratio=True, same_draws=True)
    (verdict,) = judge([*a, *b])
    logs = np.log([2.0, 2.0, 4 / 1.9])
    half = student.ppf(0.975, 2) * logs.std(ddof=1) / sqrt(3)
    assert verdict.statistic is not None and verdict.statistic.low == pytest.approx(exp(logs.mean() - half))
    (alone,) = judge([a[0], b[0]])
    half = np.hypot(0.5, 1.0)
    assert alone.statistic is not None and alone.statistic.low == pytest.approx(2 * exp(-half))


def test_a_ratio_has_the_interval_of_its_logarithm() -> None:
    runs = [run("AMR", gap((3.0, 0.3)), regularizers=["average-margin"]), run("standard", gap((1.5, 0.06)))]
    first = is_regularized("average-margin")
    (verdict,) = compare(LOSS, (1.8, 2.3), first=first, second=is_standard, ratio=True)(runs)
    half = np.hypot(0.1, 0.04)
    assert verdict.statistic is not None and verdict.statistic.value == pytest.approx(2.0)
    assert verdict.statistic.low == pytest.approx(exp(log(2) - half))
    assert verdict.judgement == "undecided"


def right(bits: Sequence[int], *, split: str = "test", first: int = 0) -> Reading:
    found = reading("accuracy", {"robust accuracy": (float(np.mean(bits)), 0.3)}, settings={"split": split})
    index = np.arange(first, first + len(bits))
    return replace(found, examples={"index": index, "clean": np.ones(len(bits), bool), "robust": np.array(bits, bool)})


def test_a_difference_of_shares_is_paired_by_example() -> None:
    """Against the 2 × 2 table of Agresti and Min, half an example added to each of its cells."""
    a, b = [1] * 30 + [1] * 8 + [0] * 3 + [0] * 19, [1] * 30 + [0] * 8 + [1] * 3 + [0] * 19
    ask, sides = Ask("accuracy", "robust accuracy"), {"first": is_regularized("average-margin"), "second": is_standard}

    def judged(one: Reading, two: Reading) -> Statistic:
        runs = [run("AMR", [one], regularizers=["average-margin"]), run("standard", [two])]
        (verdict,) = compare(ask, RISES, **sides)(runs)
        assert verdict.statistic is not None
        return verdict.statistic

    found = judged(right(a), right(b))
    n, only_first, only_second = 62, 8.5, 3.5
    error = sqrt(only_first + only_second - (only_first - only_second) ** 2 / n) / n
    assert found.value == pytest.approx(5 / 60) and found.low == pytest.approx(5 / 60 - Z * error)
    for other in (right(b, split="train"), right(b, first=1), reading("accuracy", {"robust accuracy": (0.55, 0.3)})):
        assert judged(right(a), other).low == pytest.approx(judged(right(a), other).value - sqrt(2) * 0.3)
    assert judged(right(a), right(a)).low == pytest.approx(-Z * sqrt(1) / n)


def test_a_trend_of_shares_is_paired_by_example() -> None:
    """Against the spread over the examples of each one's own line, two more of them with all eight answers."""
    gen, eps = np.random.default_rng(0), [0.5, 1.0, 2.0]
    bits = gen.random((3, 40)) < np.array([[0.9], [0.6], [0.4]])
    runs = [run(f"ε {e}", [right(row.tolist())], objective=f"pgd l2:{e}") for e, row in zip(eps, bits, strict=True)]
    (verdict,) = trend(Ask("accuracy", "robust accuracy"), FALLS, member=PGD)(runs)
    answers = np.array(list(product([0, 1], repeat=3))).T
    rows, share = np.hstack([bits.astype(float), answers]), np.repeat([1.0, 0.25], [40, 8])
    own = np.polyfit(eps, rows, 1)[0] * 1.5
    middle = np.average(own, weights=share)
    error = sqrt(np.average((own - middle) ** 2, weights=share) / 42)
    found = verdict.statistic
    assert found is not None and found.high is not None
    assert found.high - found.value == pytest.approx(Z * error)


def distances(values: Sequence[float], split: str = "test", suffix: str = "") -> Reading:
    name = f"average margin, {split}{suffix}"
    examples = {f"index, {split}{suffix}": np.arange(len(values)), name: np.array(values)}
    return replace(reading("boundary-distance", {name: (float(np.mean(values)), 0.5)}), examples=examples)


def test_means_of_the_same_examples_are_paired() -> None:
    gen = np.random.default_rng(1)
    hard = gen.gamma(2.0, size=50)
    a, b = 1.5 * hard + gen.normal(size=50) / 10, hard
    sides = {"first": is_regularized("average-margin"), "second": is_standard}
    runs = [run("AMR", [distances(a.tolist())], regularizers=["average-margin"]), run("std", [distances(b.tolist())])]
    ask = Ask("boundary-distance", "average margin, test")
    (difference,), (ratio,) = (compare(ask, RISES, ratio=r, **sides)(runs) for r in (False, True))
    assert difference.statistic is not None and ratio.statistic is not None
    half = Z * (a - b).std(ddof=1) / sqrt(50)
    assert difference.statistic.high == pytest.approx((a - b).mean() + half)
    each = a / a.mean() - b / b.mean()
    top = log(a.mean() / b.mean()) + Z * each.std(ddof=1) / sqrt(50)
    assert ratio.statistic.high == pytest.approx(exp(top))


def test_epochs_are_paired_and_splits_are_not() -> None:
    gen = np.random.default_rng(2)
    first, last = gen.random(30), gen.random(30)
    parts = [distances(first.tolist(), "train", ", epoch 1"), distances(last.tolist(), "train", ", epoch 20")]
    over = Reading(
        "boundary-distance over epochs",
        "",
        quantities=tuple(q for part in parts for q in part.quantities),
        examples={name: values for part in parts for name, values in part.examples.items()},
    )
    ask = AtEpoch("boundary-distance", "average margin, train", pick="last")
    (verdict,) = within(ask, replace(ask, pick="first"), FALLS, member=is_standard)([run("std", [over])])
    assert verdict.statistic is not None
    half = Z * (last - first).std(ddof=1) / sqrt(30)
    assert verdict.statistic.high == pytest.approx((last - first).mean() + half)
    both = [run("std", [distances(first.tolist(), "train"), distances(last.tolist(), "test")])]
    asks = (Ask("boundary-distance", f"average margin, {split}") for split in ("train", "test"))
    (verdict,) = within(*asks, FALLS, member=is_standard)(both)
    assert verdict.statistic is not None and verdict.statistic.high is not None
    assert verdict.statistic.high == pytest.approx(verdict.statistic.value + sqrt(2) * 0.5)


def test_values_and_pairs_of_the_same_networks() -> None:
    runs = [run("standard", [reading("gap", {"loss": (2.0, 0.1), "other": (1.0, 0.1)})])]
    (one,) = value(LOSS, (1.5, 2.5), member=is_standard)(runs)
    (two,) = within(LOSS, Ask("gap", "other"), FALLS, member=is_standard)(runs)
    (three,) = within(LOSS, Ask("gap", "other"), (1.5, 3.0), member=is_standard, ratio=True)(runs)
    assert [v.judgement for v in (one, two, three)] == ["supported", "contradicted", "supported"]


def test_one_seed_without_an_interval_and_unreliable_readings_decide_nothing() -> None:
    (alone,) = value(LOSS, RISES, member=is_standard)([run("standard", gap(5.0))])
    assert alone.judgement == "undecided" and "more seeds decide" in alone.says
    doubtful = Outcome.unreliable("The gradients vanish.")
    (masked,) = value(LOSS, RISES, member=is_standard)([run("standard", gap((5.0, 0.1), outcome=doubtful))])
    assert masked.judgement == "undecided" and "The gradients vanish." in masked.says
    failed = run("standard", gap((5.0, 0.1), outcome=Outcome.failed("No.")))
    assert value(LOSS, RISES, member=is_standard)([failed]) == []


def test_what_is_asked() -> None:
    weak, strong = ({"threat": f"l2:{eps}", "split": "test"} for eps in (0.5, 1.0))
    readings = [
        reading("accuracy", {"robust": 0.9}, settings=weak),
        reading("accuracy", {"robust": 0.8}, settings=strong),
    ]
    one = run("ε 1", readings, objective="pgd l2:1.0")
    found = Ask("accuracy", "robust", own=True).of(one)
    assert found is not None and found[0].value == 0.8
    assert Ask("accuracy", "robust", {"split": "train"}).of(one) is None
    many = run("both", [*readings, reading("accuracy", {"robust": 0.7}, n=5000, settings=weak)])
    best = Ask("accuracy", "robust").of(many)
    assert best is not None and best[0].n == 5000
    epochs = run("long", [reading("gap over epochs", {f"loss, epoch {e}": float(e) for e in (10, 2, 30)})])
    ends = [AtEpoch("gap", "loss", pick=pick).of(epochs) for pick in ("first", "last", "smallest")]  # type: ignore[arg-type]
    assert [each[0].value for each in ends if each] == [2.0, 30.0, 2.0]
    later = AtEpoch("gap", "loss", since=3).of(epochs)
    assert later is not None and later[0].value == 10.0 and AtEpoch("gap", "loss", since=31).of(epochs) is None
    assert strength(run("noise", [], objective="noise linf:0.25")) == 0.25
    assert strength(run("trades", [], objective="trades")) is None


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(-5, 5), st.floats(0.1, 5))
def test_verdicts(middle: float, half: float, low: float, width: float) -> None:
    statistic, region = Statistic(middle, middle - half, middle + half, 3), (low, low + width)
    inside = low < middle - half and middle + half < low + width
    outside = middle + half <= low or middle - half >= low + width
    wanted = "supported" if inside else "contradicted" if outside else "undecided"
    assert decide(statistic, region) == wanted


def test_seeds_are_not_examples() -> None:
    """Networks that agree exactly still see the same images: more seeds don't shrink that part."""
    runs = [run("standard", gap((1.0, 0.3)), seed=seed) for seed in range(4)]
    (verdict,) = value(LOSS, RISES, member=is_standard)(runs)
    assert verdict.statistic is not None and verdict.statistic.low == pytest.approx(0.7)


def fixed(*verdicts: Verdict) -> Judge:
    return lambda runs: list(verdicts)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["supported", "undecided"], "supported"),
        (["contradicted"], "contradicted"),
        (["supported", "contradicted"], "undecided"),
        (["undecided"], "undecided"),
        ([], "not run"),
    ],
)
def test_an_entry_says_what_its_settings_agree_on(words: list[str], wanted: str) -> None:
    verdicts = [Verdict(word, "here", "so") for word in words]  # type: ignore[arg-type]
    claim = Claim(
        name="x-y", paper="p", section="s", sentence="q", measured="m", judge=fixed(*verdicts), needs="a network"
    )
    (entry,) = ledger([], [claim])
    assert isinstance(entry, Entry) and entry.judgement == wanted
    assert words or entry.verdicts[0].says == "It needs a network."


def test_the_claims_of_the_papers() -> None:
    known = claims()
    assert len(known) >= 30 and len({claim.name for claim in known}) == len(known)
    for paper in ("000", "001", "003", "004"):
        assert any(claim.name.startswith(f"{paper}-") for claim in known)
    assert all(claim.sentence and claim.section and claim.measured and claim.needs for claim in known)
    assert all(entry.judgement == "not run" for entry in ledger([]))


def test_a_claim_of_the_users_own_is_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustlens.claims.yamada_2021.MINE", claims()[0], raising=False)
    assert find_claim("robustlens.claims.yamada_2021:MINE") is claims()[0]
    with pytest.raises(InputError, match="a Claim"):
        find_claim("robustlens.claims.yamada_2021:PAPER")
    with pytest.raises(InputError, match="can be imported"):
        find_claim("nowhere.to:BE")


@pytest.mark.parametrize(("n", "nature", "error"), [(1, "estimate", None), (2, "estimate", 0.0), (1, "exact", 0.0)])
def test_one_example_says_nothing_of_its_chance(n: int, nature: Literal["estimate", "exact"], error: object) -> None:
    assert error_of(Quantity("x", 1.0, "", 1.0, 1.0, n, nature=nature)) == error
