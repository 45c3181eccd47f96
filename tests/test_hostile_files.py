"""Images, tables, run directories and text made to bring the program down or to get out of where they belong."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.targets import check_page
from PIL import Image
from test_cli import TRAIN, Call, refuse
from test_report import HOSTILE, make_run

from robustlens.data import decode
from robustlens.data.config import DataConfig
from robustlens.data.folder import read_folder
from robustlens.data.sources import load
from robustlens.report.figures import write_figures
from robustlens.report.page import write_page
from robustlens.results.errors import InputError, printable
from robustlens.results.files import LARGEST, parse_json, read_table
from robustlens.results.panels import Gallery, Table
from robustlens.results.reading import Reading
from robustlens.results.seal import SEAL, sealed
from robustlens.results.store import RunDirectory, find_runs, read_reading

GOOD = [np.random.default_rng(k).integers(0, 256, (6, 6, 3), dtype=np.uint8) for k in range(20)]


def encoded(form: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GOOD[0]).save(buffer, form, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of ``side`` × ``side`` black pixels in a few kilobytes."""
    squeezed = zlib.compressobj(9)
    rows = b"".join(squeezed.compress(bytes(side // 8 + 1)) for _ in range(min(side, 2000)))
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", rows + squeezed.flush()) + chunk(b"IEND", b"")


def in_folder(place: Path, content: bytes) -> DataConfig:
    for k, name in enumerate("ab"):
        (place / name).mkdir(parents=True)
        for i in range(8):
            (place / name / f"{i}.png").write_bytes(encoded() if k or i else content)
    return DataConfig(source=str(place))


def in_parquet(place: Path, content: bytes | None, path: str | None = None) -> DataConfig:
    place.mkdir(exist_ok=True)
    cells = [{"bytes": encoded() if i else content, "path": None if i else path} for i in range(20)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": [0, 1] * 10}), place / "train-0.parquet")
    return DataConfig(source=str(place))


DOORS = [in_folder, in_parquet]

# ---- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bomb(60_000), "DecompressionBombError .Image size .3600000000 pixels"),
        (bomb(10_000), "DecompressionBombWarning .Image size .100000000 pixels"),
        (encoded()[:60], "a PNG chunk whose checksum does not fit"),
        (b"", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
        (encoded("EPS"), "cannot identify image file"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "cannot identify"),
        (encoded("PDF"), "cannot identify image file"),
        (encoded("JPEG2000"), "cannot identify image file"),
    ],
    ids=["bomb", "smaller bomb", "truncated", "empty", "PostScript", "EPS", "SVG", "PDF", "JPEG 2000"],
)
def test_images_that_are_not_opened(
    door: Callable[[Path, bytes], DataConfig], content: bytes, words: str, tmp_path: Path
) -> None:
    assert len(content) < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=words) as caught:
        load(door(tmp_path / "set", content))
    assert "\n" not in str(caught.value) and "expected an image that Pillow can read" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes: nothing was decoded"


@pytest.mark.parametrize("door", DOORS)
def test_postscript_starts_no_program(
    door: Callable[[Path, bytes], DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would have a Ghostscript on the path draw it; this one would leave a marker."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/the-program-ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(InputError, match="cannot identify image file"):
        load(door(tmp_path / "set", encoded("EPS")))
    assert not (tmp_path / "the-program-ran").exists()
    with pytest.raises(OSError, match=r".*"):
        Image.open(io.BytesIO(encoded("EPS"))).load()
    assert (tmp_path / "the-program-ran").exists(), "the proof proves something"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "TIFF"])
def test_of_moving_images_the_first_frame_is_taken(
    door: Callable[[Path, bytes], DataConfig], form: str, tmp_path: Path
) -> None:
    frames = [Image.fromarray(np.full((6, 6, 3), 50 * k, np.uint8)) for k in range(1, 5)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    splits = load(door(tmp_path / "set", buffer.getvalue()))
    images = [image for part in (splits.train, splits.valid, splits.test) for image in part.images]
    assert sum(bool((image.float() - 50).abs().max() < 8) for image in images) == 1


def test_images_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.os, "sysconf", lambda name: 30)
    with pytest.raises(InputError, match=r"fit into this machine's .* of memory, got .* with 6×6 pixels. Set resize"):
        load(in_folder(tmp_path / "set", encoded()))


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever, and a device has no end."""
    in_folder(tmp_path, encoded())
    (tmp_path / "a" / "0.png").unlink()
    os.mkfifo(tmp_path / "a" / "0.png")
    with pytest.raises(InputError, match="no regular file"):
        load(DataConfig(source=str(tmp_path)))
    (tmp_path / "a" / "0.png").unlink()
    (tmp_path / "a" / "0.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no regular file"):
        load(DataConfig(source=str(tmp_path)))
    (tmp_path / "a" / "0.png").unlink()
    with (tmp_path / "a" / "0.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="a file of more than"):
        load(DataConfig(source=str(tmp_path)))


def test_class_names_become_text_that_can_be_shown_and_written(tmp_path: Path) -> None:
    for name in (b"\xff\xfe", b"\x1b[2J", b"<b>"):
        place = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(place)
        Path(os.fsdecode(place), "0.png").write_bytes(encoded())
    classes = read_folder(tmp_path).classes
    assert set(classes) == {"\\udcff\\udcfe", "�[2J", "<b>"} and all(name.encode() for name in classes)


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["{outside}", "../outside.png", "link.png", "/dev/zero", "/dev/stdin", "a\0b", "~"])
def test_a_table_reads_no_file_outside_of_its_directory(path: str, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(encoded())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match=r"image 0: .*(leads out of the data set|no regular file|null byte)"):
        load(in_parquet(tmp_path / "set", None, path.format(outside=tmp_path / "outside.png")))
    (tmp_path / "set" / "inside.png").write_bytes(encoded())
    assert load(in_parquet(tmp_path / "set", None, "inside.png")).shape == (3, 6, 6)


def many_rows(path: Path) -> None:
    """Three million times one image, and its number, in a few kilobytes."""
    table = pa.table({"image": pa.array([encoded()] * 10_000), "label": np.zeros(10_000, np.int64)})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(pa.concat_tables([table] * 300), row_group_size=3_000_000)


def wide_cells(path: Path) -> None:
    table = pa.table({"image": [bytes(280_000_000)], "label": [0]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def claims_rows(path: Path) -> None:
    """A footer that claims 10¹² rows: its numbers are variable-length integers, zigzag-coded."""
    pq.write_table(pa.table({"image": [encoded()] * 77, "label": [0] * 77}), path)
    content = path.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") : -8]
    claim, number = bytearray(), 2 * 10**12
    while number:
        claim.append((number & 127) | (128 if number > 127 else 0))
        number >>= 7
    rows = bytes([0x16, 154, 1])  # field of 64 bits, 77
    assert footer.count(rows) >= 2
    footer = footer.replace(rows, bytes([0x16]) + bytes(claim))
    path.write_bytes(content[:4] + content[4 : len(content) - 8 - int.from_bytes(content[-8:-4], "little")] + footer)
    with path.open("ab") as file:
        file.write(len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("make", [many_rows, wide_cells, claims_rows])
def test_tables_that_would_fill_the_memory(make: Callable[[Path], None], call: Call, tmp_path: Path) -> None:
    make(tmp_path / "train-0.parquet")
    size = (tmp_path / "train-0.parquet").stat().st_size
    assert size < 200_000
    given = ("--data", tmp_path, "--threat", "l2:1", "--weights", "w.safetensors")
    refuse(call, f"its {size:,} bytes would become more than 268,435,456 in memory", "audit", "mlp", *given)


NO_NAMES = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}'


@pytest.mark.parametrize(
    "metadata",
    [b"[1]", b"{", b"null", b"\xff", b"[" * 100_000, b'{"info": [1]}', b'{"info": {"features": [1]}}', NO_NAMES],
)
def test_class_names_of_another_make_are_left_out(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"image": [encoded()] * 20, "label": [0, 1] * 10})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train-0.parquet")
    assert load(DataConfig(source=str(tmp_path))).classes == ("0", "1")


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match="a training split with examples"):
        load(DataConfig(source=str(tmp_path)))


# ---- run directories -----------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)


def deep(path: Path) -> None:
    path.write_text('{"a":' * 900 + "1" + "}" * 900)


def deeper(path: Path) -> None:
    path.write_text("[" * 1_000_000)


def half_a_pair(path: Path) -> None:
    path.write_text(path.read_text().replace('"', '"\\ud800', 1))


HARM = [pipe, device, sparse, deep, deeper, half_a_pair]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["run.json", "readings/*/reading.json"])
def test_files_of_a_run_that_are_none(harm: Callable[[Path], None], name: str, call: Call, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", "A", 0)
    make_run(tmp_path / "runs" / "b", "B", 0)
    (file,) = run.path.glob(name)
    harm(file)
    err = refuse(call, str(run.path), "report", tmp_path / "runs", "--out", tmp_path / "page.html")
    assert "a readable run.json" in err or "a reading.json and its parquet files" in err
    assert not (tmp_path / "page.html").exists()


def test_a_link_to_itself_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "A", 0)
    for file in (*run.path.glob("readings/*/reading.json"), run.path / "run.json"):
        file.unlink()
        file.symlink_to(file.name)
    assert run.readings() == []
    for read in (lambda: find_runs([tmp_path]), lambda: run.read_json("run.json")):
        with pytest.raises(InputError):
            read()


def test_a_panel_that_would_fill_the_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "A", 0)
    (file,) = run.path.glob("readings/*/panel-0.parquet")
    rows = 9_000_000
    pq.write_table(pa.table({"x": np.zeros(rows), "y": np.zeros(rows)}), file, compression="zstd")
    assert file.stat().st_size < 200_000
    record = json.loads((file.parent / "reading.json").read_text()) | {"files": {}, SEAL: "0" * 64}
    (file.parent / "reading.json").write_bytes(sealed(json.dumps(record).encode()))  # sums keep nobody from lying
    with pytest.raises(InputError, match=r"would become more than 268,435,456 in memory"):
        read_reading(file.parent)
    with pytest.raises(ValueError, match="more than 10 in memory"):
        read_table(file.with_name("panel-2.parquet"), limit=10)


def test_names_in_a_reading_lead_nowhere(tmp_path: Path) -> None:
    """What a reading calls its lens, panels and columns is text: pages and figures stay where they were asked for."""
    run, names = RunDirectory(tmp_path / "runs" / "a"), ("../../x", "/etc/x", "..", "CON")
    run.write_json("run.json", {"label": "../../label", "seed": 0, "hash": "../../hash", "study": "/etc/study"})
    for name in names:
        table = Table(name, (name,), ((name,),))
        gallery = Gallery(name, (name,), (name,), np.zeros((1, 1, 4, 4, 1), np.uint8))
        found = Reading(name, name, panels=(table, gallery), settings={"panel": "../../x", "panels": "/etc/passwd"})
        run.write_reading(run.path / "readings" / f"lens-{names.index(name)}", found)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    write_page([run], tmp_path / "out" / "page.html", title="../../x")
    written = write_figures([run], tmp_path / "out", format="svg")
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert after - before == {tmp_path / "out" / "page.html", *written}
    assert all(path.parent == tmp_path / "out" for path in written)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_no_text_becomes_an_element_of_the_page(tmp_path: Path) -> None:
    """Labels, titles, class names, settings, errors and formulas for spreadsheets are text, in charts too."""
    names = (
        HOSTILE,
        '=HYPERLINK("http://x")',
        "{{ 7 * 7 }}",
        "<!--",
        "]]>",
        "\x1b[2J",
        "</title></style>",
        "' onload='x",
    )
    for k, name in enumerate(names):
        run = make_run(tmp_path / str(k), name, 0)
        record = run.read_json("run.json")
        named = {
            "label": name,
            "study": name,
            "config": {name: [name]},
            "provenance": {name: name, "data": {"x": name}},
        }
        run.write_json("run.json", {**record, **named})
        run.write_metrics([{"epoch": 1, name: 1.0, "note": name}])
        found = Reading(name, name, settings={name: name}, panels=(Table(name, (name,), ((name, None, 1.0),)),))
        run.write_reading(run.reading_path("other", {}), found)
    text = write_page(find_runs([tmp_path]), tmp_path / "page.html", title=HOSTILE + "\udcff").read_text()
    labels = json.loads(check_page(text).scripts[1])
    assert labels == [printable(name) for name in names]
    assert "49" not in text.partition("<main>")[0].partition("</style>")[2], "templates in the text are not carried out"


def test_errors_do_not_steer_the_terminal(call: Call, tmp_path: Path) -> None:
    for name in ("\x1b]0;title\x07", "\x1b[2J", "\udcff", "\x9b31m", "a\r\nb"):
        err = refuse(call, "no such directory", "report", tmp_path / name, "--out", tmp_path / "page.html")
        assert err.rstrip("\n").isprintable()
    assert len(refuse(call, "…", "report", "a" * 100_000)) < 1000
    assert parse_json('["\\u001b[2J", "\\\\u001b", "a\\nb", "\\ud83d\\ude00"]') == ["�[2J", "\\u001b", "a\nb", "😀"]
    assert LARGEST > 2**20


BLOCKED = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was touched")
class Blocked(socket.socket):
    __init__ = refuse
socket.socket = Blocked
socket.getaddrinfo = socket.create_connection = refuse
import _socket
_socket.getaddrinfo = refuse
"""
OFFLINE = f"{BLOCKED}sys.argv[0] = 'robustlens'\nfrom robustlens.cli import main\nmain()\n"


def test_training_and_reporting_touch_no_network(tmp_path: Path) -> None:
    """What the demo does, on fewer images, in a process where making a socket is an error."""

    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "ROBUSTLENS_DATA": ""}
    command = [sys.executable, "-c", OFFLINE, *TRAIN, "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "runs").glob("*/report.html")
    check_page(page.read_text())
    asks = "import urllib.request as ask; ask.urlopen('http://127.0.0.1:9')\n"
    touched = subprocess.run([sys.executable, "-c", BLOCKED + asks], capture_output=True, text=True, check=False)
    assert "AssertionError: the network was touched" in touched.stderr, "the proof proves something"
