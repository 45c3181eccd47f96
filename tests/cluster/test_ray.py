"""Studies on a cluster: the same bits as here, whatever dies meanwhile, and nothing is done twice."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from safetensors import safe_open
from small_cluster import Place, alive, by_label, finished, same, until

from robustlens.results.mirror import connect
from robustlens.results.store import RunDirectory, find_runs

pytestmark = pytest.mark.cluster


def test_a_study_is_that_of_one_process_though_a_worker_is_killed_and_a_run_fails(
    place: Place, here: dict[str, RunDirectory]
) -> None:
    place.mark("kill-fast-2")
    out, err = finished(place.start("diverges", "plain", "fast", "tuned"), 1)
    assert err.startswith("error: Training stopped: ") and err.count("\n") == 1, err
    runs = by_label(find_runs([place.path / "runs"]))
    for label in ("plain", "fast", "tuned"):
        same(runs[label], here[label])
        assert place.numbers(label) == [1, 2, 3], "an epoch before the kill was trained again"
    assert len({process for _, process in place.epochs("fast")}) == 2
    log = (place.path / "runs/study/study.log").read_text()
    for text in (out, log):
        lines = text.splitlines()
        for words in (
            "fast, seed 0: retried 1 time",
            "fast, seed 0: run is done",
            "diverges, seed 0: run failed: Training stopped",
            "plain, seed 0: epoch 3, loss",
            "tuned, seed 0: accuracy is done",
        ):
            assert any(words in line for line in lines), (words, text)
    place_of = [
        next(k for k, line in enumerate(log.splitlines()) if words in line)
        for words in ("plain, seed 0: run is done", "tuned, seed 0: training begins")
    ]
    assert place_of == sorted(place_of), "a run began before the one that it starts from was done"


def test_a_cancelled_study_and_one_whose_driver_is_killed_go_on(place: Place, here: dict[str, RunDirectory]) -> None:
    place.mark(*(f"hold-{label}-{epoch}" for label in ("plain", "fast") for epoch in (1, 2)))
    driver = place.start("plain", "fast")
    until(lambda: place.numbers("plain") == place.numbers("fast") == [1], "both runs are at work")
    driver.send_signal(signal.SIGTERM)
    _, err = finished(driver, 130)
    assert err == "Stopped. Run the same command again to go on from here.\n"
    for run in find_runs([place.path / "runs"]):
        assert (run.path / "state.safetensors").is_file()
        with run.lock():
            pass

    for file in ("hold-plain-1", "hold-fast-1"):
        (place.path / file).unlink()
    driver = place.start("plain", "fast")
    until(lambda: place.numbers("plain") == place.numbers("fast") == [1, 2], "the second driver's runs are at work")
    driver.kill()
    orphans = [place.epochs(label)[-1][1] for label in ("plain", "fast")]
    driver = place.start("plain", "fast")
    until(lambda: not any(map(alive, orphans)), "the dead driver's runs are ended")
    place.release()
    finished(driver)
    runs = by_label(find_runs([place.path / "runs"]))
    for label in ("plain", "fast"):
        assert place.numbers(label) == [1, 2, 3]
        same(runs[label], here[label])


def test_a_training_that_is_cancelled_between_two_checkpoints_saves_its_steps(
    place: Place, here: dict[str, RunDirectory]
) -> None:
    place.mark("pause-plain-1")
    slowly = ("--set", "training.checkpoint_seconds=1000")
    driver = place.start("plain", options=slowly)
    until((place.path / "paused").exists, "the run is in the second step of its second epoch")
    driver.send_signal(signal.SIGTERM)
    finished(driver, 130)
    (state,) = (place.path / "runs").glob("*/*/state.safetensors")
    with safe_open(state, framework="pt") as content:
        progress = json.loads(content.metadata()["facts"])["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    (place.path / "pause-plain-1").unlink()
    finished(place.start("plain", options=slowly))
    same(by_label(find_runs([place.path / "runs"]))["plain"], here["plain"])


def test_runs_are_in_a_store_and_a_retry_need_not_wait_for_the_lease_of_the_dead(
    place: Place, here: dict[str, RunDirectory], store: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place.out = f"{store}/of-the-cluster"
    place.mark("kill-plain-2")
    out, _ = finished(place.start("plain", "tuned"))
    assert f"{place.out}/study/report.html" in out and "plain, seed 0: retried 1 time" in out
    assert {path.name for path in place.path.iterdir()} == {"study.toml", "events"}, "nothing lies here"
    local = tmp_path_factory.mktemp("pulled")
    connect(place.out).pull(local)
    for label, run in by_label(find_runs([local])).items():
        same(run, here[label])
    assert place.numbers("plain") == place.numbers("tuned") == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--address", "127.0.0.1:1"], "--address: expected the address of a running Ray cluster"),
        (["--address", "nowhere"], "--address: expected the address of a running Ray cluster"),
        (["--gpus-per-run", "8"], "expected a node with 1 CPUs and 8 GPUs, got 1 CPUs and 0 GPUs; 1 CPUs and 0 GPUs."),
    ],
)
def test_clusters_that_cannot_be_used(options: list[str], words: str, place: Place) -> None:
    _, err = finished(place.start("plain", options=options), 2)
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert {path.name for path in place.path.iterdir()} == {"study.toml"}


def test_a_node_that_goes_takes_no_run_with_it(place: Place, cluster: Any, here: dict[str, RunDirectory]) -> None:
    place.mark("hold-plain-2", "hold-fast-2")
    driver = place.start("plain", "fast")
    until(lambda: place.numbers("plain") == place.numbers("fast") == [1, 2], "both nodes are at work")
    before = {label: place.epochs(label)[-1][1] for label in ("plain", "fast")}
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    until(lambda: sum(map(alive, before.values())) == 1, "the processes of one node are gone")
    place.release()
    finished(driver)
    runs = by_label(find_runs([place.path / "runs"]))
    moved = [label for label in before if place.epochs(label)[-1][1] != before[label]]
    assert len(moved) == 1
    for label in before:
        assert place.numbers(label) == [1, 2, 3]
        same(runs[label], here[label])
