"""Routes that change adapters: closed unless the operator opened them, and open to uploads."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response

from loramux.server.errors import TWOFOLD, RuntimeUpdatesDisabled
from loramux.server.routes.body import JsonRoute
from loramux.server.services import get_services

UPLOAD_TYPE: Final = "application/x-safetensors"
VARIABLE: Final = "LORAMUX_ALLOW_RUNTIME_LORA_UPDATING"


class AdapterRoute(JsonRoute):
    """A route of the adapter API. Whatever is not a GET needs the operator's consent, whoever adds it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The JSON route's handler, behind our gate."""
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request.scope[TWOFOLD] = True
            if request.method not in ("GET", "HEAD"):
                _require_consent(request)
            return await inner(request)

        return handle

    def is_raw(self, request: Request) -> bool:
        """Uploads are streamed to the disk, not read as JSON."""
        return request.method == "PUT" and is_upload(request)


def is_upload(request: Request) -> bool:
    """True if the body is an adapter's weights."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == UPLOAD_TYPE


def _require_consent(request: Request) -> None:
    if not get_services(request).config.adapters.allow_runtime_updating:
        raise RuntimeUpdatesDisabled(
            f"Adapters cannot be changed on this server: start it with {VARIABLE}=1 (or"
            " VLLM_ALLOW_RUNTIME_LORA_UPDATING=1) to allow it."
        )
