"""Probes and facts about the server: `/health`, `/live`, `/ready`, `/ping`, `/version`, `/load`.

All but `/load` answer from memory, at once, and need no key.
"""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.services import ServicesDep
from loramux.version import __version__

router = APIRouter()


@router.head("/live", include_in_schema=False)
@router.get("/live")
@needs("public")
async def live() -> Response:
    """200 while this process answers at all."""
    return Response()


@router.head("/health", include_in_schema=False)
@router.get("/health")
@router.get("/ping")
@router.post("/ping")
@needs("public")
async def health(services: ServicesDep) -> Response:
    """200 while the engine runs, else 503; empty bodies, as probes expect."""
    return Response(status_code=200 if services.engine.is_alive else 503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
@needs("public")
async def ready(request: Request, services: ServicesDep) -> Response:
    """200 when requests are welcome, else 503 with the reasons."""
    reasons = services.not_ready(caller_of(request.scope))
    body = msgspec.json.encode({"ready": not reasons, "reasons": reasons})
    return Response(body, 503 if reasons else 200, media_type="application/json")


@router.get("/version")
@needs("public")
async def version() -> Response:
    """The server's version."""
    return Response(msgspec.json.encode({"version": __version__}), media_type="application/json")


@router.get("/load")
@needs("admin")
async def load(services: ServicesDep) -> Response:
    """Calls in flight, and the engine's own counts."""
    stats = await services.engine.stats()
    counts = {"server_load": services.generator.num_calls, **msgspec.structs.asdict(stats)}
    return Response(msgspec.json.encode(counts), media_type="application/json")
