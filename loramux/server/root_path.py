"""`--root-path`: the prefix under which a proxy shows the server, whether the proxy takes it off or not."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPathLayer:
    """Tell everybody behind it what the path begins with; the path itself stays as it came.

    Args:
        app: what stands behind.
        root_path: such as `/llm`; slashes at its end do not count.
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = "/" + root_path.strip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope["root_path"] = self._root_path
        await self._app(scope, receive, send)
