"""Work killed with SIGKILL at random moments, and what a second start makes of it.

Every trial forks a child from one warm parent, which has the libraries loaded, so that a trial costs its own work
alone. A child that is killed is killed as any process is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

from robustlens.report.page import write_page
from robustlens.results.seal import is_damaged
from robustlens.results.store import find_runs, read_reading
from robustlens.studies.config import read_study
from robustlens.studies.run import run_study

#: What all studies here have in common: some steps of a tenth of a second or less, a checkpoint after each.
COMMON = """
name = "tiny"
threat = "linf:0.1"
model = {{ name = "mlp", hidden = 24 }}
data = {{ source = "digits", train = 240, valid = 60, test = 60 }}
validation = {{ name = "fgsm" }}
training = {{ epochs = {epochs}, batch_size = 40, checkpoint_seconds = 0 }}
methods = [{methods}]
lenses = [{lenses}]
"""
PLAIN, AGAINST = (
    '{ label = "plain" }',
    '{ label = "pgd", objective = { name = "adversarial", '
    'attack = { name = "pgd", threat = "linf:0.1", steps = 4 } } }',
)
LENSES = (
    '{ name = "accuracy", n_examples = 40 }',
    '{ name = "logit-margins", bins = 5 }',
    '{ name = "confidence", n_examples = 40 }',
    '{ name = "accuracy", n_examples = 30, when = "epochs:1,2" }',
)
STANDARD = ('{ name = "standard-accuracy", n_examples = 12, chunk = 4, batch_size = 2, effort = 0.03 }',)


def study(epochs: int, methods: Sequence[str], lenses: Sequence[str] = ()) -> str:
    return COMMON.format(epochs=epochs, methods=", ".join(methods), lenses=", ".join(lenses))


@dataclass(frozen=True)
class Command:
    """What is killed: a study without its page, or the page; the study ``before`` is carried out unkilled."""

    name: str
    study: str
    before: str | None = None
    report: bool = False

    def work(self, place: Path) -> None:
        """What the command line does, in ``place``."""
        if self.report:
            write_page(find_runs([place / "out"]), place / "out" / "page.html", title="tiny")
        else:
            carry_out_study(place)


def carry_out_study(place: Path) -> None:
    run_study(read_study(place / "study.toml"), place / "out", device="cpu")


COMMANDS = (
    Command("training", study(4, [AGAINST])),
    Command("study with lenses", study(2, [PLAIN, AGAINST], LENSES)),
    Command("standard accuracy", study(1, [AGAINST], STANDARD), before=study(1, [AGAINST])),
    Command("report", study(1, [PLAIN], LENSES[:3]), before=study(1, [PLAIN], LENSES[:3]), report=True),
)


@dataclass
class Counts:
    """What came of the trials of one command; a trial is wrong where a fault is named."""

    command: str
    seconds: float = 0.0
    killed: int = 0
    half_written: int = 0
    went_on: int = 0
    identical: int = 0
    repeated: int = 0
    faults: list[str] = field(default_factory=list)


def start_warm(place: Path) -> None:
    """Carry out the whole of it once in this process, so that what is loaded late is loaded in every child.

    That includes the script inside the page, which takes seconds to bundle and is kept in memory.
    """
    place.mkdir()
    (place / "study.toml").write_text(study(2, [AGAINST], (*LENSES, *STANDARD)))
    carry_out_study(place)
    write_page(find_runs([place / "out"]), place / "page.html", title="tiny")


def start(work: Callable[[Path], None], place: Path) -> int:
    """Fork a child that does ``work`` in ``place``; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(place)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(work: Callable[[Path], None], place: Path) -> float:
    """Do the work to its end; its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(start(work, place), 0)
    assert status == 0, f"it ended with {os.waitstatus_to_exitcode(status)} in {place}, see above"
    return time.monotonic() - began


def files(place: Path) -> Iterator[Path]:
    """Every file below ``place`` but the locks."""
    return (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "lock")


def is_left_over(path: Path) -> bool:
    return any(part.startswith(".tmp-") for part in path.parts)


def unreadable(place: Path) -> list[str]:
    """Files that do not open, or with other content than their sum says; half-written ones have a name of their own."""
    found = []
    for path in files(place):
        if is_left_over(path):
            continue
        try:
            content = path.read_bytes()
            if path.suffix in (".json", ".safetensors") and is_damaged(content):
                raise ValueError("its sum does not fit")
            if path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in content.decode().splitlines()]
            elif path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            if path.name == "reading.json":
                read_reading(path.parent)
        except Exception as error:
            found.append(f"{path.relative_to(place)}: {error}")
    return found


def finished(place: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of a finished piece: a trained run, a reading."""
    pieces: list[Path] = []
    for path in files(place):
        if path.name == "run.json" and json.loads(path.read_bytes())["finished"]:
            pieces += [path, *path.parent.glob("*[!e].safetensors"), path.parent / "metrics.jsonl"]
        elif path.parent.parent.name == "readings" and not is_left_over(path):
            pieces.append(path)
    pieces = [path for path in pieces if not path.name.startswith("state")]
    return {str(path.relative_to(place)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in pieces}


def results(place: Path) -> dict[str, Any]:
    """What must be the same: every file's bytes, without what a clock said."""
    found: dict[str, Any] = {}
    for path in files(place):
        name = str(path.relative_to(place))
        if path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            found[name] = {k: record[k] for k in ("label", "seed", "hash", "config", "finished")}
        elif path.suffix in (".safetensors", ".parquet") or path.name in ("reading.json", "page.html"):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def prepared(command: Command, place: Path, template: Path | None) -> Path:
    """A fresh place for a trial, with what is carried out before it."""
    shutil.rmtree(place, ignore_errors=True)
    if template is None:
        place.mkdir(parents=True)
    else:
        shutil.copytree(template, place)
    (place / "study.toml").write_text(command.study)
    return place


def carry_out(command: Command, root: Path, trials: int, seed: int, say: Callable[[str], None]) -> Counts:
    """Kill ``command`` ``trials`` times, each in a place of its own, and start it again until it ends."""
    counts, draw = Counts(command.name), random.Random(f"{seed} {command.name}")
    template = None
    if command.before is not None:
        template = root / "template"
        shutil.rmtree(template, ignore_errors=True)
        template.mkdir(parents=True)
        (template / "study.toml").write_text(command.before)
        finish(carry_out_study, template)
    whole = prepared(command, root / "trial", template)  # every place has one name: it stands in what is written
    took = [finish(command.work, whole)]
    expected = results(whole)
    prepared(command, whole, template)
    took.append(finish(command.work, whole))
    assert results(whole) == expected, f"{command.name}: two uninterrupted runs differ"
    counts.seconds = round(min(took), 2)
    while counts.killed < trials:
        place = prepared(command, root / "trial", template)
        wait = draw.uniform(0, counts.seconds)
        child = start(command.work, place)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            continue  # it ended before
        counts.killed += 1
        where = f"trial {counts.killed}, killed after {wait:.3f} s"
        counts.half_written += any(is_left_over(path) for path in place.rglob("*"))
        counts.faults += [f"{where}: {each}" for each in unreadable(place)]
        before = finished(place)
        counts.went_on += bool(before) or any(path.name.startswith(("state", "chunk")) for path in files(place))
        finish(command.work, place)
        after = finished(place)
        again = [name for name, what in before.items() if after.get(name) != what]
        counts.repeated += bool(again)
        counts.faults += [f"{where}: {name} was made again" for name in again]
        found = {name: what for name, what in results(place).items() if not is_left_over(Path(name))}
        differing = [name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name, 0)]
        counts.identical += not differing
        counts.faults += [f"{where}: {name} differs" for name in differing]
        left = [path for path in place.rglob(".tmp-*") if (path.parent / "run.json").exists() or path.is_dir()]
        counts.faults += [f"{where}: {path} was left in a run directory" for path in left]
        if counts.killed % 10 == 0:
            say(f"{command.name}: {counts.killed} killed, {len(counts.faults)} faults")
    return counts
