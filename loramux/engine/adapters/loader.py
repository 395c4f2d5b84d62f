"""Reads adapters in a thread of its own, so that the step loop never waits for a file.

safetensors and torch release the interpreter while they read and convert; finished adapters are put
into a queue, and a byte on a socket pair wakes the loop when it sleeps.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from loramux.engine.adapters.weights import HostAdapter
from loramux.engine.errors import LoramuxError
from loramux.engine.types import AdapterSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """The end of one load: the adapter, or why not."""

    call_id: int
    result: HostAdapter | LoramuxError


class AdapterLoader:
    """One background thread and the queue of what it finished."""

    def __init__(self, read: Callable[[AdapterSpec], HostAdapter]) -> None:
        self._read = read
        self._jobs: queue.SimpleQueue[tuple[int, AdapterSpec] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    @property
    def wake_fd(self) -> int:
        """Readable when something finished; for the loop's poller."""
        return self._wake_read.fileno()

    def submit(self, call_id: int, spec: AdapterSpec) -> None:
        """Queue a load; its end appears in `finished`."""
        self._jobs.put((call_id, spec))

    def finished(self) -> list[Loaded]:
        """Everything that ended since the last call."""
        if self._done.empty():
            return []
        self._wake_read.recv(4096)
        out = []
        while not self._done.empty():
            out.append(self._done.get())
        return out

    def close(self) -> None:
        """End the thread after its current job."""
        self._jobs.put(None)
        self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call_id, spec = job
            try:
                result: HostAdapter | LoramuxError = self._read(spec)
            except LoramuxError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - a thread's top: one bad file must not end it
                result = LoramuxError(f"reading the adapter failed: {error!r}")
            self._done.put(Loaded(call_id, result))
            self._wake_write.send(b"\0")
