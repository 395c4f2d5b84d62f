"""W3C trace context: which trace a request belongs to, and this server's own place in it.

Source: W3C Recommendation "Trace Context" (2021), sections 3.2 and 3.3; `traceresponse` is its next level's.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers

_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE_CHARS: Final = 512
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One request's place in a trace; ids in lower-case hex."""

    trace_id: str
    span_id: str  # ours
    parent_id: str | None = None  # the caller's span; None if the trace begins here
    flags: int = 1  # bit 0: the trace is being recorded
    state: str = ""  # the callers' own notes, passed on unread

    @property
    def response_header(self) -> str:
        """The value of `traceresponse`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def read_trace(headers: Headers) -> TraceContext | None:
    """The trace that a request's headers name; None without a valid `traceparent`."""
    given = headers.getlist("traceparent")
    found = _PARENT.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or parent_id == _NO_SPAN:
        return None
    state = ",".join(headers.getlist("tracestate"))
    return TraceContext(
        trace_id,
        _new_id(8),
        parent_id,
        int(flags, 16) & 1,
        state if len(state) <= _MAX_STATE_CHARS and state.isascii() and state.isprintable() else "",
    )


def new_trace() -> TraceContext:
    """A trace that begins with this request."""
    return TraceContext(_new_id(16), _new_id(8))


def _new_id(num_bytes: int) -> str:
    while True:
        token = secrets.token_hex(num_bytes)
        if token.strip("0"):
            return token
