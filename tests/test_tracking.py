"""Trackers and the log of a study, and what is said where no terminal is."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cli import Call
from test_docs import ROOT, blocks
from test_mirror import SETTINGS, Stop
from typer.main import get_command

from robustlens.board import RunBoard
from robustlens.cli import app
from robustlens.results.errors import InputError
from robustlens.show import Show
from robustlens.studies import tracking
from robustlens.studies.config import make_study, write_study
from robustlens.studies.mail import Reporter
from robustlens.studies.plan import make_plan
from robustlens.studies.run import run_study
from robustlens.studies.tracking import study_log
from robustlens.studies.watch import Watches

ONE: dict[str, Any] = {**SETTINGS, "methods": [{"label": "plain"}]}


def test_tensorboard_has_every_number_of_every_epoch_also_of_a_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        run_study(make_study(ONE), tmp_path, device="cpu", watch=Stop(1), track=["tensorboard"])
    (run,) = run_study(make_study(ONE), tmp_path, device="cpu", track=["tensorboard"])
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    records = run.metrics()
    assert set(events.Tags()["scalars"]) == set(records[0]) - {"epoch"}
    for name in ("loss", "valid_robust_accuracy"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(record["epoch"], pytest.approx(record[name], rel=1e-6)) for record in records]


def test_the_tracker_of_the_docs_and_every_command_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = blocks("docs/cluster.md", "python")
    Path("mytrack.py").write_text(code)
    Path("study.toml").write_text(write_study(make_study(ONE)))
    commands = [line.split("#")[0].split() for block in blocks("docs/cluster.md", "sh") for line in block.splitlines()]
    ours = [command[command.index("robustlens") + 1 :] for command in commands if "robustlens" in command]
    assert len(ours) == 7
    for command in ours:
        get_command(app).commands[command[0]].make_context(command[0], list(command[1:]))  # type: ignore[attr-defined]
    (mine,) = [command for command in ours if "mytrack:Table" in command]
    left, _, err = call(*mine)
    assert (left, err) == (0, "")
    (file,) = Path("runs").rglob("epochs.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [(row["run"], row["epoch"]) for row in rows] == [("plain, seed 0", str(k)) for k in (1, 2, 3)]
    assert list(Path("runs").rglob("tensorboard/events.*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "Did you mean 'tensorboard'"),
        ("no_such_module:Table", "can be imported"),
        ("math:pi", "expected a callable, got 3.14"),
    ],
)
def test_trackers_that_cannot_be_used(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        run_study(make_study(ONE), tmp_path / "out", device="cpu", track=[name])
    assert not (tmp_path / "out").exists()


def test_tensorboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'robustlens\[tensorboard\]'"):
        tracking.find_trackers(["tensorboard"])


def test_the_log_of_a_study(tmp_path: Path) -> None:
    settings = {**ONE, "methods": [{"label": "plain"}, {"label": "bad", "training": {"optimizer": {"lr": 1e38}}}]}
    with pytest.raises(Exception, match="Training stopped"):
        run_study(make_study(settings), tmp_path, device="cpu")
    lines = (tmp_path / "s/study.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (plain|bad), seed 0: ", line) for line in lines)
    told = [line.split("seed 0: ")[1].split(",")[0] for line in lines]
    assert told[:-1] == [
        *("training begins (1 of 4)", "epoch 1", "epoch 2", "epoch 3", "training is done"),
        *("accuracy begins (2 of 4)", "accuracy is done", "training begins (3 of 4)"),
    ]
    assert re.search(r"epoch 3, loss \d\.\d{3}, valid \d+\.\d%, robust \d+\.\d%$", lines[3])
    assert told[-1].startswith("training failed: Training stopped: ")
    run_study(make_study(ONE), tmp_path, device="cpu")
    assert "accuracy was there already" in (tmp_path / "s/study.log").read_text()


def test_the_log_is_set_aside_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOG_BYTES", 300)
    (run,) = make_plan(make_study(ONE)).runs
    with study_log(tmp_path, "s") as log:
        for times in range(40):
            log.of(run).retried(times + 1)
    files = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert files == ["study.log", "study.log.1", "study.log.2", "study.log.3"]
    assert all(path.stat().st_size <= 300 for path in (tmp_path / "s").iterdir())
    assert "retried 40 times" in (tmp_path / "s/study.log").read_text().splitlines()[-1]


def test_plain_lines_where_no_terminal_is() -> None:
    (run,) = make_plan(make_study(ONE)).runs
    record = {"epoch": 1, "loss": 0.5, "valid_accuracy": 0.75, "valid_robust_accuracy": 0.25}
    for make, name in ((lambda c: Show(c), "plain"), (lambda c: RunBoard(c), "plain, seed 0")):
        console = Console(file=io.StringIO(), force_terminal=False, width=20)
        with make(console) as shown:
            watch = shown if isinstance(shown, Show) else shown.of(run)
            watch.begin(0, 2, "plain", "training")
            watch.step(1, 3, 0.7)
            watch.epoch(record)
            watch.done("plain", "training", already=False)
        assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
            f"{name}: training begins (1 of 2)",
            f"{name}: epoch 1, loss 0.500, valid 75.0%, robust 25.0%",
            f"{name}: training is done",
        ]


def test_the_board_has_a_line_per_run() -> None:
    (run,) = make_plan(make_study(ONE)).runs
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    board = RunBoard(console)

    def line() -> str:
        plain = Console(file=io.StringIO(), width=100)
        plain.print(board._table())
        return " ".join(plain.file.getvalue().splitlines()[3].replace("│", " ").split())  # type: ignore[attr-defined]

    row = board.of(run)
    assert line() == "plain, seed 0 waiting"
    row.begin(0, 2, "plain", "training")
    row.step(4, 9, 0.5)
    assert line() == "plain, seed 0 epoch 2 of 3, loss 0.500"
    row.epoch({"epoch": 2, "loss": 0.5, "valid_robust_accuracy": 0.25})
    row.retried(2)
    row.begin(1, 2, "plain", "accuracy")
    assert line() == "plain, seed 0 accuracy 25.0% 2 times"
    row.attacked(0, "pgd", 1, 4, 30)
    assert line() == "plain, seed 0 pgd, 1 of 4 batches, 30 examples stand 25.0% 2 times"
    row.failed("plain", "run", "no memory")
    assert line() == "plain, seed 0 run failed: no memory 25.0% 2 times"
    row.ended()
    assert line() == "plain, seed 0 done 25.0% 2 times"
    for _ in range(30):
        board.of(run)
    row.begin(1, 2, "plain", "accuracy")
    assert line().startswith("plain, seed 0 accuracy") and board._table().row_count == 14
    with board:
        pass
    assert "accuracy" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_reporter_sends_about_once_a_second_and_of_the_steps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], []
    monkeypatch.setattr("robustlens.studies.mail.time.monotonic", lambda: now[0])
    reporter = Reporter(7, sent.append)
    watch = Watches(reporter)
    watch.begin(0, 1, "a", "training")
    for step in range(1, 4):
        watch.step(step, 9, 0.5)
    watch.epoch({"epoch": 1})
    watch.failed("a", "training", "why")
    assert [[event[1] for event in events] for events in sent] == [["begin"]]
    now[0] = 101.5
    watch.done("a", "training", already=False)
    assert sent[1] == [
        (7, "step", (3, 9, 0.5), {}),
        (7, "epoch", ({"epoch": 1},), {}),
        (7, "done", ("a", "training"), {"already": False}),
    ]
    reporter.flush()
    assert sent[2] == []


@pytest.mark.parametrize("file", sorted((ROOT / "docs/slurm").glob("*.sbatch")), ids=lambda file: file.name)
def test_slurm_templates(file: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    text = file.read_text()
    assert "#SBATCH --signal=B:TERM@120" in text and "#SBATCH --requeue" in text
