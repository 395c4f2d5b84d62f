"""Moves adapters up the tiers in a thread of its own, so that the step loop never waits for a file.

Reading and unpacking go on without the interpreter (`unpacking.py`, `transfer.py`). The thread has the step
loop's own priority: one that steps back may be made to wait while it holds the interpreter, and the loop
with it. What is finished waits in a queue; a byte on a socket pair wakes a loop that sleeps in a poll.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from loramux.engine.adapters.packed import HostWeights
from loramux.engine.background import wait_readable
from loramux.engine.errors import LoramuxError


class JobKind(Enum):
    """What a job does."""

    READ = "read"  # files → host weights
    COPY = "copy"  # host weights → lanes


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one job: the adapter, or why not."""

    kind: JobKind
    digest: str
    result: HostWeights | LoramuxError
    seconds: float = 0.0  # that the job took


Job = Callable[[], HostWeights]


class AdapterLoader:
    """One background thread and the queue of what it finished."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[JobKind, str, Job] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    @property
    def wake_fd(self) -> int:
        """Readable when something finished; for the loop's poller."""
        return self._wake_read.fileno()

    def submit(self, kind: JobKind, digest: str, job: Job) -> None:
        """Queue a job; its end appears in `finished`."""
        self._jobs.put((kind, digest, job))

    def finished(self) -> list[Finished]:
        """Everything that ended since the last call."""
        if self._done.empty():
            return []
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        out = []
        while not self._done.empty():
            out.append(self._done.get())
        return out

    def wait(self, timeout_s: float) -> None:
        """Sleep until something finished."""
        wait_readable(timeout_s, self._wake_read.fileno())

    def close(self) -> None:
        """End the thread after its current job."""
        self._jobs.put(None)
        self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread: the others belong to the step loop
        while self._do(self._jobs.get()):
            pass

    def _do(self, job: tuple[JobKind, str, Job] | None) -> bool:
        """One job, of which nothing stays alive while the thread waits for the next; False at the end."""
        if job is None:
            return False
        kind, digest, run = job
        began_s = time.monotonic()
        try:
            result: HostWeights | LoramuxError = run()
        except LoramuxError as error:
            result = error
        except Exception as error:  # noqa: BLE001 - a thread's top: one bad file must not end it
            result = LoramuxError(f"the adapter could not be moved: {error!r}")
        self._done.put(Finished(kind, digest, result, time.monotonic() - began_s))
        self._wake_write.send(b"\0")
        return True
