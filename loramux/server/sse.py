"""Server-sent events: one write an event, LF line ends, comments while idle, errors as events.

The headers wait for the first event, so that an error before it is a real HTTP status. Only when
nothing happens for a whole keep-alive interval (a long queue) do they go out earlier, with a comment.
An error after that is one `data: {"error": ...}` event, and the stream ends without `[DONE]`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.engine.errors import LoramuxError
from loramux.server.disconnect import until_disconnect
from loramux.server.errors import ClientGone, describe

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": keep-alive\n\n"
_HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def event(json_text: bytes) -> bytes:
    """One event that carries a JSON text without line breaks."""
    return b"data: " + json_text + b"\n\n"


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
            logger.info("client closed the stream", extra={"request_id": scope.get("loramux.request_id")})

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
                await self._write(event(describe(error, request_id)[1]), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, data: bytes, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._last_write_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})
