"""CORS: which web pages may read answers. Preflights are answered before the key check, nothing else is."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
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
_WANTED: Final = "access-control-request-headers"
_ALLOWED: Final = "access-control-allow-headers"
_OF_THE_CLIENT: Final = "x-stainless-"  # that the official JavaScript client adds to every request


class CorsLayer(CORSMiddleware):
    """Starlette's layer, with refusals in the shape of all errors.

    A preflight is an OPTIONS request with Origin and Access-Control-Request-Method; any other OPTIONS
    request passes on to the key check like the rest.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight; a refused one says what is not allowed.

        The headers of the official client are allowed whatever the operator lists.
        """
        wanted = [name.strip() for name in request_headers.get(_WANTED, "").split(",")]
        harmless = [name for name in wanted if name.lower().startswith(_OF_THE_CLIENT)]
        if harmless and not self.allow_all_headers:
            request_headers = _with_wanted(request_headers, [name for name in wanted if name not in harmless])
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            return _in_shape(response)
        if harmless and not self.allow_all_headers:
            response.headers[_ALLOWED] = ", ".join([response.headers[_ALLOWED], *harmless])
        return response


def _with_wanted(headers: Headers, names: list[str]) -> Headers:
    changed = MutableHeaders(raw=list(headers.raw))
    del changed[_WANTED]
    if names:
        changed[_WANTED] = ", ".join(names)
    return changed


def _in_shape(response: Response) -> Response:
    refused = bytes(response.body).decode().removeprefix("Disallowed CORS ")
    shaped = respond(CorsRefused(f"Not allowed for pages of other sites: {refused}."))
    for name, value in response.headers.items():
        if name not in ("content-length", "content-type"):
            shaped.headers[name] = value
    return shaped
