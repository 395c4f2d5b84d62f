"""The adapter routes that clients of other systems know: vLLM's, Dynamo's and SageMaker's."""

from __future__ import annotations

import hashlib

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.engine.errors import AdapterNotFound
from loramux.server.access.access import require_change
from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapter_names import AdapterNameRefused
from loramux.server.adapter_orders import IfLoaded, LoadOrder, Outcome
from loramux.server.routes.adapter_route import AdapterRoute
from loramux.server.routes.answering import in_words_of
from loramux.server.schemas.adapters import (
    DynamoList,
    DynamoLoad,
    DynamoResult,
    LoadLoraAdapter,
    SageMakerLoad,
    UnloadLoraAdapter,
)
from loramux.server.services import ServicesDep

router = APIRouter(route_class=AdapterRoute)


@router.post("/v1/load_lora_adapter")
@needs("adapters:write")
async def load_lora_adapter(body: LoadLoraAdapter, request: Request, services: ServicesDep) -> Response:
    """vLLM's load; 200 once requests may use the adapter."""
    if not body.lora_name or not body.lora_path:
        raise AdapterNameRefused("Both 'lora_name' and 'lora_path' must be provided.")
    order = LoadOrder(
        name=body.lora_name,
        source=body.lora_path,
        if_loaded=IfLoaded.REPLACE if body.load_inplace else IfLoaded.REFUSE,
        pinned=body.pinned,
        base_model_name=body.base_model_name,
    )
    require_change(caller_of(request.scope), order.name, source=order.source)
    await services.manager.load(order)
    return _text(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
@needs("adapters:write")
async def unload_lora_adapter(body: UnloadLoraAdapter, request: Request, services: ServicesDep) -> Response:
    """vLLM's unload; requests that run on the adapter end as they would."""
    if not body.lora_name:
        raise AdapterNameRefused("'lora_name' needs to be provided to unload a LoRA adapter.")
    require_change(caller_of(request.scope), body.lora_name)
    await services.manager.unload(body.lora_name)
    return _text(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/loras")
@needs("adapters:read")
async def dynamo_list(request: Request, services: ServicesDep) -> Response:
    """Dynamo's list of names and numbers."""
    caller = caller_of(request.scope)
    loras = {ref.name: _number(ref.name) for ref in services.adapters.all() if caller.may_use(ref.name)}
    return _json(DynamoList(loras=loras, count=len(loras)))


@router.post("/v1/loras")
@needs("adapters:write")
async def dynamo_load(body: DynamoLoad, request: Request, services: ServicesDep) -> Response:
    """Dynamo's load: what it wants is the desired state, so it replaces what is there."""
    order = LoadOrder(name=body.lora_name, source=body.source.uri, if_loaded=IfLoaded.REPLACE)
    with in_words_of({"lora_path": "source.uri"}):
        require_change(caller_of(request.scope), order.name, source=order.source)
        loaded = await services.manager.load(order)
    is_swap = loaded.outcome is Outcome.REPLACED
    done = {Outcome.ADDED: "loaded", Outcome.REPLACED: "replaced", Outcome.UNCHANGED: "already loaded"}
    return _json(
        DynamoResult(
            status="success",
            message=f"LoRA adapter '{body.lora_name}' {done[loaded.outcome]} successfully",
            lora_name=body.lora_name,
            lora_id=_number(body.lora_name),
            hot_swap=is_swap,
        )
    )


@router.delete("/v1/loras/{name:path}")
@needs("adapters:write")
async def dynamo_unload(name: str, request: Request, services: ServicesDep) -> Response:
    """Dynamo's unload; one that is not there is as it should be, so that a controller can finish."""
    require_change(caller_of(request.scope), name)
    message = f"LoRA adapter '{name}' unloaded successfully"
    try:
        await services.manager.unload(name)
    except AdapterNotFound:
        message = f"LoRA adapter '{name}' was not loaded"
    return _json(DynamoResult(status="success", message=message, lora_name=name, lora_id=_number(name)))


@router.post("/adapters")
@needs("adapters:write")
async def sagemaker_load(body: SageMakerLoad, request: Request, services: ServicesDep) -> Response:
    """SageMaker's load."""
    if not body.name or not body.src:
        raise AdapterNameRefused("Both 'name' and 'src' must be provided.")
    order = LoadOrder(
        name=body.name,
        source=body.src,
        if_loaded=IfLoaded.REPLACE if body.load_inplace else IfLoaded.REFUSE,
        pinned=body.pin,
    )
    with in_words_of({"lora_path": "src", "lora_name": "name"}):
        require_change(caller_of(request.scope), order.name, source=order.source)
        await services.manager.load(order)
    return _text(f"Adapter {body.name} registered")


@router.delete("/adapters/{name:path}")
@needs("adapters:write")
async def sagemaker_unload(name: str, request: Request, services: ServicesDep) -> Response:
    """SageMaker's unload."""
    with in_words_of({"lora_name": "name"}):
        require_change(caller_of(request.scope), name)
        await services.manager.unload(name)
    return _text(f"Adapter {name} unregistered")


def _number(name: str) -> int:
    """A number for those who want one: the same on every server."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:13], 16)  # 52 bits: exact in any JSON


def _text(text: str) -> Response:
    return Response(text, media_type="text/plain; charset=utf-8")


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
