"""`GET /v1/models` and `GET /v1/models/{id}`: every name that requests may use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Query, Request, Response

from loramux.engine.errors import ModelNotFound
from loramux.server.access.caller import Caller, caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapters import AdapterRef
from loramux.server.schemas.models import ModelCard, ModelList, ModelPermission
from loramux.server.services import Services, ServicesDep

router = APIRouter()

_MAX_LIMIT: Final = 10_000


@router.get("/v1/models")
@needs("inference", "adapters:read")
async def list_models(
    request: Request,
    services: ServicesDep,
    limit: Annotated[
        int | None, Query(ge=1, le=_MAX_LIMIT, description="names a page; all if absent")
    ] = None,
    after: Annotated[str | None, Query(description="the last name of the page before")] = None,
) -> Response:
    """The base names, then the adapters that the caller may use, by name."""
    adapters = _adapters(services, caller_of(request.scope))
    names: Sequence[str | AdapterRef] = [*services.adapters.base_names, *adapters]
    if after is not None:
        names = _names_after(names, after, num_base=len(services.adapters.base_names))
    page = names if limit is None else names[:limit]
    answer = ModelList(
        data=[_card(services, name) for name in page],
        first_id=_name_of(page[0]) if page else None,
        last_id=_name_of(page[-1]) if page else None,
        has_more=len(page) < len(names),
    )
    return _json(answer)


@router.get("/v1/models/{model_id:path}")
@needs("inference", "adapters:read")
async def get_model(model_id: str, request: Request, services: ServicesDep) -> Response:
    """One of them; the id may hold slashes, colons and spaces, percent-encoded or not."""
    if model_id in services.adapters.base_names:
        return _json(_card(services, model_id))
    for ref in _adapters(services, caller_of(request.scope)):
        if ref.name == model_id:
            return _json(_card(services, ref))
    raise ModelNotFound(f"The model `{model_id[:256]}` does not exist.", param="model")


def _adapters(services: Services, caller: Caller) -> list[AdapterRef]:
    return [ref for ref in services.adapters.all() if caller.may_use(ref.name)]


def _names_after(
    names: Sequence[str | AdapterRef], after: str, *, num_base: int
) -> Sequence[str | AdapterRef]:
    """What follows a name; an adapter that is gone meanwhile keeps its place between the others."""
    for position, name in enumerate(names):
        if _name_of(name) == after:
            return names[position + 1 :]
    return [name for name in names[num_base:] if _name_of(name) > after]


def _name_of(name: str | AdapterRef) -> str:
    return name if isinstance(name, str) else name.name


def _card(services: Services, name: str | AdapterRef) -> ModelCard:
    """A card; adapters' are kept small, since there may be thousands and clients read 2 MiB at most."""
    max_model_len = services.engine.info.max_model_len
    if not isinstance(name, str):
        return ModelCard(
            id=name.name,
            created=name.created,
            root=name.source,
            parent=name.parent,
            max_model_len=max_model_len,
        )
    created = services.adapters.created
    return ModelCard(
        id=name,
        created=created,
        root=_root(services.config.server.model),
        max_model_len=max_model_len,
        permission=_permission(name, created),
    )


def _root(model: str) -> str:
    """Where the base model comes from; a folder on this machine is nobody else's business."""
    return Path(model).name if Path(model).expanduser().exists() else model


def _permission(name: str, created: int) -> list[ModelPermission]:
    number = hashlib.sha256(name.encode()).hexdigest()[:32]
    return [ModelPermission(id=f"modelperm-{number}", created=created)]


def _json(value: ModelList | ModelCard) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
