"""``torchrun … -m robustlens``: two processes train one network, and look at it, together."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_a_batch_that_cannot_be_shared_is_refused(file: Path, tmp_path: Path) -> None:
    process = start(file, tmp_path / "runs", "--set", "training.batch_size=21")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "training.batch_size: expected a multiple of 2 processes" in said
    assert "Set it to 20" in said
