"""Looking through a lens and keeping what it found: on the final network, or after chosen epochs."""

from __future__ import annotations

import copy
import dataclasses
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from robustlens.core.discovery import describe
from robustlens.core.rng import generator
from robustlens.core.steady import require_steady
from robustlens.core.types import Lens, Resumable, Subject, Threat
from robustlens.core.world import joined
from robustlens.models.adapter import load_weights
from robustlens.models.foreign import is_script
from robustlens.results.errors import DamageWarning, InputError, RobustlensError
from robustlens.results.reading import Outcome, Reading
from robustlens.results.store import RunDirectory, read_reading, write_atomically
from robustlens.studies.epochs import Scheduled, side_by_side
from robustlens.studies.memory import within_memory
from robustlens.studies.plan import PlannedRun
from robustlens.studies.watch import SilentStudy, StudyWatch
from robustlens.threats.lp import Lp


def examine(
    lens: Lens,
    subject: Subject,
    directory: RunDirectory,
    *,
    seed: int,
    facts: dict[str, Any],
    watch: StudyWatch | None = None,
) -> tuple[Reading, bool]:
    """The reading of ``lens`` on ``subject``, and whether it was there already.

    A lens that has ``look_resumably`` keeps its state in the run directory and goes on from there after an
    interruption; processes that share a run all take part in its work, and their leader writes the reading. One that
    runs out of memory looks again at fewer images at a time.

    A lens that cannot do its work gives a ``failed`` reading that says why, and is tried again the next time; the
    others go on. So it does where a lens or somebody's network ends in an error of another kind, which is kept with
    its traceback in the run directory; but processes that share the work of a lens end with it. Networks that answer
    the same image differently, by chance or by what else is in the batch, are for ``unsteady`` lenses alone, which say
    so.
    """
    path = _reading_path(lens, subject, directory, seed, facts)
    there = _finished(path)
    if there is not None:
        return there, True
    script = is_script(subject.model)

    def look(lens: Lens) -> Reading:
        _require_steady(lens, subject)
        gen = generator(subject.device, seed, "lens", lens.name)
        if not isinstance(lens, Resumable):
            return lens.look(subject, gen=gen)
        asked = _reading_path(lens, subject, directory, seed, facts).name  # another where memory ran out
        told = (watch or SilentStudy()).attacked
        return lens.look_resumably(subject, gen=gen, state=directory.path / "state" / asked, told=told)

    try:
        with warnings.catch_warnings():
            if script:
                warnings.simplefilter("ignore")  # PyTorch warns of copies of its scripts
            reading = within_memory(lens, look)
    except RobustlensError as error:
        reading = Reading(lens.name, "Nothing was measured.", Outcome.failed(str(error)), settings=describe(lens))
    except Exception as error:  # of anybody's network, which can do anything
        if isinstance(lens, Resumable) and joined().size > 1:
            raise  # the others wait for this process's part of the work: they end with it
        kept = directory.path / "errors" / f"{path.name}.txt"
        write_atomically(kept, traceback.format_exc().encode())
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (the rest is in {kept.name})."
        if script and isinstance(error, RuntimeError):
            said = [line for line in str(error).splitlines() if line.strip(" :") not in ("", "RuntimeError")]
            last = said[-1].strip() if said else type(error).__name__
            why = f"PyTorch cannot do this with TorchScript ({last}). Use torch.export."
        reading = Reading(lens.name, "Nothing was measured.", Outcome.failed(why), settings=describe(lens))
    if joined().leads or not isinstance(lens, Resumable):
        directory.write_reading(path, reading)
    return reading, False


def _require_steady(lens: Lens, subject: Subject) -> None:
    """Refuse a network whose answers to an image differ, unless the lens says so itself (``unsteady``)."""
    split = subject.splits.test if len(subject.splits.test) else subject.splits.train
    if not getattr(lens, "unsteady", False):
        few = split.batch(torch.arange(min(8, getattr(lens, "batch_size", 8), len(split))))
        require_steady(subject.model, few.x.to(subject.device), lens.name)


def require_radii(lens: Lens, threat: Threat, shape: tuple[int, int, int]) -> None:
    """Refuse radii of ``lens`` that the threat of its attack, else ``threat``, cannot have for images of ``shape``.

    Raises:
        InputError: a radius that is out of range or in other units.
    """
    attack = getattr(lens, "attack", None)
    own = threat if attack is None else attack.threat
    if isinstance(own, Lp):
        for eps in (own.eps, *(getattr(lens, "radii", None) or ())):
            own.with_eps(eps).require_fits(shape)


@contextmanager
def held(directory: RunDirectory) -> Iterator[None]:
    """Inside, the leader holds ``directory``; nobody is inside before it has removed what a killed process left.

    Raises:
        RunInUse, InputError: as of ``RunDirectory.lock``.
    """
    world = joined()
    with directory.lock() if world.leads else nullcontext():
        world.wait()
        yield


def takes_part(lens: Lens, number: int) -> bool:
    """Whether this process looks through the ``number``-th lens: they are dealt out, but resumable ones are for all."""
    world = joined()
    return isinstance(lens, Resumable) or number % world.size == world.rank


def _reading_path(lens: Lens, subject: Subject, directory: RunDirectory, seed: int, facts: dict[str, Any]) -> Path:
    settings = {"lens": describe(lens), "threat": str(subject.threat), "seed": seed, **facts}
    return directory.reading_path(lens.name, settings)


def _finished(path: Path) -> Reading | None:
    """The reading at ``path``; None where there is none, it failed, or it is damaged (with a DamageWarning)."""
    if not path.is_dir():
        return None
    try:
        reading = read_reading(path)
    except InputError as error:
        warnings.warn(f"{error.what} is damaged ({error.got}) and made again.", DamageWarning, stacklevel=2)
        return None
    return None if reading.outcome.status == "failed" else reading


def examine_epochs(scheduled: Scheduled, subject: Subject, directory: RunDirectory, run: PlannedRun) -> bool:
    """Look after each of the chosen epochs that the run reached, and put the findings side by side.

    The readings of the epochs are stored below the run directory as ``epoch-<number>/readings``, so that another choice
    of epochs repeats none of them. Returns whether everything was there already. The reading is ``failed`` where the
    weights after an epoch were not kept when the run was trained.
    """
    path = _reading_path(scheduled.lens, subject, directory, run.seed, {"epochs": list(scheduled.epochs)})
    if _finished(path) is not None:
        return True
    reached = directory.metrics()[-1]["epoch"]
    files = {epoch: directory.path / f"epoch-{epoch}.safetensors" for epoch in scheduled.epochs if epoch <= reached}
    if missing := [str(epoch) for epoch, file in files.items() if not file.is_file()]:
        why = (
            f"The weights after epoch {', '.join(missing)} were not kept: this lens was not in the study when the run "
            f"was trained. Delete {directory.path} to train it again, or choose another directory with --out."
        )
        reading = Reading(
            scheduled.name, "Nothing was measured.", Outcome.failed(why), settings=describe(scheduled.lens)
        )
        directory.write_reading(path, reading)
        return False
    found = []
    for epoch, file in files.items():
        then = dataclasses.replace(subject, model=copy.deepcopy(subject.model))
        load_weights(then.model, file)
        below = RunDirectory(directory.path / f"epoch-{epoch}")
        reading, _ = examine(scheduled.lens, then, below, seed=run.seed, facts={"epoch": epoch})
        found.append((epoch, reading))
    if found:
        directory.write_reading(path, side_by_side(scheduled, found))
    return False
