"""`POST /v1/chat/completions`."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapters import answer_headers
from loramux.server.chat_answer import ChatAnswer
from loramux.server.delta_stream import echoing, spaced
from loramux.server.disconnect import until_disconnect
from loramux.server.message_parser import PROMPT_END
from loramux.server.prompts import Prompt
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.body import GenerationRoute
from loramux.server.routes.priority import priority_of
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.chat import ChatRequest
from loramux.server.services import Services, ServicesDep
from loramux.server.sse import EventStream
from loramux.server.structured import requested_grammar
from loramux.server.tool_use import ToolUse

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/chat/completions")
@needs("inference")
async def create_chat_completion(request: Request, body: ChatRequest, services: ServicesDep) -> Response:
    """Answer a conversation."""
    adapter = await services.adapter_of(body.model, request)
    prompt, params, use = await prepare_chat(body, services)
    call = services.generator.plan(
        [prompt],
        params,
        adapter,
        scope=request.scope,
        cache_salt=caller_of(request.scope).salted(body.cache_salt),
        priority=priority_of(request, body),
    )
    answer = ChatAnswer(
        body,
        call,
        use.message,
        model=services.shown_model(body.model),
        answer_id=answer_id("chatcmpl", request, body.request_id),
        tokenizer=services.tokenizer,
        role=services.config.server.response_role,
        with_metrics=services.config.server.api.request_metrics,
    )
    headers = answer_headers(adapter)
    deltas = services.generator.stream(call)
    if body.echo:
        deltas = echoing(deltas, body.echoed_text(services.config.server.response_role))
    if body.stream:
        if body.stream_interval is not None and body.stream_interval > 1:
            deltas = spaced(deltas, body.stream_interval)
        events = answer.events(deltas)
        return EventStream(events, headers=headers, keep_alive_s=services.config.server.sse_keep_alive_s)
    text = await until_disconnect(answer.whole(deltas), request.receive)
    return Response(text, headers=headers, media_type="application/json")


async def prepare_chat(body: ChatRequest, services: Services) -> tuple[Prompt, SamplingParams, ToolUse]:
    """What is to be continued, how, and how the answer is read; nothing is queued yet.

    Raises:
        InvalidRequest: a field has a value that cannot be served.
    """
    api = services.config.server.api
    body.apply(api)
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
    asked = requested_grammar(body.response_format, body.structured_outputs, services.config.server.limits)
    prompt = await services.prompts.from_chat(
        services.tools.history(body.messages),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=use.prompt_tools or (),
        documents=body.documents,
        options=body.template_options(api.allowed_template_kwargs),
        template=body.chat_template,
        add_special_tokens=bool(body.add_special_tokens),
        truncate=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side,
    )
    wanted = services.tools.constrained(use, asked, (prompt.text or "")[-PROMPT_END:])
    grammar = await services.grammars.check(wanted.spec, param=wanted.param) if wanted else None
    params = replace(params, shown_special_token_ids=use.shown_special_token_ids, grammar=grammar)
    return prompt, params, use
