"""A stand-in for the Hugging Face Hub: its real routes over real HTTP, with switches for faults.

GET  /api/models/{org}/{repo}/revision/{rev}        commit and names of all files
GET  /api/models/{org}/{repo}/tree/{commit}[/{sub}] sizes and hashes, in pages with a Link header
GET, HEAD  /{org}/{repo}/resolve/{commit}/{path}    a file's bytes, with Range
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ROUTES = (
    ("state", re.compile(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)")),
    ("tree", re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")),
    ("resolve", re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)")),
)
_LARGE_BYTES = 256  # files from this size on are kept as large files, with a sha256


@dataclass
class Faults:
    """What goes wrong. A number counts down with each request that it spoils; -1 spoils all."""

    status: int = 0  # this status ...
    status_for: str = ".*"  # ... for paths that match
    num_status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # ... with these headers
    cut_after_bytes: int | None = None  # the connection closes inside a file
    num_cuts: int = 0
    stall_after_bytes: int | None = None  # the file's bytes stop coming, the connection stays
    num_stalls: int = 0
    wrong_bytes: int = 0  # so many times a large file comes with other content
    redirect_to: str | None = None  # files lie elsewhere
    page_entries: int = 1000  # in one page of a tree
    ignore_range: bool = False
    commit_header: str | None = None  # the commit that answers claim to be of


@dataclass
class Repository:
    """A repository: commits, and names for them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # who does not send it may not read


class HubServer:
    """The server's state. `requests` lists (method, path, headers) of everything that was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stalled = threading.Event()  # set when a file's bytes have stopped coming
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit with exactly these files; returns its id."""
        repository = self.repos.setdefault(repo, Repository())
        content = repr(sorted(files.items())) + str(len(repository.commits))
        commit = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def count(self, pattern: str) -> int:
        """How many requests had a path that matches."""
        return sum(re.search(pattern, path) is not None for _, path, _ in self.requests)


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    """A hub on a free port, stopped at the end."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 5  # of an idle connection: the server waits for its threads at the end
    wbufsize = 0

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, self.path, headers))
        self.close_connection = True
        if self._spoils("num_status") and re.search(hub.faults.status_for, self.path):
            self._take("num_status")
            self._answer(hub.faults.status, b"spoilt", hub.faults.headers)
            return
        for kind, pattern in _ROUTES:
            match = pattern.fullmatch(url.path)
            if match:
                repo, revision, *rest = (unquote(part) if part else "" for part in match.groups())
                self._route(kind, repo, revision, rest[0] if rest else "", parse_qs(url.query))
                return
        self._answer(404, b"no such route")

    def _route(self, kind: str, repo: str, revision: str, path: str, query: dict[str, list[str]]) -> None:
        repository = self.hub.repos.get(repo)
        sent = self.headers.get("authorization")
        if repository is None:
            self._answer(401, b"{}", {"x-error-code": "RepoNotFound"})
            return
        if repository.token is not None and sent != f"Bearer {repository.token}":
            self._answer(403 if sent else 401, b"{}", {"x-error-code": "GatedRepo"})
            return
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            self._answer(404, b"{}", {"x-error-code": "RevisionNotFound"})
        elif kind == "state":
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._json({"id": repo, "sha": commit, "siblings": siblings})
        elif kind == "tree":
            self._tree(files, path, int(query.get("cursor", ["0"])[0]))
        elif path in files:
            self._file(files[path], commit)
        else:
            self._answer(404, b"{}", {"x-error-code": "EntryNotFound"})

    def _tree(self, files: dict[str, bytes], folder: str, cursor: int) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [(name, data) for name, data in sorted(files.items()) if name.startswith(prefix)]
        folders = {name[len(prefix) :].split("/")[0] for name, _ in inside if "/" in name[len(prefix) :]}
        entries = [
            {"type": "directory", "path": prefix + name, "oid": "0", "size": 0} for name in sorted(folders)
        ]
        entries += [_entry(name, data) for name, data in inside if "/" not in name[len(prefix) :]]
        if not entries:
            self._answer(404, b"{}", {"x-error-code": "EntryNotFound"})
            return
        end = cursor + self.hub.faults.page_entries
        following = f'<{self.hub.url}{self.path.split("?")[0]}?cursor={end}>; rel="next"'
        self._json(entries[cursor:end], {"link": following} if end < len(entries) else {})

    def _file(self, data: bytes, commit: str) -> None:
        faults = self.hub.faults
        if faults.redirect_to is not None:
            self._answer(302, b"", {"location": faults.redirect_to})
            return
        large = len(data) >= _LARGE_BYTES
        headers = {"x-repo-commit": faults.commit_header or commit, "accept-ranges": "bytes"}
        headers["etag"] = f'"{hashlib.sha256(data).hexdigest() if large else _git_sha1(data)}"'
        if large:
            headers["x-linked-size"] = str(len(data))
            headers["x-linked-etag"] = headers["etag"]
        if large and self._spoils("wrong_bytes"):
            self._take("wrong_bytes")
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if start is None or faults.ignore_range:
            self._send(200, data, headers)
            return
        first = int(start[1])
        headers["content-range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206, data[first:], headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        self._head(status, len(data), headers)
        if self.command == "HEAD":
            return
        if (
            faults.cut_after_bytes is not None
            and len(data) > faults.cut_after_bytes
            and self._spoils("num_cuts")
        ):
            self._take("num_cuts")
            self._write(data[: faults.cut_after_bytes])
        elif (
            faults.stall_after_bytes is not None
            and len(data) > faults.stall_after_bytes
            and self._spoils("num_stalls")
        ):
            self._take("num_stalls")
            self._write(data[: faults.stall_after_bytes])
            self.hub.stalled.set()
            self.hub.closing.wait(30)
        else:
            self._write(data)

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), headers or {})
        if self.command != "HEAD":
            self._write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length))
        self.send_header("connection", "close")
        self.end_headers()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    def _spoils(self, name: str) -> bool:
        return int(getattr(self.hub.faults, name)) != 0

    def _take(self, name: str) -> None:
        with self.hub.lock:
            left = int(getattr(self.hub.faults, name))
            setattr(self.hub.faults, name, left - 1 if left > 0 else left)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
    if len(data) >= _LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
