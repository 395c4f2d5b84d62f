"""What the generating routes do alike: plan a call, and answer it whole or as events."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Protocol

from fastapi import Request, Response

from loramux.engine.errors import LoramuxError
from loramux.server.access.caller import caller_of
from loramux.server.adapters import answer_headers
from loramux.server.choice import Delta
from loramux.server.delta_stream import spaced
from loramux.server.disconnect import until_disconnect
from loramux.server.generation import Call
from loramux.server.load_report import REQUEST_HEADER, load_report
from loramux.server.prompts import Prompt
from loramux.server.routes.priority import priority_of
from loramux.server.sampling_params import SamplingParams
from loramux.server.schemas.common import GenerationRequest
from loramux.server.services import Services
from loramux.server.sse import EventStream


class Answer(Protocol):
    """Formats one call, all of it or event by event."""

    def add(self, delta: Delta) -> None:
        """Take in one more delta of an answer that is sent whole."""
        ...

    def whole(self) -> bytes:
        """The JSON text, once every choice has ended."""
        ...

    def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The event stream; closes `deltas`."""
        ...


async def plan_call(
    request: Request,
    body: GenerationRequest,
    prompts: list[Prompt],
    params: SamplingParams,
    services: Services,
) -> Call:
    """The call that a request asks for, with a place in the queue.

    Waits for the adapter, but not for one whose call would be refused anyway.

    Raises:
        InvalidRequest, RateLimited, Overloaded: as `Generator.plan`.
        ModelNotFound, AdapterError, ClientGone: as `Services.adapter_of`.
    """
    services.generator.check(prompts, params)
    adapter = await services.adapter_of(body.model, request)
    return services.generator.plan(
        prompts,
        params,
        adapter,
        scope=request.scope,
        cache_salt=caller_of(request.scope).salted(body.cache_salt),
        priority=priority_of(request, body),
    )


async def answer_call(
    request: Request,
    body: GenerationRequest,
    call: Call,
    deltas: AsyncGenerator[Delta, None],
    answer: Answer,
    services: Services,
) -> Response:
    """Run a call and send what `answer` makes of its deltas."""
    headers = answer_headers(call.adapter)
    if body.stream:
        if body.stream_interval is not None and body.stream_interval > 1:
            deltas = spaced(deltas, body.stream_interval)
        keep_alive_s = services.config.server.sse_keep_alive_s
        return EventStream(answer.events(deltas), headers=headers, keep_alive_s=keep_alive_s)
    await until_disconnect(_take_in(answer, deltas), request.receive)
    text = await asyncio.to_thread(answer.whole) if call.is_large else answer.whole()
    if (form := request.headers.get(REQUEST_HEADER)) is not None:
        headers |= load_report(form, await services.engine.stats())
    return Response(text, headers=headers, media_type="application/json")


async def _take_in(answer: Answer, deltas: AsyncGenerator[Delta, None]) -> None:
    async with aclosing(deltas) as source:
        async for delta in source:
            answer.add(delta)


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field that the client calls by another name get that name.

    Args:
        names: our name of a field, or part of one -> the client's.
    """
    try:
        yield
    except LoramuxError as error:
        for ours, theirs in names.items():
            name = re.compile(rf"(?<![-\w]){re.escape(ours)}(?!\w)")  # not inside `--max-logprobs`
            if error.param is not None and name.search(error.param):
                error.param = name.sub(theirs, error.param)
                error.message = name.sub(theirs, error.message)
        raise
