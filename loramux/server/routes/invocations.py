"""`POST /invocations`: SageMaker's way to ask for a chat or a completion, told apart by the body."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request, Response

from loramux.engine.errors import InvalidRequest
from loramux.server.access.scopes import needs
from loramux.server.routes.body import GenerationRoute
from loramux.server.routes.chat import create_chat_completion
from loramux.server.routes.completions import create_completion
from loramux.server.schemas.chat import ChatRequest
from loramux.server.schemas.completions import CompletionRequest
from loramux.server.services import ServicesDep

router = APIRouter(route_class=GenerationRoute)

_ADAPTER_HEADER: Final = "x-amzn-sagemaker-adapter-identifier"
_SHAPES: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/ChatRequest"},
                        {"$ref": "#/components/schemas/CompletionRequest"},
                    ]
                }
            }
        },
    }
}


@router.post("/invocations", openapi_extra=_SHAPES)
@needs("inference")
async def invoke(request: Request, services: ServicesDep) -> Response:
    """A chat if there are `messages`, a completion if there is a `prompt`.

    The header `X-Amzn-SageMaker-Adapter-Identifier` names the adapter, and wins over `model`.
    """
    value: dict[str, Any] = await request.json()
    adapter = request.headers.get(_ADAPTER_HEADER)
    if adapter is not None:
        value = {**value, "model": adapter}
    if value.get("messages") is not None:
        return await create_chat_completion(request, ChatRequest.checked(value), services)
    if value.get("prompt") is not None:
        return await create_completion(request, CompletionRequest.checked(value), services)
    raise InvalidRequest("The request body needs 'messages' (a chat) or 'prompt' (a completion).")
