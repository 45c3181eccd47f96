"""Run directories at any place that fsspec reaches (s3://bucket/runs): a run works in a local copy that is mirrored.

Files are pushed whole, in an order in which what is there can always be used: weights before the checkpoint that counts
on them, a reading's tables before its ``reading.json``, ``run.json`` last. A reading without ``reading.json`` does not
exist. Nothing is deleted there but the checkpoints of finished work.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from robustlens.results.errors import InputError
from robustlens.results.lease import Lease

#: What is pushed after everything else, in this order.
LAST = ("reading.json", "state.safetensors", "run.json")

#: Seconds between looks for new checkpoints while a run takes its steps.
LOOK = 1.0


def is_remote(place: str | Path) -> bool:
    """Whether ``place`` is an address such as s3://bucket/runs, and not a path."""
    return "://" in str(place)


@dataclass(frozen=True)
class Place:
    """A directory in a store: its ``url``, and the file system and path that it is reached by."""

    url: str
    fs: Any
    root: str

    def below(self, name: str) -> Place:
        return Place(f"{self.url}/{name}", self.fs, f"{self.root}/{name}")

    def directories(self) -> list[str]:
        """The names of the directories in it."""
        with _reached(self.url):
            found = self.fs.ls(self.root, detail=True) if self.fs.exists(self.root) else []
            return [each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory"]

    def files(self) -> list[str]:
        """Everything in it and below that is a run's, as relative paths, without readings that are not finished."""
        with _reached(self.url):
            start = len(self.root) + 1
            found = [path[start:] for path in self.fs.find(self.root)] if self.fs.exists(self.root) else []
        there = set(found)
        return [name for name in found if _is_kept(name) and (_reading(name) or name) in there]

    def pull(self, local: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copy the ``wanted`` files into ``local``."""
        for name in filter(wanted, self.files()):
            with _reached(f"{self.url}/{name}"):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                scratch = (local / name).with_name(f".tmp-{uuid.uuid4().hex}")
                self.fs.get_file(f"{self.root}/{name}", str(scratch))
                os.replace(scratch, local / name)

    def push(self, local: Path, names: Iterable[str]) -> None:
        """Copy files of ``local`` there, each whole."""
        for name in names:
            with _reached(f"{self.url}/{name}"):
                self.fs.put_file(str(local / name), f"{self.root}/{name}")

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with _reached(f"{self.url}/{name}"):
                self.fs.rm_file(f"{self.root}/{name}")


def connect(url: str) -> Place:
    """The place at ``url``; raises InputError if fsspec cannot reach it."""
    import fsspec  # loaded only where a place is remote

    url = url.rstrip("/")
    with _reached(url):
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        if isinstance(fs, fsspec.implementations.local.LocalFileSystem):
            fs.auto_mkdir = True
        fs.exists(root)
    return Place(url, fs, str(root))


@functools.cache
def scratch(url: str) -> Path:
    """The local directory that stands for ``url`` in this process; it goes when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="robustlens-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


class Mirror:
    """The run directory ``local`` and its copy at ``place``, held by a lease while this is entered.

    Entering pulls what is there; ``push`` copies what changed; leaving pushes once more and gives the lease back.
    """

    def __init__(self, place: Place, local: Path, owner: str | None = None) -> None:
        self.place, self.local = place, local
        self.lease = Lease(place.fs, place.root, owner)
        self._pushed: dict[str, tuple[int, int, int]] = {}
        self._looked = 0.0

    def __enter__(self) -> Self:
        with _reached(self.place.url):
            self.lease.take()
        try:
            for path in self.local.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.place.pull(self.local)
            self._pushed = self._there()
        except BaseException:
            self.lease.give_back()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.push()
        finally:
            self.lease.give_back()

    def push(self) -> None:
        """Copy what changed since the last time, and remove the checkpoints of what is finished.

        Raises:
            RunInUse: somebody else took the run over, because this process was not heard of for too long.
            InputError: the place cannot be written to.
        """
        now = self._there()
        changed = [name for name in now if now[name] != self._pushed.get(name)]
        gone = [name for name in self._pushed if name not in now and _is_state(name)]
        if not changed and not gone:
            return
        with _reached(self.place.url):
            self.lease.confirm()
        self.place.push(self.local, sorted(changed, key=_turn))
        self.place.remove(gone)
        self._pushed = now

    def push_now_and_then(self) -> None:
        """``push``, but no more often than once in ``LOOK`` seconds."""
        if time.monotonic() - self._looked >= LOOK:
            self.push()
            self._looked = time.monotonic()

    def _there(self) -> dict[str, tuple[int, int, int]]:
        """Every file that is a run's, and what changes when it is written."""
        paths = [path for path in self.local.rglob("*") if path.is_file()]
        stats = {path.relative_to(self.local).as_posix(): path.stat() for path in paths}
        return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats.items() if _is_kept(name)}


def pull_numbers(url: str) -> None:
    """Copy the numbers of all runs below ``url`` into its scratch directory, without weights."""
    connect(url).pull(scratch(url), _is_number)


def fetched(places: Sequence[str | Path]) -> list[str | Path]:
    """``places``, where each remote one is a local copy of the numbers of its runs, without weights.

    Raises:
        InputError: a place cannot be reached.
    """
    found: list[str | Path] = []
    for place in places:
        if is_remote(place):
            pull_numbers(str(place))
            found.append(scratch(str(place)))
        else:
            found.append(place)
    return found


def publish(file: Path, home: Path, url: str) -> str:
    """Copy ``file`` below ``home`` to the same place below ``url``; returns its address there."""
    name = file.relative_to(home).as_posix()
    connect(url).push(home, [name])
    return f"{url.rstrip('/')}/{name}"


def _turn(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (LAST.index(last) + 1 if last in LAST else 0), name


def _reading(name: str) -> str:
    """The ``reading.json`` of the reading that the file belongs to; empty for other files."""
    before, readings, after = name.rpartition("readings/")
    return f"{before}{readings}{after.partition('/')[0]}/reading.json" if readings else ""


def _is_kept(name: str) -> bool:
    *above, last = name.split("/")
    return last != "lock" and not any(part.startswith((".tmp-", "lock-", "clock-")) for part in (*above, last))


def _is_state(name: str) -> bool:
    return name in ("state.safetensors", "state.previous.safetensors") or name.startswith("state/")


def _is_number(name: str) -> bool:
    return name.endswith(("run.json", "metrics.jsonl")) or bool(_reading(name))


@contextmanager
def _reached(what: str) -> Iterator[None]:
    """Every store has errors of its own: they become one that says which place could not be used."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            f"place {what}",
            expected="one that fsspec reaches and that can be read and written",
            got=f"{type(error).__name__}: {lines[0] if lines else 'no reason'}",
            fix="Check the address and the credentials; s3:// needs the package s3fs, gs:// the package gcsfs.",
        ) from error
