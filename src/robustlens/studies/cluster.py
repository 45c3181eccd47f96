"""A study on many machines: every run is a Ray task, which is retried where its process or its machine dies.

The checkpoints make that safe: a retry goes on where the dead process left the run, and a study whose driver died is
started again like any other. Ray is loaded only when this is used, and its usage statistics are off.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustlens.core.signals import heeded
from robustlens.core.types import Splits
from robustlens.data.sources import load
from robustlens.results.errors import InputError, RobustlensError, RunInUse
from robustlens.results.mirror import is_remote, pull_numbers, scratch
from robustlens.results.store import RunDirectory
from robustlens.studies.config import StudyConfig
from robustlens.studies.mail import Mailbox, Reporter
from robustlens.studies.plan import Plan, PlannedRun, make_plan
from robustlens.studies.run import carry_out, directory_of, pick_device, rehearse
from robustlens.studies.tracking import find_trackers, study_log
from robustlens.studies.watch import Board, RunWatch, SilentStudy, Watches

#: How often a run is begun again after its process or its machine died.
RETRIES = 5

#: Seconds that a run waits for a directory that another process holds: longer than a dead one's lease.
PATIENCE = 180.0

#: Seconds that cancelled runs have to leave their directories before their processes are ended.
LEAVE = 20.0


def run_study_on_ray(
    study: StudyConfig,
    out: str | Path = "runs",
    *,
    device: str = "auto",
    board: Board | None = None,
    track: Sequence[str] = (),
    address: str | None = None,
    cpus_per_run: float = 1,
    gpus_per_run: float = 0,
) -> list[RunDirectory]:
    """Carry out ``study`` as ``run_study`` does, each run as a task of the Ray cluster at ``address``.

    Without an address a cluster of this machine is started, and ended with this call. Everything is checked here before
    anything is submitted. Every node must have the same robustlens and reach the data set and ``out``. A run that fails
    stops no other; the first failure is raised at the end. KeyboardInterrupt and SIGTERM cancel the runs, which keep
    their checkpoints.

    Raises:
        InputError: something in the study cannot be used, Ray is not installed or not there, other data on a node.
        TrainingStopped: a run diverged.
        RobustlensError: a run's process died again and again.
    """
    plan = make_plan(study)
    find_trackers(track)
    if device == "auto" and gpus_per_run == 0:
        device = "cpu"
    pick_device("cpu" if device.startswith("cuda") else device)  # the GPUs are the nodes'
    splits = load(study.data)
    for run in plan.runs:
        rehearse(run, splits, plan.lenses)
    prints = _fingerprints(splits)
    out = str(out) if is_remote(out) else Path(out).resolve()
    with connected(address) as ray:
        _require_room(ray, cpus_per_run, gpus_per_run)
        with study_log(out, study.name) as log:
            mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=_here(ray)).remote()
            task = ray.remote(work).options(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=RETRIES)
            watches: list[RunWatch] = []
            references: list[Any] = []
            session = uuid.uuid4().hex
            for number, run in enumerate(plan.runs):
                watches.append(Watches(log.of(run), board.of(run) if board else SilentStudy()))
                start = references[plan.runs.index(run.start)] if isinstance(run.start, PlannedRun) else None
                facts = {"hash": run.hash, "data": prints, "cwd": str(Path.cwd()), "owner": f"{session}-{run.hash}"}
                references.append(task.remote(study, number, facts, out, device, list(track), mailbox, start))
            errors = _follow(ray, plan, references, watches, mailbox)
    if errors:
        raise errors[0]
    if is_remote(out):
        pull_numbers(str(out))
        out = scratch(str(out))
    return [directory_of(run, out, study) for run in plan.runs]


def work(
    study: StudyConfig,
    number: int,
    facts: dict[str, Any],
    out: str | Path,
    device: str,
    track: list[str],
    mailbox: Any,
    start: RobustlensError | None,
) -> RobustlensError | None:
    """Carry out one run of ``study`` on a node of the cluster; returns what a user did or met, raises what is a bug.

    ``start`` is what the run came to whose weights this one starts from, which makes Ray wait for it.
    """
    import ray

    if start is not None:
        return RobustlensError("Not begun, because the run that it starts from failed.")
    reporter = Reporter(number, mailbox.put.remote)
    reporter.send([(number, "attempt", (), {})])
    try:
        with contextlib.chdir(facts["cwd"]) if Path(facts["cwd"]).is_dir() else contextlib.nullcontext():
            plan, splits = _same(study, number, facts)
            splits, trackers = splits.to(pick_device(device)), find_trackers(track)
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    with heeded():  # a cancelled training finishes its step and saves it
                        found = carry_out(plan, number, splits, out, reporter, trackers=trackers, owner=facts["owner"])
                    break
                except RunInUse:  # perhaps by a process that is about to end, or dead
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(1)
        if is_remote(out):
            shutil.rmtree(found.path)
    except RobustlensError as error:
        return error
    finally:
        ray.get(reporter.flush())
    return None


def _same(study: StudyConfig, number: int, facts: dict[str, Any]) -> tuple[Plan, Splits]:
    """The plan and the data, which must be those that the driver checked."""
    plan, splits = make_plan(study), load(study.data)
    for what, mine, theirs in (
        ("robustlens", plan.runs[number].hash, facts["hash"]),
        ("data", _fingerprints(splits), facts["data"]),
    ):
        if mine != theirs:
            raise InputError(
                f"node {platform.node()}",
                expected=f"the same {what} as where the study was started",
                got="another one",
                fix="Give every node the same version of robustlens and the same files.",
            )
    return plan, splits


def _fingerprints(splits: Splits) -> list[str]:
    return [split.fingerprint() for split in (splits.train, splits.valid, splits.test)]


def _follow(ray: Any, plan: Plan, references: list[Any], watches: list[RunWatch], mailbox: Any) -> list[Exception]:
    """Wait for all runs and pass on what they tell; returns the errors of those that failed."""
    attempts, errors, waiting = [0] * len(references), [], list(references)
    with terminating():
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=0.5)
                for number, event, arguments, named in ray.get(mailbox.take.remote()):
                    if event != "attempt":
                        getattr(watches[number], event)(*arguments, **named)
                        continue
                    attempts[number] += 1
                    if attempts[number] > 1:
                        watches[number].retried(attempts[number] - 1)
                for reference in ended:
                    number = references.index(reference)
                    if error := _outcome(ray, reference, plan.runs[number]):
                        errors.append(error)
                        watches[number].failed(plan.runs[number].label, "run", str(error).strip().splitlines()[-1])
                    else:
                        watches[number].ended()
        except KeyboardInterrupt:
            for reference in waiting:
                ray.cancel(reference)
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LEAVE)
            for reference in waiting:
                ray.cancel(reference, force=True)
            raise
    return errors


def _outcome(ray: Any, reference: Any, run: PlannedRun) -> Exception | None:
    """The error that a run ended with, if any."""
    try:
        found: RobustlensError | None = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # a bug, with its traceback
        return Exception(str(error))
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[0]
        return RobustlensError(
            f"The process of the run {run.label!r}, seed {run.seed}, ended {RETRIES + 1} times ({why}). Its checkpoint "
            "is kept. Give it more memory, or fewer runs to one machine with --cpus-per-run."
        )
    return found


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address`` or to one of this machine that ends with it.

    Raises:
        InputError: Ray is not installed, or there is no cluster at ``address``.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--executor ray", expected="the package ray", got="none", fix="Run: pip install 'robustlens[cluster]'."
        ) from error
    try:
        if address not in (None, "auto"):  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        own = {"include_dashboard": False, "object_store_memory": 100 * 2**20} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            "--address",
            expected='the address of a running Ray cluster, HOST:PORT, or "auto"',
            got=f"{address!r}: {str(error).strip().splitlines()[0]}",
            fix="Start one with `ray start --head`, or leave the address out.",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_room(ray: Any, cpus: float, gpus: float) -> None:
    """Raise InputError if no node is large enough for a run: Ray would wait for one for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise InputError(
            "Ray cluster",
            expected=f"a node with {cpus:g} CPUs and {gpus:g} GPUs",
            got="; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes),
            fix="Ask for less with --cpus-per-run and --gpus-per-run, or start such a node.",
        )


def _here(ray: Any) -> Any:
    """Where the driver is: other nodes may go while the study goes on."""
    node = ray.get_runtime_context().get_node_id()
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt in here."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
