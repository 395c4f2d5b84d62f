"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.errors import RouteDisabled
from loramux.server.routes.body import JsonRoute
from loramux.server.sampling_params import check_token_ids
from loramux.server.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from loramux.server.services import ServicesDep

router = APIRouter(route_class=JsonRoute)

_THREAD_ABOVE_TOKENS: Final = 16384  # about 5 ms of joining; longer lists leave the event loop


@router.post("/tokenize")
@needs("inference")
async def tokenize(request: Request, body: TokenizeRequest, services: ServicesDep) -> Response:
    """Token ids of a prompt or a conversation; adapters use the base model's tokenizer."""
    await services.adapter_of(body.model, request)
    body.check_supported()
    if body.messages is not None:
        if body.tools:
            services.tools.check_tools(body.tools)
        prompt = await services.prompts.from_chat(
            services.tools.history(body.messages),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=[tool.model_dump(exclude_unset=True) for tool in body.tools],
            documents=body.documents,
            options=body.chat_template_kwargs,
            template=body.chat_template,
            add_special_tokens=bool(body.add_special_tokens),
        )
        ids = prompt.token_ids
    else:
        ids = await services.prompts.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False, bounded=False
        )
    answer = Tokenized(
        count=len(ids),
        max_model_len=services.engine.info.max_model_len,
        tokens=ids,
        token_strs=[services.tokenizer.token(id_) for id_ in ids] if body.return_token_strs else None,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.post("/detokenize")
@needs("inference")
async def detokenize(request: Request, body: DetokenizeRequest, services: ServicesDep) -> Response:
    """The text of token ids, control tokens included."""
    await services.adapter_of(body.model, request)
    check_token_ids("tokens", body.tokens, services.engine.info.vocab_size)
    decode = partial(services.tokenizer.decode, body.tokens, skip_special_tokens=False)
    text = await asyncio.to_thread(decode) if len(body.tokens) > _THREAD_ABOVE_TOKENS else decode()
    return Response(msgspec.json.encode(Detokenized(text)), media_type="application/json")


@router.get("/tokenizer_info")
@needs("inference")
async def tokenizer_info(services: ServicesDep) -> Response:
    """What tokenizer_config.json says, and the chat template, for clients that tokenize by themselves."""
    if not services.config.server.api.tokenizer_info:
        message = "This server does not show its tokenizer; start it with --enable-tokenizer-info-endpoint."
        raise RouteDisabled(message)
    tokenizer = services.tokenizer
    shown = {name: value for name, value in tokenizer.config.items() if not _names_a_file(name)}
    shown = {"tokenizer_class": "PreTrainedTokenizerFast", **shown, **tokenizer.special_tokens}
    shown["chat_template"] = services.prompts.template_source
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _names_a_file(name: str) -> bool:
    """Whether an entry is about the disk that the tokenizer was once saved from."""
    return name.endswith(("_file", "_path")) or name in ("_commit_hash", "_from_auto", "auto_map")
