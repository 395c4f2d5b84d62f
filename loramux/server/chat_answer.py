"""The answer of `/v1/chat/completions`: deltas in, JSON out, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from loramux.server import sse
from loramux.server.adapters import fingerprint
from loramux.server.choice import Delta
from loramux.server.generation import Call
from loramux.server.logprobs import chat_logprobs, prompt_logprobs
from loramux.server.message_parser import (
    PROMPT_END,
    ArgumentsPart,
    CallPart,
    Message,
    MessagePart,
    MessagePlan,
    ReasoningPart,
    TextPart,
    join_parts,
)
from loramux.server.observe.call_record import current_call
from loramux.server.request_metrics import request_metrics
from loramux.server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from loramux.server.schemas.common import UNSET, RequestMetrics, UnsetType, Usage
from loramux.server.tokenizer import Tokenizer
from loramux.server.usage import UsageCounter


class ChatAnswer:
    """Formats one call.

    Args:
        body: what the client sent.
        call: what was planned for it.
        plan: how the model's text is read.
        model: the name to show.
        answer_id: "chatcmpl-...".
        tokenizer: for log-probabilities.
        role: of the answer, "assistant" unless the operator says otherwise.
        with_metrics: show the times of the request.
    """

    def __init__(
        self,
        body: ChatRequest,
        call: Call,
        plan: MessagePlan,
        *,
        model: str,
        answer_id: str,
        tokenizer: Tokenizer,
        role: str,
        with_metrics: bool = False,
    ) -> None:
        self._body = body
        self._call = call
        self._tokenizer = tokenizer
        self._role = role
        self._with_metrics = with_metrics
        self._usage = UsageCounter(call)
        self._reasons = plan.reasoning is not None
        self._parsers = [
            plan.parser((call.prompt_of(index).text or "")[-PROMPT_END:])
            for index in range(len(call.requests))
        ]
        self._joined = [Delta(index) for index in range(len(self._parsers))]  # of a whole answer
        self._parts: list[list[MessagePart]] = [[] for _ in self._parsers]
        self._introduced: set[int] = set()  # choices whose role was sent
        self._id = answer_id
        self._model = model
        self._created = int(time.time())
        self._frame = ChatChunk(
            id=answer_id,
            created=self._created,
            model=model,
            choices=[],
            system_fingerprint=fingerprint(call.adapter),
        )

    def add(self, delta: Delta) -> None:
        """Take in one more delta of an answer that is sent whole."""
        self._usage.add(delta)
        self._parts[delta.index] += self._parsers[delta.index].add(delta)
        self._joined[delta.index].join(delta)

    def whole(self) -> bytes:
        """The JSON text of all choices, once they have ended."""
        prompt_positions = self._joined[0].prompt_logprobs
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                self._choice(delta, join_parts(parts))
                for delta, parts in zip(self._joined, self._parts, strict=True)
            ],
            usage=self._total(),
            system_fingerprint=fingerprint(self._call.adapter),
            prompt_logprobs=(
                prompt_logprobs(prompt_positions, self._tokenizer) if prompt_positions is not None else UNSET
            ),
            prompt_token_ids=self._prompt_token_ids(),
            prompt_text=self._prompt_text(),
            metrics=self._metrics(),
        )
        return msgspec.json.encode(answer)

    def _choice(self, delta: Delta, message: Message) -> ChatChoice:
        finish_reason = self._parsers[delta.index].finish_reason(delta.finish_reason)
        assert finish_reason is not None
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in message.calls
        ]
        reasoning = message.reasoning if self._body.include_reasoning else ""
        return ChatChoice(
            index=delta.index,
            message=AssistantMessage(
                role=self._role,
                content=message.text or (None if message.calls or message.reasoning else ""),
                reasoning=reasoning or UNSET,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._logprobs(delta),
            finish_reason=finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    async def events(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The event stream; closes `deltas`."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        async with aclosing(deltas) as source:
            async for delta in source:
                self._usage.add(delta)
                messages = self._messages(self._parsers[delta.index].add(delta))
                if not messages and self._is_silent(delta):
                    continue
                usage = self._total() if continuous else (None if with_usage else UNSET)
                for chunk in self._chunks(delta, messages or [ChatDelta()], usage):
                    yield chunk
        if with_usage:
            yield self._event([], self._total(), metrics=self._metrics())
        yield sse.DONE

    def _metrics(self) -> RequestMetrics | UnsetType | None:
        return request_metrics(current_call()) if self._with_metrics else UNSET

    def _messages(self, parts: list[MessagePart]) -> list[ChatDelta]:
        """What parts are on the wire, one a chunk."""
        found: list[ChatDelta] = []
        for part in parts:
            match part:
                case TextPart(text):
                    found.append(ChatDelta(content=text))
                case ReasoningPart(text):
                    found += [ChatDelta(reasoning=text)] if self._body.include_reasoning else []
                case CallPart() | ArgumentsPart():
                    found.append(ChatDelta(tool_calls=[_call_delta(part)]))
        return found

    def _is_silent(self, delta: Delta) -> bool:
        """Whether a delta without text shows nothing: it does not end and nobody asked for its tokens."""
        return not (delta.finish_reason or self._body.logprobs or self._body.return_token_ids)

    def _chunks(
        self, delta: Delta, messages: list[ChatDelta], usage: Usage | UnsetType | None
    ) -> list[bytes]:
        """The chunks of one delta: its tokens come with the first, its end with the last."""
        is_first = delta.index not in self._introduced
        self._introduced.add(delta.index)
        if is_first:
            messages[0] = self._introduction(messages[0])
        chunks: list[bytes] = []
        for number, message in enumerate(messages):
            finish_reason = delta.finish_reason if number == len(messages) - 1 else None
            choice = ChunkChoice(
                index=delta.index,
                delta=message,
                logprobs=self._logprobs(delta) if number == 0 else None,
                finish_reason=self._parsers[delta.index].finish_reason(finish_reason),
                stop_reason=delta.stop_reason if finish_reason else UNSET,
                token_ids=(delta.token_ids if number == 0 else []) if self._body.return_token_ids else UNSET,
            )
            chunks.append(self._event([choice], usage, with_prompt=is_first and number == 0))
        return chunks

    def _introduction(self, message: ChatDelta) -> ChatDelta:
        """The first delta of a choice: it has the role, and a content even if there is none."""
        content = message.content
        if content is UNSET:
            is_text = message.reasoning is UNSET and message.tool_calls is UNSET
            content = "" if is_text else None
        return msgspec.structs.replace(message, role=self._role, content=content)

    def _event(
        self,
        choices: list[ChunkChoice],
        usage: Usage | UnsetType | None,
        *,
        with_prompt: bool = False,
        metrics: RequestMetrics | UnsetType | None = UNSET,
    ) -> bytes:
        frame = msgspec.structs.replace(
            self._frame,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._prompt_token_ids() if with_prompt else UNSET,
            prompt_text=self._prompt_text() if with_prompt else UNSET,
            metrics=metrics,
        )
        return sse.event(msgspec.json.encode(frame))

    def _total(self) -> Usage:
        if not self._reasons:
            return self._usage.total()
        return self._usage.total(sum(parser.num_reasoning_tokens for parser in self._parsers))

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(delta.logprobs, self._tokenizer, tokens_as_ids=as_ids)

    def _prompt_token_ids(self) -> list[int] | UnsetType:
        return self._call.prompts[0].token_ids if self._body.return_token_ids else UNSET

    def _prompt_text(self) -> str | UnsetType:
        return (self._call.prompts[0].text or "") if self._body.return_prompt_text else UNSET


def _call_delta(part: CallPart | ArgumentsPart) -> ToolCallDelta:
    match part:
        case CallPart(number, id_, name):
            function = FunctionCallDelta(name=name, arguments="")
            return ToolCallDelta(index=number, id=id_, type="function", function=function)
        case ArgumentsPart(number, text):
            return ToolCallDelta(index=number, function=FunctionCallDelta(arguments=text))
