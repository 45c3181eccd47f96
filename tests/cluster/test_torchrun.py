"""``torchrun … -m robustlens``: two processes train one network, and look at it, together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_cluster import by_label, settings

from robustlens.results.store import RunDirectory, find_runs
from robustlens.studies.config import make_study, write_study
from robustlens.studies.run import run_study

pytestmark = pytest.mark.cluster

STANDARD = {"name": "standard-accuracy", "n_examples": 20, "batch_size": 4, "chunk": 8, "effort": 0.02}
LENSES = [{"name": "accuracy", "pictures": 0}, {"name": "generalisation-gap"}, STANDARD]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(write_study(make_study(chosen())))
    return path


def chosen() -> dict[str, Any]:
    return {**settings("plain", "fast"), "lenses": LENSES}


def start(file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "robustlens", "study", str(file), "--out", str(out), "--device", "cpu", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=file.parent)


def end(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def readings(run: RunDirectory) -> list[Any]:
    return [(reading.lens, reading.says, reading.quantities) for reading in run.readings()]


def test_two_processes_train_and_look_as_one_does(file: Path, tmp_path: Path) -> None:
    alone = by_label(run_study(make_study(chosen()), tmp_path / "alone", device="cpu"))
    said = end(start(file, tmp_path / "both"))
    assert said.count("The page:") == 1
    both = by_label(find_runs([tmp_path / "both"]))
    for label, run in alone.items():
        assert run.path.name == both[label].path.name
        assert both[label].read_json("run.json")["provenance"]["processes"] == 2
        for key, value in load_file(run.path / "last.safetensors").items():
            torch.testing.assert_close(
                load_file(both[label].path / "last.safetensors")[key], value, rtol=1e-4, atol=1e-6
            )
    # On the very same networks, whatever they find is the same to the digit.
    shutil.copytree(tmp_path / "alone", tmp_path / "looked")
    for found in (tmp_path / "looked").glob("*/*/readings"):
        shutil.rmtree(found)
    end(start(file, tmp_path / "looked"))
    for label, run in by_label(find_runs([tmp_path / "looked"])).items():
        assert (run.path / "last.safetensors").read_bytes() == (alone[label].path / "last.safetensors").read_bytes()
        assert readings(run) == readings(alone[label]) and len(run.readings()) == len(LENSES)


HELD = """
import sys
import time
from robustlens.core.world import joined, together
from robustlens.results.store import RunDirectory
from robustlens.studies.examine import held

with together("cpu"):
    directory, mine = RunDirectory(sys.argv[1]), f".tmp-{joined().rank}"
    time.sleep(0 if joined().rank else 2)  # the leader is late
    with held(directory):
        directory.path.joinpath(mine).touch()
        joined().wait()
        assert {file.name for file in directory.path.glob(".tmp-*")} == {".tmp-0", ".tmp-1"}
        joined().wait()
"""


def test_nobody_writes_before_the_leader_has_removed_what_a_killed_process_left(tmp_path: Path) -> None:
    script, place = tmp_path / "hold.py", tmp_path / "run"
    script.write_text(HELD)
    place.mkdir()
    place.joinpath(".tmp-left").touch()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, str(script), str(place)], check=True, timeout=240)


AUDIT = """
import sys
import torch
from robustlens.core.discovery import discover
from robustlens.core.world import joined, together
from robustlens.data.config import DataConfig
from robustlens.data.sources import load
from robustlens.studies.audit import audit

LENSES = [{"name": "accuracy", "pictures": 0}, "logit-margins", "layer-spectra", %s]
with together("cpu") as device:
    splits = load(DataConfig(source="digits", train=100, valid=40, test=40))
    torch.manual_seed(joined().rank)  # whoever leads has the network
    model = discover("model")["mlp"](hidden=16).build(splits.shape, len(splits.classes))
    audit(model, splits, threat="linf:0.1", lenses=LENSES, out=sys.argv[1], device=device)
"""


def test_an_audit_is_shared_out_and_all_look_at_one_network(tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(AUDIT % STANDARD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how, out in (([], "alone"), (torchrun, "both")):
        subprocess.run([sys.executable, *how, str(script), str(tmp_path / out)], check=True, timeout=240)
    (alone,), (both,) = (find_runs([tmp_path / out]) for out in ("alone", "both"))
    assert alone.path.name == both.path.name and readings(alone) == readings(both) and len(readings(both)) == 4
    assert (alone.path / "robustbench.json").read_bytes() == (both.path / "robustbench.json").read_bytes()


def test_killed_with_its_processes_it_goes_on(file: Path, tmp_path: Path) -> None:
    slowly = ("--set", "training.epochs=60", "--set", "training.checkpoint_seconds=0", "--set", "validation.name=fgsm")
    out = tmp_path / "runs"
    process = start(file, out, *slowly)
    while not list(out.glob("*/*/state.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    states = list(out.glob("*/*/state.safetensors"))
    assert states, "it ended before it was stopped"
    end(start(file, out, *slowly))
    assert {run.metrics()[-1]["epoch"] for run in find_runs([out])} == {60}


STEPS = 75
FOLLOW = """
import time
from pathlib import Path
from robustlens.studies.watch import SilentStudy

class Follow(SilentStudy):
    def __init__(self, run, directory): ...
    def step(self, done, total, loss):
        with Path("steps").open("a") as file:
            file.write(".")
        time.sleep(0.02)
"""


def processes(torchrun: int) -> dict[int, int]:
    """The process of every rank."""
    found = {}
    for child in map(int, Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()):
        said = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(each.removeprefix(b"RANK=")): child for each in said if each.startswith(b"RANK=")}
    return found


def reached(state: Path) -> tuple[int, int]:
    """Epochs and steps that are safe."""
    with safe_open(state, framework="pt") as content:
        progress = json.loads(content.metadata()["facts"])["progress"]
    return progress["epoch"], progress["step"]


@pytest.mark.parametrize(("method", "first"), [("plain", 1), ("free", 0)])
def test_signals_that_come_one_after_the_other_end_all_at_the_same_step(
    method: str, first: int, tmp_path: Path
) -> None:
    """In the middle of an epoch, without checkpoints before: the rest is bit-identical."""
    process, out = midway(tmp_path, method, checkpoint_seconds=1e9)
    ranks = processes(process.pid)
    for rank in (first, 1 - first):
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], signal.SIGTERM)
        time.sleep(0.2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Stopped. Run the same command again" in said
    assert "Connection closed" not in said, said
    assert not list(out.glob("*/*/state.previous.safetensors")), "there was a checkpoint before"
    goes_on(tmp_path)


def test_a_killed_process_ends_all_and_they_go_on(tmp_path: Path) -> None:
    process, _ = midway(tmp_path, "plain", checkpoint_seconds=0)
    os.kill(processes(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    goes_on(tmp_path)


def midway(place: Path, method: str, *, checkpoint_seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """Two processes in the middle of the first of two epochs, and where they write; ``whole`` is the whole training."""
    chosen = {**settings("plain"), "model": "softmax-regression", "lenses": []}
    chosen["data"] = {"source": "digits", "train": 4 * STEPS, "valid": 20, "test": 30}
    chosen["training"] = {"epochs": 2, "batch_size": 4, "validate_every": 2, "checkpoint_seconds": checkpoint_seconds}
    if method == "free":  # which keeps rows on every process
        chosen["methods"] = [{"label": "free", "update": {"name": "free", "threat": "linf:0.1", "replays": 2}}]
    file, out, seen = place / "study.toml", place / "stopped", place / "steps"
    file.write_text(write_study(make_study(chosen)))
    (place / "follow.py").write_text(FOLLOW)
    end(start(file, place / "whole"))
    process = start(file, out, "--track", "follow:Follow")
    while not seen.exists() or seen.stat().st_size < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process, out


def goes_on(place: Path) -> None:
    """What ``midway`` began has a state in the middle of its epoch, and ends with the weights of the whole training."""
    out = place / "stopped"
    (state,) = out.glob("*/*/state.safetensors")
    epoch, step = reached(state)
    assert epoch == 0 and 5 <= step < STEPS
    end(start(place / "study.toml", out))
    for name in ("last", "best"):
        (found,), (expected,) = (each.glob(f"*/*/{name}.safetensors") for each in (out, place / "whole"))
        assert found.read_bytes() == expected.read_bytes()


VALIDATED = """
import os
import signal
import sys
from pathlib import Path
import torch
from torch import nn
from robustlens.attacks.fgsm import FGSM
from robustlens.core.signals import heeded
from robustlens.core.types import Split, Splits
from robustlens.core.world import joined, together
from robustlens.objectives.standard import Standard
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe
from robustlens.updates.free import Free


class Stopped(FGSM):
    calls = 0
    def perturb(self, *arguments, **named):
        Stopped.calls += 1
        if Stopped.calls == 2 and joined().rank == 1 and "stop" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)
        assert Stopped.calls < 3 or "stop" not in sys.argv, "all leave the validation before its third batch"
        return super().perturb(*arguments, **named)


with heeded(), together("cpu"):
    torch.manual_seed(0)
    parts = [Split(torch.rand(n, 1, 4, 4), torch.arange(n) % 3) for n in (20, 600, 10)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    recipe = Recipe(objective=Standard(), update=Free(threat=Lp("linf", 0.1), replays=2))
    config, run = TrainingConfig(epochs=2, batch_size=4), RunDirectory(Path(sys.argv[1]))
    train(model, Splits("made-up", *parts, classes=tuple("abc")), recipe, config, seed=0, run=run,
          validation=Stopped(threat=Lp("linf", 0.1)), world=joined())

threads = {task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")}
assert not any("gloo" in name for name in threads), f"threads that can abort the process at its end: {threads}"
"""


def test_a_signal_to_one_process_in_a_validation_ends_all(tmp_path: Path) -> None:
    """They save what is validated, with the rows that each of them has."""
    script = tmp_path / "validated.py"
    script.write_text(VALIDATED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    stopped = subprocess.run([*command, str(tmp_path / "both"), "stop"], timeout=240, capture_output=True, text=True)
    assert stopped.returncode != 0 and "Error:" not in stopped.stderr.replace("ChildFailedError:", ""), stopped.stderr
    assert reached(tmp_path / "both" / "state.safetensors") == (0, 5)
    for out in ("both", "whole"):
        subprocess.run([*command, str(tmp_path / out)], timeout=240, check=True)
    for name in ("last", "best"):
        both, whole = ((tmp_path / out / f"{name}.safetensors").read_bytes() for out in ("both", "whole"))
        assert both == whole


def test_a_batch_that_cannot_be_shared_is_refused(file: Path, tmp_path: Path) -> None:
    process = start(file, tmp_path / "runs", "--set", "training.batch_size=21")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "training.batch_size: expected a multiple of 2 processes" in said
    assert "Set it to 20" in said
