"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from loramux.server.access.scopes import needs
from loramux.server.routes.body import JsonRoute
from loramux.server.sampling_params import check_token_ids
from loramux.server.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from loramux.server.services import ServicesDep

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize")
@needs("inference")
async def tokenize(request: Request, body: TokenizeRequest, services: ServicesDep) -> Response:
    """Token ids of a prompt or a conversation; adapters use the base model's tokenizer."""
    await services.adapter_of(body.model, request)
    if body.messages is not None:
        prompt = await services.prompts.from_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            options=body.chat_template_kwargs,
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
    text = services.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(msgspec.json.encode(Detokenized(text)), media_type="application/json")
