"""The door through which every request goes when it begins and when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.access.caller import caller_of
from loramux.server.observe.call_record import CallRecord, enter_call, leave_call
from loramux.server.observe.metrics import Metrics
from loramux.server.observe.request_log import RequestLog
from loramux.server.observe.span_sink import SpanSink
from loramux.server.observe.trace_context import new_trace, read_trace


class Observer:
    """Follows requests from the edge to their end.

    Args:
        metrics: where they are counted.
        log: where they are written down.
        spans: where their traces go; None = nowhere.
        keeps_prompts: prompts are noted, for the log.
        keeps_outputs: and answers.
    """

    def __init__(
        self,
        metrics: Metrics,
        log: RequestLog,
        *,
        spans: SpanSink | None = None,
        keeps_prompts: bool = False,
        keeps_outputs: bool = False,
    ) -> None:
        self.metrics = metrics
        self._log = log
        self._spans = spans
        self._keeps_prompts = keeps_prompts
        self._keeps_outputs = keeps_outputs
        self._calls: set[CallRecord] = set()
        metrics.calls = self._calls

    @property
    def calls(self) -> Collection[CallRecord]:
        """Requests in flight."""
        return self._calls

    def begin(self, scope: Scope) -> CallRecord:
        """A request arrived."""
        call = CallRecord(
            self.metrics.requests.tokens,
            method=scope["method"],
            path=scope["path"],
            keeps_prompts=self._keeps_prompts,
            keeps_outputs=self._keeps_outputs,
        )
        call.trace = read_trace(Headers(scope=scope))
        if call.trace is None and self._spans is not None:
            call.trace = new_trace()
        if call.trace is not None:
            scope["loramux.traceresponse"] = call.trace.response_header
        self._calls.add(call)
        return call

    def end(self, call: CallRecord, scope: Scope) -> None:
        """It is over: answered to the last byte, failed, or its client gone."""
        self._calls.discard(call)
        call.ended_s = time.monotonic()
        call.request_id = scope.get("loramux.request_id", "")
        call.status = scope.get("loramux.status")
        call.route = _route(scope)
        call.key_id = caller_of(scope).key_id
        self.metrics.finished(call)
        self._log.finished(call)
        if self._spans is not None and call.is_inference:
            self._spans.send(call)

    async def aclose(self) -> None:
        """Send what is still queued."""
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)


def _route(scope: Scope) -> str | None:
    """The template of the route that served a request, or would have: some are refused before routing."""
    route = scope.get("route")
    if route is None and "app" in scope:
        route = scope["app"].state.route_table.match(scope)
    path: str | None = getattr(route, "path", None)
    return path


class ObserveLayer:
    """The ASGI layer around everything that is to be counted."""

    def __init__(self, app: ASGIApp, *, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and note what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = self._observer.begin(scope)
        token = enter_call(call)
        try:
            await self._app(scope, receive, send)
        finally:
            leave_call(token)
            self._observer.end(call, scope)
