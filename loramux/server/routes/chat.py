"""`POST /v1/chat/completions`."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.chat_answer import ChatAnswer
from loramux.server.delta_stream import echoing
from loramux.server.message_parser import PROMPT_END
from loramux.server.prompts import Prompt
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.answering import answer_call, in_words_of, plan_call
from loramux.server.routes.body import GenerationRoute
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.chat import ChatRequest
from loramux.server.services import Services, ServicesDep
from loramux.server.structured import requested_grammar
from loramux.server.tool_use import ToolUse

router = APIRouter(route_class=GenerationRoute)


@router.post("/v1/chat/completions")
@needs("inference")
async def create_chat_completion(request: Request, body: ChatRequest, services: ServicesDep) -> Response:
    """Answer a conversation."""
    services.expect_model(body.model, request)
    with in_words_of(names_in(body)):
        prompt, params, use = await prepare_chat(body, services)
        call = await plan_call(request, body, [prompt], params, services)
    server = services.config.server
    answer = ChatAnswer(
        body,
        call,
        use.message,
        model=services.shown_model(body.model),
        answer_id=answer_id("chatcmpl", request, body.request_id),
        tokenizer=services.tokenizer,
        role=server.response_role,
        with_metrics=server.api.request_metrics,
    )
    deltas = services.generator.stream(call)
    if body.echo:
        deltas = echoing(deltas, body.echoed_text(server.response_role))
    return await answer_call(request, body, call, deltas, answer, services)


def names_in(body: ChatRequest) -> dict[str, str]:
    """What this request calls the fields that have one name in all requests."""
    names = {"logprobs": "top_logprobs"}
    return names if body.max_completion_tokens is None else {**names, "max_tokens": "max_completion_tokens"}


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
