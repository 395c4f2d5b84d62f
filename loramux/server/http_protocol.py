"""Uvicorn's HTTP protocol with bounds: on connections, headers, and on how slow a client may be.

What is refused here never becomes a request of the application: too large or too slow headers, bytes
that are no HTTP, connections beyond the limit. The refusals have the shape that every error has.

    connection ──first byte──► head ──blank line──► body ──last byte──► idle ──first byte──► head …
                 header timeout      read timeout            keep-alive timeout (uvicorn's)

Writing is bounded by flow control: an answer waits once a client leaves some 100 KB unread, and a
client that reads nothing for the write timeout is cut off, which ends its sequences like any other
disconnect.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections import Counter
from functools import partial
from typing import Any, Final, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loramux.engine.errors import LoramuxError, Overloaded
from loramux.server.admission_config import ConnectionConfig
from loramux.server.errors import HeadersTooLarge, MalformedHttp, RequestTooSlow, respond
from loramux.server.listener import SPARE_CONNECTIONS

PROBES: Final = frozenset({b"/health", b"/live", b"/ready", b"/ping", b"/metrics"})
_SLOWEST_BODY: Final = 16 << 10  # bytes a second, beyond the read timeout
_SEND_BUFFER: Final = 64 << 10  # of the kernel, for each connection
_PARTING_S: Final = 1.0
_IDLE, _HEAD, _BODY = range(3)


class _Refused(Exception):
    """Ends the parsing of a request; httptools turns it into an error of its own."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        bounds: what a client may do.
        cuts: counts those that were cut off, by reason.
        arguments: uvicorn's own.
    """

    def __init__(self, *, bounds: ConnectionConfig, cuts: Counter[str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._bounds = bounds
        self._cuts = cuts
        self._plain_app = self.app
        self._phase = _IDLE
        self._head_bytes = 0  # that the parser was fed since the last request ended
        self._size = 0  # of the request line and headers that it has made out
        self._body_bytes = 0
        self._body_began_s = 0.0
        self._refusal: LoramuxError | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._parting: asyncio.TimerHandle | None = None  # set once the connection was refused

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse one that is far too many."""
        super().connection_made(transport)
        _bound_socket(transport.get_extra_info("socket"), self._bounds.stream_write_timeout_s)
        if len(self.connections) > self._bounds.max_connections + SPARE_CONNECTIONS:
            self._refuse(_too_many_connections(self._bounds), "connections")
            return
        self._reading = self.loop.call_later(self._bounds.request_header_timeout_s, self._on_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_reading_timer()
        for timer in (self._writing, self._parting):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and start the timer of whatever is not complete."""
        if self.transport.is_closing() or self._parting is not None:
            return
        if self._phase != _BODY:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._parting is not None:
            return
        if self._phase == _HEAD:
            if self._head_bytes > self._bounds.max_header_bytes:  # not even complete yet
                self._refuse(_large_headers(self._bounds), "header_bytes")
            elif self._reading is None:
                timeout_s = self._bounds.request_header_timeout_s
                self._reading = self.loop.call_later(timeout_s, self._on_slow_head)
        elif self._phase == _BODY and self._reading is None:
            self._reading = self.loop.call_later(self._bounds.request_read_timeout_s, self._on_slow_body)

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._phase = _HEAD
        self._size = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._grow(len(name) + len(value))
        if len(self.headers) >= self._bounds.max_header_count:
            self._refusal = _large_headers(self._bounds)
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be served, or there are too many of them."""
        self._stop_reading_timer()
        self._phase = _BODY
        self._head_bytes = self._body_bytes = 0
        self._body_began_s = self.loop.time()
        is_full = len(self.connections) > self._bounds.max_connections
        if is_full and self.url.partition(b"?")[0] not in PROBES:
            self._cuts["connections"] += 1
            self.app = self._say_full
        else:
            self.app = self._plain_app
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is here."""
        self._stop_reading_timer()
        self._phase = _IDLE
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, or what we stopped parsing."""
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            self._refuse(refusal, "header_bytes")
        else:
            self._refuse(MalformedHttp(msg), None)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._bounds.max_header_bytes:
            self._refusal = _large_headers(self._bounds)
            raise _Refused

    def _on_slow_head(self) -> None:
        timeout_s = self._bounds.request_header_timeout_s
        if self._phase == _IDLE:  # it never said anything
            self.transport.close()
            return
        message = f"the headers took longer than {timeout_s:g} s (the server's --request-header-timeout)"
        self._refuse(RequestTooSlow(message), "header_timeout")

    def _on_slow_body(self) -> None:
        """Give a body that keeps coming more time; time in which we did not read does not count."""
        now_s = self.loop.time()
        timeout_s = self._bounds.request_read_timeout_s
        if self.flow.read_paused:
            self._body_began_s = now_s
        left_s = self._body_began_s + timeout_s + self._body_bytes / _SLOWEST_BODY - now_s
        if left_s > 0:
            self._reading = self.loop.call_later(left_s, self._on_slow_body)
            return
        message = f"the body took longer than {timeout_s:g} s (the server's --request-read-timeout)"
        self._refuse(RequestTooSlow(message), "read_timeout")

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, error: LoramuxError, reason: str | None) -> None:
        """Answer once and close; if an answer is on its way already, only close."""
        if reason is not None:
            self._cuts[reason] += 1
        self._stop_reading_timer()
        is_answering = bool(self.pipeline)
        if self.cycle is not None and not self.cycle.response_complete:
            is_answering = is_answering or self.cycle.response_started
            self.cycle.disconnected = True  # whoever works on it, or waits for the rest, hears of it
            self.cycle.message_event.set()
        if not is_answering and not self.transport.is_closing():
            answer = _answer(error)
            lines = [b"%s: %s" % header for header in answer.raw_headers if header[0] != b"connection"]
            status = f"HTTP/1.1 {answer.status_code} {type(error).__name__}".encode()
            head = b"\r\n".join([status, *lines, b"connection: close", b"", b""])
            self.transport.write(head + bytes(answer.body))
            self._part()
        else:
            self.transport.close()

    def _part(self) -> None:
        """Say that no more comes, and close a little later.

        Closing while the client still sends would make the kernel take back the answer that it has not
        read yet.
        """
        if not self.transport.can_write_eof():  # TLS
            self.transport.close()
            return
        self.transport.write_eof()
        self._parting = self.loop.call_later(_PARTING_S, self.transport.close)

    async def _say_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _answer(_too_many_connections(self._bounds))
        answer.headers["connection"] = "close"
        await answer(scope, receive, send)

    # Writing

    def pause_writing(self) -> None:
        """The client does not read: let the answer wait, but not for ever."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self._bounds.stream_write_timeout_s, self._on_slow_reader)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def _on_slow_reader(self) -> None:
        self._cuts["write_timeout"] += 1
        self.transport.abort()


def bounded_protocol(bounds: ConnectionConfig, cuts: Counter[str]) -> type[asyncio.Protocol]:
    """What uvicorn makes a connection with."""
    return cast("type[asyncio.Protocol]", partial(BoundedProtocol, bounds=bounds, cuts=cuts))


def _bound_socket(connection: socket.socket | None, unread_s: float) -> None:
    """Keep the kernel from holding megabytes of unread answer, or a dead peer for a quarter of an hour."""
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if connection.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_s * 1000))


def _answer(error: LoramuxError) -> Response:
    """An error, with an id as every answer has one."""
    answer = respond(error)
    answer.headers["x-request-id"] = uuid.uuid4().hex
    return answer


def _too_many_connections(bounds: ConnectionConfig) -> Overloaded:
    return Overloaded(f"{bounds.max_connections} connections are open (the server's --max-connections)")


def _large_headers(bounds: ConnectionConfig) -> HeadersTooLarge:
    return HeadersTooLarge(
        f"request line and headers allow at most {bounds.max_header_bytes} bytes and "
        f"{bounds.max_header_count} headers (the server's --max-header-bytes, --max-header-count)"
    )
