"""`/v1/lora_adapters`: what is loaded, what should be, and what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from loramux.engine.errors import AdapterNotFound, InvalidRequest
from loramux.resolvers.explain import explain_adapter
from loramux.server.access.access import require_change, require_upload
from loramux.server.access.caller import Caller, caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapter_names import require_adapter_name
from loramux.server.adapter_orders import IfLoaded, LoadOrder, Outcome
from loramux.server.adapter_upload import CONFIG_HEADER, SHOWN_SOURCE
from loramux.server.adapter_view import view_rows
from loramux.server.errors import ClientGone
from loramux.server.routes.adapter_route import AdapterRoute, is_upload
from loramux.server.routes.answering import in_words_of
from loramux.server.schemas.adapters import (
    AdapterList,
    AdapterView,
    DeleteResult,
    DryRun,
    PutAdapter,
    PutResult,
)
from loramux.server.services import Services, ServicesDep
from loramux.server.sse import EventStream, event

router = APIRouter(route_class=AdapterRoute)


@router.get("/v1/lora_adapters")
@needs("adapters:read")
async def list_adapters(request: Request, services: ServicesDep) -> Response:
    """Every adapter that the caller may use, with those that load, drain or failed."""
    caller = caller_of(request.scope)
    views = await view_rows(
        [row for row in services.adapters.rows() if caller.may_use(row.name)], services.engine
    )
    sees_file = services.desired is not None and caller.sees_everything
    desired = services.desired.report() if services.desired is not None and sees_file else None
    return _json(AdapterList(data=views, desired=desired))


@router.get("/v1/lora_adapters/events")
@needs("adapters:read")
async def adapter_events(request: Request, services: ServicesDep) -> Response:
    """Every change from now on of what the caller may use, as server-sent events."""
    keep_alive_s = services.config.server.sse_keep_alive_s
    events = _events(services, caller_of(request.scope))
    return EventStream(events, headers={}, keep_alive_s=keep_alive_s)


@router.get("/v1/lora_adapters/{name:path}")
@needs("adapters:read")
async def get_adapter(name: str, request: Request, services: ServicesDep) -> Response:
    """One adapter."""
    if not caller_of(request.scope).may_use(name):
        raise _not_found(name)
    return _json(await _view(services, name))


@router.put("/v1/lora_adapters/{name:path}")
@needs("adapters:write")
async def put_adapter(
    name: str,
    request: Request,
    services: ServicesDep,
    dry_run: Annotated[bool, Query()] = False,
) -> Response:
    """Make a name stand for what is at a source, or for the uploaded bytes; repeating it changes nothing."""
    require_adapter_name(name, services.adapters.base_names, param="name")
    caller = caller_of(request.scope)
    if is_upload(request):
        require_upload(caller, name)
        order = await _upload_order(name, request, services)
    else:
        order = _order(name, _validated(await request.json()))
        require_change(caller, name, source=order.source)
    try:
        if dry_run:
            return await _explain(order, services)
        loaded = await services.manager.load(order)
    finally:
        _discard_unused_upload(order, services)
    status = 201 if loaded.outcome is Outcome.ADDED else 200
    return _json(PutResult(outcome=loaded.outcome.value, adapter=await _view(services, name)), status)


@router.delete("/v1/lora_adapters/{name:path}")
@needs("adapters:write")
async def delete_adapter(
    name: str,
    request: Request,
    services: ServicesDep,
    drain_timeout_s: Annotated[float, Query(ge=0, le=86_400)] = 0.0,
) -> Response:
    """Forget a name at once, and say what was freed; 202 while requests still run on it."""
    caller = caller_of(request.scope)
    with in_words_of({"lora_name": "name"}):
        require_change(caller, name)
        unloaded = await services.manager.unload(name, drain_timeout_s=drain_timeout_s)
    result = DeleteResult(
        name=name,
        state="gone" if unloaded.is_gone else "draining",
        leases=unloaded.leases,
        freed=unloaded.freed,
        shared_with=[other for other in unloaded.shared_with if caller.may_use(other)],
    )
    return _json(result, 200 if unloaded.is_gone else 202)


async def _view(services: Services, name: str) -> AdapterView:
    row = services.adapters.row(name)
    if row is None:
        raise _not_found(name)
    return (await view_rows([row], services.engine))[0]


def _not_found(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"The lora adapter {name[:256]!r} cannot be found.", param="name")


async def _events(services: Services, caller: Caller) -> AsyncGenerator[bytes, None]:
    yield b": connected\n\n"
    async with aclosing(services.manager.events.subscribe()) as events:
        async for item in events:
            if not caller.may_use(item.name):
                continue
            head = f"id: {item.id}\nevent: {item.state}\n".encode()
            yield head + event(msgspec.json.encode(item))


def _validated(value: object) -> PutAdapter:
    try:
        return PutAdapter.model_validate(value)
    except ValidationError as error:
        problems: list[dict[str, Any]] = [
            {**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()
        ]
        raise RequestValidationError(problems) from error


def _order(name: str, body: PutAdapter, *, shown_source: str | None = None) -> LoadOrder:
    return LoadOrder(
        name=name,
        source=body.source,
        if_loaded=IfLoaded.REPLACE if body.load_inplace else IfLoaded.KEEP,
        pinned=body.pinned,
        base_model_name=body.base_model_name,
        digest=body.digest.removeprefix("sha256:") if body.digest else None,
        shown_source=shown_source,
    )


async def _upload_order(name: str, request: Request, services: Services) -> LoadOrder:
    """Take in the bytes of an upload; what else a body would say stands in the query."""
    config = request.headers.get(CONFIG_HEADER)
    if config is None:
        message = f"an upload needs adapter_config.json in the header {CONFIG_HEADER}"
        raise InvalidRequest(message, param=CONFIG_HEADER)
    query: dict[str, Any] = {
        key: value for key, value in request.query_params.items() if key in PutAdapter.model_fields
    }
    for key in ("pinned", "load_inplace"):
        if key in query:
            query[key] = query[key].lower() in ("1", "true")
    body = _validated({**query, "source": SHOWN_SOURCE})
    uri = await services.uploads.receive(config, _chunks(request))
    return _order(name, body.model_copy(update={"source": uri}), shown_source=SHOWN_SOURCE)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection while it sent the adapter") from error


def _discard_unused_upload(order: LoadOrder, services: Services) -> None:
    current = services.adapters.current(order.name)
    if order.shown_source == SHOWN_SOURCE and order.source and (not current or current.uri != order.source):
        services.uploads.discard(order.source)


async def _explain(order: LoadOrder, services: Services) -> Response:
    """What a load would meet, from the headers of the files."""
    info = services.engine.info
    assert order.source is not None
    fetched = await services.manager.bring_up.fetch(order.source)
    try:
        report = await asyncio.to_thread(
            explain_adapter,
            fetched.folder,
            info.lora_sites,
            max_lora_rank=info.max_lora_rank,
            num_lanes=info.num_lanes,
            base_model_name=services.config.server.model,
        )
    finally:
        fetched.lease.release()
    is_taken = services.adapters.current(order.name) is not None
    return _json(DryRun(name=order.name, name_is_taken=is_taken, report=report))


def _json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
