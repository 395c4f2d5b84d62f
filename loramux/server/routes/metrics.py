"""`GET /metrics`: what Prometheus reads. Answers also while the engine is busy, down or starting again."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from fastapi import APIRouter, Response

from loramux.engine.errors import LoramuxError
from loramux.server.access.scopes import needs
from loramux.server.observe.metrics import CONTENT_TYPE
from loramux.server.services import ServicesDep

router = APIRouter()

_FRESH_S: Final = 0.1  # younger than this, the last snapshot will do: some routers ask 20 times a second
_PATIENCE_S: Final = 0.1  # with a busy engine, whose last snapshot is about a second old


@router.get("/metrics")
@router.get("/metrics/{rest:path}", include_in_schema=False)
@needs("metrics")
async def show_metrics(services: ServicesDep) -> Response:
    """All metrics in Prometheus' text format; any path below is the same page."""
    metrics = services.observer.metrics
    if services.engine.is_alive and time.monotonic() - metrics.engine.taken_s > _FRESH_S:
        with contextlib.suppress(LoramuxError):
            await services.engine.stats(patience_s=_PATIENCE_S)  # heard by the metrics, too
    return Response(metrics.page(), headers={"content-type": CONTENT_TYPE})
