"""Work that ends when the client closes the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from starlette.types import Receive

from loramux.server.errors import ClientGone

T = TypeVar("T")


async def until_disconnect(
    work: Coroutine[None, None, T],
    receive: Receive,
    *,
    idle_s: float | None = None,
    on_idle: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Await `work`, and cancel it as soon as the client is gone.

    Args:
        work: what the client waits for; consumed.
        receive: the request's ASGI channel, after the body was read.
        idle_s: call `on_idle` each time so many seconds have passed.
        on_idle: may fail only by the connection's end.

    Raises:
        ClientGone: the client closed the connection first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_watch(receive, idle_s, on_idle))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _watch(
    receive: Receive, idle_s: float | None, on_idle: Callable[[], Awaitable[None]] | None
) -> None:
    while True:
        try:
            message = await asyncio.wait_for(receive(), idle_s)
        except TimeoutError:
            if on_idle is not None:
                await on_idle()
            continue
        if message["type"] == "http.disconnect":
            return
