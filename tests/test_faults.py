"""Signals, full disks, places that cannot be written to, clocks that jump, and SIGKILL."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.kill import results
from small_runs import CASES, EPOCHS, STEPS, Counting, run_case
from test_resume import same, timeless
from test_store import full_reading
from test_study import carry_out

from robustlens.attacks.fgsm import FGSM
from robustlens.constraints.parseval import Parseval
from robustlens.core.signals import Terminated, heeded, whole
from robustlens.results.errors import InputError
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory, read_reading, write_atomically
from robustlens.studies import run as study_run

TOTAL = STEPS * EPOCHS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, place in places.items():
        run_case(case, place)
    return places


def steps_of_state(place: Path) -> int:
    """Steps that are safe, read without the library."""
    content = (place / "state.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"]["facts"])["progress"]
    return int(facts["epoch"] * STEPS + facts["step"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [1, 4, STEPS, STEPS + 2, TOTAL])
def test_a_signal_in_the_middle_of_a_step_saves_behind_it(
    stop: int, case: str, number: int, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpoints at an interval: every step up to the signal is safe, the last of an epoch too."""
    recipe, settings = CASES[case]
    monkeypatch.setitem(CASES, case, (recipe, settings.model_copy(update={"checkpoint_seconds": 1e9})))  # type: ignore[arg-type]
    update, calls = type(recipe.update), 0
    backward = update.backward

    def kill_within(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        found = backward(*arguments, **named)
        if calls == stop:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(update, "backward", kill_within)
    with heeded(), pytest.raises((Terminated, KeyboardInterrupt)) as caught:
        run_case(case, tmp_path)
    assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert steps_of_state(tmp_path) == stop
    watch = Counting()
    run_case(case, tmp_path, watch)
    assert watch.steps == list(range(stop + 1, TOTAL + 1))
    same(tmp_path, uninterrupted[case])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("constrained", [False, True])
def test_a_signal_in_a_validation_saves_what_is_validated(
    constrained: bool, case: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch's steps are safe, its constraint is not applied twice, and the validation is run again."""
    recipe, settings = CASES[case]
    constraint = Parseval(beta=0.3, every="epoch")
    recipe = dataclasses.replace(recipe, constraints=(constraint,) if constrained else ())
    monkeypatch.setitem(CASES, case, (recipe, settings.model_copy(update={"checkpoint_seconds": 1e9})))  # type: ignore[arg-type]
    run_case(case, tmp_path / "expected")
    perturb, epoch = FGSM.perturb, settings.validate_every

    def kill_within(*arguments: Any, **named: Any) -> Any:
        found = perturb(*arguments, **named)
        os.kill(os.getpid(), number)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FGSM, "perturb", kill_within)
        with heeded(), pytest.raises((Terminated, KeyboardInterrupt)):
            run_case(case, tmp_path / "found")
    assert steps_of_state(tmp_path / "found") == STEPS * epoch
    watch = Counting()
    run_case(case, tmp_path / "found", watch)
    assert watch.steps == list(range(STEPS * epoch + 1, TOTAL + 1))
    same(tmp_path / "found", tmp_path / "expected")


def test_a_signal_waits_for_what_is_whole() -> None:
    done = []

    def work() -> None:
        with whole():
            with whole():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")

    with heeded():
        with pytest.raises(Terminated) as caught:
            work()
        assert done == ["inner", "outer"] and caught.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_somebody_swallows_comes_again() -> None:
    """As Python does with exceptions in destructors and callbacks of libraries."""

    class Swallows:
        def __del__(self) -> None:
            with contextlib.suppress(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        del [Swallows()][0]
        time.sleep(60)

    began = time.monotonic()
    with heeded(), pytest.raises(Terminated):
        work()
    assert time.monotonic() - began < 10


STUDY = """
name = "tiny"
threat = "linf:0.1"
model = { name = "mlp", hidden = 256 }
data = { source = "digits", train = 1000, valid = 60, test = 100 }
validation = { name = "fgsm" }
training = { epochs = 6, batch_size = 50, checkpoint_seconds = 1000 }
lenses = [{ name = "standard-accuracy", n_examples = 16, batch_size = 4, chunk = 8, effort = 0.2 }]
[[methods]]
label = "pgd"
objective = { name = "adversarial", attack = { name = "pgd", threat = "linf:0.1", steps = 20 } }
"""
COMMAND = [sys.executable, "-m", "robustlens", "study", "study.toml", "--out", "out", "--device", "cpu"]


def children() -> float:
    """Seconds that processes which this one started have computed, those that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_command_ends_in_seconds_and_goes_on(tmp_path: Path) -> None:
    """Signals in the training and in the lens: the exit code, its time, one line, and the result at the end."""
    expected, place = tmp_path / "whole", tmp_path / "stopped"
    for directory in (expected, place):
        directory.mkdir()
        (directory / "study.toml").write_text(STUDY)
    subprocess.run(COMMAND, cwd=expected, check=True, capture_output=True)

    def epochs() -> int:
        return sum(len(file.read_text().splitlines()) for file in place.glob("out/tiny/*/metrics.jsonl"))

    def in_lens() -> bool:
        return any(place.glob("out/tiny/*/state/*/chunk-*.safetensors"))

    draw = random.Random(0)
    for number, is_time in (
        (signal.SIGTERM, lambda: epochs() >= 1),
        (signal.SIGINT, lambda: epochs() >= 3),
        (signal.SIGTERM, in_lens),
    ):
        before = children()
        with subprocess.Popen(COMMAND, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            while not is_time():
                assert child.poll() is None, "it ended by itself"
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.3))
            child.send_signal(number)
            used = sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            _, said = child.communicate(timeout=60)
        total = children() - before
        assert total - used / os.sysconf("SC_CLK_TCK") < 10, "seconds of computing; other work of the machine adds none"
        assert child.returncode == 128 + number
        assert said.strip() == "Stopped. Run the same command again to go on from here."
    subprocess.run(COMMAND, cwd=place, check=True, capture_output=True)
    found, wanted = (
        {name: what for name, what in results(directory / "out").items() if not name.endswith(".html")}
        for directory in (place, expected)
    )
    assert found == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; where none can be mounted, files beyond 64 KiB are refused (by the kernel as well)."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", str(place)], check=False).returncode
    if mounted == 0:
        yield place
        subprocess.run(["umount", str(place)], check=True)
        return
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_what_was_written(small_disk: Path) -> None:
    run = RunDirectory(small_disk / "run")
    run.write_json("run.json", {"label": "a"})
    path = run.reading_path("made-up", {})
    run.write_reading(path, full_reading())
    write_atomically(run.path / "state.safetensors", b"old")
    large = Reading("made-up", "", examples={"index": torch.randperm(100_000).numpy()})
    for write in (
        lambda: write_atomically(run.path / "state.safetensors", bytes(300_000), previous=run.path / "previous"),
        lambda: run.write_metrics([{"epoch": 1, "text": "x" * 300_000}]),
        lambda: run.write_reading(path, large),
    ):
        with pytest.raises(InputError, match=r"free space.*(No space left|File too large)") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert read_reading(path).says == full_reading().says and run.metrics() == []
    assert (run.path / "state.safetensors").read_bytes() == b"old"
    assert sorted(file.name for file in run.path.rglob("*") if file.parent != path) == sorted(
        ["run.json", "state.safetensors", "readings", path.name]
    )


def test_a_training_on_a_full_disk_goes_on_when_there_is_space(
    uninterrupted: dict[str, Path], small_disk: Path, tmp_path: Path
) -> None:
    place, ballast = small_disk / "run", small_disk / "ballast"

    def fill(what: str, number: int) -> None:
        if (what, number) == ("step", 7):
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            if os.statvfs(small_disk).f_bavail:  # no disk of its own here: nothing may be written at all
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with pytest.raises(InputError, match=r"free space.*(No space left|File too large)"):
        run_case("sgd", place, Counting(fill))
    assert steps_of_state(place) == 6
    ballast.unlink()
    if not os.path.ismount(small_disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    run_case("sgd", place)
    same(place, uninterrupted["sgd"])


def test_the_lock_on_a_full_disk(small_disk: Path) -> None:
    if not os.path.ismount(small_disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        (small_disk / "run").mkdir()
        (small_disk / "run" / "lock").touch()
        (small_disk / "ballast").write_bytes(bytes(256 * 1024))
    with pytest.raises(InputError, match=r"free space.*(No space left|File too large)"):
        RunDirectory(small_disk / "run").lock().__enter__()


@pytest.fixture
def kept_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own where one can be mounted."""
    place = tmp_path / "out"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "kept", str(place)], check=False).returncode == 0
    if not mounted and os.geteuid() == 0:
        pytest.skip("root is not kept out by permissions, and may not mount here")
    yield place
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def protect(place: Path, protected: bool) -> None:
    """Make ``place`` read-only, or not any more."""
    if os.path.ismount(place):
        subprocess.run(["mount", "-o", f"remount,{'ro' if protected else 'rw'}", str(place)], check=True)
    else:
        for directory in (place, *(path for path in place.rglob("*") if path.is_dir())):
            directory.chmod(0o555 if protected else 0o755)


def test_a_directory_that_is_read_only(kept_disk: Path) -> None:
    (run,), _ = carry_out(kept_disk, methods=[{"label": "plain"}], seeds=[0])
    protect(kept_disk, True)
    for seeds in ([0], [1]):
        with pytest.raises(InputError, match=r"can be written to.*(Read-only file system|Permission denied)") as caught:
            carry_out(kept_disk, methods=[{"label": "plain"}], seeds=seeds)
        assert "\n" not in str(caught.value)
    assert [reading.lens for reading in run.readings()] == ["logit-margins"], "it can be read"
    protect(kept_disk, False)
    _, log = carry_out(kept_disk, methods=[{"label": "plain"}], seeds=[0])
    assert log.new == []


def test_what_a_killed_process_left_is_removed_with_the_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_json("run.json", {})
    (run.path / ".tmp-1").write_text("half")
    (run.path / "epoch-2" / "readings" / ".tmp-2").mkdir(parents=True)
    (run.path / "epoch-2" / "readings" / ".tmp-2" / "panel-0.parquet").write_text("half")
    with run.lock():
        assert {path.name for path in run.path.rglob("*")} == {"run.json", "lock", "epoch-2", "readings"}


def test_a_wall_clock_that_jumps_changes_nothing(
    uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By years, back and forth, at every look: in a run that is stopped, and in a study."""
    draw = random.Random(0)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(time.time(), tz)

    carry_out(tmp_path / "calm", methods=[{"label": "plain"}], seeds=[0])
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 4e9))
    monkeypatch.setattr(study_run.datetime, "datetime", Jumping)

    def interrupt(what: str, number: int) -> None:
        if (what, number) == ("step", 8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_case("adam", tmp_path / "run", Counting(interrupt))
    run_case("adam", tmp_path / "run")
    same(tmp_path / "run", uninterrupted["adam"])
    assert all(
        0 <= json.loads(line)["seconds"] < 600 for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert timeless(tmp_path / "run") == timeless(uninterrupted["adam"])
    (run,), _ = carry_out(tmp_path / "jumping", methods=[{"label": "plain"}], seeds=[0])
    assert results(tmp_path / "jumping") == results(tmp_path / "calm")
    _, log = carry_out(tmp_path / "jumping", methods=[{"label": "plain"}], seeds=[0])
    assert log.new == [] and run.exists


def killed(trials: int, out: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.faults", "--trials", str(trials), "--json", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())
    assert len(found) == 4
    for counts in found:
        assert counts["killed"] == counts["identical"] == trials and not counts["repeated"] and not counts["faults"]
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    killed(2, tmp_path / "counts.json")


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    found = killed(50, tmp_path / "counts.json")
    assert all(counts["went_on"] > 25 for counts in found), "most kills come in the middle of something"
