"""The commands around an audit: networks from files and libraries, what is required of them, two runs compared."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from safetensors.torch import save_file
from small_runs import fresh
from test_cli import files, refuse

import robustlens.cli
from robustlens.core.discovery import discover
from robustlens.results.store import find_runs

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def two_lenses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits look through two lenses, on a wide screen."""
    few = {name: lens for name, lens in discover("lens").items() if name in ("accuracy", "preprocessing")}
    monkeypatch.setattr("robustlens.studies.depth.discover", lambda kind: few)
    monkeypatch.setattr(robustlens.cli.console, "width", 200)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks as files."""
    home = tmp_path_factory.mktemp("nets")
    net = fresh(lambda: SmallNet(10)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), home / "net.pt")
    torch.save(net.state_dict(), home / "weights.pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(discover("model")["mlp"]().build((1, 8, 8), 10).state_dict(), home / "mlp.safetensors")
    return home


def audit(out: Path, *, threat: str = "linf:0.05", examples: int = 30) -> list[str]:
    return ["--data", "digits", "--threat", threat, "--examples", str(examples), "--out", str(out), "--device", "cpu"]


def test_a_file_of_a_program(call: Call, place: Path, tmp_path: Path) -> None:
    code, out, err = call("audit", place / "net.pt", *audit(tmp_path))
    assert (code, err) == (0, ""), err
    (run,) = find_runs([tmp_path])
    assert (run.path / "report.html").is_file() and "robust accuracy" in out
    assert json.loads((run.path / "robustbench.json").read_text())["architecture"] == "SmallNet"


def test_networks_that_cannot_be_opened(call: Call, place: Path, tmp_path: Path) -> None:
    usual = audit(tmp_path / "out")
    refuse(call, "add --weights weights.pt", "audit", place / "weights.pt", *usual)
    refuse(call, "no such file", "audit", place / "nothing.pt2", *usual)
    refuse(call, "pip install timm", "audit", "timm:resnet50", *usual)
    refuse(call, "data called cifar10, cifar100, imagenet", "audit", "robustbench:Carmon2019Unlabeled", *usual)
    weights = ("--weights", place / "mlp.safetensors")
    refuse(call, "expected none beside", "audit", place / "net.pt", *usual, *weights)
    refuse(call, "expected 1 value, got 3", "audit", place / "net.pt", *usual, "--mean", "0.5,0.5,0.5", "--std", "1")
    assert files(tmp_path) == set()


def test_requirements_guard_a_build(call: Call, place: Path, tmp_path: Path) -> None:
    """Exit code 0, or 1 with one line after table and page; what is not understood is refused before any work."""
    asked = ["audit", "mlp", "--weights", place / "mlp.safetensors", *audit(tmp_path / "out")]
    code, _, err = call(*asked, "--require", "robust>=0", "--require", "clean>=0%")
    assert (code, err) == (0, "")
    code, out, err = call(*asked, "--require", "robust>=0.95", "--require", "clean>=0")
    assert code == 1 and "report.html" in out.replace("\n", "")
    assert err.startswith("error: requirement: expected robust accuracy of at least 95.0 %, got ")
    assert err.count("\n") == 1 and "clean" not in err
    refuse(call, "a share from 0 to 1", *asked, "--out", tmp_path / "new", "--require", "robust>=45")
    refuse(call, "Did you mean 'robust'?", *asked, "--out", tmp_path / "new", "--require", "robustt>=0.45")
    assert not (tmp_path / "new").exists()


def test_compare(call: Call, place: Path, tmp_path: Path) -> None:
    weights = ("--weights", place / "mlp.safetensors")
    assert call("audit", place / "net.pt", *audit(tmp_path / "a"))[0] == 0
    assert call("audit", "mlp", *weights, *audit(tmp_path / "b"))[0] == 0
    assert call("audit", "mlp", *weights, *audit(tmp_path / "c", threat="linf:0.1"))[0] == 0
    code, out, err = call("compare", tmp_path / "a", tmp_path / "b")
    assert (code, err) == (0, "")
    assert "clean accuracy" in out and "robust accuracy" in out and "right in mlp alone" in out and "McNemar" in out
    refuse(call, "expected the same in both, got linf:0.05 and linf:0.1", "compare", tmp_path / "a", tmp_path / "c")
    refuse(call, "no such directory", "compare", tmp_path / "a", tmp_path / "nowhere")
    refuse(call, "expected one run, got 3", "compare", tmp_path, tmp_path / "a")
    refuse(call, "Missing argument", "compare", tmp_path / "a")
    code, out, _ = call("compare", "--help")
    assert code == 0 and "Usage" in out


def test_the_page_about_audits_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and its commands, one after the other; mypkg is a package of the reader's."""
    page = (Path(__file__).parents[1] / "docs/audit.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypkg").mkdir()
    build = "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "mypkg" / "net.py").write_text(build)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/audit.md", "exec", dont_inherit=True), {"__name__": "example"})
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        code, out, err = call(*shlex.split(command)[1:])
        assert (code, err) == (0, ""), f"{command}: {err}"
    assert "McNemar" in out
