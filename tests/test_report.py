"""The report: numbers against hand-computed means, hostile text, missing data, and a real browser without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.elements import Elements

from robustlens.report.aggregate import common_edges, over_seeds, shares
from robustlens.report.charts import MAX_POINTS, chart, spec
from robustlens.report.collect import training_curves
from robustlens.report.figures import slug, write_figures
from robustlens.report.numbers import interval, number, seconds
from robustlens.report.page import write_page
from robustlens.report.summary import summarise
from robustlens.results.errors import InputError
from robustlens.results.panels import Curve, Gallery, Heatmap, Histogram, Panel, Series, Table
from robustlens.results.reading import Outcome, Quantity, Reading
from robustlens.results.runs import load, methods
from robustlens.results.store import RunDirectory

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&'
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WHY = "A stronger attack found more adversarial examples."


def panels(shift: float) -> tuple[Panel, ...]:
    x = np.linspace(0, 0.3, 7)
    y = np.clip(0.9 - (3 - shift) * x, 0, 1)
    grid = np.linspace(-1, 1, 5)
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 1), dtype=np.uint8)
    return (
        Curve("Accuracy by radius", "radius", "accuracy", (Series("test", x, y, y - 0.02, y + 0.02),), (0.0, 1.0)),
        Curve("Decay", "rank", "value", tuple(Series(f"layer {i}", x, np.exp(-x)) for i in range(4)), log_y=True),
        Histogram("Margins", "distance", np.linspace(0, 1, 6), {"train": np.arange(5.0), "test": np.ones(5)}),
        Heatmap("Surface", "first", "second", grid, grid, np.outer(grid, grid) + shift),
        Table("Norms", ("layer", "norm"), (("conv", 1.0 + shift), (HOSTILE, None))),
        Gallery("Pictures", ("clean", "adversarial", "difference"), ("seven", HOSTILE), images),
    )


def make_run(
    path: Path, label: str, seed: int, *, accuracy: float = 0.9, outcome: Outcome | None = None
) -> RunDirectory:
    run = RunDirectory(path)
    config = {"method": {"name": label}, "seed": seed}
    provenance = {
        "version": "0.1.0",
        "device": "cpu",
        "seconds": 65.0 + seed,
        "data": {"name": "digits", "fingerprint": "ab12"},
    }
    record = {"label": label, "seed": seed, "study": "small", "hash": f"{path.name}-hash", "config": config}
    run.write_json("run.json", {**record, "provenance": provenance})
    epochs = [{"epoch": e, "loss": 2.0 / e, "accuracy": 0.5 + 0.1 * e, "seconds": 1.0} for e in (1, 2, 3)]
    run.write_metrics([{**e, **({"valid_robust_accuracy": 0.3} if e["epoch"] == 2 else {})} for e in epochs])
    quantities = (
        Quantity("robust_accuracy", accuracy, "fraction", accuracy - 0.02, accuracy + 0.02, 500, nature="upper bound"),
        Quantity("margin", 10 * accuracy, "ℓ2"),
    )
    reading = Reading(
        "robustness",
        f"It says {label}.",
        outcome or Outcome(),
        quantities,
        ("robust_accuracy", "margin"),
        panels(accuracy),
        {"seed": seed, "steps": 10},
    )
    run.write_reading(run.reading_path("robustness", reading.settings), reading)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    root = tmp_path_factory.mktemp("runs")
    made = [make_run(root / f"a{s}", "PGD ε=2", s, accuracy=0.80 + 0.03 * s) for s in range(3)]
    made.append(make_run(root / "b", HOSTILE, 0, accuracy=0.3, outcome=Outcome.unreliable(WHY)))
    broken = RunDirectory(root / "c")
    broken.write_json(
        "run.json", {"label": "ERM", "seed": 0, "study": "small", "hash": "c", "config": {}, "provenance": {}}
    )
    failed = Reading(
        "robustness", "Nothing was measured.", Outcome.failed("The gradient is not a number."), settings={"steps": 10}
    )
    broken.write_reading(broken.reading_path("robustness", failed.settings), failed)
    return [*made, broken]


@pytest.fixture(scope="module")
def page(runs: list[RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(runs, tmp_path_factory.mktemp("page") / "report.html", title=f"Study {HOSTILE}")


@pytest.fixture(scope="module")
def elements(page: Path) -> Elements:
    return Elements(page.read_text())


def test_page_loads_nothing_and_stays_small(page: Path, elements: Elements) -> None:
    assert page.stat().st_size < 3e6
    for tag, attributes in elements.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "href", "action", "srcset"):
            assert re.match(r"data:|#|$", attributes.get(name) or ""), (tag, attributes)
    policy = next(a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(elements: Elements) -> None:
    assert len(elements.scripts) == 4
    assert not any("onerror" in attributes for _, attributes in elements.tags)
    specs, labels = (json.loads(text) for text in elements.scripts[:2])
    assert labels == ["PGD ε=2", HOSTILE, "ERM"]
    assert any(row["label"] == HOSTILE for row in specs[0]["data"]["values"])
    assert f"It says {HOSTILE}." in "".join(elements.words)


def test_page_shows_everything(elements: Elements) -> None:
    text = " ".join("".join(elements.words).split())
    for title in [p.title for p in panels(0)] + ["Training loss", "Accuracy while training", "Time per epoch"]:
        assert title in text
    assert WHY in text and "The gradient is not a number." in text and "Nothing was measured." in text
    assert "⚠ unreliable" in text and "⚠ failed" in text
    assert "3 methods, 5 trained networks (1 to 3 seeds each)" in text
    assert "1 is unreliable and 1 failed" in text
    assert "83.0 %" in text and "[78.0, 88.0]" in text
    assert "digits" in text and "1 min 5 s" in text
    pictures = [a for tag, a in elements.tags if tag == "img"]
    assert len(pictures) == 2 * 3 * 2 and all((a["src"] or "").startswith("data:image/png;base64,") for a in pictures)


def test_summary_matches_means_by_hand(runs: list[RunDirectory]) -> None:
    summary = summarise(runs)
    assert [(c.lens, c.quantity, c.nature) for c in summary.columns] == [
        ("robustness", "robust_accuracy", "upper bound"),
        ("robustness", "margin", "estimate"),
    ]
    pgd, other, failed = summary.rows
    assert pgd.seeds == (0, 1, 2)
    cell = pgd.cells[0]
    assert cell.value == pytest.approx((0.80 + 0.83 + 0.86) / 3)
    assert (cell.low, cell.high) == (pytest.approx(0.78), pytest.approx(0.88))
    assert cell.text == "83.0 % [78.0, 88.0]" and cell.n == (500, 500, 500) and cell.status == "ok"
    assert (pgd.cells[1].low, pgd.cells[1].high) == (pytest.approx(8.0), pytest.approx(8.6))
    assert other.cells[0].status == "unreliable" and other.cells[0].why == WHY and not cell.best
    assert other.cells[1].low is None
    assert failed.cells[0].status == "failed" and failed.cells[0].value is None
    header, first, second, third = summary.texts()
    assert header[1] == "robustness: robust accuracy" and first[1] == cell.text
    assert second[1] == "30.0 % [28.0, 32.0] ⚠ unreliable" and third[1] == "failed"


def test_best_is_marked_only_where_clear(tmp_path: Path) -> None:
    clear = [make_run(tmp_path / "a", "A", 0, accuracy=0.9), make_run(tmp_path / "b", "B", 0, accuracy=0.8)]
    close = [clear[0], make_run(tmp_path / "c", "C", 0, accuracy=0.87)]
    assert [row.cells[0].best for row in summarise(clear).rows] == [True, False]
    assert [row.cells[0].best for row in summarise(close).rows] == [False, False]


def test_one_label_with_two_configurations_is_two_methods(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a", "PGD", 0), make_run(tmp_path / "b", "PGD", 1)
    assert list(methods(load([one, two, one]))) == ["PGD"]
    record = two.read_json("run.json")
    two.write_json("run.json", {**record, "config": {"method": {"name": "PGD", "eps": 0.1}, "seed": 1}})
    names = list(methods(load([one, two])))
    assert len(names) == 2 and all(re.fullmatch(r"PGD · [0-9a-f]{6}", name) for name in names)


def test_methods_that_are_each_examined_at_their_own_radius_stand_together_and_are_not_ranked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name, 0, accuracy=value) for name, value in (("A", 0.9), ("B", 0.5))]

    def look(run: RunDirectory, eps: float) -> None:
        settings = {"threat": f"l2:{eps}", "attack used": {"name": "pgd", "threat": f"l2:{eps}", "step_size": eps / 4}}
        quantity = Quantity("robust accuracy", 1 - eps, "fraction", 0.99 - eps, 1 - eps, 500)
        found = Reading("accuracy", "…", quantities=(quantity,), headline=("robust accuracy",), settings=settings)
        run.write_reading(run.reading_path("accuracy", settings), found)

    for run, eps in zip(runs, (0.1, 0.5), strict=True):
        look(run, eps)
    cells = [row.cells[0] for row in summarise(runs).rows]
    assert [(cell.value, cell.best) for cell in cells] == [(0.9, False), (0.5, False)]
    look(runs[0], 0.5)
    assert {column.lens for column in summarise(runs).columns} >= {"accuracy, l2:0.1", "accuracy, l2:0.5"}


def test_same_lens_with_other_settings_is_another_column(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "PGD", 0)
    more = Reading("robustness", "…", quantities=(Quantity("q", 1.0),), headline=("q",), settings={"steps": 50})
    run.write_reading(run.reading_path("robustness", more.settings), more)
    expected = ["robustness (steps 10)", "robustness (steps 10)", "robustness (steps 50)"]
    assert sorted(c.lens for c in summarise([run]).columns) == expected


def test_runs_that_cannot_be_used_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        summarise([])
    with pytest.raises(InputError, match=r"run\.json"):
        write_page([RunDirectory(tmp_path / "nowhere")], tmp_path / "x.html", title="x")
    unlabelled = RunDirectory(tmp_path / "u")
    unlabelled.write_json("run.json", {"seed": 0})
    with pytest.raises(InputError, match="label"):
        summarise([unlabelled])
    damaged = make_run(tmp_path / "d", "D", 0)
    (damaged.path / "metrics.jsonl").write_text("{not json")
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        summarise([damaged])
    with pytest.raises(InputError, match="pdf, svg, png"):
        write_figures([damaged], tmp_path, format="gif")  # type: ignore[arg-type]


def test_nothing_measured_and_values_that_are_not_finite(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "empty")
    run.write_json("run.json", {"label": "ERM", "seed": 0})
    text = write_page([run], tmp_path / "empty.html", title="Empty").read_text()
    assert "No lens has looked at them yet" in text and "There is no headline number yet." in text
    nan = np.array([np.nan, np.inf, -1.0])
    odd = (
        Curve("Odd", "x", "y", (Series("s", np.arange(3.0), nan),), log_y=True),
        Curve("Point", "x", "y", (Series("s", np.ones(1), np.ones(1)),)),
        Curve("None", "x", "y", ()),
        Histogram("Holes", "x", np.array([-np.inf, 0, 1, np.inf]), {"s": np.array([1.0, 2.0, np.nan])}),
        Heatmap("Flat", "x", "y", np.zeros(1), np.arange(3.0), nan[:, None]),
    )
    quantities = (Quantity("q", math.nan), Quantity("r", math.inf, "fraction"))
    run.write_reading(run.reading_path("odd", {}), Reading("odd", "…", Outcome(), quantities, ("q", "r"), odd))
    text = write_page([run], tmp_path / "odd.html", title="Odd").read_text()
    assert "3 values are not drawn" in text and "There is nothing to draw." in text
    assert ">NaN<" in text and ">∞<" in text
    assert [cell.text for cell in summarise([run]).rows[0].cells] == ["NaN", "∞"]


def test_curves_of_seeds_become_a_mean_with_their_range() -> None:
    def curve(*y: float) -> Curve:
        return Curve("c", "x", "y", (Series("s", np.arange(float(len(y))), np.array(y)),))

    merged, note = over_seeds([(1, curve(3, 5)), (0, curve(1, 3, 7))])
    assert isinstance(merged, Curve) and "mean" in note
    line = merged.series[0]
    assert line.low is not None and line.high is not None
    np.testing.assert_allclose(line.y, [2, 4, 7])  # only one seed reached the third epoch
    np.testing.assert_allclose(line.low, [1, 3, 7])
    np.testing.assert_allclose(line.high, [3, 5, 7])
    table, _ = over_seeds([(s, Table("t", ("a", "b"), (("x", float(s)),))) for s in (1, 2)])
    assert isinstance(table, Table) and table.rows == (("x", 1.5),)
    grids = [(s, Heatmap("h", "x", "y", np.zeros(1), np.zeros(1), np.full((1, 1), s))) for s in (4, 2)]
    shown, note = over_seeds(grids)
    assert isinstance(shown, Heatmap) and shown.z[0, 0] == 2 and "seed 2" in note


def test_epochs_recorded_now_and_then_have_their_time_and_their_axis(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "A", 0)
    marks = [1, 2, 5, 10, 1000]
    run.write_metrics([{"epoch": mark, "loss": 1.0, "seconds": 3.0} for mark in marks])
    found = {group.title: group.by_method["A"][0][1] for group in training_curves(load([run]))}
    time = found["Time per epoch"]
    assert isinstance(time, Curve)
    np.testing.assert_allclose(time.series[0].y, [3, 3, 1, 0.6, 3 / 990])

    def scale(*x: float) -> str:
        drawn = spec(chart({"A": Curve("c", "epoch", "y", (Series("s", np.array(x), np.ones(len(x))),))}))
        return str(drawn["layer"][0]["encoding"]["x"]["scale"]["type"])

    assert scale(*marks) == "log" and scale(*range(1, 200)) == "linear" and scale(0, *marks) == "linear"
    assert scale() == "linear" and scale(1, math.inf) == "linear"


def test_histograms_keep_their_mass_on_other_bins() -> None:
    edges, finer = np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.5, 1.0, 1.5, 2.0, 4.0])
    np.testing.assert_allclose(shares(edges, np.array([3.0, 1.0]), finer), [0.375, 0.375, 0.125, 0.125, 0])
    assert common_edges([edges, edges]) is edges
    np.testing.assert_allclose(common_edges([edges, np.array([0.0, 2.0, 4.0])]), [0, 2, 4])
    decades = common_edges([np.geomspace(1e-3, 1, 4), np.geomspace(1e-2, 10, 4)])
    np.testing.assert_allclose(decades, np.geomspace(1e-3, 10, 4))


def test_long_curves_are_thinned_but_keep_their_peaks() -> None:
    y = np.zeros(20_000)
    y[12_345], y[777] = 9, -9
    drawn = spec(chart({"A": Curve("c", "x", "y", (Series("s", np.arange(20_000.0), y),))}))
    values = [row["y"] for row in drawn["data"]["values"]]
    assert len(values) <= MAX_POINTS and max(values) == 9 and min(values) == -9


def test_charts_are_valid_specifications_with_the_shared_parameter() -> None:
    for panel in panels(0)[:4]:
        written: dict[str, Any] = chart({"A": panel, "B": panel}).to_dict()  # Altair checks it against the schema
        assert [p["name"] for p in written["params"]] == ["highlight"]
    with pytest.raises(TypeError, match="not a chart"):
        chart({"A": panels(0)[4]})


def test_figures_are_real_files(runs: list[RunDirectory], tmp_path: Path) -> None:
    written = write_figures(runs, tmp_path / "svg", format="svg")
    assert sorted(p.suffix for p in written) == [".png"] * 2 + [".svg"] * 7  # a gallery a method that has one
    for path in written:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        assert re.fullmatch(r"[a-z0-9-]+\.(svg|png)", path.name)
    before = {path: path.read_bytes() for path in written}
    again = write_figures(runs, tmp_path / "svg", format="svg")
    assert {path: path.read_bytes() for path in again} == before, "a figure does not depend on those drawn before it"
    short = make_run(tmp_path / "short", "ERM", 0)
    shutil.rmtree(short.path / "readings")
    short.write_metrics([{"epoch": 1, "loss": 1.0}])
    assert [p.read_bytes()[:4] for p in write_figures([short], tmp_path, format="pdf")] == [b"%PDF"]
    assert [p.read_bytes()[:4] for p in write_figures([short], tmp_path, format="png")] == [b"\x89PNG"]


def test_numbers_as_a_reader_wants_them() -> None:
    assert [number(v, "fraction") for v in (0.932, 1.0, 0.99987, 0.0001, 0.0)] == [
        "93.2 %", "100.0 %", "99.99 %", "0.01 %", "0.0 %",
    ]  # fmt: skip
    assert [number(v) for v in (3.0, -0.51234, 1234567.0, math.inf, None)] == ["3", "−0.5123", "1.23e+06", "∞", "—"]
    assert interval(0.5, 0.75, "fraction") == "[50.0, 75.0]" and interval(None, 1.0) == ""
    assert [seconds(v) for v in (41, 725, 12000)] == ["41 s", "12 min 5 s", "3 h 20 min"]
    assert slug("../Größe: ε=8/255!") == "groe-8-255" and slug("…") == "figure"


def test_report_never_loads_torch() -> None:
    code = "import sys, robustlens.report.page, robustlens.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt install chromium): the page cannot be opened"
)
def test_a_browser_without_network_draws_every_chart(page: Path, elements: Elements, tmp_path: Path) -> None:
    probe = """<script>
    const ready = () => {
      if (!document.documentElement.dataset.drawn) return setTimeout(ready, 30);
      document.querySelectorAll(".chip")[1].click();
      setTimeout(() => {
        const label = JSON.parse(document.getElementById("labels").textContent)[1];
        const found = {
          drawings: document.querySelectorAll(".chart svg.marks, .chart canvas.marks").length,
          faded: document.querySelectorAll("tr.faded").length,
          follow: robustlens.views.filter((v) => String(v.signal("highlight")) === label).length,
          faint: document.querySelectorAll('.chart path[opacity="0.1"]').length,
        };
        document.body.append(Object.assign(document.createElement("output"), { textContent: JSON.stringify(found) }));
      }, 300);
    };
    ready();
    </script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(probe.join(page.read_text().rsplit("</body>", 1)))
    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --proxy-server=127.0.0.1:9 --enable-logging=stderr "
        "--virtual-time-budget=20000 --dump-dom"
    )
    command = [str(CHROMIUM), *arguments.split(), f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    match = re.search(r"<output>(.*?)</output>", done.stdout)
    assert match, done.stdout[-2000:]
    found = json.loads(match[1])
    count = len(json.loads(elements.scripts[0]))
    assert found["drawings"] == found["follow"] == count == 3 + 4
    assert found["faded"] >= 2 and found["faint"] > 0
