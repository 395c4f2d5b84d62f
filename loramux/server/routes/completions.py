"""`POST /v1/completions`."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.completion_answer import CompletionAnswer
from loramux.server.prompts import Prompt
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.answering import answer_call, plan_call
from loramux.server.routes.body import GenerationRoute
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.completions import CompletionRequest
from loramux.server.services import Services, ServicesDep

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/completions")
@needs("inference")
async def create_completion(request: Request, body: CompletionRequest, services: ServicesDep) -> Response:
    """Continue one or several prompts."""
    services.expect_model(body.model, request)
    prompts, params = await prepare_completion(body, services)
    call = await plan_call(request, body, prompts, params, services)
    answer = CompletionAnswer(
        body,
        call,
        model=services.shown_model(body.model),
        answer_id=answer_id("cmpl", request, body.request_id),
        tokenizer=services.tokenizer,
        with_metrics=services.config.server.api.request_metrics,
    )
    deltas = services.generator.stream(call)
    return await answer_call(request, body, call, deltas, answer, services)


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
