"""The audit log: one JSON line for every change of an adapter and every refusal, never a key or a prompt.

    {"time": 1767.5, "action": "adapter.load", "result": "ok", "key_id": "ci", "client": "10.0.0.7", ...}

Lines are put together on the event loop and written by a thread, so that a slow disk stalls nobody. The
file is only ever appended to, one `write` a batch of whole lines; when it was moved away or deleted (as
log rotation does), the next batch opens a new one. Refusals that come faster than the disk takes them
are counted instead, and the count is written; changes of adapters are always kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig, LoramuxError
from loramux.server.adapter_orders import AdapterChange
from loramux.server.errors import code_of

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S: Final = 5.0  # a disk that hangs must not keep the server from ending
_MAX_BATCH: Final = 512
_MAX_SHOWN: Final = 512  # characters of a name or a path


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who does something: the sender of a request."""

    key_id: str | None = None
    client: str | None = None  # address, as far as trusted proxies tell
    request_id: str | None = None


_NO_REQUEST: Final = Actor()  # the server acts by itself: flags, files, replays
# A request's task sets it, and the tasks that it starts inherit it.
_actor: ContextVar[Actor] = ContextVar("loramux_actor", default=_NO_REQUEST)


def set_actor(actor: Actor) -> None:
    """Note for whom this task works from now on."""
    _actor.set(actor)


class AuditLog:
    """Writes lines to a file; without a path it does nothing.

    Args:
        path: of the file; made if it does not exist, readable by its owner only.
        max_queued: lines that may wait for the disk before refusals are only counted.
        clock: Unix seconds.

    Raises:
        InvalidConfig: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_queued: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._max_queued = max_queued
        self._clock = clock
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._num_lost = 0
        self._is_failing = False
        self._file: int | None = None
        self._writer: threading.Thread | None = None
        if path is not None:
            try:
                self._file = _open(path)
            except OSError as error:
                message = f"--audit-log {path} cannot be written: {error.strerror}"
                raise InvalidConfig(message, param="--audit-log") from error
            self._writer = threading.Thread(target=self._write_all, name="audit", daemon=True)
            self._writer.start()

    def changed(self, change: AdapterChange) -> None:
        """Somebody asked for a change of an adapter, and this came of it."""
        error = change.error
        self._put(
            {
                "action": f"adapter.{change.action}",
                "result": "ok" if error is None else "error",
                **_who(),
                "origin": change.origin,
                "name": _shown(change.name),
                "source": change.source,
                "digest": change.digest,
                "version_before": change.version_before,
                "version_after": change.version_after,
                "bytes": change.nbytes,
                "pinned": change.pinned,
                "code": code_of(error) if error is not None else None,
                "duration_s": round(change.duration_s, 6),
            }
        )

    def keys_changed(self, num_keys: int, *, is_done: bool) -> None:
        """The keys file was read again; there are so many keys now."""
        self._put({"action": "keys.reload", "result": "ok" if is_done else "error", "num_keys": num_keys})

    def denied(self, error: LoramuxError, *, method: str, path: str, name: str | None = None) -> None:
        """A request was refused for who sent it."""
        if self._queue.qsize() >= self._max_queued:
            self._num_lost += 1
            return
        self._put(
            {
                "action": "denied",
                "result": "denied",
                **_who(),
                "method": method,
                "path": _shown(path),
                "name": _shown(name) if name is not None else None,
                "code": code_of(error),
            }
        )

    def flush(self) -> None:
        """Return when everything so far was written, or lost."""
        if self._writer is not None:
            written = threading.Event()
            self._queue.put(written)
            written.wait()

    def close(self) -> None:
        """Write what is left, and end."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join(_CLOSE_TIMEOUT_S)
            self._writer = None

    def _put(self, entry: dict[str, Any]) -> None:
        if self._writer is None:
            return
        lost, self._num_lost = self._num_lost, 0
        if lost:
            self._queue.put(self._line({"action": "lost", "result": "denied", "num_lost": lost}))
        self._queue.put(self._line(entry))

    def _line(self, entry: dict[str, Any]) -> bytes:
        known = {name: value for name, value in entry.items() if value is not None}
        return msgspec.json.encode({"time": round(self._clock(), 6), **known}) + b"\n"

    def _write_all(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _MAX_BATCH:
                    batch.append(self._queue.get_nowait())
            is_open = None not in batch
            self._write(b"".join(line for line in batch if isinstance(line, bytes)))
            for waiting in batch:
                if isinstance(waiting, threading.Event):
                    waiting.set()
        if self._file is not None:
            os.close(self._file)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        try:
            self._follow_rotation()
            assert self._file is not None
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            if not self._is_failing:
                logger.error("--audit-log %s: lines are lost: %s", self._path, error.strerror)
            self._is_failing = True
        else:
            self._is_failing = False

    def _follow_rotation(self) -> None:
        """Open the file again if another one, or none, has its name now."""
        assert self._path is not None
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                named, own = os.stat(self._path), os.fstat(self._file)
                if (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino):
                    return
            os.close(self._file)
            self._file = None
        self._file = _open(self._path)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _who() -> dict[str, Any]:
    actor = _actor.get()
    return {"key_id": actor.key_id, "client": actor.client, "request_id": actor.request_id}


def _shown(text: str) -> str:
    """A client's text for one line: plain ASCII, control characters escaped, not too long."""
    return text.encode("unicode_escape").decode()[:_MAX_SHOWN]
