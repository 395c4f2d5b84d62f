"""The end of service: what is under way may finish, and nothing new is begun.

Probes, metrics and everything else that only reads still answers, so that whoever looks sees why.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.errors import ServerDraining, respond
from loramux.server.start_gate import StartGate

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_PROBE: Final = "/ping"  # may come as a POST


class Drain:
    """Counts the work that is under way, and lets no more in once `begin` was called."""

    def __init__(self) -> None:
        self.has_begun = False
        self.num_open = 0  # requests that change or generate something
        self._is_idle = asyncio.Event()

    def begin(self) -> None:
        """Refuse new work from now on."""
        self.has_begun = True
        self._look()

    def enter(self) -> None:
        """Work starts."""
        self.num_open += 1

    def leave(self) -> None:
        """Work has ended: its answer was sent to the last byte, or nobody reads it."""
        self.num_open -= 1
        self._look()

    async def wait_idle(self) -> None:
        """Return when the last work has ended; only after `begin`."""
        await self._is_idle.wait()

    def _look(self) -> None:
        if self.has_begun and self.num_open == 0:
            self._is_idle.set()


class DrainLayer:
    """Counts requests in, a few in a turn of the loop, and refuses those that begin work in a drain."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain
        self._gate = StartGate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer 503."""
        if scope["type"] != "http" or scope["method"] in _READING or get_route_path(scope) == _PROBE:
            await self._app(scope, receive, send)
            return
        if self._drain.has_begun:
            error = ServerDraining("The server is shutting down; try again at another one.")
            await respond(error, scope.get("loramux.request_id"))(scope, receive, send)
            return
        self._drain.enter()
        try:
            await self._gate.enter()
            await self._app(scope, receive, send)
        finally:
            self._drain.leave()
