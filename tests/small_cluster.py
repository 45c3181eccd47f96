"""A Ray cluster of two nodes and an object store, both on this machine: a pytest plug-in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from robustlens.results.store import RunDirectory
from robustlens.studies.config import make_study, write_study
from robustlens.studies.run import run_study

BUCKET = "runs-of-tests"
TESTS = Path(__file__).parent

#: Settings of the methods of the tests' studies; "tuned" starts from "plain".
METHODS = {
    "plain": {"label": "plain"},
    "fast": {"label": "fast", "objective": {"name": "adversarial", "attack": {"name": "fgsm", "threat": "linf:0.1"}}},
    "tuned": {"label": "tuned", "start": "plain", "training": {"optimizer": {"lr": 0.01}}},
    "diverges": {"label": "diverges", "training": {"optimizer": {"lr": 1e38}}},
}


def settings(*labels: str) -> dict[str, Any]:
    return {
        "name": "study",
        "data": {"source": "digits", "classes": [0, 1], "train": 60, "valid": 20, "test": 30},
        "model": "logistic",
        "threat": "linf:0.1",
        "methods": [METHODS[label] for label in labels],
        "training": {"epochs": 3, "batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.05}},
        "validation": {"name": "fgsm"},
        "lenses": [{"name": "accuracy", "pictures": 0}],
    }


def by_label(runs: list[RunDirectory]) -> dict[str, RunDirectory]:
    return {str(run.read_json("run.json")["label"]): run for run in runs}


def same(run: RunDirectory, other: RunDirectory, *, weights: bool = True) -> None:
    """Both came to the same: weights to the bit, records but for their times, readings."""
    for name in ("last.safetensors", "best.safetensors") if weights else ():
        assert (run.path / name).read_bytes() == (other.path / name).read_bytes(), name
    mine, theirs = ([{**record, "seconds": 0} for record in each.metrics()] for each in (run, other))
    assert mine == theirs
    told, others = ([(r.lens, r.says, r.quantities) for r in each.readings()] for each in (run, other))
    assert told == others and len(told) == 1


def until(true: Callable[[], bool], what: str, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} seconds: {what}"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class Place:
    """A working directory with a study in it, whose runs a driver of its own process carries out on the cluster."""

    path: Path
    address: str
    out: str = "runs"
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *labels: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        (self.path / "study.toml").write_text(write_study(make_study(settings(*labels))))
        command = [sys.executable, "-m", "robustlens", "study", "study.toml", "--out", self.out]
        command += ["--executor", "ray", "--address", self.address, "--track", "cluster_trackers:Follow", *options]
        pipe = subprocess.PIPE
        self.drivers.append(subprocess.Popen(command, cwd=self.path, stdout=pipe, stderr=pipe, text=True))
        return self.drivers[-1]

    def mark(self, *names: str) -> None:
        for name in names:
            (self.path / name).touch()

    def release(self) -> None:
        for file in self.path.glob("hold-*"):
            file.unlink()

    def epochs(self, label: str) -> list[tuple[int, int]]:
        """(epoch, process) in the order in which they ended."""
        file = self.path / "events"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(epoch), int(process)) for name, epoch, process in lines if name == label]

    def numbers(self, label: str) -> list[int]:
        return [epoch for epoch, _ in self.epochs(label)]


def finished(driver: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == code, out + err
    return out, err


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """An S3 store on this machine; returns an address in it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}"
    server.stop()


@pytest.fixture(scope="session")
def cluster(store: str) -> Iterator[Any]:
    """Two nodes with one CPU each; the store's address is in their environment."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(**node)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def place(cluster: Any, tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path, cluster.address)
    yield found
    found.release()
    for driver in found.drivers:
        driver.kill()
        driver.wait()
        for pipe in (driver.stdout, driver.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """The same runs, carried out one after the other in this process."""
    out = tmp_path_factory.mktemp("here")
    return by_label(run_study(make_study(settings("plain", "fast", "tuned")), out, device="cpu"))
