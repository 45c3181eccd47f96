"""The fuzz targets: whatever comes in, the result is a value or one RobustlensError, and no file lies outside.

Each target is a function of what hypothesis made up (``strategy``) that raises AssertionError, or whatever the product
let escape, where the property does not hold.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from hypothesis import strategies as st

from robustlens.report.page import write_page
from robustlens.results.errors import RobustlensError
from robustlens.results.runs import read_runs
from robustlens.results.store import RunDirectory, find_runs
from robustlens.studies.config import read_study
from robustlens.studies.plan import make_plan

from .elements import Elements

#: Text that ends elements, scripts, comments and lines, and text of any characters, half surrogates too.
NASTY = (
    '</script><script>alert("x")</script><img src=x onerror=alert(1)>&', "-->", "]]>", "../../x", "/etc/passwd",
    "{{ 7 * 7 }}",     '" onload="x', "=1+1", "\x1b[2J", "\0", "\u2028", "NaN", "CON", "__proto__", "image", "",
)  # fmt: skip
TEXT = st.sampled_from(NASTY) | st.text(max_size=12) | st.text(st.characters(), max_size=4)
NUMBERS = (
    st.sampled_from([0, -1, 1, 10**30, 10**400, 2**63, 1e308, -1e308, 5e-324, float("nan"), float("inf")])
    | st.floats()
    | st.integers(-3, 300)
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
GONE = object()
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with these fields."""
    return st.fixed_dictionaries(fields)


def spoilt(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What belongs there, as often as not with one or two places in it that hold anything else, or nothing."""
    wrong = st.tuples(st.integers(0, 9999), st.just(GONE) | JSON)
    return st.builds(_spoil, right, st.just([]) | st.lists(wrong, min_size=1, max_size=2))


def _spoil(value: Any, wrongs: list[tuple[int, Any]]) -> Any:
    root = [copy.deepcopy(value)]
    for at, wrong in wrongs:
        places = list(_places(root))
        home, key = places[at % len(places)]
        if wrong is not GONE:
            home[key] = wrong
        elif home is not root:
            del home[key]
    return root[0]


def _places(home: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of lists and mappings, from the outermost."""
    for key, part in home.items() if isinstance(home, dict) else enumerate(home):
        yield home, key
        if isinstance(part, dict | list):
            yield from _places(part)


# ---- a study file --------------------------------------------------------------------------------------------------

WHOLE = st.integers(1, 9) | st.sampled_from([9, 2**30])
SHOWN = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12) | st.sampled_from(NASTY[:8])
ATTACK = record(name=st.sampled_from(["pgd", "fgsm"]), threat=st.sampled_from(["linf:8/255", "l2:0.5"]))
OBJECTIVE = st.just("standard") | record(name=st.just("adversarial"), attack=ATTACK)
REGULARIZER = st.sampled_from(["jacobian", "orthogonality"]) | record(
    name=st.just("orthogonality"), beta=st.floats(0, 1)
)
LENS = st.sampled_from(["logit-margins", "accuracy"]) | record(
    name=st.just("logit-margins"),
    bins=WHOLE,
    when=st.sampled_from(["end", "epochs:1"]),
)
STUDY = record(
    name=SHOWN,
    data=record(source=st.just("digits") | SHOWN, train=WHOLE, classes=st.lists(WHOLE | SHOWN, max_size=2)),
    model=st.just("mlp") | record(name=st.just("mlp"), hidden=WHOLE),
    threat=st.sampled_from(["linf:8/255", "l2:1"]),
    training=record(epochs=WHOLE, batch_size=WHOLE, optimizer=record(name=st.just("adam"), lr=st.floats(1e-4, 1))),
    methods=st.lists(
        record(label=SHOWN, objective=OBJECTIVE, regularizers=st.lists(REGULARIZER, max_size=1)), min_size=1, max_size=3
    ),
    seeds=st.lists(st.integers(-1, 9), min_size=1, max_size=3),
    lenses=st.lists(LENS, max_size=2),
)  # fmt: skip
TOML_WORDS = (
    "[", "]", "[[", "]]", "{", "}", "=", ".", ",", '"', "'", '"""', "#", "\n", "a", "methods", "label", "1", "-", "_",
    "nan",     "1979-05-27", "0x", "e", "true", "\\u0000", "\\", " ", "a.b.c", "[" * 40, "a." * 80, "9" * 4400,
)  # fmt: skip


def _toml(settings: Any) -> bytes:
    """The settings as TOML, without what it cannot hold (None, half surrogates)."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {_utf8(k): kept(v) for k, v in value.items() if v is not None}
        if isinstance(value, list):
            return [kept(v) for v in value if v is not None]
        return _utf8(value) if isinstance(value, str) else value

    return tomli_w.dumps(kept(settings) if isinstance(settings, dict) else {}).encode()


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


STUDIES = (
    spoilt(STUDY).map(_toml)
    | st.lists(st.sampled_from(TOML_WORDS), max_size=40).map(lambda words: "".join(words).encode())
    | st.binary(max_size=40)
)


def study(content: bytes) -> None:
    """A study file is a plan or an error."""
    with _place() as place:
        (place / "in" / "study.toml").write_bytes(content)
        with _errors():
            make_plan(read_study(place / "in" / "study.toml"))
        _nothing_new(place, {"in/study.toml"})


# ---- a run directory -----------------------------------------------------------------------------------------------

FLOATS = st.lists(st.floats(width=32), max_size=4)
ROWS = st.lists(st.lists(st.none() | st.floats() | TEXT, max_size=3), max_size=3)


def _table(title: str, header: list[str], rows: list[list[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"kind": "table", "title": title, "header": header, "rows": rows}, {}


def _fitting(x: list[float], y: list[float], title: str, log: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = {"title": title, "x_label": title, "y_label": "y"}
    size = min(len(x), len(y))
    curve = {**facts, "kind": "curve", "y_range": None, "log_y": log, "names": [title]}
    return curve, {"series": [title] * size, "x": x[:size], "y": y[:size], "low": [None] * size, "high": y[:size]}


def _histogram(edges: list[float], counts: list[float], title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = (counts * 9)[: max(0, len(edges) - 1)]
    facts = {"kind": "histogram", "title": title, "x_label": title, "names": [title], "edges": edges}
    return facts, {title: counts}


def _heatmap(x: list[float], y: list[float], z: float, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = {"kind": "heatmap", "title": title, "x_label": title, "y_label": title, "x": x, "y": y}
    return facts, {"z": [z * k for k in range(len(x) * len(y))]}


def _gallery(shape: list[int], title: str) -> tuple[dict[str, Any], dict[str, Any]]:
    rows, across, high, wide, channels = shape
    facts = {"kind": "gallery", "title": title, "header": [title] * 2, "captions": [title] * rows, "shape": shape}
    return facts, {"pixels": [bytes(across * high * wide * channels)] * rows}


PANELS_AND_TABLES = (
    st.builds(_table, TEXT, st.lists(TEXT, max_size=3), ROWS)
    | st.builds(_fitting, FLOATS, FLOATS, TEXT, st.booleans())
    | st.builds(_histogram, FLOATS, FLOATS, TEXT)
    | st.builds(_heatmap, FLOATS, FLOATS, st.floats(), TEXT)
    | st.builds(_gallery, st.tuples(*[st.integers(0, 3)] * 4, st.sampled_from([1, 3])).map(list), TEXT)
)
ENDS = st.none() | st.floats()
QUANTITY = record(
    name=st.sampled_from(["accuracy", "q"]), value=st.floats(), unit=st.sampled_from(["fraction", ""]) | TEXT,
    low=ENDS, high=ENDS, n=st.none() | st.integers(), residual=ENDS, nature=st.sampled_from(["exact", "estimate"]),
)  # fmt: skip
OUTCOME = record(status=st.sampled_from(["ok", "unreliable", "failed"]), why=TEXT)
SETTINGS = st.just({"seed": 0}) | st.dictionaries(TEXT, JSON, max_size=2)
READING = record(
    lens=st.sampled_from(["accuracy", "../../x"]) | TEXT, says=TEXT, headline=st.just(["accuracy", "q"]),
    outcome=OUTCOME, quantities=st.lists(QUANTITY, max_size=2), settings=SETTINGS,
)  # fmt: skip
EPOCH = record(epoch=st.integers(1, 3), loss=st.floats(), accuracy=st.floats(0, 1)) | st.dictionaries(
    TEXT, JSON, max_size=2
)
RUN = record(
    label=st.just("A") | TEXT, seed=st.integers(0, 2), study=TEXT, hash=TEXT | st.just(""),
    config=st.dictionaries(TEXT, JSON, max_size=2),
    provenance=record(version=TEXT, seconds=st.floats(), data=JSON),
)  # fmt: skip
READ = st.tuples(READING, st.lists(PANELS_AND_TABLES.map(list), max_size=3)).map(list)
#: A run directory: run.json, the lines of metrics.jsonl, and readings with their panels and tables.
DIRECTORY = st.tuples(RUN, st.lists(EPOCH, max_size=3), st.lists(READ, max_size=2)).map(list)
DIRECTORIES = spoilt(st.lists(DIRECTORY, min_size=1, max_size=3))


def _write(place: Path, content: Any) -> None:
    """The run directory that ``content`` describes, as far as what spoilt it left a description."""
    place.mkdir(parents=True)
    run, epochs, readings = (*_listed(content), None, None, None)[:3]
    (place / "run.json").write_text(json.dumps(run, default=repr))
    (place / "metrics.jsonl").write_text("".join(json.dumps(epoch, default=repr) + "\n" for epoch in _listed(epochs)))
    for number, read in enumerate(_listed(readings)):
        reading, panels = (*_listed(read), None, None)[:2]
        drawn = [(*_listed(panel), None, None)[:2] for panel in _listed(panels)]
        below = place / "readings" / f"lens-{number}"
        below.mkdir(parents=True)
        record = {**reading, "panels": [facts for facts, _ in drawn]} if isinstance(reading, dict) else reading
        (below / "reading.json").write_text(json.dumps(record, default=repr))
        for i, (_, columns) in enumerate(drawn):
            with contextlib.suppress(pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
                if columns:
                    pq.write_table(pa.table(columns), below / f"panel-{i}.parquet")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def directories(contents: Any) -> None:
    """Run directories are runs in memory or an error; reading them writes nothing."""
    with _place() as place:
        for number, content in enumerate(_listed(contents)):
            _write(place / "in" / str(number), content)
        before = _files(place)
        with _errors():
            read_runs(find_runs([place / "in"]))
        _nothing_new(place, before)


# ---- the page ------------------------------------------------------------------------------------------------------


_WORDS = r"[\w-]+"
ELEMENTS = frozenset(
    re.findall(
        _WORDS,
        "html head meta title style body header h1 h2 h3 p nav a div button span main section article figure "
        "figcaption table thead tbody tr th td img ul li details summary script footer dl dt dd pre code noscript",
    )
)
ATTRIBUTES = frozenset(
    re.findall(
        _WORDS,
        "lang charset http-equiv content name aria-label href class role type aria-pressed data-chip title style "
        "hidden id tabindex scope data-method data-spec src width alt open colspan",
    )
)
PAGES = st.tuples(DIRECTORIES, TEXT)


def page(content: tuple[Any, str]) -> None:
    """A page is written and holds no element, attribute or script from the text, or nothing is written."""
    contents, title = content
    with _place() as place:
        for number, each in enumerate(_listed(contents)):
            _write(place / "in" / str(number), each)
        before = _files(place)
        written = False
        with _errors():
            write_page(
                [RunDirectory(place / "in" / str(n)) for n in range(len(_listed(contents)))],
                place / "page.html",
                title=title,
            )
            written = True
        _nothing_new(place, before | ({"page.html"} if written else set()))
        if written:
            check_page((place / "page.html").read_text())


def check_page(text: str) -> Elements:
    """Parse a page and assert that every element is the template's, and that no comment is there."""
    found = Elements(text)
    tags, attributes = {tag for tag, _ in found.tags}, [each for _, each in found.tags]
    assert tags <= ELEMENTS, tags - ELEMENTS
    assert not found.comments, found.comments
    for each in attributes:
        assert each.keys() <= ATTRIBUTES, each.keys() - ATTRIBUTES
        for address in (each[name] or "" for name in ("src", "href") if name in each):
            assert address.startswith(("data:image/png;base64,", "#")), address
    assert len(found.scripts) == 4
    specs, labels = map(json.loads, found.scripts[:2])
    assert all(isinstance(each, dict) for each in specs) and all(isinstance(each, str) for each in labels)
    return found


# ---- what all targets need -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "in").mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """RobustlensError is the one that may come, as one line that can be printed; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except RobustlensError as error:
            said = str(error)
        else:
            said = ""
    assert "\n" not in said and "\x1b" not in said and said.encode().decode() == said


def _files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def _nothing_new(place: Path, expected: set[str]) -> None:
    assert _files(place) == expected


@dataclass(frozen=True)
class Target:
    """``check`` is to hold for everything that ``strategy`` makes up."""

    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]


TARGETS: Mapping[str, Target] = {
    "study": Target(STUDIES, study),
    "directory": Target(DIRECTORIES, directories),
    "page": Target(PAGES, page),
}
