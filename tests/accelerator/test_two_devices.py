"""Two processes on two emulated accelerators, as with NCCL on CUDA: what they exchange never leaves the devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_accelerator
import torch
from conftest import SmallNet
from shared_runs import PROCESSES, carry_out, cases, require_same
from small_accelerator import NAME

from robustlens.core.world import World
from robustlens.results.store import find_runs
from robustlens.studies.audit import audit
from robustlens.studies.config import make_study, write_study
from robustlens.studies.run import run_study

pytestmark = [pytest.mark.accelerator, pytest.mark.xdist_group("accelerator")]
CASES = {case: (recipe, settings) for case, recipe, settings in cases()}
STUDY = {
    "name": "both",
    "data": {"source": "digits", "train": 60, "valid": 20, "test": 20},
    "model": "lenet-small",
    "threat": "linf:0.1",
    "methods": [{"label": "noise", "objective": {"name": "noise", "threat": "linf:0.1"}}],
    "training": {"epochs": 2, "batch_size": 20},
    "lenses": ["accuracy", "layer-spectra", {"name": "standard-accuracy", "effort": 0.02}],
}
LENSES = ({"name": "accuracy", "pictures": 0}, "logit-margins")

HEAD = """
import sys
from pathlib import Path

import torch
from small_accelerator import NAME, plug_in
from torch import distributed

from robustlens.core.world import joined, together

torch.set_num_threads(1)
plug_in(Path(sys.argv[1]))
OUT = Path(sys.argv[2])
"""
EXCHANGE = """
with together("emulated") as device:
    rank = joined().rank
    assert device == f"{NAME}:{rank}" and distributed.get_backend() == "exchange"
    joined().average([mean := torch.full((3,), 1.0 + rank, device=device)])
    assert mean.tolist() == [1.5] * 3
    table = torch.ones(3, 3, device=device)
    for wrong in (torch.ones(3), torch.ones(3, device=f"{NAME}:{1 - rank}"), table[:, 1]):
        try:
            distributed.all_reduce(wrong)
        except RuntimeError:
            continue
        raise SystemExit("exchanged")
"""
TRAIN = """
from shared_runs import carry_out, cases

with together("emulated") as device:
    for case, recipe, settings in cases():
        carry_out(case, recipe, settings, OUT, joined(), batch=8, device=device)
"""
AUDIT = """
from conftest import SmallNet
from test_two_devices import LENSES, images
from robustlens.studies.audit import audit

with together("emulated") as device:
    torch.manual_seed(joined().rank)  # whoever leads has the network
    audit(SmallNet(), images(), threat="linf:0.05", lenses=LENSES, out=OUT / "audit", device=device)
"""
LEARN = """
from robustlens.cli import app

app(["study", str(OUT / "study.toml"), "--out", str(OUT / "study"), "--device", "emulated"])
"""


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def torchrun(script: str, out: Path, compiled: Path, *, processes: int = PROCESSES) -> subprocess.CompletedProcess[str]:
    file = out / "script.py"
    file.write_text(HEAD + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join(str(Path(of).parent) for of in (small_accelerator.__file__, __file__))
    return subprocess.run(
        [*command, str(file), str(compiled), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def same_quantities(there: list[Any], here: list[Any]) -> None:
    assert [reading.lens for reading in there] == [reading.lens for reading in here]
    for theirs, ours in zip(there, here, strict=True):
        for a, b in zip(theirs.quantities, ours.quantities, strict=True):
            assert b.value == pytest.approx(a.value, rel=1e-3, abs=1e-4), (ours.lens, a.name)


def test_each_process_has_its_device_and_exchanges_nothing_else(
    device: torch.device, compiled: Path, tmp_path: Path
) -> None:
    done = torchrun(EXCHANGE, tmp_path, compiled)
    assert done.returncode == 0, done.stderr
    done = torchrun(EXCHANGE, tmp_path, compiled, processes=3)
    assert done.returncode != 0 and "expected at most 2 processes, one a GPU, got one that wants GPU 3" in done.stderr


@pytest.fixture(scope="module")
def shared(device: torch.device, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    done = torchrun(TRAIN, out, compiled)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("case", CASES)
def test_they_train_what_one_process_trains_on_a_cpu(case: str, shared: Path, tmp_path: Path) -> None:
    carry_out(case, *CASES[case], tmp_path, World(), batch=8)
    require_same(tmp_path / case, shared / case, tolerance=1e-9)


def test_a_study_and_an_audit(device: torch.device, compiled: Path, tmp_path: Path) -> None:
    study = make_study(STUDY)
    (tmp_path / "study.toml").write_text(write_study(study))
    for script in (AUDIT, LEARN):
        done = torchrun(script, tmp_path, compiled)
        assert done.returncode == 0, done.stderr
    (both,) = find_runs([tmp_path / "study"])
    (alone,) = run_study(study, tmp_path / "alone", device="cpu")
    about = both.read_json("run.json")["provenance"]
    assert about["device"] == NAME and about["processes"] == 2
    same_quantities(alone.readings(), both.readings())
    torch.manual_seed(0)
    there = audit(SmallNet(), images(), threat="linf:0.05", lenses=LENSES, out=tmp_path / "here", device="cpu")
    (here,) = find_runs([tmp_path / "audit"])
    same_quantities(there.readings(), here.readings())
