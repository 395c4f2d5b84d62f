"""Server-sent events: one write an event, LF line ends, comments while idle, errors as events.

The headers wait for the first event, so that an error before it is a real HTTP status. Only when
nothing happens for a whole keep-alive interval (a long queue, an adapter that is being fetched) do they
go out earlier, with a comment. An error after that is one `data: {"error": ...}` event, and the stream
ends without `[DONE]`; that is so whatever ends it but the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Final

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from loramux.engine.errors import LoramuxError
from loramux.server.disconnect import until_disconnect
from loramux.server.errors import ClientGone, ServerDraining, describe
from loramux.server.observe.call_record import CLIENT_GONE, note_error

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": keep-alive\n\n"
_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}
_HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def event(json_text: bytes) -> bytes:
    """One event that carries a JSON text without line breaks."""
    return b"data: " + json_text + b"\n\n"


def named_event(name: str, json_text: bytes) -> bytes:
    """One event with a name, as `/v1/responses` has them."""
    return b"event: " + name.encode() + b"\ndata: " + json_text + b"\n\n"


class EventStream(Response):
    """An answer made of events.

    Args:
        events: whole events as bytes; closed when the client goes away.
        headers: beside those every stream has.
        keep_alive_s: seconds of silence after which a comment is sent; 0 = never.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, headers: Mapping[str, str], keep_alive_s: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._started = False
        self._last_write_s = time.monotonic()

    async def follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events after headers that have gone out already."""
        self._started = True
        await self(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client is gone."""

        async def keep_alive() -> None:
            if time.monotonic() - self._last_write_s >= self._keep_alive_s / 2:
                await self._write(_COMMENT, send)

        try:
            await until_disconnect(
                self._send_events(scope.get("loramux.request_id"), send),
                receive,
                idle_s=self._keep_alive_s or None,
                on_idle=keep_alive,
            )
        except ClientGone:
            note_error(CLIENT_GONE)  # the request's own log line says so

    async def _send_events(self, request_id: str | None, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for item in events:
                    await self._write(item, send)
            except Exception as error:
                if not self._started:
                    raise
                if not isinstance(error, LoramuxError):
                    logger.exception("unexpected error in a stream", extra={"request_id": request_id})
                await self._write(_error_event(error, request_id), send)
            except asyncio.CancelledError:  # the client left, and reads nothing, or the process ends
                if self._started:
                    await self._write(_error_event(_ending(), request_id), send)
                raise
        await send(_END)

    async def _write(self, data: bytes, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._last_write_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def late_answer(work: Coroutine[None, None, Response], *, keep_alive_s: float) -> Response:
    """What `work` answers; if it takes longer than the interval, a stream that has begun with comments.

    Args:
        work: makes the answer to a request that asked for a stream; consumed.
        keep_alive_s: the interval.

    Raises:
        Exception: `work` failed within the interval, so that its error is a real HTTP status.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=keep_alive_s)
    except asyncio.CancelledError:
        await _end(task)
        raise
    return task.result() if task.done() else _LateStream(task, keep_alive_s)


class _LateStream(Response):
    """Comments until the real answer is there; then that, as events."""

    def __init__(self, task: asyncio.Task[Response], keep_alive_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._task = task
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("loramux.request_id")
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while not self._task.done():
                await _send_part(_COMMENT, send)
                await asyncio.wait((self._task,), timeout=self._keep_alive_s)
            answer = self._task.result()
        except ClientGone:  # found out by the work itself, which is who listens until there are events
            note_error(CLIENT_GONE)
            return
        except Exception as error:
            if not isinstance(error, LoramuxError):
                logger.exception("unexpected error in a stream", extra={"request_id": request_id})
            await _send_part(_error_event(error, request_id), send)
        except asyncio.CancelledError:
            await _end(self._task)
            await _send_part(_error_event(_ending(), request_id), send)
            raise
        else:
            if isinstance(answer, EventStream):
                await answer.follow(scope, receive, send)
                return
            await _send_part(event(bytes(answer.body)), send)
        await send(_END)


def _error_event(error: Exception, request_id: str | None) -> bytes:
    return event(describe(error, request_id)[1])


def _ending() -> LoramuxError:
    return ServerDraining("the server is shutting down")


async def _send_part(data: bytes, send: Send) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _end(task: asyncio.Task[Response]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
