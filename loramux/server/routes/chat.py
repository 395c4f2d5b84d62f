"""`POST /v1/chat/completions`."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapters import answer_headers
from loramux.server.chat_answer import ChatAnswer
from loramux.server.disconnect import until_disconnect
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.body import GenerationRoute
from loramux.server.schemas.chat import ChatRequest
from loramux.server.services import ServicesDep
from loramux.server.sse import EventStream

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/chat/completions")
@needs("inference")
async def create_chat_completion(request: Request, body: ChatRequest, services: ServicesDep) -> Response:
    """Answer a conversation."""
    adapter = await services.adapter_of(body.model, request)
    body.check_supported()
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        max_tokens = services.sampling_defaults.get("max_tokens")
    params = body.to_params(
        dict(services.sampling_defaults),
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    use = services.tools.plan(body)
    grammar = await services.grammars.requested(
        body.response_format, body.structured_outputs, tools=use.grammar
    )
    params = replace(params, shown_special_token_ids=use.shown_special_token_ids, grammar=grammar)
    prompt = await services.prompts.from_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=use.prompt_tools or (),
        options=body.template_options(services.config.server.api.allowed_template_kwargs),
        add_special_tokens=bool(body.add_special_tokens),
        truncate=body.truncate_prompt_tokens,
    )
    call = services.generator.plan(
        [prompt],
        params,
        adapter,
        scope=request.scope,
        cache_salt=caller_of(request.scope).salted(body.cache_salt),
        priority=body.priority,
    )
    answer = ChatAnswer(
        body,
        call,
        use.message,
        model=services.shown_model(body.model),
        answer_id=answer_id("chatcmpl", request, body.request_id),
        tokenizer=services.tokenizer,
        role=services.config.server.response_role,
    )
    headers = answer_headers(adapter)
    if body.stream:
        events = answer.events(services.generator.stream(call))
        return EventStream(events, headers=headers, keep_alive_s=services.config.server.sse_keep_alive_s)
    text = await until_disconnect(answer.whole(services.generator.stream(call)), request.receive)
    return Response(text, headers=headers, media_type="application/json")
