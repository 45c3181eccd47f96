"""A Hugging Face Hub on loopback: the part of its HTTP interface that downloading a data set needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: A repository's files, by path.
Files = Mapping[str, bytes]


class Hub(ThreadingHTTPServer):
    """Serves ``repositories``, each by its owner/name, and notes the requests for files in ``downloads``."""

    def __init__(self, repositories: Mapping[str, Files]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories = repositories
        self.downloads: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(repositories: Mapping[str, Files]) -> Iterator[Hub]:
    """A running hub."""
    with Hub(repositories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        kind, _, rest = path.removeprefix("/api").strip("/").partition("/")
        owner, name, *parts = [*rest.split("/"), "", ""][: rest.count("/") + 1] if "/" in rest else (rest, "")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if kind != "datasets" or repository is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api"):
            self._describe(f"{owner}/{name}", repository, parts, recursive="recursive=true" in address.query.lower())
        else:
            self._file(repository, "/".join(parts[2:]))

    do_HEAD = do_POST = do_GET

    def _describe(self, identifier: str, repository: Files, parts: list[str], *, recursive: bool) -> None:
        match parts:
            case [] | ["revision", _]:
                siblings = [{"rfilename": path} for path in repository]
                found = {"id": identifier, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
                self._json(found | {"downloads": 0, "likes": 0, "tags": []})
            case ["tree", _, *folders]:
                self._json(_tree(repository, "".join(f"{folder}/" for folder in folders), recursive=recursive))
            case ["paths-info", _]:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
                self._json([_entry(path, repository[path]) for path in asked if path in repository])
            case _:
                self._send(404, b"{}")

    def _file(self, repository: Files, path: str) -> None:
        if path not in repository:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            self.server.downloads.append(path)
        data = repository[path]
        self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def _tree(repository: Files, inside: str, *, recursive: bool) -> list[dict[str, object]]:
    here = {path: data for path, data in repository.items() if path.startswith(inside)}
    folders = {path[: path.index("/", len(inside))] for path in here if "/" in path[len(inside) :]}
    files = [_entry(path, data) for path, data in here.items() if recursive or "/" not in path[len(inside) :]]
    return [{"type": "directory", "path": folder, "size": 0, "oid": COMMIT} for folder in sorted(folders)] + files


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
