"""`POST /v1/completions/render` and `/v1/chat/completions/render`: what a call would send to the engine.

Nothing is generated and nothing queued. Routers take the token ids to find the replica that has their
prefix; people look at what the chat template makes of a conversation.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.prompts import Prompt
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.answering import in_words_of
from loramux.server.routes.body import JsonRoute
from loramux.server.routes.chat import names_in, prepare_chat
from loramux.server.routes.completions import prepare_completion
from loramux.server.routes.priority import priority_of
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.chat import ChatRequest
from loramux.server.schemas.common import GenerationRequest
from loramux.server.schemas.completions import CompletionRequest
from loramux.server.schemas.render import RenderedRequest
from loramux.server.services import Services, ServicesDep

router = APIRouter(route_class=JsonRoute)

_SHOWN: Final = (  # of the sampling parameters, under the names of the request
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "logprobs", "prompt_logprobs"),
    *("logprob_token_ids", "allowed_token_ids"),
)


@router.post("/v1/completions/render")
@needs("inference")
async def render_completion(request: Request, body: CompletionRequest, services: ServicesDep) -> Response:
    """One entry for each prompt of a completion."""
    services.expect_model(body.model, request)
    prompts, params = await prepare_completion(body, services)
    rendered = [
        _rendered("cmpl", request, body, prompt, params, services, number)
        for number, prompt in enumerate(prompts)
    ]
    await services.adapter_of(body.model, request)
    return Response(msgspec.json.encode(rendered), media_type="application/json")


@router.post("/v1/chat/completions/render")
@needs("inference")
async def render_chat(request: Request, body: ChatRequest, services: ServicesDep) -> Response:
    """The prompt of a conversation."""
    services.expect_model(body.model, request)
    with in_words_of(names_in(body)):
        prompt, params, _ = await prepare_chat(body, services)
        rendered = _rendered("chatcmpl", request, body, prompt, params, services)
    await services.adapter_of(body.model, request)
    return Response(msgspec.json.encode(rendered), media_type="application/json")


def _rendered(
    prefix: str,
    request: Request,
    body: GenerationRequest,
    prompt: Prompt,
    params: SamplingParams,
    services: Services,
    number: int | None = None,
) -> RenderedRequest:
    suffix = "" if number is None else f"-{number}"
    options = body.stream_options
    sampling = services.generator.sampling_of(prompt, params)
    shown: dict[str, Any] = {name: getattr(params, name) for name in _SHOWN}
    return RenderedRequest(
        request_id=answer_id(prefix, request, body.request_id) + suffix,
        model=services.shown_model(body.model),
        token_ids=prompt.token_ids,
        sampling_params={
            **shown,
            "max_tokens": sampling.max_tokens,
            "stop": params.stop_strings,
            "logit_bias": {str(token_id): bias for token_id, bias in params.logit_bias.items()},
        },
        stream=body.stream,
        stream_options=options.model_dump() if options is not None else None,
        cache_salt=body.cache_salt or None,
        priority=priority_of(request, body),
    )
