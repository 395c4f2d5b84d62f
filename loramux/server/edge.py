"""The outermost layer of our own: request ids, and the last place an unexpected error can reach."""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.errors import respond

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # one that is safe in a header and a log


_AT_END = "loramux.at_end"


def at_end(scope: Scope, callback: Callable[[], None]) -> None:
    """Call something when a request is over: answered to the last byte, failed, or its client gone."""
    scope[_AT_END].callback(callback)


class EdgeLayer:
    """Give every request an id, return it as `x-request-id`, and answer what nobody caught.

    A client's own `x-request-id` is kept if it is 1-128 plain characters, else replaced. The id
    stands in `scope["loramux.request_id"]`. What `at_end` was given is called when the request is over.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["loramux.request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                scope["loramux.status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if (trace := scope.get("loramux.traceresponse")) is not None:
                    headers["traceresponse"] = trace
            await send(message)

        at_end = scope[_AT_END] = contextlib.ExitStack()
        try:
            with at_end:
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("unexpected error", extra={"request_id": request_id, "path": scope["path"]})
            if started:
                raise
            await respond(error, request_id)(scope, receive, send_with_id)
