"""`/v1/models/` is `/v1/models`: answered as it is, since a redirect would lose the body of a POST."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class TrailingSlashLayer:
    """Take slashes off the end of the path, before anybody decides by it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"].endswith("/"):
            given: bytes = scope.get("raw_path") or b"/"
            if given.endswith(b"/"):  # an encoded one is part of a name, which nobody has
                scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)
