"""A lock on a directory in an object store: a lease that its holder renews, so that a dead holder's runs out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import uuid
from typing import Any

from robustlens.results.errors import RunInUse

#: A lease that was not renewed for so many seconds is free; the clock is the store's.
STALE = 120.0

#: Seconds between renewals.
RENEW = 20.0


class Lease:
    """Who works in the directory ``root`` of the store ``fs``.

    Locks are the objects ``lock-1``, ``lock-2``, …: the highest one counts. Taking the lease is creating the next one,
    which a store lets only one process do, and giving it back is writing "free" into it. A thread renews it, and
    ``confirm`` notices if somebody else took it over meanwhile. Of two processes with the same ``owner`` the later one
    takes the lease over at once: the retry of a task knows that the task's earlier process is dead.
    """

    def __init__(self, fs: Any, root: str, owner: str | None = None) -> None:
        self.fs, self.root = fs, root
        self.token = uuid.uuid4().hex
        self.owner = owner or self.token
        self.number = 0
        self._ended = threading.Event()
        self._renewing = threading.Lock()

    def take(self) -> None:
        """Hold the directory, or raise RunInUse, naming the holder."""
        number, holder = self._highest()
        if holder["state"] == "held" and holder["owner"] != self.owner and (age := self._age(number)) < STALE:
            raise self._in_use(f"one held by {holder['by']}, which gave a sign of life {age:.0f} seconds ago")
        self.number = number + 1
        try:
            self.fs.pipe_file(self._file(self.number), self._record("held"), mode="create")
        except OSError as error:
            if self._highest()[0] == number:  # nobody was faster: the store refuses to write
                raise
            raise self._in_use("one that another process just took") from error
        self.confirm()
        threading.Thread(target=self._keep, daemon=True).start()

    def confirm(self) -> None:
        """Renew the lease; raise RunInUse if it ran out and somebody else took it over."""
        with self._renewing:
            number, holder = self._highest()
            if (number, holder["token"]) != (self.number, self.token):
                raise self._in_use(f"one that {holder['by']} took over")
            self.fs.pipe_file(self._file(self.number), self._record("held"))

    def give_back(self) -> None:
        """Free the directory; what cannot be reached any more frees itself after a while."""
        self._ended.set()
        with contextlib.suppress(Exception), self._renewing:
            number, holder = self._highest()
            if (number, holder["token"]) == (self.number, self.token):
                self.fs.pipe_file(self._file(number), self._record("free"))
                for older in self._numbers() - {number}:
                    self.fs.rm_file(self._file(older))

    def _keep(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(Exception):  # a store that is away for a moment; the next push says so if it stays
                if not self._ended.is_set():
                    self.confirm()

    def _numbers(self) -> set[int]:
        try:
            names = [name.rstrip("/").rpartition("/")[2] for name in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return set()
        return {int(name.removeprefix("lock-")) for name in names if name.startswith("lock-")}

    def _highest(self) -> tuple[int, dict[str, str]]:
        number = max(self._numbers(), default=0)
        if number == 0:
            return 0, {"state": "free", "owner": "", "token": "", "by": "nobody"}
        try:
            return number, json.loads(self.fs.cat_file(self._file(number)))
        except FileNotFoundError:  # superseded since the listing
            return self._highest()

    def _age(self, number: int) -> float:
        """Seconds since the lock was written, by the store's own clock: machines' clocks disagree."""
        probe = f"{self.root}/clock-{self.token}"
        self.fs.pipe_file(probe, b"")
        now = self.fs.modified(probe)
        self.fs.rm_file(probe)
        return float((now - self.fs.modified(self._file(number))).total_seconds())

    def _file(self, number: int) -> str:
        return f"{self.root}/lock-{number}"

    def _record(self, state: str) -> bytes:
        by = f"process {os.getpid()} on {platform.node()}"
        return json.dumps({"state": state, "owner": self.owner, "token": self.token, "by": by}).encode()

    def _in_use(self, got: str) -> RunInUse:
        return RunInUse(
            f"run directory {self.root}",
            expected="a directory that no other process works in",
            got=got,
            fix=f"Wait for it to end (the directory of a dead process is free after {STALE:.0f} seconds), or choose "
            "another one with --out.",
        )
