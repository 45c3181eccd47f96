"""Carrying out a study on this machine: train, examine, remember; a finished piece is never computed twice."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustlens
from robustlens.attacks.verify import evaluate
from robustlens.core.allocator import keep_freed_memory
from robustlens.core.discovery import build
from robustlens.core.modes import lay_channels_last
from robustlens.core.rng import derive, forked, generator
from robustlens.core.types import Augmentation, Batch, Moment, Splits, Subject
from robustlens.core.world import joined, require_synchronisable
from robustlens.data.sources import load
from robustlens.models.adapter import check_model, load_weights
from robustlens.results.errors import InputError, RobustlensError
from robustlens.results.mirror import Mirror, connect, is_remote, scratch
from robustlens.results.store import RunDirectory
from robustlens.studies.config import StudyConfig, make_study
from robustlens.studies.epochs import Scheduled
from robustlens.studies.examine import examine, examine_epochs, held, require_radii, takes_part
from robustlens.studies.plan import Plan, PlannedRun, make_plan, run_directory, slug
from robustlens.studies.tracking import Tracker, find_trackers, study_log
from robustlens.studies.watch import SilentStudy, StudyWatch, Watches
from robustlens.threats.lp import Lp
from robustlens.train.loop import train


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; "auto" is the GPU if there is one, else the CPU."""
    keep_freed_memory()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" computes nothing
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "device", expected='"auto", "cpu" or a device that is here', got=repr(name), fix='Use "auto".'
        ) from error
    return device


class Pushing(SilentStudy):
    """Mirrors a run directory as the run goes on: at every epoch and piece, and after new checkpoints."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror

    def tell(self, event: str, *arguments: Any, **named: Any) -> None:
        if event in ("step", "attacked"):
            self.mirror.push_now_and_then()
        else:
            self.mirror.push()


def run_study(
    study: StudyConfig | Mapping[str, Any],
    out: str | Path = "runs",
    *,
    device: str = "auto",
    watch: StudyWatch | None = None,
    track: Sequence[str] = (),
) -> list[RunDirectory]:
    """Train every method with every seed, look through every lens, and return the run directories.

    Everything is checked before anything is written. Interrupt it at any moment: called again with the same study,
    it goes on where it stopped. ``out`` may be any address that fsspec reaches (s3://bucket/runs); what is returned
    then are local copies that go when this process ends. ``track`` names trackers (``tracking.find_trackers``). The
    processes that torchrun started (``core.world.together``) share every batch of the trainings and look through
    different lenses; their leader alone tells ``watch`` and trackers.

    ``study`` may be a dictionary of what a study's file holds.

    Raises:
        InputError: something in the study cannot be used, or another process works in a run directory.
        TrainingStopped: a run diverged.
    """
    study = study if isinstance(study, StudyConfig) else make_study(study)
    plan, place, world = make_plan(study), pick_device(device), joined()
    trackers = find_trackers(track) if world.leads else ()
    if world.size > 1 and is_remote(out):
        raise InputError(
            "--out", expected="a directory that all processes share", got=str(out), fix="Copy it there at the end."
        )
    splits = load(study.data).to(place)
    for run in plan.runs:
        rehearse(run, splits, plan.lenses)
    with study_log(out, study.name) if world.leads else nullcontext() as log:
        watches = [Watches(*([log.of(run)] if log else []), watch or SilentStudy()) for run in plan.runs]
        return [carry_out(plan, number, splits, out, each, trackers=trackers) for number, each in enumerate(watches)]


def carry_out(
    plan: Plan,
    number: int,
    splits: Splits,
    out: str | Path,
    watch: StudyWatch,
    *,
    trackers: Sequence[Tracker] = (),
    owner: str | None = None,
) -> RunDirectory:
    """Train the planned run ``number`` and look through every lens, holding its directory; a finished piece is skipped.

    ``owner`` is the same for each process that is started to carry out this run: where ``out`` is remote, a later one
    need not wait for the lease of an earlier one (``results.lease``).

    Raises:
        RunInUse: another process works in the run directory.
        TrainingStopped, InputError: as of ``run_study``.
    """
    run, each = plan.runs[number], 1 + len(plan.lenses)
    with opened(run, plan.study, out, owner) as (directory, pushing):
        watch = Watches(*(make(run, directory.path) for make in trackers), *pushing, watch)
        what = "training"
        try:
            watch.begin(number * each, len(plan.runs) * each, run.label, what)
            model = trained(run, splits, directory, plan, watch, out=directory.path.parents[1])
            subject = Subject(model, splits.as_tested(), run.threat, splits.test.labels.device)
            for k, scheduled in enumerate(plan.lenses, start=1):
                if not takes_part(scheduled.lens, k):
                    continue
                what = scheduled.name
                watch.begin(number * each + k, len(plan.runs) * each, run.label, what)
                if scheduled.epochs:
                    already = examine_epochs(scheduled, subject, directory, run)
                else:
                    facts = {"weights": plan.study.weights}
                    _, already = examine(scheduled.lens, subject, directory, seed=run.seed, facts=facts, watch=watch)
                watch.done(run.label, what, already=already)
            joined().wait()
        except RobustlensError as error:
            watch.failed(run.label, what, str(error))
            raise
    return directory


@contextmanager
def opened(
    run: PlannedRun, study: StudyConfig, out: str | Path, owner: str | None
) -> Iterator[tuple[RunDirectory, list[Pushing]]]:
    """The directory of ``run``, held for this process, and what mirrors it where ``out`` is remote."""
    if not is_remote(out):
        directory = directory_of(run, out, study)
        with held(directory):
            yield directory, []
        return
    home, place = scratch(str(out)), connect(str(out)).below(slug(study.name))
    for name in place.directories():
        (home / slug(study.name) / name).mkdir(parents=True, exist_ok=True)
    directory = directory_of(run, home, study)
    with directory.lock(), Mirror(place.below(directory.path.name), directory.path, owner) as mirror:
        if isinstance(run.start, PlannedRun):
            start = directory_of(run.start, home, study).path
            place.below(start.name).pull(start, lambda name: name == "last.safetensors")
        yield directory, [Pushing(mirror)]


def directory_of(run: PlannedRun, out: str | Path, study: StudyConfig) -> RunDirectory:
    """Where ``run`` is, or will be."""
    return run_directory(Path(out) / slug(study.name), run.label, run.seed, run.hash)


def rehearse(run: PlannedRun, splits: Splits, lenses: Sequence[Scheduled]) -> None:
    """One step and one validation on a few images with a network that is thrown away, before anything is written.

    Raises:
        InputError: network, augmentation, objective, validation or radii do not fit the data or each other.
    """
    objective = run.recipe.objective
    trained = getattr(getattr(objective, "attack", objective), "threat", None)
    for threat in (run.threat, run.validation.threat, trained):
        if isinstance(threat, Lp):
            threat.require_fits(splits.shape)
    for scheduled in lenses:
        require_radii(scheduled.lens, run.threat, splits.shape)
    device = splits.test.labels.device
    gen = generator(device, run.seed, "rehearsal")
    with forked():
        try:
            built = run.model.build(splits.shape, len(splits.classes)).to(device)
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            raise InputError(
                "model", expected="a network that fits into memory", got="a larger one", fix="Make it narrower."
            ) from error
        model = check_model(built, splits.shape, len(splits.classes)).train()
        batch = splits.train.batch(torch.arange(min(4, len(splits.train))))
        x = batch.x
        for each in run.training.augment:
            augmentation: Augmentation = build("augmentation", each)
            x = augmentation.augment(x, gen=gen)
        if tuple(x.shape[1:]) != splits.shape:
            raise InputError(
                "training images",
                expected=f"channels × height × width {splits.shape} after augmentation, as the test images have",
                got=str(tuple(x.shape[1:])),
                fix="Change the size in training.augment, or data.train_size.",
            )
        batch = Batch(x, batch.y, batch.index, Moment(epochs=run.training.epochs, examples=len(splits.train)))
        if isinstance(run.start, Path):
            load_weights(model, run.start)
        run.recipe.check(model, x)
        if joined().size > 1 and run.training.batch_norm == "synchronised":
            require_synchronisable(model)
        run.recipe.update.backward(model, run.recipe.objective, run.recipe.regularizers, batch, gen=gen)
        evaluate(run.validation, model, splits.valid.batch(torch.arange(min(4, len(splits.valid)))), gen=gen)


def trained(
    run: PlannedRun, splits: Splits, directory: RunDirectory, plan: Plan, watch: StudyWatch, *, out: str | Path
) -> nn.Module:
    """The network of ``run`` in eval mode, trained now or read from its directory."""
    device, world = splits.test.labels.device, joined()
    with forked():
        torch.manual_seed(derive(run.seed, "weights"))
        model: nn.Module = run.model.build(splits.shape, len(splits.classes)).to(device)
    if isinstance(run.start, PlannedRun):
        load_weights(model, directory_of(run.start, out, plan.study).path / "last.safetensors")
    elif run.start is not None:
        load_weights(model, run.start)
    # Convolutions on a CPU take a third less time in this layout.
    lay_channels_last(model, torch.zeros(1, *splits.shape, device=device))
    origin = provenance(splits, device)
    record = directory.read_json("run.json") if directory.exists else {}
    if record != {} and _data_of(record, directory) != origin["data"]:
        raise InputError(
            f"run directory {directory.path}",
            expected="the data that the run was trained on",
            got=f"{splits.name} with other images",
            fix="Choose another directory with --out.",
        )
    finished = record.get("finished", False)
    if not finished:
        record = {
            "study": plan.study.name,
            "hash": run.hash,
            "seed": run.seed,
            "config": run.settings,
            "provenance": origin,
            "finished": False,
        }
        if world.leads:
            directory.write_json("run.json", {"label": run.label, **record})
        epochs = train(
            model,
            splits,
            run.recipe,
            run.training,
            seed=run.seed,
            run=directory,
            validation=run.validation,
            keep=plan.kept_epochs,
            watch=watch,
            world=world,
        )
        record["provenance"]["seconds"] = round(sum(e["seconds"] for e in epochs), 2)
        record["provenance"] |= {key: epochs[-1][key] for key in ("stopped",) if key in epochs[-1]}
        record |= {"finished": True, "metrics_sha256": directory.metrics_sha256()}
    if world.leads and (not finished or record.get("label") != run.label):
        directory.write_json("run.json", {**record, "label": run.label})
    for state in ("state.safetensors", "state.previous.safetensors") if world.leads else ():
        (directory.path / state).unlink(missing_ok=True)
    watch.done(run.label, "training", already=finished)
    load_weights(model, directory.path / f"{plan.study.weights}.safetensors")
    model.eval()
    if ":" in str(run.settings["model"]):  # the user's code: it can change while its name and weights stay
        _require_same_code(model, splits, directory, plan.study.weights)
    return model


def answers(model: nn.Module, splits: Splits, n: int = 16) -> Tensor:
    """Logits (n, K) of the first test images: they change with the code of a network whose weights stay."""
    with torch.no_grad():
        logits: Tensor = model(splits.test.batch(torch.arange(min(n, len(splits.test)))).x)
    return logits


def _require_same_code(model: nn.Module, splits: Splits, directory: RunDirectory, weights: str) -> None:
    """Refuse a network that answers a few images otherwise than when it was trained into ``directory``.

    By more than 2 % of its largest logit: another device may round as coarsely as that.
    """
    found = answers(model, splits, 4)
    record = directory.read_json("run.json")
    known = record.get("answers", {})
    if weights not in known:
        if joined().leads and torch.equal(found, answers(model, splits, 4)):  # else it answers at random
            directory.write_json("run.json", {**record, "answers": {**known, weights: found.tolist()}})
    elif not bool(((found - found.new_tensor(known[weights])).abs() <= 0.02 * found.abs().max()).all()):
        raise InputError(
            f"run directory {directory.path}",
            expected="the network that was trained there",
            got="other answers to the same images, with the same weights: its code has changed",
            fix="Choose another directory with --out.",
        )


def _data_of(record: Any, directory: RunDirectory) -> Any:
    try:
        return record["provenance"]["data"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"run directory {directory.path}",
            expected="a run.json that robustlens wrote",
            got="another one",
            fix="Delete that directory, or choose another one with --out.",
        ) from error


@cache
def commit() -> str:
    """The commit of the checkout that this code runs from, ending in "+" where the code differs; "" outside one."""
    place = Path(robustlens.__file__).parent

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(place), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a user's repository may hold an installed library
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def provenance(splits: Splits, device: torch.device) -> dict[str, Any]:
    """Where and from what a run was made."""
    return {
        "version": robustlens.__version__,
        **({"commit": commit()} if commit() else {}),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": joined().size,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            "name": splits.name,
            **{part: getattr(splits, part).fingerprint() for part in ("train", "valid", "test")},
            "examples": [len(splits.train), len(splits.valid), len(splits.test)],
        },
    }
