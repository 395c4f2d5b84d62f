"""`GET /v1/models` and `GET /v1/models/{id}`: every name that requests may use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.engine.errors import ModelNotFound
from loramux.server.access.caller import Caller, caller_of
from loramux.server.access.scopes import needs
from loramux.server.schemas.models import ModelCard, ModelList, ModelPermission
from loramux.server.services import Services, ServicesDep

router = APIRouter()


@router.get("/v1/models")
@needs("inference", "adapters:read")
async def list_models(request: Request, services: ServicesDep) -> Response:
    """The base names, then the adapters that the caller may use, by name."""
    return _json(ModelList(data=_cards(services, caller_of(request.scope))))


@router.get("/v1/models/{model_id:path}")
@needs("inference", "adapters:read")
async def get_model(model_id: str, request: Request, services: ServicesDep) -> Response:
    """One of them; the id may hold slashes, colons and spaces, percent-encoded or not."""
    for card in _cards(services, caller_of(request.scope)):
        if card.id == model_id:
            return _json(card)
    raise ModelNotFound(f"The model `{model_id[:256]}` does not exist.", param="model")


def _cards(services: Services, caller: Caller) -> list[ModelCard]:
    table = services.adapters
    root = services.config.server.model
    if Path(root).expanduser().exists():
        root = Path(root).name  # a folder on this machine is nobody else's business
    base = [
        ModelCard(
            id=name,
            created=table.created,
            root=root,
            max_model_len=services.engine.info.max_model_len,
            permission=_permission(name, table.created),
        )
        for name in table.base_names
    ]
    adapters = [
        ModelCard(
            id=ref.name,
            created=ref.created,
            root=ref.source,
            parent=ref.parent,
            max_model_len=services.engine.info.max_model_len,
            permission=_permission(ref.name, ref.created),
        )
        for ref in table.all()
        if caller.may_use(ref.name)
    ]
    return base + adapters


def _permission(name: str, created: int) -> list[ModelPermission]:
    number = hashlib.sha256(name.encode()).hexdigest()[:32]
    return [ModelPermission(id=f"modelperm-{number}", created=created)]


def _json(value: ModelList | ModelCard) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
