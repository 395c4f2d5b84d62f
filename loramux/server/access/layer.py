"""The key check: one layer in front of every route. It finds out who asks, and lets in who may.

A path without a route needs a key as well, so that nobody learns from outside which routes there are.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.engine.errors import LoramuxError
from loramux.server.access.audit import Actor, AuditLog, set_actor
from loramux.server.access.caller import ANYONE, NOBODY, Caller, set_caller
from loramux.server.access.keys import KeyRing
from loramux.server.access.scopes import RouteRule, RouteTable
from loramux.server.errors import AuthFailed, NotAllowed, respond

_HOW: Final = "send it as 'Authorization: Bearer KEY'."


class AccessLayer:
    """Answer 401 to requests without one of the keys, 403 to those whose key does not allow the route.

    Both come before anything of the body is read. Behind this layer `caller_of(scope)` says who asks.

    Args:
        app: what is guarded.
        keys: those of the server.
        routes: what each route needs.
        audit: where refusals are written down.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, routes: RouteTable, audit: AuditLog) -> None:
        self._app = app
        self._keys = keys
        self._routes = routes
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":  # there are no other routes, and none would be guarded
            return
        rule = self._routes.match(scope)
        caller = self._caller(scope)
        set_caller(scope, caller or NOBODY)
        client: tuple[str, int] | None = scope.get("client")
        set_actor(
            Actor(
                key_id=caller.key_id if caller else None,
                client=client[0] if client else None,
                request_id=scope.get("loramux.request_id"),
            )
        )
        refusal = _refusal(rule, caller, scope)
        if refusal is not None:
            self._audit.denied(refusal, method=scope["method"], path=scope["path"])
            await respond(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """Whose key the request brings; None without one, with a wrong one, or with more than one."""
        if self._keys.is_open:
            return ANYONE
        given = _authorization(scope)
        if len(given) != 1:
            return None
        scheme, _, key = given[0].partition(b" ")
        return self._keys.find(key.strip()) if scheme.lower() == b"bearer" else None


def _authorization(scope: Scope) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == b"authorization"]


def _refusal(rule: RouteRule | None, caller: Caller | None, scope: Scope) -> LoramuxError | None:
    if rule is not None and rule.is_public:
        return None
    if caller is None:
        has_key = bool(_authorization(scope))
        return AuthFailed(f"{'Incorrect' if has_key else 'No'} API key provided; {_HOW}")
    if rule is None or caller.scopes & rule.scopes:
        return None
    needed = " or ".join(f"'{name}'" for name in sorted(rule.scopes))
    return NotAllowed(f"This API key lacks the scope {needed} that {scope['method']} {rule.path} needs.")
