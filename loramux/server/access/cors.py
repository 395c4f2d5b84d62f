"""CORS: which web pages may read answers. Preflights are answered before the key check, nothing else is."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from loramux.server.errors import CorsRefused, respond

# What a page's script may read of an answer.
EXPOSED_HEADERS: Final = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-loramux-adapter",
)


class CorsLayer(CORSMiddleware):
    """Starlette's layer, with refusals in the shape of all errors.

    A preflight is an OPTIONS request with Origin and Access-Control-Request-Method; any other OPTIONS
    request passes on to the key check like the rest.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight; a refused one says what is not allowed."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refused = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        shaped = respond(CorsRefused(f"Not allowed for pages of other sites: {refused}."))
        for name, value in response.headers.items():
            if name not in ("content-length", "content-type"):
                shaped.headers[name] = value
        return shaped
