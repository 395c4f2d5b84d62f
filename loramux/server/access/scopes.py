"""What a key must allow before a route answers: declared beside the route, enforced in front of all.

    @router.post("/v1/completions")
    @needs("inference")
    async def create_completion(...)

A route without a declaration stops the start. Routes are told apart by `scope["path"]` alone, the way
routing does it, never by a URL that was put together from headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from fastapi.routing import iter_route_contexts
from starlette._utils import get_route_path
from starlette.routing import BaseRoute
from starlette.types import Scope

from loramux.server.access.caller import SCOPES

PUBLIC: Final = "public"
METRICS: Final = "metrics"  # public, or `admin` if the operator wants a key there
RouteScope = Literal["inference", "adapters:read", "adapters:write", "admin", "public", "metrics"]

_DECLARED: Final = "loramux_scopes"
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., object])


def needs(*scopes: RouteScope) -> Callable[[_Endpoint], _Endpoint]:
    """Declare a route's scope; a key with any one of several is let in. `public` needs no key."""
    wrong = [scope for scope in scopes if scope not in (*SCOPES, PUBLIC, METRICS)]
    if not scopes or wrong:
        raise ValueError(f"scopes must be some of {', '.join(SCOPES)} and {PUBLIC}, got {scopes}")

    def declare(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _DECLARED, frozenset(scopes))
        return endpoint

    return declare


@dataclass(frozen=True, slots=True)
class RouteRule:
    """One route, and what it takes to get there."""

    path: str
    pattern: re.Pattern[str]
    methods: frozenset[str]
    scopes: frozenset[str]  # one of these; empty = public

    @property
    def is_public(self) -> bool:
        """True if no key is needed."""
        return not self.scopes


class RouteTable:
    """Every route of an app with its rule, in the order in which routing tries them.

    Args:
        routes: the app's.
        guard_metrics: /metrics needs a key with the scope `admin`.

    Raises:
        TypeError: a route declares no scope, or is of a kind that nobody can guard (a mount, a socket).
    """

    def __init__(self, routes: Sequence[BaseRoute], *, guard_metrics: bool = False) -> None:
        self._guard_metrics = guard_metrics
        self.rules = list(self._read(routes))

    def match(self, scope: Scope) -> RouteRule | None:
        """The rule of the route that answers a request; None if routing will refuse it."""
        path = get_route_path(scope)
        method = scope["method"]
        for rule in self.rules:
            if method in rule.methods and rule.pattern.match(path):
                return rule
        return None

    def methods(self, scope: Scope) -> list[str]:
        """Every method that the path of a request takes, for `Allow`."""
        path = get_route_path(scope)
        return sorted({method for rule in self.rules if rule.pattern.match(path) for method in rule.methods})

    def _read(self, routes: Sequence[BaseRoute]) -> Iterable[RouteRule]:
        for route in iter_route_contexts(routes):
            methods: set[str] | None = route.methods
            shown = f"{','.join(sorted(methods or ()))} {route.path}".strip()
            if not methods or route.endpoint is None or route.path is None:
                raise TypeError(f"route {shown}: only plain HTTP routes with methods can be guarded")
            declared: frozenset[str] | None = getattr(route.endpoint, _DECLARED, None)
            if declared is None:
                raise TypeError(
                    f"route {shown} ({route.endpoint.__module__}.{route.endpoint.__qualname__}) declares no"
                    " scope: put @needs('inference') or another one of loramux.server.access.scopes between"
                    " the route's decorator and the function"
                )
            also_head = {"HEAD"} if "GET" in methods else set()
            yield RouteRule(
                route.path, route.path_regex, frozenset(methods | also_head), self._resolve(declared)
            )

    def _resolve(self, declared: frozenset[str]) -> frozenset[str]:
        if METRICS in declared:
            return frozenset({"admin"}) if self._guard_metrics else frozenset()
        return frozenset() if PUBLIC in declared else declared
