"""The Host header: an optional list of the names that the server goes by.

Without a list nothing of the server reads the header. With one, a web page cannot reach a server of
the visitor's own network by pointing a name of its own to it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.access.scopes import RouteTable
from loramux.server.errors import HostRefused, respond

_ANY_BELOW: Final = "*."


class HostLayer:
    """Answer 400 to requests for another host; public routes, which probes ask by address, are exempt.

    Args:
        app: what is guarded.
        hosts: names in lower case, without ports; `*.example.org` stands for every name below it.
        routes: tells which routes are public.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], routes: RouteTable) -> None:
        self._app = app
        self._names = frozenset(hosts)
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith(_ANY_BELOW))
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or self._is_welcome(scope):
            await self._app(scope, receive, send)
            return
        message = "This server does not go by the name in the Host header (its --allowed-hosts)."
        await respond(HostRefused(message))(scope, receive, send)

    def _is_welcome(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) == 1 and self._knows(_without_port(given[0].decode("latin-1").lower())):
            return True
        rule = self._routes.match(scope)
        return rule is not None and rule.is_public

    def _knows(self, host: str) -> bool:
        return host in self._names or host.endswith(self._suffixes)


def _without_port(host: str) -> str:
    if host.startswith("["):  # an IPv6 address
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
