"""`POST /v1/responses`: a chat in OpenAI's newer form. Nothing is stored."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.message_parser import PROMPT_END
from loramux.server.responses_answer import ResponsesAnswer
from loramux.server.responses_input import to_chat
from loramux.server.routes.answer_id import answer_id
from loramux.server.routes.answering import answer_call, in_words_of, plan_call
from loramux.server.routes.body import GenerationRoute
from loramux.server.routes.chat import prepare_chat
from loramux.server.schemas.responses import ResponsesRequest
from loramux.server.services import ServicesDep

router = APIRouter(route_class=GenerationRoute)

_NAMES: Final = {  # of a chat's fields here
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    ".function": "",  # of tools
}


@router.post("/v1/responses")
@needs("inference")
async def create_response(request: Request, body: ResponsesRequest, services: ServicesDep) -> Response:
    """Answer a conversation."""
    services.expect_model(body.model, request)
    with in_words_of(_NAMES):
        chat = to_chat(body)
        prompt, params, use = await prepare_chat(chat, services)
        call = await plan_call(request, chat, [prompt], params, services)
    answer = ResponsesAnswer(
        body,
        call,
        use.message.parser((prompt.text or "")[-PROMPT_END:]),
        model=services.shown_model(body.model),
        answer_id=answer_id("resp", request, body.request_id).replace("-", "_", 1),
        tokenizer=services.tokenizer,
        tokens_as_ids=bool(chat.return_tokens_as_token_ids),
    )
    deltas = services.generator.stream(call)
    return await answer_call(request, chat, call, deltas, answer, services)
