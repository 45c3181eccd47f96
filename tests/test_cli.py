"""The command line: whatever is wrong with the input, one line, exit code 2, and no new file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SmallNet
from PIL import Image
from safetensors.torch import save_file
from small_runs import fresh
from torch import nn

import robustlens.cli
from robustlens.core.discovery import KINDS, discover
from robustlens.results.errors import InputError, TrainingStopped
from robustlens.results.store import RunDirectory, find_runs

Call = Callable[..., tuple[int, str, str]]
LENS = 'lenses=[{name="logit-margins",bins=5}]'
SMALL = ["--set", "data.train=40", "--set", "data.valid=10", "--set", "data.test=20", "--set", LENS]
TRAIN = ["train", "--data", "digits", "--model", "mlp", "--method", "standard", "--epochs", "1", *SMALL]


def refuse(call: Call, words: str, *arguments: str | Path, code: int = 2) -> str:
    got, _, err = call(*arguments)
    assert got == code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert words in err, err
    return err


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


STUDY = """
name = "small"
model = { name = "mlp", hidden = 8 }
threat = "linf:0.1"
lenses = [{ name = "logit-margins", bins = 5 }]
[data]
source = "digits"
train = 40
valid = 10
test = 20
[training]
epochs = 1
[[methods]]
label = "plain [bold]"
"""

BAD_TRAIN = [
    (["--method", "pgdd"], "Did you mean 'pgd'?"),
    (["--method", "trades"], "expected one of trades/cifar10, trades/mnist"),
    (["--model", "lenet-smal"], "Did you mean 'lenet-small'?"),
    (["--model", ""], "model: expected one of"),
    (["--model", "no_such:Net"], "ModuleNotFoundError"),
    (["--model", ".x:Net"], "can be imported"),
    (["--model", "lenet", "--data", "digits"], "pixels"),
    (["--model", "logistic"], "2 classes"),
    (["--data", "digit"], "Did you mean 'digits'?"),
    (["--data", "Digits"], "Did you mean 'digits'?"),
    (["--data", "/proc/version"], "got the file '/proc/version'. Give its directory"),
    (["--data", ""], "data.source"),
    (["--data", "./nowhere"], "check the path"),
    (["--data", "./[/red][x]"], "'./[/red][x]'"),
    (["--threat", "linf:8"], 'write "linf:8/255"'),
    (["--threat", "linf:-1/255"], "a finite number ≥ 0"),
    (["--threat", "l2:5000"], "not 0–255"),
    (["--threat", "l2:x"], "got 'x'"),
    (["--threat", "l7:1"], "one of l1, l2, linf"),
    (["--threat", "8/255"], "a norm and a radius"),
    (["--epochs", "0"], "training.epochs"),
    (["--epochs", "many"], "--epochs"),
    (["--device", "gpu"], "device: expected"),
    (["--device", "meta"], "device: expected"),
    (["--set", "training.epoch=3"], "Did you mean 'epochs'?"),
    (["--set", "trainin.epochs=3"], "Did you mean 'training'?"),
    (["--set", "training.optimizer.momentun=3"], "Did you mean 'momentum'?"),
    (["--set", "training.optimizer.name=sgdd"], "training.optimizer: expected one of 'sgd', 'adam'"),
    (["--set", "training.optimizer.lr=inf"], "training.optimizer.lr: expected a finite number"),
    (["--set", "training.optimizer.lr=-1"], "training.optimizer.lr"),
    (["--set", "training.optimizer.nesterov=true", "--set", "training.optimizer.momentum=0"], "a momentum > 0"),
    (["--set", "training.optimizer=3"], "training.optimizer: expected a table of settings, got 3"),
    (["--set", "training.schedule.peak=0.1"], "training.schedule.name: expected a name"),
    (["--set", "training.epochs=true"], "training.epochs"),
    (["--set", "training.epochs.x=3"], "epochs to have fields"),
    (["--set", "training"], "key.path=value"),
    (["--set", "=3"], "key.path=value"),
    (["--set", "seeds.x=1"], "a position in the list"),
    (["--set", "seeds.1=1"], "a position in the list"),
    (["--set", "seeds.-1=1"], "a position in the list"),
    (["--set", "methods.4.label=a"], "a position in the list"),
    (["--set", "seeds=[]"], "seeds"),
    (["--set", "seeds=[1,1]"], "differ"),
    (["--set", "methods=[]"], "methods: expected at least 1 of them"),
    (["--set", "model=3"], "study model: expected a name in quotes or a table with one, got 3"),
    (["--set", "data.valid_fraction=2"], "data.valid_fraction"),
    (["--set", "data.classes=[3]"], "two or more different classes"),
    (["--set", "data.classes=[]"], "two or more different classes"),
    (["--set", "data.classes=[3,10]"], "numbers from 0 to 9"),
    (["--set", 'data.classes=["3","x"]'], "class: expected one of"),
    (["--set", "data.train=0"], "data.train"),
    (["--set", "weights=first"], "'last' or 'best'"),
    (["--set", 'lenses=["acuracy"]'], "Did you mean 'accuracy'?"),
    (["--set", 'lenses=[{name="accuracy",splitt="test"}]'], "Did you mean 'split'?"),
    (["--set", "validation.name=pgdd"], "Did you mean 'pgd'?"),
    (["--set", 'training.augment=["flipp"]'], "Did you mean 'flip'?"),
    (["--set", 'training.augment=[{name="random-resized-crop",size=4}]'], "after augmentation"),
    (["--method", "linear-exact"], "affine in its input"),
    (["--set", "model.hidden=8"], "model to have fields"),
    (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(("options", "words"), BAD_TRAIN, ids=[" ".join(options) for options, _ in BAD_TRAIN])
def test_training_that_cannot_be(
    options: list[str], words: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(call, words, *TRAIN, "--out", tmp_path / "out", *options)
    assert files(tmp_path) == set()


BAD_STUDIES = {
    "key": (STUDY.replace("threat =", "thread ="), "Did you mean 'threat'?"),
    "deep key": (STUDY.replace("label =", "lable ="), "Did you mean 'label'?"),
    "type": (STUDY.replace("epochs = 1", 'epochs = "one"'), "training.epochs"),
    "range": (STUDY.replace("train = 40", "valid_fraction = 2"), "data.valid_fraction"),
    "missing": (STUDY.replace('threat = "linf:0.1"', ""), "threat: expected a value, got nothing"),
    "toml": (STUDY + "x = = 3", "valid TOML"),
    "binary": (b"\xff\xfe\x00", "valid TOML"),
    "empty": ("", "data: expected a value"),
    "nan": (STUDY.replace("bins = 5", "near = nan"), "near: expected a finite number"),
    "date": (STUDY.replace("epochs = 1", "epochs = 2020-01-01"), "training.epochs"),
    "eps": (STUDY.replace('threat = "linf:0.1"', 'threat = "l2:128"'), 'write "l2:128/255"'),
    "trained eps": (
        STUDY + 'objective = { name = "noise", threat = "l2:128" }',
        'write "l2:128/255"',
    ),
    "radii": (STUDY.replace('"logit-margins", bins = 5', '"accuracy", radii = [8]'), 'write "linf:8/255"'),
    "method": (STUDY + "training = { epochz = 2 }", "training of method 'plain [bold]'"),
}


@pytest.mark.parametrize("kind", BAD_STUDIES)
def test_studies_that_cannot_be(kind: str, call: Call, tmp_path: Path) -> None:
    content, words = BAD_STUDIES[kind]
    file = tmp_path / "study.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(call, words, "study", file, "--out", tmp_path / "out")
    refuse(call, "No such file", "study", tmp_path / "other.toml", "--out", tmp_path / "out")
    refuse(call, "Is a directory", "study", tmp_path, "--out", tmp_path / "out")
    assert files(tmp_path) == {"study.toml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of the user's own, their weights, and data good and bad."""
    home = tmp_path_factory.mktemp("mine")
    (home / "cli_nets.py").write_text(
        "from conftest import SmallNet\nfrom torch import nn\n\n"
        "def ten(): return SmallNet(10)\n\ndef seven(): return SmallNet(7)\n\n"
        "def colour(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10))\n"
    )
    save_file(fresh(lambda: SmallNet(10)).state_dict(), home / "ten.safetensors")
    save_file(fresh(lambda: nn.Linear(3, 3)).state_dict(), home / "other.safetensors")
    (home / "cut.safetensors").write_bytes((home / "ten.safetensors").read_bytes()[:100])
    for number in range(10):
        for split, count in (("train", 4), ("test", 2)):
            (home / "folder" / split / str(number)).mkdir(parents=True)
            for k in range(count):
                pixels = (torch.arange(64).view(8, 8) * 3 + 5 * number + k).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(home / "folder" / split / str(number) / f"{k}.png")
    table = pa.table({"image": [{"bytes": b"no image", "path": None}] * 8, "label": list(range(8))})
    for name, change in (("cut", True), ("pictures", False)):
        (home / name).mkdir()
        file = home / name / "train-0.parquet"
        pq.write_table(table, file)
        if change:
            file.write_bytes(file.read_bytes()[:-30])
    (home / "labels").mkdir()
    pq.write_table(table.set_column(1, "label", pa.array([0.5] * 8)), home / "labels" / "train-0.parquet")
    (home / "empty").mkdir()
    (home / "broken" / "a").mkdir(parents=True)
    (home / "broken" / "b").mkdir()
    for k in range(6):
        (home / "broken" / "ab"[k % 2] / f"{k}.png").write_bytes(b"\x89PNG not really")
    return home


BAD_AUDITS = [
    (["cli_nets:ten"], ["--examples", "0"], "--examples"),
    (["cli_nets:ten"], ["--threat", "linf:8"], 'write "linf:8/255"'),
    (["cli_nets:ten"], ["--data", "digitz"], "Did you mean 'digits'?"),
    (["cli_nets:ten"], ["--data", "@cut"], "readable parquet file"),
    (["cli_nets:ten"], ["--data", "@pictures"], "image"),
    (["cli_nets:ten"], ["--data", "@labels"], "class numbers or names"),
    (["cli_nets:ten"], ["--data", "@empty"], "image"),
    (["cli_nets:ten"], ["--data", "@broken"], "image"),
    (["cli_nets:seven"], [], "expected 10 logits an image"),
    (["cli_nets:colour"], [], "channels, size and precision (float32) of the images"),
    (["cli_nets:nine"], [], "no attribute 'nine'"),
    (["cli_nets"], [], "A network of your own is pkg.module:callable."),
    (["lenet-smal"], [], "Did you mean 'lenet-small'?"),
    (["lenet-small"], [], "its weights, got none"),
    (["cli_nets:ten"], ["--weights", "@other.safetensors"], "another architecture"),
    (["cli_nets:ten"], ["--weights", "@cut.safetensors"], "a safetensors file"),
    (["cli_nets:ten"], ["--weights", "@none.safetensors"], "no such file"),
    (["mlp"], ["--weights", "@ten.safetensors"], "another architecture"),
    (["mpl"], ["--weights", "@ten.safetensors"], "Did you mean 'mlp'?"),
    (["cli_nets:ten"], ["--mean", "x"], "numbers with commas"),
    (["cli_nets:ten"], ["--mean", "0.5,0.5", "--std", "1,1"], "mean: expected 1 value, got 2"),
    (["cli_nets:ten"], ["--mean", "0.5", "--std", "0"], "std"),
    (["cli_nets:ten"], ["--device", "tpu"], "device"),
]


@pytest.mark.parametrize(("model", "options", "words"), BAD_AUDITS, ids=[" ".join(m + o) for m, o, _ in BAD_AUDITS])
def test_audits_that_cannot_be(
    model: list[str],
    options: list[str],
    words: str,
    call: Call,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(place)
    given = [f"{place}/{option[1:]}" if option.startswith("@") else option for option in options]
    usual = ["--data", "digits", "--threat", "linf:0.1", "--examples", "20", "--out", str(tmp_path / "out")]
    refuse(call, words, "audit", *model, *usual, *given)
    assert files(tmp_path) == set()


def test_audit_of_an_image_folder(call: Call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    weights = place / "ten.safetensors"
    data = ("--data", place / "folder", "--threat", "linf:8/255", "--weights", weights)
    code, out, err = call("audit", "cli_nets:ten", *data, "--out", tmp_path)
    assert (code, err) == (0, ""), err
    (run,) = find_runs([tmp_path])
    assert {reading.lens for reading in run.readings()} == set(discover("lens")) - {
        "standard-accuracy",
        "linear-margins",
    }
    assert (run.path / "report.html").is_file()
    assert str(run.path / "report.html") in out.replace("\n", "") and "cli_nets:ten: " in out


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a study that the command line carried out."""
    home = tmp_path_factory.mktemp("studied")
    (home / "study.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robustlens", "study", str(home / "study.toml"), "--out", str(home / "out")])
        with pytest.raises(SystemExit) as left:
            robustlens.cli.main()
    assert not left.value.code
    return home


def test_study_and_again(studied: Path, call: Call) -> None:
    page = studied / "out" / "small" / "report.html"
    assert "plain [bold]" in page.read_text()
    code, out, _ = call("study", studied / "study.toml", "--out", studied / "out")
    assert code == 0
    assert "plain [bold]: training was there already" in out and "logit-margins was there already" in out
    assert page.name in out


def test_overrides_and_runs_in_use(studied: Path, call: Call, tmp_path: Path) -> None:
    (run,) = find_runs([studied / "out"])
    again = ("study", studied / "study.toml", "--out", studied / "out")
    with run.lock():
        refuse(call, "no other process", *again)
    code, _, _ = call(*again[:3], tmp_path, "--set", "training.epochs=2", "--set", 'methods.0.label="two"')
    assert code == 0
    (other,) = find_runs([tmp_path])
    assert other.read_json("run.json")["config"]["training"]["epochs"] == 2 == len(other.metrics())


def test_report_and_figures(studied: Path, call: Call, tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    code, out, err = call("report", studied / "out", "--out", page, "--title", "My <title>", "--figures", figures)
    assert (code, err) == (0, "")
    assert "My &lt;title&gt;" in page.read_text()
    made = list(figures.iterdir())
    assert made and all(file.suffix == ".pdf" and file.read_bytes().startswith(b"%PDF") for file in made)
    assert f"{len(made)} figures in" in out
    refuse(call, "can be written to", "report", studied / "out", "--out", page / "below" / "page.html")
    refuse(call, "can be written to", "report", studied / "out", "--out", page, "--figures", page / "below")


def test_reports_that_cannot_be(studied: Path, call: Call, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    refuse(call, "got none.", "report", tmp_path / "empty", *out)
    refuse(call, "no such directory", "report", tmp_path / "nowhere", *out)
    refuse(call, "expected a file, got a directory", "report", studied / "out", "--out", tmp_path / "empty")
    refuse(call, "--format", "report", studied / "out", "--format", "tiff", *out)
    RunDirectory(tmp_path / "run").write_json("run.json", {"label": "x"})
    refuse(call, "run", "report", tmp_path / "run", *out)
    assert not (tmp_path / "page.html").exists()


def test_a_place_that_cannot_be_written_to(call: Call, tmp_path: Path, place: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    refuse(call, "can be written to", *TRAIN, "--out", below)
    refuse(call, "can be written to", *TRAIN, "--out", "/proc/robustlens")
    folder = ("--data", place / "folder", "--threat", "l2:1", "--weights", tmp_path / "w.safetensors")
    with torch.random.fork_rng():
        save_file(discover("model")["mlp"]().build((1, 8, 8), 10).state_dict(), tmp_path / "w.safetensors")
    refuse(call, "can be written to", "audit", "mlp", *folder, "--out", below)
    assert files(tmp_path) == {"file", "w.safetensors"}


def test_list(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustlens.cli.console, "width", 300)
    code, out, _ = call("list")
    assert code == 0
    for kind in KINDS:
        assert all(name in out for name in discover(kind)), kind
    assert "mnist5k" in out and "ylecun/mnist" in out
    assert "004-table1" in out and "000-loss-gap-falls" in call("list", "claims")[1]
    _, attacks, _ = call("list", "attack")
    assert "pgd" in attacks and "lenet-small" not in attacks
    refuse(call, "Did you mean 'lens'?", "list", "lense")
    refuse(call, "kind: expected one of", "list", "nonsense")


def test_help_and_mistakes(call: Call) -> None:
    for command in ("demo", "train", "study", "audit", "report", "list"):
        code, out, err = call(command, "--help")
        assert (code, err) == (0, "") and "Usage" in out
    assert all(command in call("-h")[1] for command in ("demo", "train", "study", "audit", "report", "list"))
    code, out, err = call()
    assert code == 2 and "Usage" in out + err
    refuse(call, "nonsense", "nonsense")
    refuse(call, "model", "audit")
    refuse(call, "--threat", "audit", "mlp", "--data", "digits")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (TrainingStopped("Training stopped: the [loss] is nan."), 1, "error: Training stopped: the [loss] is nan.\n"),
        (InputError("a", expected="b", got="[/c]\nd", fix=":smile:"), 2, "error: a: expected b, got [/c] d. :smile:\n"),
        (KeyboardInterrupt(), 130, "Stopped. Run the same command again to go on from here.\n"),
    ],
)
def test_errors_become_one_line(
    error: BaseException, code: int, words: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("robustlens.studies.run.run_study", fail)
    got, _, err = call(*TRAIN, "--out", tmp_path)
    assert (got, err) == (code, words)


def test_bugs_are_not_hidden(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustlens.studies.config.single_run", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(*TRAIN)


HELP = """
import json, sys
sys.argv = ["robustlens", "--help"]
from robustlens.cli import main
try:
    main()
except SystemExit as left:
    print(json.dumps([left.code, [m for m in ("torch", "numpy", "pydantic", "pyarrow", "altair") if m in sys.modules]]))
"""


def test_help_does_not_load_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "robustlens", "report", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs in ") and done.stderr.count("\n") == 1
