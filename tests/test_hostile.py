"""Files made to run code or to bring the program down: one clear line, exit code 2, and proof that nothing ran."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_cli import Call, refuse
from torch import nn

from robustlens.core.discovery import discover
from robustlens.models.adapter import load_weights
from robustlens.models.foreign import open_program
from robustlens.results.errors import InputError
from robustlens.studies.config import LARGEST, read_study
from robustlens.studies.plan import MOST_RUNS, make_plan, run_directory, slug
from robustlens.train.checkpoint import load_state

MARKER = "the-payload-ran"


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (Path.touch, (self.place / MARKER,))


def network() -> nn.Module:
    with torch.random.fork_rng():
        return discover("model")["mlp"]().build((1, 8, 8), 10)


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    state = {**network().state_dict(), **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


FIRST = next(iter(tensors()))
SHAPE = tuple(tensors()[FIRST].shape)


# ---- pickles -------------------------------------------------------------------------------------------------------


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", content)
        archive.writestr("net/version", "3")
        archive.writestr("net/../../" + MARKER, "")
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors", "../" + MARKER):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def saved(thing: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **how)
    return buffer.getvalue()


PICKLES: dict[str, Callable[[Payload], bytes]] = {
    "state dict": lambda payload: saved({**tensors(), FIRST: payload}),
    "whole module": lambda payload: saved([network(), payload]),
    "old format": lambda payload: saved({FIRST: payload}, _use_new_zipfile_serialization=False),
    "plain pickle": pickle.dumps,
    "protocol 0": lambda payload: pickle.dumps(payload, protocol=0),
    "archive": lambda payload: zipped(pickle.dumps(payload)),
    "legacy tar": lambda payload: tarred(pickle.dumps(payload)),
}


def test_the_payload_would_run(tmp_path: Path) -> None:
    """The proof below proves something: opened without care, the file makes the marker."""
    for name in ("state dict", "plain pickle"):
        content = PICKLES[name](Payload(tmp_path))
        pickle.loads(content) if name == "plain pickle" else torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / MARKER).exists(), name
        (tmp_path / MARKER).unlink()


OPENED: dict[str, Callable[[Path], Any]] = {
    ".pt": lambda path: load_weights(network(), path),
    ".pth": lambda path: load_weights(network(), path),
    ".safetensors": lambda path: load_weights(network(), path),
    "program.pt": open_program,
    "program.pt2": open_program,
    "program.ts": open_program,
}


@pytest.mark.parametrize("ending", OPENED)
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_are_refused_without_running(kind: str, ending: str, tmp_path: Path) -> None:
    """As weights and as programs."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"w{ending}"
    path.write_bytes(PICKLES[kind](Payload(tmp_path)))
    with pytest.raises(InputError) as caught:
        OPENED[ending](path)
    said = str(caught.value)
    assert "\n" not in said and path.name in said and not list(tmp_path.rglob(MARKER))
    assert not ending.startswith("program") or "expected a TorchScript or ExportedProgram file" in said


@pytest.mark.parametrize(
    "members", [["net/code/x.py"], ["net/models/model.json"], ["serialized_exported_program.json"]]
)
def test_archives_that_only_look_like_programs(members: list[str], tmp_path: Path) -> None:
    """Members that lead out of the archive are written nowhere, and their pickles are not opened."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "net.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*members, "net/data.pkl", "net/constants.pkl", f"net/../../{MARKER}", f"../{MARKER}"):
            archive.writestr(name, pickle.dumps(Payload(tmp_path)))
    with pytest.raises(InputError, match=r"cannot be read|would run code") as caught:
        open_program(path)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob(MARKER))


def test_an_archive_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"")
        archive.writestr("w/data/0", bytes(20_000_000))
    assert path.stat().st_size < 30_000
    for read in (lambda: load_weights(network(), path), lambda: open_program(path)):
        with pytest.raises(InputError, match=r"at most 100 times its size, got 20,000,000 bytes packed into"):
            read()


def made_up(kind: str) -> bytes:
    """An archive whose table of contents is wrong."""
    content = bytearray(zipped(b"x" * 50))
    entry, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    if kind == "mark":
        content[entry + 2] = 0
    elif kind == "place":
        content[end + 12 : end + 16] = (2**31).to_bytes(4, "little")
    elif kind == "name":
        content[entry + 9] |= 8  # says that it is UTF-8
        content[entry + 46] = 0xFF
    else:
        content[entry + 6] = 99
    return bytes(content)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("mark", zipfile.BadZipFile),
        ("place", zipfile.BadZipFile),
        ("name", UnicodeDecodeError),
        ("version", NotImplementedError),
    ],
)
def test_archives_with_a_made_up_table_of_contents(kind: str, cause: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(made_up(kind))
    for read in (lambda: load_weights(network(), path), lambda: open_program(path)):
        with pytest.raises(InputError, match="expected an archive, got") as caught:
            read()
        assert isinstance(caught.value.__cause__, cause) and "\n" not in str(caught.value)


def test_a_pickle_on_the_command_line(call: Call, tmp_path: Path) -> None:
    for option in (["mlp", "--weights", tmp_path / "w.pt"], [tmp_path / "w.pt"]):
        (tmp_path / "w.pt").write_bytes(PICKLES["state dict"](Payload(tmp_path)))
        refuse(call, "w.pt", "audit", *option, "--data", "digits", "--threat", "l2:1", "--out", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"w.pt"}


# ---- safetensors ---------------------------------------------------------------------------------------------------


def header(facts: Any, body: bytes = b"", claimed: int | None = None) -> bytes:
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + body


def one(shape: list[int], *ends: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(ends)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header({}, claimed=2**42), "header too large"),
        (header({}, claimed=2**63 + 5), "header too large"),
        (header({"a": one([2**40], 0, 2**42)}), "not fully covered"),
        (header({"a": one([2**62, 2**62], 0, 16)}, bytes(16)), "overflow"),
        (header({"a": one([2], 0, 8), "b": one([2], 4, 12)}, bytes(12)), "invalid offset"),
        (header({"a": one([2], 8, 0)}, bytes(8)), "invalid offset"),
        (header({"a": one([-1], 0, 4)}, bytes(4)), "invalid"),
        (header({"a": one([1], 0, 4, dtype="PICKLE")}, bytes(4)), "invalid"),
        (header(b'{"a":' * 100_000), "recursion limit"),
        (header(b"\xff{}"), "SafetensorError"),
        (b"", "header too small"),
    ],
)
def test_safetensors_headers_that_lie(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_weights(network(), tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value) and "expected a safetensors file" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({FIRST: torch.ones(3, 3)}, r"of shape .*, got \(3, 3\)"),
        ({FIRST: None}, "got no such tensor"),
        ({"extra": torch.ones(1)}, "got also 'extra'"),
        ({FIRST: torch.ones(SHAPE, dtype=torch.int64)}, "plain numbers like torch.float32, got .* torch.int64"),
        ({FIRST: torch.ones(SHAPE, dtype=torch.bool)}, r"got .* torch.bool"),
        ({FIRST: torch.ones(SHAPE, dtype=torch.complex64)}, r"got .* torch.complex64"),
        ({FIRST: torch.full(SHAPE, float("nan"))}, "expected numbers in tensor .*, got NaN"),
        ({FIRST: torch.ones(SHAPE).to_sparse()}, r"got a torch.sparse_coo tensor"),
        ({FIRST: torch.ones(SHAPE, device="meta")}, "got a meta tensor"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], words: str, call: Call, tmp_path: Path) -> None:
    """Told in one line, and the network keeps the weights that it had."""
    only_torch = any(t is not None and (t.is_meta or t.layout != torch.strided) for t in change.values())
    path = tmp_path / ("w.pt" if only_torch else "w.safetensors")
    torch.save(tensors(**change), path) if only_torch else save_file(tensors(**change), path)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=words) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    given = ("--data", "digits", "--threat", "l2:1", "--weights", path, "--out", tmp_path / "out")
    refuse(call, path.name, "audit", "mlp", *given)


def test_infinite_weights_are_told(call: Call, tmp_path: Path) -> None:
    save_file(tensors(**{FIRST: torch.full(SHAPE, 1e300, dtype=torch.float64)}), tmp_path / "w.safetensors")
    given = ("--data", "digits", "--threat", "l2:1", "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out")
    refuse(call, "expected finite logits, got NaN or infinity", "audit", "mlp", *given)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_precision_are_converted(precision: torch.dtype, tmp_path: Path) -> None:
    save_file({name: tensor.to(precision) for name, tensor in tensors().items()}, tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "facts",
    [
        None,
        "[]",
        "{",
        '{"optimizer_numbers": 3}',
        '{"optimizer_numbers": {"x": 1}}',
        '{"optimizer_numbers": {"a/b": 1}}',
    ],
)
def test_a_state_that_somebody_else_wrote(facts: str | None, tmp_path: Path) -> None:
    model = network()
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors", None if facts is None else {"facts": facts})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="expected the state of a run of this configuration"):
        load_state(tmp_path / "state.safetensors", model=model, optimizer=optimizer, average=None)


# ---- studies -------------------------------------------------------------------------------------------------------

STUDY = """name = "small"
seeds = [0]
model = { name = "mlp", hidden = 8 }
threat = "linf:0.1"
lenses = [{ name = "logit-margins", bins = 5 }]
data = { source = "digits" }
training = { epochs = 1 }
[[methods]]
label = "plain"
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[0]", "[" * 100_000, "nested too deeply"),
        ("[0]", "[" * 100 + "]" * 100, "nested more than 64 levels deep"),
        ("seeds", "a." * 20_000 + "a", "a key of more than 64 parts"),
        ("seeds", "'a' . " * 20_000 + "a", "a key of more than 64 parts"),
        ("[0]", f"[{','.join(map(str, range(MOST_RUNS + 1)))}]", f"at most {MOST_RUNS:,} runs"),
        ("[0]", f"[{10**30}]", "seeds.0"),
        ("epochs = 1", f"epochs = {10**30}", "training.epochs"),
        ("epochs = 1", f"batch_size = {10**30}", "training.batch_size"),
        ("epochs = 1", f"epochs = {'9' * 5000}", "valid TOML, got Exceeds the limit"),
        ("epochs = 1", "optimizer = { lr = 1e400 }", "training.optimizer.lr: expected a finite number, got inf"),
        ("epochs = 1", "optimizer = { lr = nan }", "training.optimizer.lr"),
        ("epochs = 1", "grad_clip = inf", "training.grad_clip"),
        ("hidden = 8", f"hidden = {10**30}", "field hidden: expected a number of 64 bits"),
        ("hidden = 8", f"hidden = {10**12}", "a network that fits into memory"),
        ("bins = 5", f"bins = {10**30}", "field bins: expected a number of 64 bits"),
        ("bins = 5", f'when = "epochs:{"9" * 5000}"', 'expected "end" or epochs from 1 on'),
        ("linf:0.1", "linf:1e400", "a finite number"),
        ("linf:0.1", "linf:nan", "a finite number"),
        ("linf:0.1", "linf:" + "9" * 5000, "a finite number"),
        ('"digits"', f'"digits", train = {10**30}', "data.train"),
        ('"digits"', f'"digits", resize = {10**9}', "data.resize"),
        ('"digits"', '"./dig\\u0000its"', "There is no such directory"),
        ('"digits"', f'"./{"a" * 5000}"', "There is no such directory"),
        ('"digits"', '"~nobody-of-this-name/x"', "There is no such directory"),
        ('"plain"', '"pl\\u0000ain"', "text without control characters"),
        ('"plain"', '"pl\\u001b[2Jain"', "text without control characters"),
        ('"plain"', f'"{"a" * 5000}"', "methods.0.label: expected string should have at most 80 characters"),
        ('"plain"', f'"plain"\nstart = "{"a" * 5000}"', "the label of a method further up"),
        ('"plain"', '"plain"\nstart = "a\\u0000b"', "the label of a method further up"),
        ('"small"', '"a\\u0000b"', "study name"),
    ],
)
def test_studies_that_would_bring_it_down(old: str, new: str, words: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace(old, new, 1))
    refuse(call, words, "study", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_study_file_of_a_gigabyte_is_not_read(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    with path.open("wb") as file:
        file.write(STUDY.encode())
        file.truncate(2**30)
    refuse(call, f"at most {LARGEST:,} bytes", "study", path, "--out", tmp_path / "out")
    refuse(call, f"at most {LARGEST:,} bytes", "study", "/dev/zero", "--out", tmp_path / "out")


NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "~",
    "CON",
    "nul.txt",
    "a/b\\c",
    "ä" * 80,
    "A",
    "a",
    "-rf",
    "*",
    "$(touch x)",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_inside_the_directory(name: str, tmp_path: Path) -> None:
    """A study's name is one plain directory, and a label is one below it that ends in the run's hash."""
    study = STUDY.replace('"small"', json.dumps(name)).replace('"plain"', json.dumps(name))
    (tmp_path / "study.toml").write_text(study)
    (run,) = make_plan(read_study(tmp_path / "study.toml")).runs
    path = run_directory(tmp_path / "out" / slug(name), run.label, run.seed, run.hash).path
    assert path.resolve().parent.parent == tmp_path / "out"
    assert path.name.endswith(f"-seed0-{run.hash}") and len(path.name) < 100
    assert all(part.isascii() and part == part.lower() for part in path.relative_to(tmp_path / "out").parts)


def test_names_that_differ_only_by_case_do_not_share_a_directory(tmp_path: Path) -> None:
    method = '[[methods]]\nlabel = "PLAIN"\nobjective = { name = "noise", threat = "l2:1" }\n'
    (tmp_path / "study.toml").write_text(STUDY + method)
    runs = make_plan(read_study(tmp_path / "study.toml")).runs
    assert len({run_directory(tmp_path, run.label, run.seed, run.hash).path.name.lower() for run in runs}) == 2
