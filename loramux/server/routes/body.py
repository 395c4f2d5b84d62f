"""Reading JSON bodies: size, content type and syntax are checked before the framework sees them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from loramux.engine.errors import InvalidRequest
from loramux.server.errors import ClientGone, RequestTooLarge
from loramux.server.services import get_services

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class JsonRequest(Request):
    """A request whose body was read and parsed."""

    def __init__(self, request: Request, body: bytes, value: object) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = value

    async def body(self) -> bytes:
        """The body as it was sent."""
        return self._bytes

    async def json(self) -> Any:
        """The parsed body."""
        return self._value


class JsonRoute(APIRoute):
    """A route with a JSON body. Stricter than the framework's: no NaN, no lone surrogates, a size cap."""

    def get_route_handler(self) -> _Handler:
        """The framework's handler, behind our reading of the body."""
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method not in _METHODS_WITH_BODY or self.is_raw(request):
                return await inner(request)
            limit = get_services(request).config.server.limits.request_bytes
            body = await _read(request, limit)
            value = _parse(body, request.headers.get("content-type", ""))
            return await inner(JsonRequest(request, body, value))

        return handle

    def is_raw(self, request: Request) -> bool:
        """True for a body that the route reads by itself."""
        return False


async def _read(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        RequestTooLarge: it is, or says it is, larger than `limit`.
        ClientGone: the connection closed before its end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise RequestTooLarge(_too_large(limit))
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection while it sent the body")
        piece: bytes = message.get("body", b"")
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise RequestTooLarge(_too_large(limit))
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large(limit: int) -> str:
    return f"the request body allows at most {limit} bytes (the server's --max-request-bytes)"


def _parse(body: bytes, content_type: str) -> object:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"Unsupported Media Type: Only 'application/json' is allowed, got {content_type[:100]!r}"
        raise InvalidRequest(message, param="content-type")
    if not body.strip():
        raise InvalidRequest("The request body is empty; a JSON object is expected.")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {str(error)[:200]}") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The request body must be a JSON object, got {_kind(value)}.")
    return value


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(
        type(value), "a number"
    )
