"""Coroutines for callers that block: run on the one I/O loop of the process, and given up on demand.

A thread that waits in a socket's `recv` cannot be woken when the server stops; one that waits for a
coroutine can. The loop is `fsspec`'s, which `s3fs` needs anyhow: one thread for all connections.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from loramux.engine.errors import AdapterUnavailable

T = TypeVar("T")


class IoCalls:
    """The calls of one client."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop = get_loop()
        self._mutex = threading.Lock()
        self._waiting: set[Future[Any]] | None = set()  # None = closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine; blocks the calling thread, not the loop.

        Raises:
            AdapterUnavailable: `close` was called before or meanwhile.
        """
        with self._mutex:
            waiting = self._waiting
            if waiting is not None:
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
                waiting.add(future)
        if waiting is None:
            coroutine.close()
            raise _cancelled()
        try:
            return future.result()
        except CancelledError:
            raise _cancelled() from None
        finally:
            waiting.discard(future)

    def close(self, last: Coroutine[Any, Any, object] | None = None) -> None:
        """Give up every call and take no more, except for a last one that closes the client."""
        with self._mutex:
            waiting, self._waiting = self._waiting, None
        for future in list(waiting or ()):
            future.cancel()
        if last is not None:
            asyncio.run_coroutine_threadsafe(last, self._loop).result()


def _cancelled() -> AdapterUnavailable:
    return AdapterUnavailable("the download was cancelled", param="lora_path")
