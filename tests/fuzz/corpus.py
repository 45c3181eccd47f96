"""Inputs that are always tried: those that once failed, cut down, and some that reach far into a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RUN = {"label": "A", "seed": 0, "study": "s", "hash": "h", "config": {}, "provenance": {}}
READING = {
    "lens": "accuracy", "says": "It says so.", "headline": ["q"], "outcome": {"status": "ok", "why": ""},
    "settings": {},
    "quantities": [{"name": "q", "value": 0.5, "unit": "fraction", "low": 0.4, "high": 0.6, "n": 9}],
}  # fmt: skip
NAMED = {"title": "t", "x_label": "x", "y_label": "y"}
CURVE = {**NAMED, "kind": "curve", "y_range": None, "log_y": False, "names": ["a"]}
POINTS = {"series": ["a"] * 2, "x": [0.0, 1.0], "y": [1.0, 2.0], "low": [None] * 2, "high": [None] * 2}
STUDY = b"""model = "mlp"
threat = "l2:1"
data = { source = "digits" }
[[methods]]
label = "A"
"""


def directory(run: Any = RUN, epochs: Sequence[Any] = (), reading: Any = READING, panels: Sequence[Any] = ()) -> Any:
    """A run directory as the targets describe it."""
    return [run, list(epochs), [[reading, [list(panel) for panel in panels]]]]


def heatmap(x: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**NAMED, "kind": "heatmap", "x": x, "y": [0.0]}, {"z": [1.0] * len(x)}


def histogram(edges: list[float], *counts: float) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"kind": "histogram", "title": "t", "x_label": "x", "names": ["a"], "edges": edges}, {"a": list(counts)}


def gallery(shape: list[int], pixels: bytes, captions: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = {"kind": "gallery", "title": "t", "header": ["a"], "captions": ["c"] * captions, "shape": shape}
    return facts, {"pixels": [pixels]}


RUNS: list[Any] = [
    [directory(epochs=[{"epoch": 1}], panels=[(CURVE, POINTS), heatmap([0.0, 1.0]), histogram([0.0, 1.0], 3.0)])],
    [directory(), directory({**RUN, "seed": 1, "hash": "other"})],
    # A number that five digits round to infinity.
    [directory(epochs=[{"epoch": 2, "loss": -1.7976931348623157e308}])],
    [directory(epochs=[{"epoch": 10**400}, {"epoch": "one", "loss": 1.0}, [1], 3, None])],
    [directory(epochs=[{"epoch": 1, "loss": 10**400}])],
    # Axes that are not finite, empty, or of another length than the values.
    [directory(panels=[heatmap([float("inf"), -2e16, 5e16])])],
    [directory(panels=[heatmap([])])],
    [directory(panels=[histogram([], 1.0)])],
    [directory(panels=[histogram([0.0, 1.0, 2.0], 1.0)])],
    [directory(panels=[histogram([float("-inf"), 0.0, float("nan")], 1.0, -2.0)])],
    [directory(panels=[histogram([3e16, -3e38, float("nan"), 3.5e16], 1.0, 2.0, 3.0)])],
    [directory(panels=[histogram([float("-inf"), float("-inf"), 0.0, 1.0, float("inf")], 1.0, 2.0, 3.0, 4.0)])],
    [directory(panels=[(CURVE, {**POINTS, "x": [None, 1.0]})])],
    [directory(panels=[(CURVE, {**POINTS, "y": [[1.0], [2.0]]})])],
    [directory(panels=[(CURVE, {**POINTS, "y": ["a", "b"]})])],
    [directory(panels=[({**CURVE, "y_range": [1]}, POINTS)])],
    [directory(panels=[(CURVE, {name: [] for name in POINTS})])],
    [directory(panels=[(CURVE, {**POINTS, "x": [float("-inf")] * 2})])],
    [directory(panels=[({**CURVE, "title": ["</script>"]}, POINTS)])],
    [directory(panels=[({"kind": ["curve"]}, {}), ({"kind": "pie"}, {})])],
    [directory(panels=[gallery([1, 1, 0, 0, 1], b"")])],
    [directory(panels=[gallery([1, 1, 2, 2, 2], bytes(8))])],
    [directory(panels=[gallery([1, 1, -1, 2, 3], bytes(12))])],
    [directory(panels=[gallery([1, 1, 2, 2, 1], bytes(4), captions=3)])],
    [directory(panels=[({"kind": "table", "title": "t", "header": "ab", "rows": [[{"<b>": 1}], 3]}, {})])],
    [directory(reading={**READING, "quantities": [{"name": "q", "value": "much"}]})],
    [directory(reading={**READING, "quantities": [{"name": "q", "value": 10**400, "n": 1.5}]})],
    [directory(reading={**READING, "headline": [["q"]], "says": None, "settings": []})],
    [directory(reading={**READING, "outcome": {"status": "great", "why": 3}})],
    [directory(reading=[READING])],
    [directory({**RUN, "seed": float("inf")})],
    [directory({**RUN, "seed": 10**400, "label": None, "config": [1], "provenance": "text"})],
    [directory({**RUN, "label": "\ud800", "study": "\udfff"})],
    [directory({**RUN, "provenance": {"seconds": float("nan"), "data": {"a": [{"b": "<script>"}]}}})],
    [directory({**RUN, "label": "\x1b[2J\0</script>"})],
]  # fmt: skip

CORPUS: Mapping[str, Sequence[Any]] = {
    "study": [
        STUDY,
        b"",
        b"\xff",
        b"\xef\xbb\xbf" + STUDY,
        b"a = " + b"[" * 5000,
        b"a." * 5000 + b"a = 1",
        b"a = " + b"9" * 5000,
        STUDY + b'start = "' + b"a" * 5000 + b'"',
        STUDY.replace(b'"digits"', b'"digits", train = 1' + b"0" * 30),
        STUDY.replace(b'"l2:1"', b'"l2:' + b"9" * 400 + b'"'),
        b'lenses = [{ name = "accuracy", when = "epochs:' + b"9" * 5000 + b'" }]\n' + STUDY,
        b"seeds = [" + b"9" * 40 + b"]\n" + STUDY,
        STUDY + b"regularizers = [{ name = [1] }, { name = [1] }]",
        STUDY + b"training = { epochs = 1979-05-27 }",
    ],
    "directory": RUNS,
    "page": [(runs, "title") for runs in RUNS] + [(RUNS[0], "\udcff</title><script>")],
}
