"""The answer of `/v1/responses`: deltas in, a response object or its events out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from loramux.server import sse
from loramux.server.adapters import fingerprint
from loramux.server.choice import Delta
from loramux.server.errors import describe
from loramux.server.generation import Call
from loramux.server.logprobs import chat_logprobs
from loramux.server.message_parser import MessageParser, TextPart
from loramux.server.response_items import Event, ResponseItems
from loramux.server.responses_input import wants_logprobs
from loramux.server.schemas.chat import TokenLogprob
from loramux.server.schemas.responses import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from loramux.server.tokenizer import Tokenizer
from loramux.server.usage import UsageCounter


class ResponsesAnswer:
    """Formats one call.

    Args:
        body: what the client sent.
        call: what was planned for it.
        parser: reads the model's text.
        model: the name to show.
        answer_id: "resp_...".
        tokenizer: for log-probabilities.
        tokens_as_ids: these name tokens as `token_id:N`.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        call: Call,
        parser: MessageParser,
        *,
        model: str,
        answer_id: str,
        tokenizer: Tokenizer,
        tokens_as_ids: bool = False,
    ) -> None:
        self._wants_logprobs = wants_logprobs(body)
        self._parser = parser
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids
        self._usage = UsageCounter(call)
        self._items = ResponseItems()
        self._unsaid: list[TokenLogprob] = []  # of tokens whose text is still held back
        self._sent = 0  # events
        self._response = ResponseObject(
            id=answer_id,
            created_at=int(time.time()),
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            model=model,
            output=[],
            parallel_tool_calls=body.parallel_tool_calls,
            reasoning=_reasoning(body),
            temperature=call.params.temperature,
            text={"format": body.text.format, "verbosity": body.text.verbosity or "medium"},
            tool_choice=body.tool_choice if body.tool_choice is not None else "auto",
            tools=body.tools,
            top_logprobs=body.top_logprobs or 0,
            top_p=call.params.top_p,
            truncation=body.truncation,
            user=body.user,
            metadata=body.metadata,
            system_fingerprint=fingerprint(call.adapter),
        )

    def add(self, delta: Delta) -> None:
        """Take in one more delta of a response that is sent whole."""
        self._events_of(delta)
        if delta.finish_reason is not None:
            self._response = self._ended(delta)

    def whole(self) -> bytes:
        """The JSON text of the response, once it has ended."""
        return msgspec.json.encode(self._response)

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The response as it is written, ended by `response.completed` or `response.incomplete`.

        Nothing is sent before the first delta, so that an early error has its own HTTP status.
        """
        async with aclosing(deltas) as source:
            try:
                async for delta in source:
                    opening = b"" if self._sent else self._open()
                    written = [self._encode(event) for event in self._events_of(delta)]
                    if delta.finish_reason is not None:
                        final = self._ended(delta)
                        written.append(self._encode({"type": f"response.{final.status}", "response": final}))
                    if opening or written:
                        yield b"".join((opening, *written))
            except Exception as error:
                if self._sent:
                    yield self._failed(error)
                raise

    def _events_of(self, delta: Delta) -> list[Event]:
        self._usage.add(delta)
        if self._wants_logprobs:
            self._unsaid += chat_logprobs(
                delta.logprobs, self._tokenizer, tokens_as_ids=self._tokens_as_ids
            ).content
        events: list[Event] = []
        for part in self._parser.add(delta):
            logprobs, self._unsaid = self._unsaid, []
            events += self._items.add(part, logprobs if isinstance(part, TextPart) else [])
        if delta.finish_reason is not None:
            events += self._items.close("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def _ended(self, last: Delta) -> ResponseObject:
        is_cut = last.finish_reason == "length"
        used = self._usage.total()
        return msgspec.structs.replace(
            self._response,
            status="incomplete" if is_cut else "completed",
            completed_at=None if is_cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=self._items.finished,
            usage=ResponseUsage(
                input_tokens=used.prompt_tokens,
                input_tokens_details=InputTokensDetails(
                    cached_tokens=used.prompt_tokens_details.cached_tokens
                ),
                output_tokens=used.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=self._parser.num_reasoning_tokens),
                total_tokens=used.total_tokens,
            ),
        )

    def _open(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._encode({"type": kind, "response": self._response}) for kind in kinds)

    def _failed(self, error: Exception) -> bytes:
        described = msgspec.json.decode(describe(error)[1])["error"]
        described = {"code": described["code"], "message": described["message"]}
        failed = msgspec.structs.replace(self._response, status="failed", error=described)
        return self._encode({"type": "response.failed", "response": failed})

    def _encode(self, event: Event) -> bytes:
        numbered = {"type": event["type"], "sequence_number": self._sent, **event}
        self._sent += 1
        return sse.named_event(event["type"], msgspec.json.encode(numbered))


def _reasoning(body: ResponsesRequest) -> dict[str, Any]:
    given = body.reasoning
    return {"effort": given.effort if given else None, "summary": given.summary if given else None}
