"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from loramux.server.access.caller import caller_of
from loramux.server.access.scopes import needs
from loramux.server.adapters import answer_headers
from loramux.server.completion_answer import CompletionAnswer
from loramux.server.delta_stream import spaced
from loramux.server.disconnect import until_disconnect
from loramux.server.prompts import Prompt
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.body import GenerationRoute
from loramux.server.routes.priority import priority_of
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.completions import CompletionRequest
from loramux.server.services import Services, ServicesDep
from loramux.server.sse import EventStream

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/completions")
@needs("inference")
async def create_completion(request: Request, body: CompletionRequest, services: ServicesDep) -> Response:
    """Continue one or several prompts."""
    adapter = await services.adapter_of(body.model, request)
    prompts, params = await prepare_completion(body, services)
    call = services.generator.plan(
        prompts,
        params,
        adapter,
        scope=request.scope,
        cache_salt=caller_of(request.scope).salted(body.cache_salt),
        priority=priority_of(request, body),
    )
    answer = CompletionAnswer(
        body,
        call,
        model=services.shown_model(body.model),
        answer_id=answer_id("cmpl", request, body.request_id),
        tokenizer=services.tokenizer,
        with_metrics=services.config.server.api.request_metrics,
    )
    headers = answer_headers(adapter)
    if body.stream:
        deltas = services.generator.stream(call)
        if body.stream_interval is not None and body.stream_interval > 1:
            deltas = spaced(deltas, body.stream_interval)
        events = answer.events(deltas)
        return EventStream(events, headers=headers, keep_alive_s=services.config.server.sse_keep_alive_s)
    choices = await until_disconnect(services.generator.collect(call), request.receive)
    text = await asyncio.to_thread(answer.whole, choices) if call.is_large else answer.whole(choices)
    return Response(text, headers=headers, media_type="application/json")


async def prepare_completion(
    body: CompletionRequest, services: Services
) -> tuple[list[Prompt], SamplingParams]:
    """What is to be continued, and how; nothing is queued yet.

    Raises:
        InvalidRequest: a field has a value that cannot be served.
    """
    body.apply(services.config.server.api)
    body.check_supported()
    params = body.to_params(
        dict(services.sampling_defaults),
        max_tokens=1 if body.echo and body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    grammar = await services.grammars.requested(body.response_format, body.structured_outputs)
    params = replace(params, grammar=grammar) if grammar else params
    prompts = await services.prompts.from_completion(
        body.prompt,
        add_special_tokens=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side,
    )
    return prompts, params
