"""One fetch and everybody who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Literal

from loramux.resolvers.base import FetchedAdapter, Progress, ProgressCallback
from loramux.resolvers.cache import StoreLease
from loramux.resolvers.download import Watch

_REPORT_EVERY_S: Final = 0.1

Phase = Literal["resolving", "downloading", "verifying"]


class Flight:
    """A fetch in a thread, shared by its callers; lives in the event loop, but for `report`.

    The fetch's own lease is held until the last caller has one of its own. When every caller has been
    cancelled, so is the fetch.

    Args:
        run: the fetch; called once, in a thread, with this flight.
        threads: where.
    """

    def __init__(self, run: Callable[[Flight], FetchedAdapter], threads: Executor) -> None:
        self.watch = Watch(lambda done: self.report("downloading", done))
        self.total_bytes: int | None = None
        self._loop = asyncio.get_running_loop()
        self._listeners: list[ProgressCallback] = []
        self._num_waiting = 0
        self._reported_at = 0.0
        self.task: asyncio.Future[FetchedAdapter] = self._loop.run_in_executor(threads, run, self)
        self.task.add_done_callback(lambda _: self._settle())

    async def wait(self, progress: ProgressCallback | None) -> FetchedAdapter:
        """The result, with a lease of the caller's own."""
        self._num_waiting += 1
        if progress is not None:
            self._listeners.append(progress)
        try:
            fetched = await asyncio.shield(self.task)
            if isinstance(fetched.lease, StoreLease):
                fetched = dataclasses.replace(fetched, lease=fetched.lease.share())
            return fetched
        finally:
            self._num_waiting -= 1
            if progress is not None:
                self._listeners.remove(progress)
            self._settle()

    def report(self, phase: Phase, done_bytes: int) -> None:
        """Tell the listeners how far it is; from the fetch's thread, passed on a few times a second."""
        now = time.monotonic()
        if phase == "downloading" and 0 < now - self._reported_at < _REPORT_EVERY_S and done_bytes:
            return
        self._reported_at = now
        progress = Progress(phase, done_bytes, self.total_bytes)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._notify, progress)

    def _notify(self, progress: Progress) -> None:
        for listener in list(self._listeners):
            listener(progress)

    def _settle(self) -> None:
        """Once nobody waits: stop the fetch, or let go of what it got."""
        if self._num_waiting > 0:
            return
        if not self.task.done():
            self.watch.cancel()
        elif not self.task.cancelled() and self.task.exception() is None:
            self.task.result().lease.release()
