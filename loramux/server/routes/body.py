"""Reading JSON bodies: size, shape, content type and syntax are checked before the framework sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from loramux.engine.errors import InvalidRequest
from loramux.server.access.caller import caller_of
from loramux.server.admission import BodyRoom
from loramux.server.errors import ClientGone, RequestTooLarge, UnsupportedMediaType
from loramux.server.json_shape import check_shape
from loramux.server.limits import Limits, check_field_sizes
from loramux.server.services import get_services
from loramux.server.sse import late_answer

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_THREAD_ABOVE_BYTES: Final = (
    256 << 10
)  # about 5 ms of looking and parsing; longer bodies leave the event loop


class JsonRequest(Request):
    """A request whose body was read and parsed."""

    def __init__(self, request: Request, value: object) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        """Not the bytes, which are given back as soon as they are parsed, but a sign that there were some."""
        return b"{}"

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
            self.check_welcome(request)
            value = await _read_value(request)
            return await self.answer(inner, JsonRequest(request, value), value)

        return handle

    def check_welcome(self, request: Request) -> None:
        """Refuse a request before its body is read; for those who can."""

    async def answer(self, inner: _Handler, request: Request, body: dict[str, Any]) -> Response:
        """The framework's answer to a request whose body was parsed."""
        return await inner(request)

    def is_raw(self, request: Request) -> bool:
        """True for a body that the route reads by itself."""
        return False


class GenerationRoute(JsonRoute):
    """A route that makes the engine work: refused at once when there is no room, and alive while it waits."""

    def check_welcome(self, request: Request) -> None:
        """Refuse while the caller's line, or the server's, is full."""
        get_services(request).generator.admission.check_open(caller_of(request.scope))

    async def answer(self, inner: _Handler, request: Request, body: dict[str, Any]) -> Response:
        """The answer; a stream that has to wait (for an adapter, say) begins with comments."""
        interval_s = get_services(request).config.server.sse_keep_alive_s
        if body.get("stream") is not True or not interval_s:
            return await inner(request)
        return await late_answer(inner(request), keep_alive_s=interval_s)


async def _read_value(request: Request) -> dict[str, Any]:
    """The parsed body, checked for size and shape.

    Raises:
        RequestTooLarge, ClientGone, Overloaded, InvalidRequest: it cannot be had.
    """
    services = get_services(request)
    limits = services.config.server.limits
    content_type = request.headers.get("content-type", "")
    with services.generator.admission.body_room() as room:
        body = await _read(request, limits.request_bytes, room)
        if len(body) <= _THREAD_ABOVE_BYTES:
            return _parse(body, content_type, limits)
        value = await asyncio.to_thread(_parse, body, content_type, limits)
    return value


async def _read(request: Request, limit: int, room: BodyRoom) -> bytes:
    """The whole body.

    Raises:
        RequestTooLarge: it is, or says it is, larger than `limit`.
        ClientGone: the connection closed before its end.
        Overloaded: all bodies together are more than the server keeps.
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
        room.take(len(piece))
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large(limit: int) -> str:
    return f"the request body allows at most {limit} bytes (the server's --max-request-bytes)"


def _parse(body: bytes, content_type: str, limits: Limits) -> dict[str, Any]:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"Unsupported Media Type: Only 'application/json' is allowed, got {content_type[:100]!r}"
        raise UnsupportedMediaType(message, param="content-type")
    if not body.strip():
        raise InvalidRequest("The request body is empty; a JSON object is expected.")
    check_shape(body, limits)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {str(error)[:200]}") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply.") from error
    _check_keys(body)
    if not isinstance(value, dict):
        raise InvalidRequest(f"The request body must be a JSON object, got {_kind(value)}.")
    check_field_sizes(value, limits)
    return value


def _check_keys(body: bytes) -> None:
    """Refuse a key that stands twice in one object: which of them counts is a matter of the parser.

    The fast parser cannot tell; this second look costs 2 us for a small body and 1 ms a megabyte.
    """
    _DECODER.decode(body.decode())


def _object(pairs: list[tuple[str, object]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        found = [name for name, _ in pairs]
        twice = next(name for name in found if found.count(name) > 1)
        raise InvalidRequest(f"The request body is not valid JSON: the key {twice[:100]!r} stands twice.")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(
        type(value), "a number"
    )
