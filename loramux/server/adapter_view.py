"""What the adapter API shows: rows of the table and the engine's residency, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Final

from loramux.engine.errors import LoramuxError
from loramux.server.adapters import Failure, Row
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.schemas.adapters import AdapterError, AdapterUpdate, AdapterView, DrainingVersion

_ROWS_A_TURN: Final = 500  # of the event loop: about 2 ms


async def view_rows(rows: Collection[Row], engine: EngineKeeper) -> list[AdapterView]:
    """What clients see of some adapters."""
    try:
        stats = await engine.stats()
    except LoramuxError:  # the engine has ended; names are still true
        return [_view(row, None) for row in rows]
    tiers = {**dict.fromkeys(stats.host_adapters, "host"), **dict.fromkeys(stats.device_adapters, "device")}
    views: list[AdapterView] = []
    for number, row in enumerate(rows, 1):
        views.append(_view(row, tiers))
        if number % _ROWS_A_TURN == 0:
            await asyncio.sleep(0)
    return views


def _view(row: Row, tiers: Mapping[str, str] | None) -> AdapterView:
    version = row.current or (row.draining[-1] if row.draining else None)
    update = None
    if row.loading is not None:
        update = AdapterUpdate(
            state=row.loading.state,
            source=row.loading.source,
            started_at=row.loading.started_at,
            done_bytes=row.loading.done_bytes,
            total_bytes=row.loading.total_bytes,
        )
    error = _error(row.failure) if row.failure else None
    draining = [
        DrainingVersion(version=old.ref.version, digest=old.ref.digest, leases=old.leases)
        for old in row.draining
    ]
    if version is None:
        source = row.loading.source if row.loading else None
        return AdapterView(name=row.name, state=row.state, source=source, error=error, update=update)
    ref, spec = version.ref, version.ref.spec
    return AdapterView(
        name=row.name,
        state=row.state,
        version=ref.version,
        digest=ref.digest,
        source=ref.source,
        revision=ref.revision,
        parent=ref.parent,
        trained_on=spec.base_model,
        rank=spec.rank,
        num_modules=len(spec.modules),
        modules=list(ref.targets),
        bytes=spec.nbytes,
        tier=None if tiers is None else tiers.get(ref.digest, "disk"),
        pinned=ref.pinned,
        origin=ref.origin,
        leases=version.leases,
        created=ref.created,
        loaded_at=ref.loaded_at,
        last_used=version.last_used,
        error=error,
        update=update,
        draining=draining,
    )


def _error(failure: Failure) -> AdapterError:
    return AdapterError(
        message=failure.error.message,
        code=failure.code,
        param=failure.error.param,
        at=failure.at,
        retry_at=failure.retry_at,
    )
