"""The API key check: one layer in front of every route but the public ones.

It decides from `scope["path"]` only, never from a URL that was put together from headers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.errors import AuthFailed, respond

PUBLIC_PATHS: Final = frozenset({"/health", "/live", "/ready", "/version", "/ping"})


class ApiKeyLayer:
    """Refuse requests that do not bring one of the keys as `Authorization: Bearer KEY`.

    Keys are compared as digests, all of them on every request, in constant time.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or _path(scope) in PUBLIC_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        message = "Incorrect API key provided; send it as 'Authorization: Bearer KEY'."
        if "authorization" not in Headers(scope=scope):
            message = "No API key provided; send it as 'Authorization: Bearer KEY'."
        await respond(AuthFailed(message))(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = _digest(key.strip())
        return any([hmac.compare_digest(given, digest) for digest in self._digests])


def _path(scope: Scope) -> str:
    """The path below `--root-path`, as routing sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
