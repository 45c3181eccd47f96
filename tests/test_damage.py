"""Truncated files and flipped bits are noticed; what can be made again is made again, and it is said."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gen
from PIL import Image
from safetensors.torch import load, save_file
from small_runs import Counting, fresh, run_case
from test_resume import same
from test_store import full_reading
from test_study import carry_out

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.worst_case import worst_case
from robustlens.core.types import Batch
from robustlens.data.decode import Encoded
from robustlens.data.raw import Fit
from robustlens.data.tables import read_parquet
from robustlens.models.adapter import load_weights
from robustlens.report.page import write_page
from robustlens.results.errors import DamageWarning, InputError
from robustlens.results.runs import read_runs
from robustlens.results.seal import UNSEALED, is_damaged, sealed
from robustlens.results.store import RunDirectory, read_reading
from robustlens.threats.lp import Lp
from robustlens.train.checkpoint import save_weights

MIDDLE = 0.6  # of a file: inside tensors, pages and text


def flip(path: Path, where: float = MIDDLE) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, cut, empty)


def flips(content: bytes) -> list[bytes]:
    """``content`` with each of its bits flipped in turn."""
    number = int.from_bytes(content)
    return [(number ^ (1 << bit)).to_bytes(len(content)) for bit in range(8 * len(content))]


def test_every_single_bit_of_a_sealed_file() -> None:
    """What is not noticed has left everything but the sum's own name as it was."""
    value = {"loss": 0.123456789, "text": "ℓ2 “all”", "deep": [1, 2, {"x": None}]}
    content = sealed(json.dumps({**UNSEALED, **value}).encode())
    assert not is_damaged(content)
    unnoticed = [bad for bad in flips(content) if not is_damaged(bad)]
    name = len(next(iter(UNSEALED))) + 4
    assert len(unnoticed) <= 8 * name
    assert all(bad[name + 4 :] == content[name + 4 :] for bad in unnoticed)
    assert all(is_damaged(content[:end]) for end in range(name + 80, len(content)))


def stopped(place: Path) -> None:
    """The case "sgd", stopped after step 8 of 15, with the states after steps 7 and 6."""

    def interrupt(what: str, number: int) -> None:
        if (what, number) == ("step", 8):
            raise InputError("", expected="", got="", fix="")

    with pytest.raises(InputError):
        run_case("sgd", place, Counting(interrupt))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run and a stopped one."""
    whole, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    run_case("sgd", whole)
    stopped(part)
    return whole, part


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before(
    damage: Callable[[Path], None], states: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, part = states
    place = tmp_path / "run"
    shutil.copytree(part, place)
    damage(place / "state.safetensors")
    watch = Counting()
    with pytest.warns(DamageWarning, match=r"state\.safetensors.*the one before"):
        run_case("sgd", place, watch)
    assert watch.steps == list(range(7, 16)), "it goes on from the state after step 6"
    same(place, whole)


def test_bit_flips_all_over_a_state(states: tuple[Path, Path]) -> None:
    """Whatever is flipped is noticed, but in the sum's own name."""
    content = (states[1] / "state.safetensors").read_bytes()
    assert not is_damaged(content)
    name = next(iter(UNSEALED)).encode()
    for place in range(0, len(content), 101):
        bad = bytearray(content)
        bad[place] ^= 1 << (place % 8)
        assert is_damaged(bytes(bad)) or name not in bad


def test_the_state_before_alone_is_enough(states: tuple[Path, Path], tmp_path: Path) -> None:
    """As after a crash between the two renames."""
    whole, part = states
    place = tmp_path / "run"
    shutil.copytree(part, place)
    (place / "state.safetensors").unlink()
    run_case("sgd", place)
    same(place, whole)


def test_two_damaged_states_are_an_error(states: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(states[1], place)
    for name in ("state", "state.previous"):
        flip(place / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"checkpoint .*other content.*Delete the run directory"):
        run_case("sgd", place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(damage: Callable[[Path], None], tmp_path: Path) -> None:
    model, file = fresh(), tmp_path / "last.safetensors"
    save_weights(model, file)
    load_weights(fresh(seed=6), file)
    before = fresh(seed=6).state_dict()
    damage(file)
    other = fresh(seed=6)
    with pytest.raises(InputError, match=r"last\.safetensors: .*delete the run's directory") as caught:
        load_weights(other, file)
    assert "\n" not in str(caught.value)
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())


def test_weights_without_a_sum_still_load(tmp_path: Path) -> None:
    model, other = fresh(), fresh(seed=6)
    save_file(model.state_dict(), tmp_path / "old.safetensors")
    load_weights(other, tmp_path / "old.safetensors")
    assert all(value.equal(model.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["reading.json", "panel-0.parquet", "panel-4.parquet"])
def test_damaged_readings(file: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = run.reading_path("made-up", {})
    run.write_reading(path, full_reading())
    read_reading(path)
    damage(path / file)
    with pytest.raises(InputError, match="Delete that directory; the study makes it again"):
        read_reading(path)


def test_every_byte_of_a_reading(tmp_path: Path) -> None:
    """A bit of each byte of all its files: an error, or exactly what was written."""
    run = RunDirectory(tmp_path)
    path = run.reading_path("made-up", {})
    run.write_reading(path, full_reading())
    whole, unnoticed = repr(read_reading(path)), 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), 7):
            bad = bytearray(content)
            bad[place] ^= 1 << (place % 8)
            file.write_bytes(bad)
            try:
                assert repr(read_reading(path)) == whole
                unnoticed += 1
            except InputError:
                continue
        file.write_bytes(content)
    assert unnoticed < 10, "the name of the sum alone"


def test_a_study_makes_damaged_readings_again_and_says_so(tmp_path: Path) -> None:
    lenses = [{"name": "logit-margins", "bins": 5}, {"name": "logit-margins", "bins": 5, "when": "epochs:1,2"}]
    (run,), _ = carry_out(tmp_path, lenses=lenses, methods=[{"label": "plain"}], seeds=[0])
    files = sorted(tmp_path.rglob("panel-0.parquet"))
    before = {file: file.read_bytes() for file in files}
    assert len(files) == 4
    for file in files:
        flip(file)
    with pytest.raises(InputError, match="is damaged"):
        write_page([run], tmp_path / "page.html", title="damaged")
    with pytest.warns(DamageWarning, match="made again") as caught:
        _, log = carry_out(tmp_path, lenses=lenses, methods=[{"label": "plain"}], seeds=[0])
    assert len(caught) == 4 and log.old == ["plain: training"]
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "last.safetensors"])
def test_a_finished_run_with_a_damaged_file(file: str, tmp_path: Path) -> None:
    """Of single numbers too: a flipped digit is still JSON."""
    (run,), _ = carry_out(tmp_path, methods=[{"label": "plain"}], seeds=[0])
    path = run.path / file
    if file == "last.safetensors":
        flip(path)
        with pytest.raises(InputError, match="delete the run's directory"):
            carry_out(tmp_path, methods=[{"label": "plain"}], seeds=[0])
        return
    text = path.read_text()
    found = '"epoch": ' if file == "metrics.jsonl" else '"seed": '
    digit = text.index(found) + len(found)
    path.write_text(text[:digit] + "7" + text[digit + 1 :])
    json.loads(path.read_text().splitlines()[0] if file == "metrics.jsonl" else path.read_text())
    with pytest.raises(InputError, match=r"[dD]elete"):
        read_runs([run])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_of_a_long_evaluation_is_evaluated_again(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    net, x = fresh().eval(), torch.rand(8, 1, 8, 8, generator=gen(1))
    with torch.no_grad():
        stream = [Batch(x, net(x).argmax(1), torch.arange(8))]
    attacks = (FGSM(threat=Lp("linf", 0.05)),)
    whole = worst_case(attacks, net, stream, seed=0, state=tmp_path)
    (file,) = tmp_path.iterdir()
    before = load(file.read_bytes())
    damage(file)
    with pytest.warns(DamageWarning, match="evaluated again"):
        again = worst_case(attacks, net, stream, seed=0, state=tmp_path)
    assert again.broken_by.equal(whole.broken_by)
    after = load(file.read_bytes())
    assert all(value.nan_to_num(-1).equal(before[name].nan_to_num(-1)) for name, value in after.items())


def picture(row: int) -> bytes:
    pixels, out = np.random.default_rng(row).integers(0, 256, (8, 8), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(out, "PNG")
    return out.getvalue()


def table(directory: Path, first: bytes, **how: object) -> Path:
    images = [{"bytes": content, "path": None} for content in (first, *map(picture, range(1, 6)))]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2] * 2}), directory / "train.parquet", **how)
    return directory / "train.parquet"


def test_no_flipped_bit_of_a_png_changes_a_pixel() -> None:
    """Each of its bits; Pillow alone lets some through (it skips the checksums of pixels)."""
    whole = np.asarray(Image.open(io.BytesIO(picture(0))))
    silent = 0
    for bad in flips(picture(0)):
        try:
            silent += bool((np.asarray(Image.open(io.BytesIO(bad)).convert("L")) != whole).any())
        except Exception:  # decoders of damaged files raise almost anything
            continue
    assert silent > 0, "else nothing is shown here"
    for bad in flips(picture(0)):
        read = Encoded(lambda row, bad=bad: bad, str, grey=True)
        with pytest.raises(InputError, match="expected an image that Pillow can read"):
            read(torch.tensor([0]), Fit())


@pytest.mark.parametrize("what", ["cut", "footer", "checked page"])
def test_damaged_parquet(what: str, tmp_path: Path) -> None:
    file = table(tmp_path, picture(0), write_page_checksum=what == "checked page", compression="none")
    content = bytearray(file.read_bytes())
    if what == "cut":
        del content[-20:]
    elif what == "footer":
        content[-6] ^= 0x40  # the footer's length
    else:
        content[content.index(b"IDAT") + 6] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged or incomplete") as caught:
        read_parquet(tmp_path, None, None)
    assert "\n" not in str(caught.value)
