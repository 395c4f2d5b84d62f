"""`POST /v1/responses`: a chat in OpenAI's newer form. Nothing is stored."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapters import answer_headers
from loramux.server.disconnect import until_disconnect
from loramux.server.message_parser import PROMPT_END
from loramux.server.responses_answer import ResponsesAnswer
from loramux.server.responses_input import to_chat
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.body import GenerationRoute
from loramux.server.routes.chat import prepare_chat
from loramux.server.routes.priority import priority_of
from loramux.server.schemas.responses import ResponsesRequest
from loramux.server.services import ServicesDep
from loramux.server.sse import EventStream

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/responses")
@needs("inference")
async def create_response(request: Request, body: ResponsesRequest, services: ServicesDep) -> Response:
    """Answer a conversation."""
    adapter = await services.adapter_of(body.model, request)
    chat = to_chat(body)
    prompt, params, use = await prepare_chat(chat, services)
    call = services.generator.plan(
        [prompt],
        params,
        adapter,
        scope=request.scope,
        cache_salt=caller_of(request.scope).salted(chat.cache_salt),
        priority=priority_of(request, chat),
    )
    answer = ResponsesAnswer(
        body,
        call,
        use.message.parser((prompt.text or "")[-PROMPT_END:]),
        model=services.shown_model(body.model),
        answer_id=answer_id("resp", request, body.request_id).replace("-", "_", 1),
        tokenizer=services.tokenizer,
    )
    headers = answer_headers(adapter)
    deltas = services.generator.stream(call)
    if body.stream:
        events = answer.events(deltas)
        return EventStream(events, headers=headers, keep_alive_s=services.config.server.sse_keep_alive_s)
    text = await until_disconnect(answer.whole(deltas), request.receive)
    return Response(text, headers=headers, media_type="application/json")
